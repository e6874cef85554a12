# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Writes what a study's prediction means: mask, numbers, picture."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events

import custom
from custom.console import CohortError, read_switch
from custom.data.cohort import CohortLoader
from custom.data.files import file_sha256, write_json, write_nifti
from custom.handlers.shares import SharedStudies, gather_on_first, meet
from custom.handlers.study_attention import view_attention
from custom.handlers.study_masks import as_volume, describe_scan, given_mask, off_grid
from custom.reporting.acquisition import doubt_lungs, doubt_opacity
from custom.reporting.dicom_objects import has_highdicom, make_segments, write_dicom
from custom.reporting.dicom_source import DicomOutputError, identify_study, read_source
from custom.reporting.figures import AttentionView, draw_overview, shown_voxel
from custom.reporting.followup_files import group_by_patient, write_followup, write_text
from custom.reporting.page import build_page
from custom.reporting.pictures import StudyPictures, take_pictures
from custom.reporting.quantify import measure_opacity
from custom.reporting.report import build_failure, build_report, headline
from custom.reporting.table import flatten_report, write_table
from custom.transforms.lung_regions import REMOVED

__all__ = ["StudyReport"]

logger = logging.getLogger(__name__)

_NO_PAGES = "switched off: pages is false"
_NO_HIGHDICOM = "highdicom is not installed: install covid-ct-bundles[dicom], or set dicom_output to false"


class StudyReport:
    """Writes, for every study an evaluator has segmented, into ``output_dir/<name>/``:

    - ``<name>_opacity.nii.gz``: the mask on the scan's own grid, its affine equal to the scan's;
    - ``<name>_lungs.nii.gz``: the lung mask (1 left, 2 right), where preprocessing made one;
    - ``<name>_overview.png``: three planes with contours, and attention maps where the network has them;
    - ``<name>_seg.dcm`` and ``<name>_sr.dcm``: masks and numbers as DICOM objects, where the scan is DICOM;
    - ``<name>_page.html``: all of this to look at, in one file that needs no network;
    - ``<name>_report.json``: the numbers, null plus a reason where unknown; see ``docs/report.md``. It is
      written last, so where it stands, the study is complete.

    ``finish`` adds ``output_dir/cohort.csv`` where there is more than one study, and for each patient with
    more than one ``output_dir/followup_<patient>.html`` and ``.json``.

    The batch must hold ``scan`` (the image as loaded, HU) and ``name`` and may hold ``lung`` and ``lobes``,
    masks on the scan's grid; the output ``pred`` is the mask after inversion of every spatial step and
    ``image`` what the network saw. A study that could not be prepared, or whose mask is that of another
    grid, gets a report with nulls and the reason, and no mask. No log and no file name tells of a patient.

    Args:
        output_dir: folder for the studies' folders.
        network: its ``attention_maps`` are drawn, if it has that method.
        bundle: name of the bundle, for the report.
        weights: weights file, whose hash goes into the report.
        cohort: the loader of the studies, which knows those that failed.
        dicom_output: write DICOM objects for scans that are DICOM.
        deidentify: leave out of DICOM objects and report what identifies patient and study, and give the
            DICOM objects new UIDs throughout. The name of a study stays what it is.
        pages: write the pages and follow-ups.
        settings: of the inference, to be named on the pages, such as ``hu_window``.
        share: what of the cohort this process does; the studies that an earlier run has done are in the
            cohort's table and the follow-ups with the others.

    Raises:
        ValueError: When a switch is neither on nor off.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        network: torch.nn.Module | None = None,
        bundle: str = "",
        weights: str | os.PathLike | None = None,
        cohort: CohortLoader | None = None,
        dicom_output: bool | str = True,
        deidentify: bool | str = False,
        pages: bool | str = True,
        settings: Mapping[str, Any] | None = None,
        share: SharedStudies | None = None,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.network = network
        self.bundle = bundle
        self.weights = None if weights is None else Path(weights)
        self.cohort = cohort
        self.dicom_output = read_switch("dicom_output", dicom_output)
        self.deidentify = read_switch("deidentify", deidentify)
        self.pages = read_switch("pages", pages)
        self.settings = settings
        self.failures: list[dict[str, str]] = []
        self._reports: dict[Path, dict[str, Any]] = {} if share is None else dict(share.done)
        self._model: dict[str, Any] | None = None
        self._warned = False

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: the evaluator; its postprocessing must invert and threshold ``pred``.
        """
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        """
        Args:
            engine: the evaluator after an iteration.
        """
        for study, output in zip(engine.state.batch, engine.state.output, strict=True):
            self.write(study, output)

    def finish(self) -> None:
        """Report the studies that failed, after all others are done; write the cohort's table and follow-ups.

        Where several processes share the cohort, the first writes for all, when all are done.

        Raises:
            CohortError: When any has failed; of several processes, on the first.
        """
        prepared = [] if self.cohort is None else self.cohort.failures
        for failure in prepared:
            self._write_failure(failure["name"], failure["reason"], self._identify(failure["name"]))
        parts = gather_on_first((self._reports, [*prepared, *self.failures]))
        try:
            if parts is not None:
                self._write_cohort(
                    {file: report for reports, _ in parts for file, report in reports.items()},
                    [failure for _, failures in parts for failure in failures],
                )
        finally:
            meet()

    def _write_cohort(self, reports: dict[Path, dict[str, Any]], failures: list[dict[str, str]]) -> None:
        order = {item["name"]: number for number, item in enumerate(self._items())}
        names = {file: report["study"] for file, report in reports.items()}
        reports = {file: reports[file] for file in sorted(reports, key=lambda f: order.get(names[f], 0))}
        if len(reports) > 1:
            write_table(self.output_dir / "cohort.csv", list(map(flatten_report, reports.values())))
        if self.pages:
            for key, group in group_by_patient(reports).items():
                course = write_followup(self.output_dir, group)[1]["course"]
                logger.info(f"{key}: {len(group)} studies, course {course or 'not stated'}")
        if failures:
            raise CohortError(sorted(failures, key=lambda one: order.get(one["name"], 0)), len(reports))

    def write(self, study: dict[str, Any], output: dict[str, Any]) -> None:
        """Write one study's files.

        Args:
            study: item of the decollated batch.
            output: item of the decollated output.
        """
        name, scan = study["name"], study["scan"]
        if reason := off_grid(scan, output["pred"], "mask"):
            reason += "; postprocessing must invert every spatial step of preprocessing"
            self.failures.append({"name": name, "reason": reason})
            self._write_failure(name, reason, describe_scan(scan))
            logger.warning(f"{name}: {reason}")
            return
        affine = np.asarray(scan.affine.cpu(), dtype=float)
        hu = np.asarray(scan.cpu())[0]
        opacity = (np.asarray(output["pred"].cpu())[0] > 0).astype(np.uint8)
        lungs, no_lungs = given_mask(study, "lung", "lung mask")
        doubt = doubt_lungs(lungs, hu) if lungs is not None and lungs.any() else no_lungs
        if doubt:
            lungs, no_lungs = None, doubt
        lobes, no_lobes = given_mask(study, "lobes", "lobe mask")
        folder = self.output_dir / name
        _clear(folder, name)

        masks = {"opacity": opacity, "lungs": lungs}
        files: dict[str, str | None] = {
            kind: f"{name}_{kind}.nii.gz" for kind, mask in masks.items() if mask is not None
        }
        for kind, file in files.items():
            write_nifti(folder / str(file), masks[kind], affine)
        shown = shown_voxel(as_volume(opacity), as_volume(lungs))
        attention = (
            None if self.network is None else view_attention(self.network, output["image"], shown, affine)
        )
        for item in (study, output):
            item.pop("image", None)  # what the network saw is as large as the scan, and is done with
        measured = measure_opacity(
            opacity, affine, lungs, hu, lobes, no_lungs_reason=no_lungs, no_lobes_reason=no_lobes
        )
        info = describe_scan(scan)
        if told := _describe_removed(output["pred"], measured["voxel_volume_ml"]):
            info["notes"] = [*info.get("notes", ()), told]
        if remark := doubt_opacity(measured):
            info["notes"] = [*info.get("notes", ()), remark]
            logger.warning(f"{name}: {remark}")
        lines = headline(measured)
        files["overview"] = f"{name}_overview.png"
        draw_overview(
            folder / files["overview"], hu, opacity, affine, name, lines, lungs=lungs, attention=attention
        )
        dicom, no_dicom = self._write_dicom(name, info, opacity, lungs, hu, affine, measured)
        missing = {"lungs": no_lungs, "seg": no_dicom, "sr": no_dicom, "page": _NO_PAGES}
        if dicom is not None:
            files["sr"] = f"{name}_sr.dcm"
            files["seg"] = f"{name}_seg.dcm" if dicom["segments"] else None
        if self.pages:
            files["page"] = f"{name}_page.html"
        report = build_report(
            name,
            self._describe_model(),
            info,
            affine,
            as_volume(opacity).shape,
            as_volume(lungs),
            measured,
            files,
            missing,
            dicom,
            doubt if "lung" in study else "",
            self.deidentify,
        )
        pictures = None
        if self.pages:
            pictures = take_pictures(as_volume(hu), as_volume(opacity), as_volume(lungs), affine)
        self._finish_study(report, pictures, attention)
        logger.info(f"{name}: {', '.join(lines)}")

    def _write_failure(self, name: str, reason: str, info: dict[str, Any] | None) -> None:
        _clear(self.output_dir / name, name)
        page = f"{name}_page.html" if self.pages else None
        report = build_failure(name, self._describe_model(), reason, self.deidentify, info, page)
        self._finish_study(report)

    def _finish_study(
        self,
        report: dict[str, Any],
        pictures: StudyPictures | None = None,
        attention: AttentionView | None = None,
    ) -> None:
        folder = self.output_dir / report["study"]
        if page := report["files"]["page"]:
            write_text(folder / page, build_page(report, pictures, attention, self.settings))
        file = folder / f"{report['study']}_report.json"
        write_json(file, report)
        self._reports[file.resolve()] = report

    def _identify(self, name: str) -> dict[str, Any] | None:
        """What is known of a study that could not be prepared."""
        image = next((item["image"] for item in self._items() if item["name"] == name), None)
        return None if image is None else identify_study(image)

    def _items(self) -> Sequence[Mapping[str, Any]]:
        return getattr(getattr(self.cohort, "dataset", None), "data", None) or ()

    def _write_dicom(
        self,
        name: str,
        info: dict[str, Any],
        opacity: np.ndarray,
        lungs: np.ndarray | None,
        hu: np.ndarray,
        affine: np.ndarray,
        measured: dict[str, Any],
    ) -> tuple[dict[str, Any] | None, str]:
        """Returns what was written, or None, and why something was not."""
        if info.get("source") != "dicom":
            return None, "the scan is not DICOM: there is no series that DICOM objects could refer to"
        if not self.dicom_output:
            return None, "switched off: dicom_output is false"
        if not has_highdicom():
            if not self._warned:
                logger.warning(f"no DICOM objects are written: {_NO_HIGHDICOM}")
                self._warned = True
            return None, _NO_HIGHDICOM
        try:
            source = read_source(info["files"], self.deidentify)
            segments = make_segments(opacity, lungs, hu)
            dicom = write_dicom(
                self.output_dir / name, name, source, segments, affine, measured, self._describe_model()
            )
        except DicomOutputError as error:
            logger.warning(f"{name}: no DICOM objects are written: {error}")
            return None, str(error)
        return dicom, "" if dicom["segments"] else "no lung and no opacity: there is nothing to segment"

    def _describe_model(self) -> dict[str, Any]:
        if self._model is None:
            digest = None
            if self.weights is not None and self.weights.is_file():
                digest = file_sha256(self.weights)
            self._model = {
                "bundle": self.bundle,
                "software_version": custom.__version__,
                "weights_sha256": digest,
            }
        return self._model


def _describe_removed(mask: Any, voxel_ml: float | None) -> str:
    """What postprocessing took away far from the lungs, or ""."""
    removed = getattr(mask, "meta", {}).get(REMOVED)
    if not removed:
        return ""
    volume = f"{removed['voxels'] * voxel_ml:.1f} mL" if voxel_ml else f"{removed['voxels']} voxels"
    return (
        f"removed {volume} of opacity that was found nowhere within {removed['reach_mm']:g} mm of the lungs "
        f"(regions: {removed['regions']})"
    )


def _clear(folder: Path, name: str) -> None:
    """Remove an earlier run's results, which must not pass for this one's; first what says it is complete."""
    for stale in sorted(folder.glob(f"{name}_*"), key=lambda file: not file.name.endswith("_report.json")):
        stale.unlink()
