# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent


def script(name: str, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_scripts_is_not_a_package():
    """A package of this name would shadow the one that other bundles bring along."""
    assert not (ROOT / "scripts" / "__init__.py").exists()


def test_format_json(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"b": [1,2], "ä": null}')
    assert script("format_json", "--check", str(file)).returncode == 1
    assert script("format_json", str(file)).returncode == 0
    assert file.read_text(encoding="utf-8").startswith('{\n    "b": [\n        1,')
    assert script("format_json", "--check", str(file)).returncode == 0
    file.write_text("{")
    done = script("format_json", str(file))
    assert done.returncode == 2 and "is not valid JSON" in done.stderr


def test_prepare_slices_and_its_user_errors(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        for number in range(2):
            pixels = np.random.default_rng(number).integers(0, 255, (30, 20), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / kind / f"{number}.png")
    paths = ["--images", str(tmp_path / "images"), "--masks", str(tmp_path / "masks")]
    paths += ["--output-dir", str(tmp_path / "out")]
    done = script("prepare_covid", "slices", *paths, "--folds", "2", "--orientation", "transposed")
    assert done.returncode == 0, done.stderr
    assert "2 slices of 2 patients in 2 folds" in done.stdout
    assert len(json.loads((tmp_path / "out" / "datalist.json").read_text())["training"]) == 2
    done = script("prepare_covid", "slices", *paths, "--folds", "3")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: 3 folds are asked for")


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "scripts").glob("*.py")))
def test_every_script_explains_itself(name):
    done = script(name, "--help")
    if name == "deploy_app" and importlib.util.find_spec("monai.deploy") is None:
        # It runs in MONAI Deploy's environment, and says so in any other.
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert done.stderr.startswith("error: ") and "docs/deploy_with_monai_deploy.md" in done.stderr
        return
    assert done.returncode == 0 and "usage:" in done.stdout
