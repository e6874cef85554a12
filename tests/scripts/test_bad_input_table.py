# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Every way an input can be wrong, through the scripts; for the bundles see tests/bundles/test_bad_inputs.py.

They run in this process, as their ``main``; that it becomes the exit code of a process is tested once.
"""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from lidc_phantom import write_case
from PIL import Image

from tests import dicom_faults
from tests.bad_scans import ODD, REFUSED, make_table, nifti, scan_of, table_phantom

ROOT = Path(__file__).resolve().parent.parent.parent
NAMES = [row.name for row in REFUSED]
# Those that are no volume of numbers: a mask can be wrong in the same ways. Then those that show no chest.
BAD_FILES = REFUSED[: NAMES.index("eight_bit")]
BAD_VOLUMES = [*BAD_FILES, *(row for row in REFUSED if row.name in ("constant", "all_air"))]


def main(name: str, *words: object) -> int:
    return runpy.run_path(str(ROOT / "scripts" / f"{name}.py"))["main"]([str(word) for word in words])


def error_of(capsys: pytest.CaptureFixture) -> str:
    """The one line on standard error, bars left aside."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    (line,) = [line for line in re.split(r"[\r\n]+", text) if line.startswith("error: ")]
    return line.removeprefix("error: ")


@pytest.fixture(scope="module")
def phantom():
    return table_phantom()


@pytest.fixture(scope="module")
def table(tmp_path_factory, phantom) -> Path:
    return make_table(tmp_path_factory.mktemp("table"), phantom)


def copy(file: Path, target: Path) -> None:
    """The same file or link under another name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if file.is_symlink():
        target.symlink_to(target.name)
    else:
        target.write_bytes(file.read_bytes())


@pytest.mark.parametrize("side", ["p", "t"])
def test_score(table, phantom, tmp_path, capsys, side):
    """Bad predictions with good truths, and the other way round."""
    mask = (phantom.label > 0).astype(np.uint8)
    other = "t" if side == "p" else "p"
    for folder in (tmp_path / side, tmp_path / other):
        folder.mkdir()
        nifti(folder / "good ü.nii.gz", mask, phantom.affine)
    for row in BAD_FILES:
        copy(scan_of(table / row.name), tmp_path / side / f"{row.name}.nii.gz")
        nifti(tmp_path / other / f"{row.name}.nii.gz", mask, phantom.affine)
    words = ["--predictions", tmp_path / "p", "--truths", tmp_path / "t", "--output", tmp_path / "out" / "s"]
    assert main("score", *words) == 1
    line = error_of(capsys)
    assert line.startswith(f"{len(BAD_FILES)} of {len(BAD_FILES) + 1} cases failed: ")
    content = json.loads((tmp_path / "out" / "s.json").read_text())
    assert [case["name"] for case in content["cases"]] == ["good ü"]
    reasons = {failed["name"]: failed["reason"] for failed in content["failures"]}
    for row in BAD_FILES:
        assert re.search(row.message, reasons[row.name], re.IGNORECASE) and reasons[row.name] in line, row
    for folder in (tmp_path / side, tmp_path / other):
        (folder / "good ü.nii.gz").unlink()
    words[-1] = tmp_path / "none" / "s"
    assert main("score", *words) == 2 and not (tmp_path / "none").exists()


@pytest.mark.parametrize("row", REFUSED + ODD, ids=str)
def test_make_report(row, table, phantom, tmp_path, capsys):
    scan = scan_of(table / row.name)
    grid = phantom.lungs.shape, phantom.affine
    if row.name in ("one_slice", "thousand_slices"):
        grid = nib.load(scan).shape, nib.load(scan).affine
    nifti(tmp_path / "mask ü.nii.gz", np.zeros(grid[0], np.uint8), grid[1])
    words = [
        "--scan",
        scan,
        "--mask",
        tmp_path / "mask ü.nii.gz",
        "--output-dir",
        tmp_path / "out",
        "--no-dicom",
    ]
    code = main("make_report", *words)
    found = list((tmp_path / "out").rglob("*_report.json"))
    if row in ODD:
        assert code == 0 and json.loads(found[0].read_text())["opacity_volume_ml"]["total"] == 0
        return
    message = "scan not found" if row.name == "unreadable" else row.message  # a link to itself
    assert code == 2 and re.search(message, error_of(capsys))
    for file in found:  # none where there is no scan at all
        assert json.loads(file.read_text())["opacity_volume_ml"]["total"] is None
    assert not list((tmp_path / "out").rglob("*.nii.gz")) and not list((tmp_path / "out").rglob("*.png"))


def test_score_of_folders_that_cannot_be(phantom, tmp_path, capsys):
    for kind in "pt":
        (tmp_path / kind).mkdir()
    words = ["--predictions", tmp_path / "p", "--truths", tmp_path / "t", "--output"]
    assert main("score", *words, tmp_path / "s") == 2 and "no prediction in" in error_of(capsys)
    for kind in "pt":
        nifti(tmp_path / kind / "a.nii.gz", (phantom.label > 0).astype(np.uint8), phantom.affine)
    (tmp_path / "file").touch()
    assert main("score", *words, tmp_path / "file" / "s") == 2 and "Not a directory" in error_of(capsys)


@pytest.mark.parametrize("where", ["studies", "masks"])
def test_prepare_covid_volumes(table, phantom, tmp_path, capsys, where):
    rows = BAD_VOLUMES if where == "studies" else BAD_FILES
    mask = (phantom.label > 0).astype(np.uint8)
    source = tmp_path / "in ä"
    for number, row in enumerate([None, None, *rows]):
        files = {"studies": f"study_{number:04d}.nii.gz", "masks": f"study_{number:04d}_mask.nii.gz"}
        for folder, name in files.items():
            (source / folder).mkdir(parents=True, exist_ok=True)
            if row is not None and folder == where:
                copy(scan_of(table / row.name), source / folder / name)
            else:
                voxels = mask if folder == "masks" else phantom.image
                nifti(source / folder / name, voxels, phantom.affine)
    words = ["mosmed", "--source", source, "--output-dir", tmp_path / "out", "--testing", "0", "--folds", "2"]
    assert main("prepare_covid", *words) == 1
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    skipped = {one["what"]: one for one in json.loads((tmp_path / "out" / "skipped.json").read_text())}
    for number, row in enumerate(rows, start=2):
        found = skipped[f"study_{number:04d}"]
        assert found["failed"] and found["reason"] in out
        pattern = f"{row.message}|the mask .* has values -1024"  # a scan of HU is no mask in the first place
        assert re.search(pattern, found["reason"], re.IGNORECASE), f"{row.name}: {found['reason']}"
    assert len(json.loads((tmp_path / "out" / "datalist.json").read_text())["training"]) == 2
    for kind in ("studies", "masks"):
        for number in (0, 1):
            next((source / kind).glob(f"study_{number:04d}*")).unlink()
    assert main("prepare_covid", *words) == 2
    assert f"can be used, {len(rows)} left out; the first is study_0002: " in error_of(capsys)


def test_prepare_covid_slices(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for number in range(9):
        for kind in ("images", "masks"):
            (tmp_path / kind).mkdir(exist_ok=True)
            pixels = rng.integers(0, 255, (30, 20), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / kind / f"{number} ü.png")
    bad = {
        2: b"",
        3: b"this is a report, not a picture",
        4: (tmp_path / "images" / "4 ü.png").read_bytes()[:300],
    }
    for number, content in bad.items():
        (tmp_path / "images" / f"{number} ü.png").write_bytes(content)
    Image.fromarray(np.zeros((30, 20), np.uint16)).save(tmp_path / "images" / "5 ü.png")
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(tmp_path / "masks" / "6 ü.png")
    (tmp_path / "masks" / "7 ü.png").unlink()
    (tmp_path / "masks" / "7 ü.png").symlink_to("7 ü.png")
    words = ["slices", "--images", tmp_path / "images", "--masks", tmp_path / "masks", "--folds", "2"]
    assert main("prepare_covid", *words, "--output-dir", tmp_path / "out") == 1
    line = error_of(capsys)
    assert line.startswith("6 of 9 slices failed: 2 ü: ")
    for number, reason in {2: "cannot be read", 3: "cannot be read", 4: "cannot be read"}.items():
        assert re.search(rf"\b{number} ü: \S.*{reason}", line)
    assert "of mode I;16" in line and "they must agree" in line and "symbolic links" in line
    listed = json.loads((tmp_path / "out" / "datalist.json").read_text())["training"]
    assert [entry["image"] for entry in listed] == [f"images/{n} ü.png" for n in (0, 1, 8)]
    (tmp_path / "file").touch()
    assert main("prepare_covid", *words, "--output-dir", tmp_path / "file" / "out") == 2
    assert "Not a directory" in error_of(capsys)


DICOM_FAULTS = {
    "missing": (lambda files: files[5].unlink(), "slices are missing"),
    "duplicate": (lambda files: dicom_faults.copy_slice(files[5], files[5].with_name("x.dcm")), "position"),
    "spacing": (lambda files: dicom_faults.set_tags(files[5], PixelSpacing=[9, 9]), "pixel spacings"),
    "tilt": (lambda files: dicom_faults.tilt_gantry(files, 12), "tilt"),
    "rescale": (lambda files: dicom_faults.set_tags(files, RescaleSlope=None), "Rescale"),
    "torn": (lambda files: dicom_faults.truncate(files[5], 0.6), "cannot be decoded|do not fill"),
    "empty": (lambda files: dicom_faults.truncate(files[5], 0), "broken or empty"),
}


def test_prepare_lidc(tmp_path, capsys):
    source = tmp_path / "in ä with spaces"
    good = write_case(source, 1)
    cases = {name: write_case(source, 10 + n) for n, name in enumerate(DICOM_FAULTS)}
    for name, case in cases.items():
        DICOM_FAULTS[name][0](sorted(case.dicom.glob("*.dcm")))
    texts = {"torn.xml": b"<LidcReadMessage>", "empty.xml": b"", "binary.xml": bytes(range(256))}
    for name, content in texts.items():
        (source / name).write_bytes(content)
    assert main("prepare_lidc", "--source", source, "--output-dir", tmp_path / "out") == 1
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    skipped = {one["what"]: one for one in json.loads((tmp_path / "out" / "skipped.json").read_text())}
    for name, case in cases.items():
        found = skipped[case.series_uid]
        assert found["failed"] and re.search(DICOM_FAULTS[name][1], found["reason"]), f"{name}: {found}"
        assert found["reason"] in out
    assert all("valid XML" in skipped[name]["reason"] for name in texts)
    (image,) = (tmp_path / "out" / "images").iterdir()
    assert np.array_equal(np.asarray(nib.load(image).dataobj), good.image)


STUDY = {"title": "t", "reference": "a", "systems": {"a": {"bundle": "covid_ct_scoatnet_segmentation"}}}


@pytest.mark.parametrize(
    ("study", "data", "message"),
    [
        ("no JSON at all", None, "is not valid JSON"),
        ([], None, "must be an object"),
        ({}, None, "'title' is missing"),
        ({**STUDY, "colour": "red"}, None, "unknown key 'colour'"),
        ({**STUDY, "systems": {"a": {"bundle": "none"}}}, None, "bundle 'none' not found"),
        ({**STUDY, "overlays": ["none"]}, None, "overlay 'none' not found"),
        ({**STUDY, "overrides": {"epoch": 3}}, None, "did you mean --epochs"),
        ({**STUDY, "reference": "b"}, None, "is none of its systems"),
        (STUDY, None, "datalist.json not found"),
        (STUDY, "no JSON", "is not valid JSON"),
        (STUDY, {"training": []}, "has 0 folds"),
        (STUDY, {"training": "all"}, "none of the sections"),
    ],
)
def test_cross_validate(tmp_path, capsys, study, data, message):
    for name, content in (("study ü.json", study), ("datalist.json", data)):
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / name).write_text(text, encoding="utf-8")
    words = [tmp_path / "study ü.json", "--dataset-dir", tmp_path, "--output-dir", tmp_path / "out"]
    assert main("cross_validate", *words) == 2
    assert re.search(message, error_of(capsys)) and not (tmp_path / "out").exists()


def test_make_phantoms_and_demo(tmp_path, capsys):
    (tmp_path / "file").touch()
    for words, message in (
        (["--cases", "0"], "n_cases"),
        (["--shape", "0", "5", "5"], "shape"),
        (["--spacing", "-1", "1", "1"], "spacing"),
        (["--output-dir", tmp_path / "file" / "out"], "Not a directory"),
    ):
        assert main("make_phantoms", "--output-dir", tmp_path / "out", *words) == 2
        assert re.search(message, error_of(capsys))
    assert main("demo", "--output-dir", tmp_path / "file" / "demo") == 2
    assert "Not a directory" in error_of(capsys)


def test_format_json(tmp_path, capsys):
    for content, message in (
        (b"{", "is not valid JSON"),
        (b"\xff\xfe{}", "is not valid JSON"),
        (None, "No such"),
    ):
        file = tmp_path / "a ü.json"
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)
        assert main("format_json", file) == 2
        line = error_of(capsys)
        assert message in line and str(file) in line


def test_what_main_returns_is_the_exit_code_of_the_process(tmp_path):
    """Of the scripts whose processes no other test starts; all at once, since starting is what takes time."""
    none = str(tmp_path / "none")
    calls = {
        "score": ["--predictions", none, "--truths", none, "--output", none],
        "prepare_lidc": ["--source", none, "--output-dir", none],
        "make_phantoms": ["--output-dir", none, "--cases", "0"],
    }
    running = {
        name: subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, words in calls.items()
    }
    for name, process in running.items():
        out, err = process.communicate()
        assert process.returncode == 2 and len(err.splitlines()) == 1 and err.startswith("error: "), name
        assert out == ""
