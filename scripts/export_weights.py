# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Write weights in half precision, for sharing: half the bytes, loaded into float32 networks as any others.

python scripts/export_weights.py models/model.pt --output BUNDLE/models/model.pt

The settings beside the weights (model.json) go with them. Equal weights give equal bytes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from custom.bundle.half import export_half
from custom.bundle.settings import read_settings, settings_file
from custom.console import command
from custom.data.files import file_sha256


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("weights", type=Path, help="weights file (.pt) of a training")
    parser.add_argument("--output", type=Path, required=True, help="file to write")
    args = parser.parse_args(argv)
    before = args.weights.stat().st_size if args.weights.is_file() else 0
    written = export_half(args.weights, args.output)
    print(f"written: {written}, {written.stat().st_size:,} bytes (before: {before:,})")
    print(f"SHA-256: {file_sha256(written)}")
    settings = read_settings(written)
    told = ", ".join(f"{key} {value}" for key, value in settings.items())
    print(f"{settings_file(written)}: {told}" if settings else "no settings: the published ones are assumed")


if __name__ == "__main__":
    sys.exit(main())
