# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Turn a download of LIDC-IDRI into scans, nodule masks and data lists for pre-training.

python scripts/prepare_lidc.py --source LIDC-IDRI --output-dir lidc

Run again, it continues where it stopped. Exit code: 0 when every scan with nodules was prepared, 1 when some
failed (they are listed at the end and in skipped.json), 2 when none could be or an option is wrong.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from custom.console import command
from custom.data.lidc_prepare import prepare_lidc
from custom.data.lidc_source import download_lidc


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", type=Path, required=True, help="folder of the DICOM files")
    parser.add_argument("--xml-dir", type=Path, help="folder of the XML files, if not in --source")
    parser.add_argument(
        "--output-dir", type=Path, required=True, help="gets images/, labels/, cases/ and the data lists"
    )
    parser.add_argument(
        "--four-readers",
        action="store_true",
        help="count a voxel when 2 of the 4 radiologists have it, not half of those who saw the nodule",
    )
    parser.add_argument(
        "--validation-fraction", type=float, default=0.25, help="part of the patients (default: 0.25)"
    )
    parser.add_argument("--folds", type=int, default=5, help="folds of the other patients (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of validation patients and folds")
    parser.add_argument("--workers", type=int, default=0, help="processes; each holds one scan in memory")
    parser.add_argument(
        "--download",
        action="store_true",
        help="first fetch the scans that the files in --xml-dir outline nodules in (about 100 GB) into "
        "--source, with the client idc-index of the Imaging Data Commons",
    )
    options = parser.parse_args(argv)
    if options.download:
        if options.xml_dir is None:
            raise ValueError("--download needs --xml-dir: the XML files name the scans and are not fetched")
        print(f"{download_lidc(options.xml_dir, options.source)} series in {options.source}", flush=True)
    summary = prepare_lidc(
        options.source,
        options.output_dir,
        xml_dir=options.xml_dir,
        four_readers=options.four_readers,
        validation_fraction=options.validation_fraction,
        n_folds=options.folds,
        seed=options.seed,
        num_workers=options.workers,
    )
    print(summary)
    return 1 if summary.failed else 0


if __name__ == "__main__":
    sys.exit(main())
