# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Turn a COVID-19 CT data set into a data list that the bundles train on."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from custom.console import command
from custom.data.datalist import read_datalist
from custom.data.plain_slices import ORIENTATIONS, prepare_slices


def slices(options: argparse.Namespace) -> None:
    datalist = prepare_slices(
        options.images,
        options.masks,
        options.output_dir,
        orientation=options.orientation,
        n_folds=options.folds,
        seed=options.seed,
        name=options.name,
        description=options.description,
    )
    entries = read_datalist(datalist)["training"]
    patients = len({entry["patient_id"] for entry in entries})
    print(f"{len(entries)} slices of {patients} patients in {options.folds} folds: {datalist}")


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = parser.add_subparsers(required=True, metavar="KIND")
    plain = kinds.add_parser(
        "slices", help="plain 8-bit slices and masks, e.g. COVID-SemiSeg (stored transposed)"
    )
    plain.add_argument("--images", type=Path, required=True, help="folder of PNG or JPG slices")
    plain.add_argument("--masks", type=Path, required=True, help="folder of masks with the same names")
    plain.add_argument(
        "--output-dir", type=Path, required=True, help="gets images/, masks/ and datalist.json"
    )
    plain.add_argument(
        "--orientation", choices=ORIENTATIONS, default="upright", help="how the slices are stored"
    )
    plain.add_argument("--folds", type=int, default=5)
    plain.add_argument("--seed", type=int, default=0)
    plain.add_argument("--name", default="plain slices")
    plain.add_argument("--description", default="", help="source and licence, kept in the data list")
    plain.set_defaults(run=slices)
    options = parser.parse_args(argv)
    options.run(options)


if __name__ == "__main__":
    sys.exit(main())
