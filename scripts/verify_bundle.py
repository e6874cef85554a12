# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Check a bundle, folder or zip, before anything of it runs.

python scripts/verify_bundle.py bundles/covid_ct_scoatnet_segmentation
python scripts/verify_bundle.py covid_ct_scoatnet_segmentation_v0.1.0.zip

Prints a line for each finding; the exit code is 0 without any and 2 with some. What a config may run,
its expressions and targets, is listed in scripts/known_code.txt. A bundle of yours that runs more: look at
--unknown, write what you agree to into a file, and name the file by --allow.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from custom.bundle.standards import Standards
from custom.bundle.verification import verify_bundle
from custom.console import command

ROOT = Path(__file__).resolve().parent.parent
MOST = 100  # lines of findings


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="a bundle's folder, in work or unpacked, or a zip")
    parser.add_argument(
        "--allow",
        type=Path,
        nargs="+",
        default=[],
        help="files with more expressions and targets, one a line",
    )
    parser.add_argument(
        "--unknown",
        action="store_true",
        help="print the bundle's unknown expressions and targets, one a line",
    )
    args = parser.parse_args(argv)
    result = verify_bundle(args.bundle, Standards.of_repository(ROOT, args.allow))
    if args.unknown:
        for text in sorted(result.unknown):
            print(text if text.isprintable() else f"# cannot be listed: {text!a}")
        return 0
    for finding in result.findings[:MOST]:
        print(finding)
    if len(result.findings) > MOST:
        print(f"... and {len(result.findings) - MOST} more")
    if not result.findings:
        print(f"right: {result.summary}")
    return 2 if result.findings else 0


if __name__ == "__main__":
    sys.exit(main())
