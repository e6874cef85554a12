# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Rank systems by cross-validation on your own data.

python scripts/cross_validate.py scripts/studies/compare_slices.json --dataset-dir DATA --output-dir RESULT

A study (JSON) names the systems: bundles with overlays for networks, losses, ablations or transfer, and the
settings they share. Each is trained on all folds of DATA/datalist.json but one and scored on that one, fold
by fold. Stopped by whatever, the same command goes on where it was. RESULT/comparison/comparison.md is the
report: tables with confidence intervals and paired tests, box plots, and a sheet of cases x systems.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from custom.bundle import CrossValidation, read_study
from custom.bundle.study_report import write_study_report
from custom.console import command

ROOT = Path(__file__).resolve().parent.parent


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path, help="JSON file of the study; see scripts/studies")
    parser.add_argument("--dataset-dir", type=Path, required=True, help="data set with datalist.json")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for runs and report")
    parser.add_argument(
        "--systems", nargs="+", metavar="NAME", help="these systems of the study only (default: all)"
    )
    parser.add_argument("--folds", type=int, nargs="+", help="hold out these folds only (default: all)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="[NAME:]KEY=VALUE",
        help="override a key of the configs for all systems, or for the one of that name; may be repeated",
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time (default: 1)")
    parser.add_argument(
        "--processes", type=int, default=1, help="processes of one run, by torchrun (default: 1)"
    )
    args = parser.parse_args(argv)
    study = read_study(args.study, ROOT / "bundles", args.set)
    if args.systems:
        study = study.only(args.systems)
    cross_validation = CrossValidation(
        study, args.dataset_dir, args.output_dir, args.folds, args.jobs, args.processes
    )
    report = write_study_report(cross_validation, cross_validation.run())
    print(f"report: {report}")


if __name__ == "__main__":
    sys.exit(main())
