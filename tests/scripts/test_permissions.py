# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Files that may not be read, folders that may not be written to, through every script: one line, code 2."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from lidc_phantom import write_case
from PIL import Image

from custom.data import make_phantom, write_datalist
from tests.permissions import read_only, unreadable

ROOT = Path(__file__).resolve().parent.parent.parent
BUNDLE = ROOT / "bundles" / "covid_ct_scoatnet_segmentation"
# A network that is trained in no time; what it finds is of no interest.
NETWORK = {"_target_": "torch.nn.Conv2d", "in_channels": 1, "out_channels": 1, "kernel_size": 1}


def volume(folder: Path) -> tuple[Path, Path]:
    """A scan and a mask."""
    chest = make_phantom((64, 64, 16), (5.4, 5.4, 17.0), seed=2)
    paths = folder / "scan.nii.gz", folder / "mask.nii.gz"
    for path, array in zip(paths, (chest.image, (chest.label > 0).astype(np.uint8)), strict=True):
        nib.save(nib.Nifti1Image(array, chest.affine), path)
    return paths


def pictures(folder: Path, count: int, name: str = "v") -> list[Path]:
    """Slices of the grey values of a chest, dark above and bright below."""
    rng = np.random.default_rng(ord(name))
    files = [folder / f"{name}_{number}.png" for number in range(1, count + 1)]
    folder.mkdir(parents=True)
    for file in files:
        hu = np.concatenate([rng.normal(-870, 40, (60, 60)), rng.normal(40, 30, (40, 60))])
        grey = np.clip((hu + 1024) * 255 / 3024, 0, 255).astype(np.uint8)
        Image.fromarray(grey).save(file)
    return files


def slices(folder: Path, name: str = "v", folds: bool = True) -> Path:
    """Slices with masks on a list."""
    images, masks = pictures(folder / "images", 3, name), pictures(folder / "masks", 3, name)
    entries = [
        {"image": f"images/{i.name}", "label": f"masks/{m.name}", "patient_id": i.stem}
        | ({"fold": n} if folds else {})
        for n, (i, m) in enumerate(zip(images, masks, strict=True))
    ]
    write_datalist(folder / "datalist.json", "slices", "for a test", training=entries)
    return folder / "datalist.json"


def weights(folder: Path) -> Path:
    torch.save({"weight": torch.ones((1, 1, 1, 1)), "bias": torch.zeros(1)}, folder / "weights.pt")
    return folder / "weights.pt"


def reports(folder: Path) -> list[Path]:
    """Two of one patient."""
    scan, mask = volume(folder)
    for date in ("20200301", "20200310"):
        again = scan.rename(folder / f"scan_{date}.nii.gz") if scan.exists() else scan
        words = ["--scan", again, "--mask", mask, "--output-dir", folder / date, "--study-date", date]
        assert main("make_report", *words, "--no-dicom") == 0
        scan = again.rename(scan)
    return sorted(folder.rglob("*_report.json"))


# Each makes its input in a folder and returns the script, its words for an output, and files without any of
# which it can do nothing.
Made = tuple[str, list[object], list[Path]]


def score(source: Path, out: Path) -> Made:
    _, mask = volume(source)
    for side in "pt":
        (source / side).mkdir()
        shutil.copy(mask, source / side / "a.nii.gz")
    words = ["--predictions", source / "p", "--truths", source / "t", "--output", out / "scores"]
    return "score", words, [source / "p" / "a.nii.gz"]


def make_report(source: Path, out: Path) -> Made:
    scan, mask = volume(source)
    return "make_report", ["--scan", scan, "--mask", mask, "--output-dir", out, "--no-dicom"], [scan]


def follow_up(source: Path, out: Path) -> Made:
    found = reports(source)
    return "follow_up", [*found, "--one-patient", "--output-dir", out], found[:1]


def prepare_covid_mosmed(source: Path, out: Path) -> Made:
    scan, mask = volume(source)
    for kind, file, end in (("studies", scan, ""), ("masks", mask, "_mask")):
        (source / kind).mkdir()
        for number in (1, 2):
            shutil.copy(file, source / kind / f"study_000{number}{end}.nii.gz")
    words = ["mosmed", "--source", source, "--output-dir", out, "--testing", 0, "--folds", 2]
    return "prepare_covid", words, sorted((source / "studies").iterdir())


def prepare_covid_slices(source: Path, out: Path) -> Made:
    for kind in ("images", "masks"):
        pictures(source / kind, 2)
    words = ["slices", "--images", source / "images", "--masks", source / "masks", "--folds", 2]
    return "prepare_covid", [*words, "--output-dir", out], sorted((source / "images").iterdir())


def prepare_covid_unlabelled(source: Path, out: Path) -> Made:
    return "prepare_covid", ["unlabelled", source / "images", out], pictures(source / "images", 3)


def prepare_covid_negatives(source: Path, out: Path) -> Made:
    files = sorted(write_case(source, 1).dicom.glob("*.dcm"))
    return "prepare_covid", ["lidc-negatives", source, out], files


def prepare_covid_join(source: Path, out: Path) -> Made:
    labelled, other = slices(source / "labelled"), slices(source / "other", "w", folds=False)
    words = ["join", "--labelled", labelled, "--add", other, "--held-out-fold", "any", "--output-dir", out]
    return "prepare_covid", words, [labelled]


def prepare_lidc(source: Path, out: Path) -> Made:
    files = sorted(write_case(source, 1).dicom.glob("*.dcm"))
    return "prepare_lidc", ["--source", source, "--output-dir", out], files


def pseudo_label(source: Path, out: Path) -> Made:
    pictures(source / "in", 3)
    assert main("prepare_covid", "unlabelled", source / "in", source / "ready") == 0
    words = [source / "ready", "--bundle", BUNDLE, "--weights", weights(source), "--unseen-fold", 0]
    words += ["--set", f"network_def={json.dumps(NETWORK)}", "--set", "image_size=[32,32]"]
    return "pseudo_label", [*words, "--output-dir", out], [source / "weights.pt"]


def export_weights(source: Path, out: Path) -> Made:
    return "export_weights", [weights(source), "--output", out / "half.pt"], [source / "weights.pt"]


def pack_bundle(source: Path, out: Path) -> Made:
    bundle = source / BUNDLE.name
    shutil.copytree(BUNDLE, bundle, ignore=shutil.ignore_patterns("models", "eval", "cache", "output"))
    return "pack_bundle", [bundle, "--output", out / "bundle.zip"], [bundle / "configs" / "train.json"]


def cross_validate(source: Path, out: Path) -> Made:
    content = {"title": "t", "reference": "a", "systems": {"a": {"bundle": BUNDLE.name}}}
    (source / "study.json").write_text(json.dumps(content), encoding="utf-8")
    slices(source / "data")
    words = [source / "study.json", "--dataset-dir", source / "data", "--output-dir", out]
    return "cross_validate", words, [source / "data" / "datalist.json"]


READ_AND_WRITE = [
    score,
    make_report,
    follow_up,
    prepare_covid_mosmed,
    prepare_covid_slices,
    prepare_covid_unlabelled,
    prepare_covid_negatives,
    prepare_covid_join,
    prepare_lidc,
    pseudo_label,
    export_weights,
    pack_bundle,
    cross_validate,
]


def main(name: str, *words: object) -> int:
    return runpy.run_path(str(ROOT / "scripts" / f"{name}.py"))["main"]([str(word) for word in words])


def error_of(capsys: pytest.CaptureFixture) -> str:
    """The one line on standard error, bars left aside."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    (line,) = [line for line in re.split(r"[\r\n]+", text) if line.startswith("error: ")]
    return line


@pytest.fixture
def place(tmp_path: Path) -> tuple[Path, Path]:
    """Folders for what is read and what is written, with spaces and letters that are not ASCII."""
    folders = tmp_path / "in ä 肺", tmp_path / "out of ß"
    for folder in folders:
        folder.mkdir()
    return folders


@pytest.mark.parametrize("make", READ_AND_WRITE)
def test_a_folder_that_cannot_be_written_to(make: Callable[[Path, Path], Made], place, capsys):
    source, out = place
    name, words, _ = make(source, out / "results")
    capsys.readouterr()
    with read_only(out):
        assert main(name, *words) == 2
    line = error_of(capsys)
    assert "Permission denied" in line and str(out) in line and ".partial-" not in line
    assert not list(out.iterdir())


@pytest.mark.parametrize("make", READ_AND_WRITE)
def test_files_that_cannot_be_read(make: Callable[[Path, Path], Made], place, capsys):
    source, out = place
    name, words, files = make(source, out)
    capsys.readouterr()
    with unreadable(*files):
        assert main(name, *words) == 2
    line = error_of(capsys)
    assert re.search("ermission denied", line), line
    assert not list(out.rglob("datalist.json"))


def test_scripts_that_only_write(place, capsys):
    source, out = place
    (out / "a.json").write_text('{"a":1}')
    calls = (
        ("make_phantoms", "--output-dir", out / "results", "--cases", 1, "--shape", 24, 24, 8, "--folds", 1),
        ("demo", "--output-dir", out / "results"),
        ("format_json", out / "a.json"),
    )
    with read_only(out):
        for name, *words in calls:
            assert main(name, *words) == 2, name
            line = error_of(capsys)
            assert "Permission denied" in line and str(out) in line, line
    assert [path.name for path in out.iterdir()] == ["a.json"]
    assert (out / "a.json").read_text() == '{"a":1}'
