# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import custom
from custom.data.files import file_sha256
from custom.handlers.shares import SharedStudies, gather_on_first


@pytest.fixture
def cohort(tmp_path) -> tuple[list[dict], Path, Path]:
    """Three scans, all of which an earlier run has done."""
    (tmp_path / "model.pt").write_bytes(b"weights")
    model = {
        "bundle": "b",
        "software_version": custom.__version__,
        "weights_sha256": file_sha256(tmp_path / "model.pt"),
    }
    items = []
    for name in "xyz":
        scan, folder = tmp_path / f"{name}.nii.gz", tmp_path / "out" / name
        scan.touch()
        os.utime(scan, ns=(0, 0))
        folder.mkdir(parents=True)
        (folder / f"{name}_opacity.nii.gz").touch()
        files = {"opacity": f"{name}_opacity.nii.gz", "lungs": None}
        report = {"study": name, "status": "segmented", "model": model, "files": files}
        (folder / f"{name}_report.json").write_text(json.dumps(report))
        items.append({"name": name, "image": str(scan) if name != "z" else [str(scan)]})
    return items, tmp_path / "out", tmp_path / "model.pt"


def left(cohort: tuple[list[dict], Path, Path], **options: object) -> list[int]:
    items, folder, weights = cohort
    return list(SharedStudies(items, folder, "b", weights, **options))


def change_report(folder: Path, name: str, **changes: object) -> None:
    file = folder / name / f"{name}_report.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_what_is_done_is_left_out_unless_asked_for(cohort, caplog):
    caplog.set_level("INFO")
    share = SharedStudies(*cohort[:2], "b", cohort[2])
    assert len(share) == 0 and [report["study"] for report in share.done.values()] == ["x", "y", "z"]
    assert "3 of 3 studies are done already; 0 to do by 1 processes" in caplog.text
    assert left(cohort, skip_done="false") == [0, 1, 2]
    with pytest.raises(ValueError, match="skip_done must be true or false"):
        left(cohort, skip_done="perhaps")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "y" / "y_report.json").unlink(),
        lambda folder: (folder / "y" / "y_report.json").write_text('{"study": "y"'),
        lambda folder: (folder / "y" / "y_report.json").write_text("[]"),
        lambda folder: (folder / "y" / "y_opacity.nii.gz").unlink(),
        lambda folder: change_report(folder, "y", status="failed"),
        lambda folder: change_report(folder, "y", model={"bundle": "b", "weights_sha256": "0"}),
        lambda folder: os.utime(folder.parent / "y.nii.gz", ns=(2**62, 2**62)),
    ],
    ids=["none", "torn", "no report", "a file is missing", "failed", "other weights", "newer scan"],
)
def test_what_is_not_whole_or_not_of_this_run_is_done_again(cohort, spoil):
    spoil(cohort[1])
    assert left(cohort) == [1]


def test_other_weights_leave_all_to_do(cohort):
    cohort[2].write_bytes(b"others")
    assert left(cohort) == [0, 1, 2]


def test_one_process_gathers_from_itself():
    assert gather_on_first(7) == [7]
