# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Writes a cohort of synthetic chest CTs with opacity, class and lung masks and a datalist.

python scripts/make_phantoms.py --output-dir cohort --cases 10
"""

from __future__ import annotations

import argparse
import sys

from custom.console import command
from custom.data.phantom_cohort import write_cohort


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Write synthetic chest CTs with exact masks (NIfTI) and a datalist.json",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--output-dir", required=True, help="folder to write to; complete cases there are kept"
    )
    parser.add_argument("--cases", type=int, default=10, help="number of patients")
    parser.add_argument("--seed", type=int, default=0, help="seed of the cohort")
    parser.add_argument("--shape", type=int, nargs=3, default=[128, 128, 48], metavar="N", help="voxels")
    parser.add_argument(
        "--spacing", type=float, nargs=3, default=[2.8, 2.8, 6.5], metavar="MM", help="mm per voxel"
    )
    parser.add_argument("--folds", type=int, default=5, help="number of folds for cross-validation")
    args = parser.parse_args(argv)
    print(write_cohort(args.output_dir, args.cases, args.seed, args.shape, args.spacing, args.folds))


if __name__ == "__main__":
    sys.exit(main())
