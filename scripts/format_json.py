# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Give JSON files four spaces of indent, or check that they have it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from custom.console import command
from custom.data.files import atomic_path


def formatted(path: Path) -> str:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    return json.dumps(content, indent=4, ensure_ascii=False) + "\n"


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a file differs")
    options = parser.parse_args(argv)
    different = [path for path in options.files if path.read_text(encoding="utf-8") != formatted(path)]
    for path in different:
        if options.check:
            print(f"{path} is not formatted; run: python scripts/format_json.py {path}", file=sys.stderr)
        else:
            with atomic_path(path) as temporary:
                temporary.write_text(formatted(path), encoding="utf-8")
    return 1 if options.check and different else 0


if __name__ == "__main__":
    sys.exit(main())
