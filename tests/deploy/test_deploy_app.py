# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""A packed bundle as a MONAI Deploy application, in an environment of its own: DICOM in, DICOM SEG out."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from label_tester import ROOT, SCOATNET, TALKED_TO, pack_and_unpack, settings_of
from pydicom import dcmread
from report_checks import check_dicom, read_segment

from custom.data import write_dicom_series
from custom.data.phantom import make_phantom
from custom.deployment.label_environment import default_folder

SCRIPT = ROOT / "scripts" / "deploy_app.py"
REQUIREMENTS = Path(__file__).with_name("deploy_requirements.txt")
NAMED = ("monai-deploy-app-sdk", "holoscan-cu13", "holoscan-cli", "monai", "torch", "pydicom", "highdicom")
REAL = "ct_lung_dicom"
SECRETS = ("Mustermann", "Erika", "ID-4711")
CT = "1.2.840.10008.5.1.4.1.1.2"


@pytest.fixture(scope="module")
def bundle(models, tmp_path_factory) -> Path:
    """An unpacked bundle, and weights in it."""
    folder = pack_and_unpack(SCOATNET, tmp_path_factory.mktemp("bundle"))
    (folder / "models").mkdir()
    shutil.copy(models[SCOATNET], folder / "models" / "model.pt")
    return folder


@pytest.fixture(scope="module")
def python(bundle) -> Path:
    """The environment that docs/deploy_with_monai_deploy.md makes, built once and kept."""
    folder = default_folder().with_name("monai-deploy-4.0.0")
    files = [bundle / "requirements.txt", REQUIREMENTS, ROOT / "constraints.txt"]
    content = [platform.python_version(), *(file.read_text(encoding="utf-8") for file in files)]
    wanted = hashlib.sha256("\n".join(content).encode()).hexdigest()
    stamp, python = folder / "stamp.txt", folder / "bin" / "python"
    seconds = 0.0
    if not stamp.is_file() or stamp.read_text() != wanted:
        begun = time.monotonic()
        shutil.rmtree(folder, ignore_errors=True)
        words = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(files[2])]
        for command in (
            [sys.executable, "-m", "venv", str(folder)],
            [str(python), *words, "-r", str(files[0]), "-r", str(files[1])],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-3000:]
        stamp.write_text(wanted)
        seconds = time.monotonic() - begun
    code = f"import importlib.metadata as m; print(*(n + ' ' + m.version(n) for n in {NAMED!r}), sep=', ')"
    answer = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout
    built = f"built in {seconds:.0f} s" if seconds else "built before"
    TALKED_TO.append(f"MONAI Deploy: python {platform.python_version()}, {answer.strip()}; {built}")
    return python


@pytest.fixture(scope="module")
def scans(tmp_path_factory) -> Path:
    """A phantom in a folder with a patient's name, a real CT where there is one, and a series with a gap."""
    folder = tmp_path_factory.mktemp("scans")
    phantom = make_phantom(shape=(64, 64, 16), spacing=(5.4, 5.4, 17.0), seed=7)
    place = folder / "Mustermann_Erika"
    named = {"patient_id": "ID-4711", "patient_name": "Mustermann^Erika", "shuffle": True}
    write_dicom_series(place, phantom.image, phantom.affine, **named)
    gap = write_dicom_series(folder / "gap", phantom.image, phantom.affine, patient_id="ID-2", seed=2)
    gap[7].unlink()
    data = os.environ.get("CT_DATA")
    if data:
        shutil.copytree(Path(data) / REAL, folder / REAL)
    return folder


@pytest.fixture(scope="module")
def app(python, tmp_path_factory) -> Callable[..., subprocess.CompletedProcess]:
    """Runs the application as a user does, in a folder where nothing else of the repository is."""
    folder = tmp_path_factory.mktemp("elsewhere")
    script = shutil.copy(SCRIPT, folder)

    def run(*words: str, settings: dict | None = None, **variables: str) -> subprocess.CompletedProcess:
        command = [str(python), str(script), *words]
        if settings:
            command += ["--set", *(f"{key}={json.dumps(value)}" for key, value in settings.items())]
        environment = {**os.environ, **variables}
        environment.pop("PYTHONPATH", None)
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, env=environment
        )

    return run


@pytest.fixture(scope="module")
def done(app, bundle, scans, tmp_path_factory):
    """What the application says of all scans at once, and its folder of results."""
    output = tmp_path_factory.mktemp("app")
    folders = ("--bundle", str(bundle), "--input", str(scans), "--output", str(output))
    return app(*folders, settings=settings_of(SCOATNET)), output


@pytest.fixture(scope="module")
def expected(bundle, scans, tmp_path_factory) -> Path:
    """What ``python -m monai.bundle run`` writes for the same scans, in the project's own environment."""
    output = tmp_path_factory.mktemp("expected")
    command = [sys.executable, "-m", "monai.bundle", "run"]
    command += ["--config_file", str(bundle / "configs" / "inference.json"), "--bundle_root", str(bundle)]
    command += ["--dataset_dir", str(scans), "--output_dir", str(output)]
    for key, value in settings_of(SCOATNET).items():
        command += [f"--{key}", repr(value)]
    environment = {**os.environ, "PYTHONPATH": str(bundle)}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ended.returncode == 1 and "slices are missing" in ended.stderr, ended.stderr[-2000:]
    return output


def study_of(scans: Path, output: Path, name: str) -> tuple[str, list]:
    """The study that was made of a folder, and the headers of its images."""
    headers = [dcmread(file, stop_before_pixels=True) for file in sorted((scans / name).glob("*.dcm"))]
    uid = headers[0].StudyInstanceUID
    reports = [json.loads(file.read_text(encoding="utf-8")) for file in output.rglob("*_report.json")]
    (study,) = (r["study"] for r in reports if r.get("source") and r["source"].get("study_uid") == uid)
    return study, headers


@pytest.mark.parametrize("name", ["Mustermann_Erika", REAL])
def test_the_seg_is_the_mask_that_monai_bundle_run_writes(done, expected, scans, name):
    if not (scans / name).is_dir():
        pytest.skip("CT_DATA is not set: it names the folder of real CT data")
    said, output = done
    study, headers = study_of(scans, output, name)
    made = output / study / f"{study}_seg.dcm"
    assert f"written: {made}" in said.stdout and f"written: {output / study / study}_sr.dcm" in said.stdout

    truth = nib.load(expected / study / f"{study}_opacity.nii.gz")
    mask = np.asarray(truth.dataobj) > 0
    assert 0 < mask.sum() < 0.5 * mask.size
    saved = nib.load(output / study / f"{study}_opacity.nii.gz")
    assert np.array_equal(np.asarray(saved.dataobj) > 0, mask) and np.array_equal(saved.affine, truth.affine)

    # Voxel for voxel by their place in the patient, whatever the order of axes in the SEG is.
    segment, affine = read_segment(made, "Opacity")
    places = nib.affines.apply_affine(affine, np.argwhere(segment))
    found = nib.affines.apply_affine(np.linalg.inv(truth.affine), places)
    assert np.abs(found - found.round()).max() < 1e-2
    assert {tuple(voxel) for voxel in found.round().astype(int)} == {tuple(v) for v in np.argwhere(mask)}

    seg = dcmread(made)
    (item,) = (item for item in seg.SegmentSequence if item.SegmentLabel == "Opacity")

    def code(sequence):
        return sequence[0].CodeValue, sequence[0].CodingSchemeDesignator

    assert code(item.SegmentedPropertyTypeCodeSequence) == ("112001", "DCM")
    assert code(item.SegmentedPropertyCategoryCodeSequence) == ("49755003", "SCT")
    assert code(item.AnatomicRegionSequence) == ("39607008", "SCT")
    assert (seg.PatientID, seg.StudyInstanceUID) == (headers[0].PatientID, headers[0].StudyInstanceUID)
    assert seg.FrameOfReferenceUID == headers[0].FrameOfReferenceUID
    (series,) = seg.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == headers[0].SeriesInstanceUID
    referred = {image.ReferencedSOPInstanceUID for image in series.ReferencedInstanceSequence}
    assert referred <= {header.SOPInstanceUID for header in headers if header.SOPClassUID == CT}
    check_dicom(made)
    check_dicom(output / study / f"{study}_sr.dcm")


def test_a_series_with_a_gap_is_refused_in_one_line_and_the_others_are_done(done):
    said, output = done
    assert said.returncode == 1, said.stderr
    (line,) = (line for line in said.stderr.splitlines() if line.startswith("error: "))
    assert "slices are missing: 1 between" in line and "Traceback" not in said.stderr
    files = [path for path in output.rglob("*") if path.is_file()]
    written = [line.split()[1] for line in said.stdout.splitlines() if line.startswith("written: ")]
    assert sorted(written) == sorted(str(path) for path in files if path.suffix == ".dcm")
    told = "\n".join([said.stdout, said.stderr, *map(str, files)])
    assert not [secret for secret in SECRETS if secret in told]


def test_a_container_names_its_folders_by_variables(app, bundle, scans, expected, tmp_path):
    variables = {
        "HOLOSCAN_MODEL_PATH": str(bundle.parent),
        "HOLOSCAN_INPUT_PATH": str(scans / "Mustermann_Erika"),
        "HOLOSCAN_OUTPUT_PATH": str(tmp_path),
    }
    said = app(settings={**settings_of(SCOATNET), "deidentify": True}, **variables)
    assert said.returncode == 0, said.stderr
    (made,) = tmp_path.rglob("*_seg.dcm")
    assert dcmread(made).PatientID.startswith("anon-"), "--set has reached the config"
    study = made.parent.name
    masks = [nib.load(folder / study / f"{study}_opacity.nii.gz") for folder in (tmp_path, expected)]
    assert np.array_equal(*(np.asarray(mask.dataobj) for mask in masks))


def without_weights(bundle: Path, folder: Path, scans: Path) -> tuple[Path, Path]:
    leave = shutil.ignore_patterns("models")
    return shutil.copytree(bundle, folder / SCOATNET, ignore=leave), scans


def without_code(bundle: Path, folder: Path, scans: Path) -> tuple[Path, Path]:
    return ROOT / "bundles" / SCOATNET, scans


def nifti_alone(bundle: Path, folder: Path, scans: Path) -> tuple[Path, Path]:
    phantom = make_phantom(shape=(64, 64, 16), spacing=(5.4, 5.4, 17.0), seed=7)
    (folder / "nifti").mkdir()
    nib.save(nib.Nifti1Image(phantom.image, phantom.affine), folder / "nifti" / "ct.nii.gz")
    return bundle, folder / "nifti"


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (without_weights, "model.pt not found; it should hold the weights"),
        (without_code, "has no folder custom: pack it with scripts/pack_bundle.py first"),
        (nifti_alone, "ct: the scan is not DICOM"),
    ],
)
def test_mistakes_end_in_one_line(app, bundle, scans, tmp_path, make, line):
    named, place = make(bundle, tmp_path, scans)
    folders = ("--bundle", str(named), "--input", str(place), "--output", str(tmp_path / "output"))
    said = app(*folders, settings=settings_of(SCOATNET))
    errors = [text for text in said.stderr.splitlines() if text.startswith("error: ")]
    assert said.returncode == 2 and "Traceback" not in said.stderr, said.stderr
    assert len(errors) == 1 and line in errors[0], said.stderr


def test_an_unknown_key_is_refused(app, bundle, scans):
    said = app("--bundle", str(bundle), "--input", str(scans), settings={"image_sizes": [64, 64]})
    assert said.returncode == 2 and "--set image_sizes=[64, 64]: give KEY=VALUE" in said.stderr
    assert "Traceback" not in said.stderr
