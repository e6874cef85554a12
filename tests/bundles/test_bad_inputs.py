# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Every way an input can be wrong, through the bundles: one line, the right exit code, nothing half-written.

The scripts' part of the table is in tests/scripts/test_bad_input_table.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from bundle_tester import bundle_command, run_bundle
from threshold_model import BUNDLE, inference_overrides, reports

from custom.console import CohortError, check_overrides, describe_error
from custom.data import find_studies
from tests import dicom_faults
from tests.bad_scans import ODD, REFUSED, BadScan, make_table, nifti, scan_of, table_phantom

SAME_CHEST = {"shuffled_slices", "several_series", "jpeg_ls", "jpeg_2000", "run_length", "jpeg_lossless"}


@pytest.fixture(scope="module")
def phantom():
    return table_phantom()


@pytest.fixture(scope="module")
def table(tmp_path_factory, phantom) -> Path:
    return make_table(tmp_path_factory.mktemp("table"), phantom)


def run(workflow) -> tuple[str, int]:
    """Run what must fail; returns the line that the user reads, and the exit code."""
    with pytest.raises(Exception) as caught:  # noqa: B017 - MONAI wraps it; what the user sees is checked
        workflow.run()
    line = describe_error(caught.value)
    assert line is not None and "\n" not in line
    cause: BaseException | None = caught.value
    while cause is not None and not isinstance(cause, CohortError):
        cause = cause.__cause__
    return line, 2 if cause is None else cause.exit_code


class TestInference:
    @pytest.fixture(scope="class")
    def inferred(self, table, tmp_path_factory) -> tuple[Path, str, int]:
        """The whole table as one cohort: the output, the line at its end and the exit code."""
        work = tmp_path_factory.mktemp("inferred")
        overrides = {**inference_overrides(work, table, size=32), "dicom_output": False}
        return work, *run(BUNDLE.workflow("infer", ("inference",), overrides))

    @staticmethod
    def result(work: Path, table: Path, row: BadScan) -> tuple[dict, list[str]]:
        """A row's report, and the files of its study."""
        scan = scan_of(table / row.name)
        studies = find_studies(scan) if scan.is_dir() else []
        name = studies[0].name if studies else f"{row.name}_a"
        return reports(work)[name], sorted(file.name for file in (work / "output" / name).iterdir())

    @pytest.mark.parametrize("row", REFUSED, ids=str)
    def test_a_bad_scan_is_refused_and_leaves_a_report_with_nulls(self, inferred, table, row):
        report, files = self.result(inferred[0], table, row)
        assert report["status"] == "failed" and report["opacity_volume_ml"]["total"] is None
        assert re.search(row.message, report["reason"]) and "\n" not in report["reason"]
        assert any(file.endswith("_report.json") for file in files)
        assert not any(file.endswith((".nii.gz", ".dcm", ".png")) for file in files)
        assert report["reason"] in inferred[1], "failures are listed at the end with their reasons"

    @pytest.mark.parametrize("row", ODD, ids=str)
    def test_an_odd_scan_is_read(self, inferred, table, row):
        report, files = self.result(inferred[0], table, row)
        assert report["status"] == "segmented", report["reason"]
        assert any(file.endswith("_opacity.nii.gz") for file in files)
        if row.name in SAME_CHEST:
            plain, _ = self.result(inferred[0], table, next(r for r in ODD if "pipe" in r.name))
            assert report["lung_volume_ml"] == plain["lung_volume_ml"]

    def test_the_others_are_done_and_the_failures_counted(self, inferred):
        _, line, code = inferred
        assert line.startswith(f"{len(REFUSED)} of {len(REFUSED) + len(ODD)} studies failed: ") and code == 1

    def test_a_single_bad_study_ends_with_code_2(self, tmp_path, phantom):
        nifti(tmp_path / "a.nii.gz", phantom.image * 0)
        overrides = inference_overrides(tmp_path / "work", tmp_path)
        line, code = run(BUNDLE.workflow("infer", ("inference",), overrides))
        assert "all voxels are 0" in line and code == 2

    def test_exit_code_and_line_of_the_command(self, tmp_path, phantom):
        scans = tmp_path / "scans ä with spaces"
        scans.mkdir()
        for name in ("one", "two"):
            nifti(scans / f"{name} ü.nii.gz", phantom.image, phantom.affine)
        (scans / "broken.nii.gz").touch()
        overrides = inference_overrides(tmp_path, scans)
        stale = tmp_path / "output" / "broken" / "broken_opacity.nii.gz"
        stale.parent.mkdir(parents=True)
        stale.touch()
        done = run_bundle(BUNDLE, ("inference",), overrides)
        assert done.returncode == 1, done.stderr
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert "1 of 3 studies failed: broken: " in line and "Traceback" not in done.stderr
        statuses = sorted(report["status"] for report in reports(tmp_path).values())
        assert statuses == ["failed", "segmented", "segmented"]
        assert not stale.exists(), "a mask of an earlier run must not pass for this one's"

    def test_folders_that_hold_nothing_or_cannot_be_written(self, tmp_path, phantom):
        (tmp_path / "empty").mkdir()
        overrides = inference_overrides(tmp_path, tmp_path / "empty")
        line, code = run(BUNDLE.workflow("infer", ("inference",), overrides))
        assert "no NIfTI file" in line and code == 2
        (tmp_path / "scans").mkdir()
        nifti(tmp_path / "scans" / "a.nii.gz", phantom.image, phantom.affine)
        overrides = inference_overrides(tmp_path, tmp_path / "scans", size=32)
        (tmp_path / "file").touch()
        overrides["output_dir"] = str(tmp_path / "file" / "output")  # a file is no folder, even for root
        line, code = run(BUNDLE.workflow("infer", ("inference",), overrides))
        assert "Not a directory" in line and code == 2

    def test_a_misspelt_key_on_the_command_line_is_refused(self, tmp_path):
        overrides = {**inference_overrides(tmp_path, tmp_path), "datasetdir": "x"}
        words = bundle_command(BUNDLE, ("inference",), overrides)
        with pytest.raises(ValueError, match=r"did you mean --dataset_dir\?"):
            check_overrides(words[words.index("run") :])


def truncated_mask(file: Path, mask: np.ndarray, affine: np.ndarray) -> None:
    nifti(file, mask, affine)
    dicom_faults.truncate(file, 0.5)


def mask_of_another_shape(file: Path, mask: np.ndarray, affine: np.ndarray) -> None:
    nifti(file, mask[:-1], affine)


def mask_elsewhere(file: Path, mask: np.ndarray, affine: np.ndarray) -> None:
    nifti(file, mask, affine + np.outer([0, 1, 0, 0], [0, 0, 0, 3]))


def mask_with_nan(file: Path, mask: np.ndarray, affine: np.ndarray) -> None:
    nifti(file, np.where(mask > 0, np.nan, 0).astype(np.float32), affine)


def mask_with_time(file: Path, mask: np.ndarray, affine: np.ndarray) -> None:
    nifti(file, np.stack([mask, mask], axis=-1), affine)


BAD_MASKS: list[tuple[Callable, str]] = [
    (truncated_mask, "damaged or cut off"),
    (mask_of_another_shape, "differ in size"),
    (mask_elsewhere, "different places"),
    (mask_with_nan, "NaN"),
    (mask_with_time, "4 dimensions"),
]
# A file that cannot be opened is missed already when the list is read, before any case is prepared.
BAD_CASES = [row for row in REFUSED if row.name != "unreadable"]
REASONS = {row.name: row.message for row in BAD_CASES} | {make.__name__: text for make, text in BAD_MASKS}
GOOD = ("good_0", "good_1", "good_2")


class TestTrainingAndEvaluation:
    @pytest.fixture(scope="class")
    def data(self, table, phantom) -> Path:
        """The table as a data set: good cases, odd ones, bad scans, and good scans with bad masks."""
        folder = table
        mask = (phantom.label > 0).astype(np.uint8)
        names = [row.name for row in BAD_CASES + ODD] + [make.__name__ for make, _ in BAD_MASKS] + list(GOOD)
        for name in names:
            (folder / name).mkdir(exist_ok=True)
            label = folder / name / "mask.nii.gz"
            if name == "one_slice":
                nifti(label, mask[:, :, 8:9], nib.load(scan_of(folder / name)).affine)
            elif name == "thousand_slices":
                scan = nib.load(scan_of(folder / name))
                nifti(label, (np.asarray(scan.dataobj) > 20).astype(np.uint8), scan.affine)
            else:
                nifti(label, mask, phantom.affine)
        for make, _ in BAD_MASKS:
            nifti(folder / make.__name__ / "a.nii.gz", phantom.image, phantom.affine)
            make(folder / make.__name__ / "mask.nii.gz", mask, phantom.affine)
        for name in GOOD:
            nifti(folder / name / "a.nii.gz", phantom.image, phantom.affine)
        return folder

    @staticmethod
    def overrides(data: Path, work: Path, training: tuple[str, ...], held_out: tuple[str, ...]) -> dict:
        """Of train and evaluate with a network that thresholds, as that of inference."""
        entries = [
            {
                "image": str(scan_of(data / name).relative_to(data)),
                "label": f"{name}/mask.nii.gz",
                "patient_id": name,
                "fold": fold,
            }
            for fold, names in ((0, held_out), (1, training))
            for name in names
        ]
        content = inference_overrides(work, data, size=32)
        (work / "datalist.json").write_text(json.dumps({"training": entries}), encoding="utf-8")
        paths = {**BUNDLE.training_paths(work, data), "data_list_file": str(work / "datalist.json")}
        kept = {key: content[key] for key in ("network_def", "hu_window", "image_size", "ckpt_path")}
        return {**paths, **kept, "batch_size": 64, "epochs": 1}

    def test_training_names_all_cases_that_cannot_be_prepared(self, data, tmp_path):
        overrides = self.overrides(data, tmp_path, (*REASONS, GOOD[0]), GOOD[1:2])
        overrides.pop("ckpt_path")
        line, code = run(BUNDLE.workflow("train", ("train",), overrides))
        assert line.startswith(f"{len(REASONS)} of {len(REASONS) + 1} cases cannot be prepared: ")
        assert code == 2
        for name, message in REASONS.items():
            stem = scan_of(data / name).name.removesuffix(".nii.gz")
            (reason,) = re.findall(rf"\b{name}_{stem}: (.+?)(?:; \w+: |; mend them)", line)
            assert re.search(message, reason), f"{name}: {reason}"
        assert not (tmp_path / "models" / "checkpoint_latest.pt").exists()

    def test_training_names_what_cannot_be_validated_on(self, data, tmp_path):
        overrides = self.overrides(data, tmp_path, GOOD[:1], ("mask_with_nan",))
        overrides.pop("ckpt_path")
        line, code = run(BUNDLE.workflow("train", ("train",), overrides))
        assert "mask_with_nan" in line and "NaN" in line and code == 2

    def test_training_on_odd_scans(self, data, tmp_path):
        overrides = self.overrides(data, tmp_path, tuple(row.name for row in ODD), GOOD[:1])
        overrides.pop("ckpt_path")
        BUNDLE.workflow("train", ("train",), overrides).run()
        assert (tmp_path / "models" / "model.pt").is_file()

    def test_evaluation_scores_the_others_and_lists_the_failures(self, data, tmp_path):
        fine = (*(row.name for row in ODD), *GOOD[:2])
        overrides = self.overrides(data, tmp_path, GOOD[2:], (*REASONS, *fine))
        line, code = run(BUNDLE.workflow("train", ("train", "evaluate"), overrides))
        assert line.startswith(f"{len(REASONS)} of {len(REASONS) + len(fine)} cases failed: ") and code == 1
        scores = json.loads((tmp_path / "eval" / "scores.json").read_text(encoding="utf-8"))
        assert scores["summary"]["cases"] == len(scores["cases"]) == len(fine)
        found = {failed["name"]: failed["reason"] for failed in scores["failures"]}
        assert len(found) == len(REASONS)
        for name, message in REASONS.items():
            reason = found[f"{name}_{scan_of(data / name).name.removesuffix('.nii.gz')}"]
            assert re.search(message, reason) and reason in line, f"{name}: {reason}"

    def test_evaluation_of_bad_cases_alone_writes_no_scores(self, data, tmp_path):
        overrides = self.overrides(data, tmp_path, GOOD[2:], ("with_nan", "mask_elsewhere"))
        line, code = run(BUNDLE.workflow("train", ("train", "evaluate"), overrides))
        assert line.startswith("2 of 2 studies failed: ") and code == 2
        assert not (tmp_path / "eval" / "scores.json").exists()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda content: "no JSON at all", "is not valid JSON"),
            (lambda content: [], "none of the sections"),
            (lambda content: {"training": [{"image": "good_0/a.nii.gz"}]}, "'patient_id' is missing"),
            (lambda content: {"training": [content["training"][0]] * 2}, "is already in"),
            (lambda content: {"training": [content["training"][0]]}, "no case is left"),
            (
                lambda content: {
                    "training": [entry | {"patient_id": "one"} for entry in content["training"]]
                },
                "keep them together",
            ),
            (
                lambda content: {
                    "training": [entry | {"image": entry["patient_id"]} for entry in content["training"]]
                },
                "neither a NIfTI file .* nor a DICOM study",
            ),
        ],
    )
    def test_bad_data_lists(self, data, tmp_path, change, message):
        overrides = self.overrides(data, tmp_path, GOOD[:1], GOOD[1:])
        file = Path(overrides["data_list_file"])
        changed = change(json.loads(file.read_text(encoding="utf-8")))
        file.write_text(changed if isinstance(changed, str) else json.dumps(changed), encoding="utf-8")
        overrides.pop("ckpt_path")
        line, code = run(BUNDLE.workflow("train", ("train",), overrides))
        assert re.search(message, line), line
        assert code == 2

    def test_a_file_that_cannot_be_opened_or_written(self, data, tmp_path):
        overrides = self.overrides(data, tmp_path, ("unreadable",), GOOD[1:])
        overrides.pop("ckpt_path")
        assert "a.nii.gz not found" in run(BUNDLE.workflow("train", ("train",), overrides))[0]
        overrides = self.overrides(data, tmp_path, GOOD[:1], GOOD[1:])
        overrides["ckpt_path"] = str(tmp_path / "none.pt")
        (tmp_path / "file").touch()
        overrides["cache_dir"] = str(tmp_path / "file" / "cache")
        overrides.pop("ckpt_path")
        assert "Not a directory" in run(BUNDLE.workflow("train", ("train",), overrides))[0]
