# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""The Python environment that MONAI Label lives in, apart from the project's own.

MONAI Label 0.8.5 pins neither torch nor numpy, and its transitive pins contradict numpy 2 and pydicom 3. So
it is installed without them, beside the versions that the project itself is tested with.
"""

from __future__ import annotations

import configparser
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import TextIO

from filelock import FileLock
from tqdm import tqdm

from custom.console import bar_interval
from custom.data.files import write_json

__all__ = ["MONAI_LABEL_VERSION", "build_environment", "default_folder", "read_versions"]

MONAI_LABEL_VERSION = "0.8.5"

ROOT = Path(__file__).resolve().parent.parent.parent

REQUIREMENTS = Path(__file__).with_name("label_requirements.txt")
WITHOUT_THEIR_PINS = (f"monailabel=={MONAI_LABEL_VERSION}", "pydicom-seg==0.4.1")

SHIMS = Path(__file__).with_name("label_shims.py")
SHIMS_MODULE = "covid_ct_label_shims"
STAMP = "environment.json"
NEEDED_GB = 4.0
NAMED = ("monailabel", "monai", "torch", "torchvision", "numpy", "pydicom", "highdicom", "dcmqi")


def default_folder() -> Path:
    """Where the environment goes: ``$COVID_CT_CACHE``, else the user's cache folder."""
    cache = os.environ.get("COVID_CT_CACHE")
    if cache:
        return Path(cache).expanduser() / f"monailabel-{MONAI_LABEL_VERSION}"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "covid-ct-bundles" / f"monailabel-{MONAI_LABEL_VERSION}"


def build_environment(folder: str | os.PathLike | None = None) -> Path:
    """Build the environment, or take the one that is there and is what it would be.

    pip's own settings hold, so another index, or one with CPU-only builds, is chosen by ``PIP_INDEX_URL`` or
    ``PIP_EXTRA_INDEX_URL``.

    Args:
        folder: where it is, or goes to; defaults to :func:`default_folder`.

    Returns:
        Its Python interpreter.

    Raises:
        OSError: In one line, when it cannot be built: no space, no such package, no network.
        ValueError: When the folder holds something else.
    """
    folder = Path(folder or default_folder()).expanduser().resolve()
    python = folder / "bin" / "python"
    requirements, constraints = _requirements()
    content = [*requirements, constraints, *WITHOUT_THEIR_PINS, SHIMS.read_text(encoding="utf-8")]
    wanted = {
        "python": platform.python_version(),
        "interpreter": os.path.realpath(sys.executable),
        "content": hashlib.sha256("\n".join(content).encode()).hexdigest(),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if python.exists() and _read_stamp(folder).get("built_from") == wanted:
            return python
        if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").is_file():
            raise ValueError(f"{folder} is in the way: it is not empty and no Python environment")
        shutil.rmtree(folder, ignore_errors=True)
        free = shutil.disk_usage(folder.parent).free / 1e9
        if free < NEEDED_GB:
            raise OSError(
                f"MONAI Label's environment needs {NEEDED_GB:.0f} GB, {folder.parent} has {free:.1f} GB left"
            )
        print(f"Building MONAI Label's environment in {folder} (once, a few minutes) ...", flush=True)
        _install(folder, python, requirements, constraints)
        write_json(folder / STAMP, {"built_from": wanted, "versions": _ask_versions(python)})
    return python


def read_versions(folder: str | os.PathLike | None = None) -> dict[str, str]:
    """Versions of the libraries in an environment that has been built.

    Args:
        folder: the environment, defaults to :func:`default_folder`.
    """
    return dict(_read_stamp(Path(folder or default_folder()).expanduser())["versions"])


def _requirements() -> tuple[list[str], str]:
    """What to install, and the versions that the project is tested with, as a constraints file."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    own = setup.get("options", "install_requires").split()
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    more = [line for line in lines if line and not line.startswith("#")]
    if sys.version_info < (3, 11):
        more = [line.split("==")[0] for line in more]
    return [*own, *more], (ROOT / "constraints.txt").read_text(encoding="utf-8")


def _install(folder: Path, python: Path, requirements: list[str], constraints: str) -> None:
    log = folder.with_name(f"{folder.name}.log")
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    with (
        open(log, "w", encoding="utf-8") as file,
        tqdm(desc="environment", unit="package", dynamic_ncols=True, mininterval=bar_interval()) as bar,
    ):
        _run([sys.executable, "-m", "venv", str(folder)], file, bar)
        pins = folder / "constraints.txt"
        pins.write_text(constraints, encoding="utf-8")
        _run([*pip, "-c", str(pins), *requirements], file, bar)
        _run([*pip, "--no-deps", *WITHOUT_THEIR_PINS], file, bar)
        (site_packages,) = folder.glob("lib/python*/site-packages")
        shutil.copyfile(SHIMS, site_packages / f"{SHIMS_MODULE}.py")
        test = [str(python), "-c", "import torchvision"]
        refused = subprocess.run(test, capture_output=True, text=True, check=False).stderr
        needed = "torchvision::nms does not exist" in refused
        # A .pth file is read by every process of this environment, and by none of another.
        line = f"import {SHIMS_MODULE}; {SHIMS_MODULE}.install(torchvision_operators={needed})\n"
        (site_packages / f"{SHIMS_MODULE}.pth").write_text(line, encoding="utf-8")
        _run([str(python), "-c", "import monailabel.app, torchvision, highdicom"], file, bar)


def _run(command: list[str], log: TextIO, bar: tqdm) -> None:
    """Run one step; its output goes to the log, and the bar counts the packages that pip looks at."""
    last: deque[str] = deque(maxlen=200)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None  # PIPE was asked for
        for line in process.stdout:
            log.write(line)
            last.append(line.strip())
            if line.startswith("Collecting"):
                bar.set_postfix_str(line.split()[1][:30], refresh=False)
                bar.update()
            elif line.startswith("Installing collected"):
                bar.set_postfix_str("unpacking")
    if process.returncode:
        errors = [line for line in last if "error" in line.lower()] or list(last) or ["no message"]
        raise OSError(f"MONAI Label's environment cannot be built: {errors[-1]}; all of it is in {log.name}")


def _ask_versions(python: Path) -> dict[str, str]:
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {NAMED!r}}}))"
    answer = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout
    return {"python": platform.python_version(), **json.loads(answer)}


def _read_stamp(folder: Path) -> dict:
    try:
        return dict(json.loads((folder / STAMP).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
