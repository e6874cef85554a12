# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Opening a page in headless Chromium, and what it says there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@dataclass(frozen=True)
class Opened:
    """A page after its scripts have run: its HTML, and what the console and the network layer said."""

    dom: str
    console: list[str]

    def state(self, name: str) -> str:
        """An attribute of the page's root, or of the first element that has it."""
        found = re.search(rf'\sdata-{name}="([^"]*)"', self.dom)
        assert found, f"no data-{name}"
        return found.group(1)


def open_page(page: Path, fragment: str = "", script: str = "", width: int = 1280) -> Opened:
    """Open a page from the disk, with the network cut off.

    Args:
        page: HTML file.
        fragment: what follows "#" in its address.
        script: JavaScript to run in a copy of the page, after its own.
        width: of the window.
    """
    browser = next((path for name in NAMES if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no Chromium is installed: it opens the pages")
    with tempfile.TemporaryDirectory() as folder:
        if script:
            text = page.read_text(encoding="utf-8")
            page = Path(folder) / "copy.html"
            page.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
        words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--dump-dom"]
        words += [
            f"--user-data-dir={folder}/profile",
            "--enable-logging=stderr",
            "--virtual-time-budget=3000",
        ]
        words += [f"--window-size={width},1000", "--host-resolver-rules=MAP * ~NOTFOUND"]
        address = page.resolve().as_uri() + (f"#{fragment}" if fragment else "")
        done = subprocess.run(
            [*words, address], capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": folder}
        )
    if not done.stdout.strip():
        pytest.skip(f"Chromium is installed and does not run here: {done.stderr[-200:]}")
    said = [line for line in done.stderr.splitlines() if re.search(r":CONSOLE[:(]", line)]
    return Opened(done.stdout, said)
