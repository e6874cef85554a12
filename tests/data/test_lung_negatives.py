# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from lidc_phantom import SPACING, write_case, write_readings
from PIL import Image
from pydicom import dcmread

from custom.data.datalist import load_cases, read_datalist
from custom.data.lung_negatives import prepare_negatives

SCRIPT = Path(__file__).resolve().parent.parent.parent / "scripts" / "prepare_covid.py"


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return write_case(tmp_path_factory.mktemp("lidc") / "in", 1)


@pytest.fixture(scope="module")
def prepared(case, tmp_path_factory):
    folder = tmp_path_factory.mktemp("negatives")
    return folder, prepare_negatives(case.dicom, folder, per_series=50)


def picture(path):
    return np.asarray(Image.open(path))


def numbers(summary):
    return [int(stem[-4:]) for one in summary.cases for stem in one["slices"]]


def test_only_slices_away_from_every_outline_are_taken(case, prepared):
    _, summary = prepared
    # One reader outlined a pixel more than the others: the union of all readers is what counts.
    outlined = set(np.flatnonzero((case.half | case.two_of_four).any(axis=(0, 1))).tolist())
    assert outlined and SPACING[2] > 5  # neighbours of outlined slices are far enough
    assert not outlined & set(numbers(summary))
    assert len(numbers(summary)) >= 3
    assert summary.cases[0]["slices_that_fit"] == len(numbers(summary))


def test_slices_are_windowed_upright_and_cropped_to_the_lungs(case, prepared):
    folder, summary = prepared
    sizes = {picture(folder / "images" / f"{stem}.png").shape for stem in summary.cases[0]["slices"]}
    assert len(sizes) == 1, "one box for the scan, as in inference"
    for stem, k in zip(summary.cases[0]["slices"], numbers(summary), strict=True):
        pixels, mask = picture(folder / "images" / f"{stem}.png"), picture(folder / "masks" / f"{stem}.png")
        assert pixels.shape == mask.shape and not mask.any()
        grey = np.clip(np.rint((case.image[:, :, k] + 1100.0) * 255 / 1400), 0, 255)
        # The phantom's axes as nibabel sees them: rows are to grow to posterior, columns to the left.
        signs = np.sign(np.diag(case.affine)[:2])
        upright = grey[:: -int(signs[0]), :: -int(signs[1])].T
        rows, columns = pixels.shape
        assert rows < upright.shape[0] and columns < upright.shape[1]
        places = [
            (r, c)
            for r in range(upright.shape[0] - rows + 1)
            for c in range(upright.shape[1] - columns + 1)
            if np.array_equal(upright[r : r + rows, c : c + columns], pixels)
        ]
        assert len(places) == 1, k
        assert (pixels < 90).mean() > 0.3  # mostly lung


def test_the_list_is_for_training_in_no_fold(prepared):
    folder, summary = prepared
    content = read_datalist(summary.datalist)
    assert "may have other lung disease" in content["description"]
    assert all("fold" not in entry for entry in content["training"])
    cases = load_cases(summary.datalist, folder)
    assert {one["patient_id"] for one in cases} == {"LIDC-IDRI-0001"}


def test_fewer_slices_are_evenly_spaced_and_nothing_is_done_twice(case, prepared, tmp_path):
    everything = numbers(prepared[1])
    first = prepare_negatives(case.dicom, tmp_path, per_series=1)
    assert numbers(first) == [everything[len(everything) // 2]] and first.reused == 0
    listed = first.datalist.read_bytes()
    again = prepare_negatives(case.dicom, tmp_path, per_series=1)
    assert again.reused == 1 and again.datalist.read_bytes() == listed
    (tmp_path / "masks" / f"{first.cases[0]['slices'][0]}.png").unlink()
    assert prepare_negatives(case.dicom, tmp_path, per_series=1).reused == 0


def test_nodules_everywhere_and_wrong_options(case, tmp_path):
    for options, message in (
        ({"per_series": 0}, "at least 1 slice per series"),
        ({"window": (300.0, -1100.0)}, "the window must grow"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare_negatives(case.dicom, tmp_path / "out", **options)
    other = write_case(tmp_path / "in", 2)
    headers = [dcmread(file, stop_before_pixels=True) for file in other.dicom.glob("*.dcm")]
    slices = sorted((float(h.ImagePositionPatient[2]), str(h.SOPInstanceUID)) for h in headers)
    from lidc_phantom import Outlined

    mask = np.zeros((100, 100, len(slices)), bool)
    mask[40:44, 40:44] = True
    write_readings(other.xml, other.series_uid, slices, [[Outlined("all the way", mask)]])
    with pytest.raises(ValueError, match="5 mm away from every nodule"):
        prepare_negatives(tmp_path / "in", tmp_path / "out")
    skipped = json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert [(one["kind"], one["failed"]) for one in skipped] == [("CT with nodules everywhere", False)]


def test_command_line_names_what_failed(case, tmp_path, capsys):
    main = runpy.run_path(str(SCRIPT))["main"]
    words = ["lidc-negatives", str(case.dicom), str(tmp_path / "out"), "--per-series", "1"]
    assert main(words) == 0
    assert "1 slices of 1 series, 1 patients" in capsys.readouterr().out
    broken = write_case(tmp_path / "in", 3)
    next(iter(sorted(broken.dicom.glob("*.dcm")))).write_bytes(b"")
    words[1] = str(tmp_path / "in")
    assert main(words) == 2
    assert "broken or empty" in capsys.readouterr().err
