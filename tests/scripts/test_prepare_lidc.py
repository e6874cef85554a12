# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from lidc_phantom import write_case

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def main():
    spec = importlib.util.spec_from_file_location("prepare_lidc", ROOT / "scripts" / "prepare_lidc.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def words(tmp_path):
    write_case(tmp_path / "in", 1)
    return ["--source", str(tmp_path / "in"), "--output-dir", str(tmp_path / "out")]


def test_exit_codes(main, words, tmp_path, capsys):
    assert main(words) == 0
    assert "1 scans of 1 patients (0 from an earlier run), 2 nodules on 8 slices" in capsys.readouterr().out
    broken = write_case(tmp_path / "in", 2)
    next(broken.dicom.glob("*.dcm")).write_bytes(b"")
    assert main([*words, "--four-readers", "--folds", "3", "--seed", "5", "--workers", "1"]) == 1
    assert f"failed, {broken.series_uid}: 1 of the files beside its slices" in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "datalist_all.json").read_text())
    assert content["protocol"] == "voxels that at least 2 of 4 readers have" and len(content["training"]) == 1
    assert main([*words, "--validation-fraction", "2"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors == ["error: validation_fraction must be from 0 to less than 1, got 2"]
    assert main(["--source", str(tmp_path / "none"), "--output-dir", str(tmp_path / "out")]) == 2
    assert "error: no such folder" in capsys.readouterr().err


def test_downloading_is_asked_for_and_needs_its_client(main, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "idc_index", None)
    assert main([*words, "--download"]) == 2
    assert "error: --download needs --xml-dir" in capsys.readouterr().err
    assert main([*words, "--download", "--xml-dir", str(tmp_path / "in")]) == 2
    assert capsys.readouterr().err.strip().endswith("pip install idc-index")


def test_only_scans_with_nodules_are_asked_for(main, words, tmp_path, monkeypatch):
    """The call alone; the service itself is out of reach of the tests."""
    calls = []

    class Client:
        def download_from_selection(self, folder, **selection):
            calls.append((folder, selection))

    client = ModuleType("idc_index")
    client.IDCClient = Client
    monkeypatch.setitem(sys.modules, "idc_index", client)
    with_nodule, without = write_case(tmp_path / "more", 2), write_case(tmp_path / "more", 3)
    without.xml.write_text(without.xml.read_text().replace("unblindedReadNodule", "other"))
    assert main([*words, "--download", "--xml-dir", str(tmp_path / "more")]) == 2  # nothing was fetched
    assert calls == [
        (str(tmp_path / "in"), {"seriesInstanceUID": [with_nodule.series_uid], "use_s5cmd_sync": True})
    ]
