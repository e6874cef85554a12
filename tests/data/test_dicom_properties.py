# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Slices of any orientation, spacing and order are sorted by where they lie, or the series is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from custom.data.dicom_header import Instance
from custom.data.dicom_stack import stack_slices
from tests.fuzzing import fuzzed

LPS = np.diag([-1.0, -1.0, 1.0])
spacings = st.tuples(*[st.floats(0.3, 5.0)] * 2, st.floats(0.4, 12.0))


@st.composite
def stacks(draw: st.DrawFn, minimum: int = 2) -> tuple[list[Instance], np.ndarray, np.random.Generator]:
    """Slices in their order, the affine of the stack, and what shuffles them."""
    generator = np.random.default_rng(draw(st.integers(0, 2**31)))
    rotation = Rotation.from_quat(generator.normal(size=4)).as_matrix()
    between_columns, between_rows, distance = draw(spacings)
    origin = generator.uniform(-500, 500, 3)
    row, column = rotation[:, 0], rotation[:, 1]
    normal = np.cross(row, column)
    instances = []
    for k in range(draw(st.integers(minimum, 12))):
        instances.append(
            Instance(
                file=f"{generator.integers(10**9)}.dcm",
                uid=f"1.2.{k}",
                number=None if draw(st.booleans()) else int(generator.integers(100)),
                image_type=(),
                frame_of_reference_uid="",
                shape=(4, 4),
                frames=1,
                samples=1,
                # As in a header: decimal numbers of at most 16 letters.
                position=tuple(float(f"{v:.6f}") for v in origin + k * distance * normal),
                orientation=tuple(float(f"{v:.8f}") for v in (*row, *column)),
                pixel_spacing=(between_rows, between_columns),
                thickness=distance,
                slope=1.0,
                intercept=0.0,
                rescale_type="HU",
            )
        )
    affine = np.eye(4)
    affine[:3, :3] = LPS @ np.column_stack([row * between_columns, column * between_rows, distance * normal])
    affine[:3, 3] = LPS @ origin
    return instances, affine, generator


@given(stacks(minimum=1))
@fuzzed()
def test_the_order_of_the_files_does_not_matter(stack):
    instances, affine, generator = stack
    shuffled = [instances[i] for i in generator.permutation(len(instances))]
    found, measured = stack_slices(shuffled)
    assert [instance.uid for instance in found] == [instance.uid for instance in instances]
    assert np.allclose(measured, affine, atol=1e-4) and np.linalg.det(measured[:3, :3]) > 0


@given(stacks(minimum=4), st.data())
@fuzzed()
def test_a_lost_slice_or_one_too_many_is_never_overlooked(stack, data):
    instances, _, generator = stack
    lost = data.draw(st.integers(1, len(instances) - 2))  # of those at the ends nobody could know
    with pytest.raises(ValueError, match="slices are missing|uneven"):
        stack_slices([i for k, i in enumerate(instances) if k != lost])
    twice = [*instances, data.draw(st.sampled_from(instances))]
    with pytest.raises(ValueError, match="share their position"):
        stack_slices([twice[i] for i in generator.permutation(len(twice))])


@given(stacks(minimum=3), st.data())
@fuzzed()
def test_a_slice_out_of_line_is_never_overlooked(stack, data):
    instances, affine, _ = stack
    k = data.draw(st.integers(0, len(instances) - 1))
    normal = LPS @ affine[:3, 2] / np.linalg.norm(affine[:3, 2])
    aside = LPS @ affine[:3, 0] / np.linalg.norm(affine[:3, 0])
    distance = float(np.linalg.norm(affine[:3, 2]))
    along, across = data.draw(st.sampled_from([(0.35 * distance + 0.2, 0.0), (0.0, 6.0)]))
    moved = list(instances)
    position = np.array(instances[k].position) + along * normal + across * aside
    moved[k] = Instance(**{**vars(instances[k]), "position": tuple(position.tolist())})
    with pytest.raises(ValueError, match=r"missing|uneven|sideways|tilt|share"):
        stack_slices(moved)
