# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Pack a bundle into one zip that works where this repository is not.

python scripts/pack_bundle.py bundles/covid_ct_scoatnet_segmentation

The zip holds the bundle, its weights if models/model.pt is there, the package custom at this version, a
manifest with the hash of every file, requirements.txt and a README. Equal input gives equal bytes. The bundle
is checked first, as scripts/verify_bundle.py does; nothing is packed when there are findings.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import custom
from custom.bundle.packing import pack_bundle
from custom.bundle.standards import Standards
from custom.bundle.verification import verify_bundle
from custom.console import command

ROOT = Path(__file__).resolve().parent.parent


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path, help="the bundle's folder")
    parser.add_argument(
        "--output", type=Path, help="the zip (default: <name>_v<version>.zip in the working directory)"
    )
    parser.add_argument(
        "--allow",
        type=Path,
        nargs="+",
        default=[],
        help="files with more expressions and targets, one a line",
    )
    args = parser.parse_args(argv)
    if not args.bundle.is_dir():
        raise FileNotFoundError(f"{args.bundle} is no folder; give that of a bundle")
    standards = Standards.of_repository(ROOT, args.allow)
    findings = verify_bundle(args.bundle, standards).findings
    if findings:
        print("\n".join(findings))
        raise ValueError(f"{args.bundle}: {len(findings)} findings; nothing was packed")
    packed = pack_bundle(args.bundle, args.output, standards.requirements)
    print(
        f"written: {packed.path}, {packed.files} files, custom {custom.__version__}, SHA-256 {packed.sha256}"
    )
    print(
        f"with weights, SHA-256 {packed.weights_sha256}"
        if packed.weights_sha256
        else "without weights: models/model.pt is not there; who gets it must train it first"
    )
    if packed.left_out:
        tops = sorted({name.split("/")[0] if "/" in name else name for name in packed.left_out})
        print(f"left out: {len(packed.left_out)} files of training and inference in {', '.join(tops)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
