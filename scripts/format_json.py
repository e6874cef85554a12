# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Give JSON files four spaces of indent, or check that they have it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from custom.console import command
from custom.data.files import atomic_path


def read(path: Path) -> tuple[str, str]:
    """What a file holds, and what it should hold."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    return text, json.dumps(content, indent=4, ensure_ascii=False) + "\n"


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a file differs")
    options = parser.parse_args(argv)
    texts = {path: read(path) for path in options.files}
    different = {path: formatted for path, (text, formatted) in texts.items() if text != formatted}
    for path, formatted in different.items():
        if options.check:
            print(f"{path} is not formatted; run: python scripts/format_json.py {path}", file=sys.stderr)
        else:
            with atomic_path(path) as temporary:
                temporary.write_text(formatted, encoding="utf-8")
    return 1 if options.check and different else 0


if __name__ == "__main__":
    sys.exit(main())
