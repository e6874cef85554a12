# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""The shipped weights give the same files for every batch size and number of workers."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import pytest
from bundle_tester import Bundle

from custom.data import make_phantom

BUNDLE = Bundle("covid_ct_scoatnet_segmentation")


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scans")
    for number in range(2):
        phantom = make_phantom((64, 64, 12), (5.4, 5.4, 22.0), seed=number, burden=0.6)
        nib.save(nib.Nifti1Image(phantom.image, phantom.affine), folder / f"{number}.nii.gz")
    return folder


def results(scans: Path, work: Path, batch_size: int, num_workers: int) -> dict[str, bytes]:
    """Everything that an inference writes."""
    overrides = {
        "bundle_root": str(BUNDLE.folder),
        "dataset_dir": str(scans),
        "output_dir": str(work),
        "image_size": [64, 64],
        "batch_size": batch_size,
        "dataloader#num_workers": num_workers,
    }
    workflow = BUNDLE.workflow("infer", ("inference",), overrides)
    assert workflow.parser.get_parsed_content("inferer").batch_size == batch_size
    assert workflow.parser.get_parsed_content("dataloader").num_workers == num_workers
    workflow.run()
    workflow.finalize()
    return {str(file.relative_to(work)): file.read_bytes() for file in work.rglob("*") if file.is_file()}


def test_batch_size_and_workers_change_no_byte(scans, tmp_path):
    first = results(scans, tmp_path / "first", 1, 0)
    voxels = sum(nib.load(file).get_fdata().sum() for file in (tmp_path / "first").rglob("*_opacity.nii.gz"))
    assert voxels > 0 and "cohort.csv" in first
    for batch_size, num_workers in ((3, 0), (64, 0), (5, 2)):
        other = results(scans, tmp_path / f"{batch_size}_{num_workers}", batch_size, num_workers)
        assert other.keys() == first.keys()
        different = [name for name in first if other[name] != first[name]]
        assert not different, f"batches of {batch_size}, {num_workers} workers: {different}"
