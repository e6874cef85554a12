# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""A Segmentation that is made of parts, to spare memory, is the one that is made at once."""

from __future__ import annotations

import numpy as np
import pytest
from pydicom.dataset import Dataset

from custom.data import write_dicom_series
from custom.reporting import dicom_objects
from custom.reporting.dicom_source import read_source

pytest.importorskip("highdicom")
UIDS = ("SOPInstanceUID", "SeriesInstanceUID", "TrackingUID", "DimensionOrganizationUID")
TIMES = ("ContentTime", "ContentDate", "InstanceCreationTime", "SeriesTime", "ContributionDateTime")
MODEL = {"bundle": "b", "software_version": "0", "weights_sha256": "0" * 64}


def differences(one: Dataset, other: Dataset, path: str = "") -> list[str]:
    names = {element.keyword for element in one}
    found = [f"{path}: {names ^ {e.keyword for e in other}}"] if names != {e.keyword for e in other} else []
    for element in one:
        key, same = element.keyword, other.get(element.tag)
        if key in (*UIDS, *TIMES, "PixelData") or same is None:
            continue
        if element.VR != "SQ":
            found += [] if element.value == same.value else [f"{path}/{key}: {element.value} {same.value}"]
        elif len(element.value) != len(same.value):
            found.append(f"{path}/{key}: {len(element.value)} and {len(same.value)} items")
        else:
            for number, pair in enumerate(zip(element.value, same.value, strict=True)):
                found += differences(*pair, f"{path}/{key}[{number}]")
    return found


@pytest.mark.parametrize(
    ("columns", "rows", "up"), [(8, 6, 1), (7, 5, 1), (7, 5, -1)], ids=["bytes", "bits", "the other way"]
)
def test_parts_make_the_same_segmentation(tmp_path, monkeypatch, columns, rows, up):
    affine = np.diag([-2.0, -2, 3 * up, 1])
    files = write_dicom_series(
        tmp_path / "scan", np.full((columns, rows, 13), -800, np.int16), affine, shuffle=True
    )
    source = read_source([str(file) for file in files])
    rng = np.random.default_rng(0)
    masks = {name: rng.random(source.shape) < 0.3 for name in dicom_objects.SEGMENTS}
    for number, mask in enumerate(masks.values()):
        mask[..., 4:9] = False  # a part with nothing at all
        mask[..., number + 6] = False
    segments = {name: dicom_objects.Segment(mask, (1,)) for name, mask in masks.items()}
    made = []
    for step in (13, 4):
        monkeypatch.setattr(dicom_objects, "_STEP", step)
        with dicom_objects._silence():
            made.append(dicom_objects.make_segmentation(source, segments, source.affine, MODEL))
    at_once, of_parts = made
    assert differences(at_once, of_parts) == []
    frames = [
        np.unpackbits(
            np.frombuffer(one.PixelData, np.uint8),
            count=int(one.NumberOfFrames) * columns * rows,
            bitorder="little",
        )
        for one in made
    ]
    assert np.array_equal(*frames)
    assert frames[0].sum() == sum(int(mask.sum()) for mask in masks.values())
    assert len(of_parts.PixelData) % 2 == 0
