# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Follow patients over several studies: a page with curve, table and pictures side by side, and a JSON file.

    python scripts/follow_up.py OUTPUT

OUTPUT is a folder that inference or make_report.py has written to; several folders and single reports
(*_report.json) may be given. Studies of one patient are recognised by the key in their reports. Where reports
do not hold one (NIfTI, de-identified), give the reports of one patient and --one-patient.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from custom.console import command
from custom.reporting.followup_files import find_reports, group_by_patient, write_followup


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reports", nargs="+", type=Path, help="folders, or *_report.json files")
    parser.add_argument(
        "--output-dir", type=Path, help="where to write (default: the folder, if one is given)"
    )
    parser.add_argument("--one-patient", action="store_true", help="all these studies are of one patient")
    args = parser.parse_args(argv)
    output = args.output_dir
    if output is None:
        if len(args.reports) > 1 or not args.reports[0].is_dir():
            raise ValueError("give --output-dir, since not one folder was given to write to")
        output = args.reports[0]
    reports = find_reports(args.reports)
    groups = {"": reports} if args.one_patient else group_by_patient(reports)
    if not groups:
        raise ValueError(
            f"no patient has two studies among these {len(reports)} reports; if the reports do not say whose "
            "they are and all are of one patient, add --one-patient"
        )
    for group in groups.values():
        page, followup = write_followup(output, group)
        course = followup["course"] or f"not stated: {followup['reasons']['course']}"
        print(f"{page}: {len(group)} studies, course {course}")


if __name__ == "__main__":
    sys.exit(main())
