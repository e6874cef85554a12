# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Report an existing opacity mask: the page, JSON and DICOM objects that inference writes.

    python scripts/make_report.py --scan SCAN --mask MASK --output-dir OUTPUT

For masks corrected in MONAI Label or 3D Slicer, or made by another program. SCAN is a NIfTI file or a folder
with one DICOM study; MASK is NIfTI, NRRD or a DICOM Segmentation on the grid of the scan, its axes in any
order. The lungs are found in the scan unless a mask of them is given. What cannot be measured ends in a
report with the reason, and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

from monai.data import Dataset, decollate_batch
from monai.transforms import Compose, Lambdad

from custom.console import command
from custom.data import CohortLoader, list_scans
from custom.data.masks import LUNG_SEGMENTS, OPACITY_SEGMENT
from custom.data.scans import _safe_name, is_nifti
from custom.handlers import StudyReport
from custom.reporting.wording import parse_date
from custom.transforms import LoadCTd, LungMaskd, ValidateHUd
from custom.transforms.load import STUDY_KEY, study_info
from custom.transforms.masks import LoadMaskd


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scan", type=Path, required=True, help="NIfTI file, or folder with one DICOM study")
    parser.add_argument("--mask", type=Path, required=True, help="opacity: NIfTI, NRRD or DICOM Segmentation")
    parser.add_argument(
        "--lungs", type=Path, help="mask of the lungs, 1 left, 2 right; or a DICOM Segmentation"
    )
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for the study's folder")
    parser.add_argument(
        "--label", type=int, help="value of opacity in MASK, where it holds others besides 0 and 1"
    )
    parser.add_argument("--series-uid", help="Series Instance UID, where the study has several series")
    parser.add_argument(
        "--study-date", help="YYYYMMDD, for a scan that does not say (NIfTI); needed for a follow-up"
    )
    parser.add_argument(
        "--no-dicom", action="store_true", help="write no DICOM Segmentation and Structured Report"
    )
    parser.add_argument(
        "--deidentify", action="store_true", help="leave out what identifies patient and study"
    )
    args = parser.parse_args(argv)
    if args.study_date is not None and parse_date(args.study_date) is None:
        raise ValueError(f"--study-date must be a date as 20200315, got {args.study_date}")
    return args


def find_scan(path: Path, series_uid: str | None) -> dict[str, Any]:
    """The item of a data list for one scan."""
    if not path.exists():
        raise FileNotFoundError(f"scan not found: {path}")
    if is_nifti(path):
        return {"image": str(path), "name": _safe_name(path.name)}
    if not path.is_dir():
        raise ValueError(f"neither a NIfTI file nor a folder with a DICOM study: {path}")
    items = list_scans(path, series_uid)
    if len(items) > 1:
        raise ValueError(f"{len(items)} scans in {path}: give the folder of one, or --series-uid")
    return items[0]


def preparation(args: argparse.Namespace) -> Compose:
    """From paths to scan, mask and lungs on one grid."""

    def date(image: Any) -> Any:
        study = study_info(image)
        if study.get("study_date") not in (None, args.study_date):
            raise ValueError("--study-date is for scans that do not say when they were taken; this one does")
        image.meta[STUDY_KEY] = json.dumps(study | {"study_date": args.study_date})
        return image

    steps: list[Any] = [LoadCTd("image", ensure_channel_first=True, series_uid=args.series_uid)]
    steps += [Lambdad("image", date)] if args.study_date else []
    steps += [ValidateHUd("image"), LoadMaskd("mask", "image", OPACITY_SEGMENT, args.label)]
    steps += [LoadMaskd("lung", "image", LUNG_SEGMENTS)] if args.lungs else []
    return Compose([*steps, LungMaskd("image", mask_key="lung")])


@command
def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    item = find_scan(args.scan, args.series_uid) | {"mask": str(args.mask)}
    if args.lungs:
        item["lung"] = str(args.lungs)
    for path, what in ((args.mask, "mask"), (args.lungs, "lung mask")):
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"{what} not found: {path}")
    logging.getLogger("custom.data.cohort").setLevel(logging.ERROR)  # the last line says the same
    loader = CohortLoader(Dataset([item], preparation(args)))
    report = StudyReport(
        args.output_dir, cohort=loader, dicom_output=not args.no_dicom, deidentify=args.deidentify
    )
    for batch in loader:
        (study,) = decollate_batch(batch)
        report.write({**study, "scan": study["image"]}, {"pred": study["mask"], "image": study["image"]})
    folder = args.output_dir / item["name"]
    report.finish()
    print(f"written: {folder / (item['name'] + '_page.html')} and what lies beside it")


if __name__ == "__main__":
    sys.exit(main())
