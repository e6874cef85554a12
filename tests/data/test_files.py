# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import stat

import pytest

from custom.data.files import atomic_path, write_json


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "sub" / "file.nii.gz"
    with atomic_path(target) as temporary:
        assert temporary.suffixes[-2:] == [".nii", ".gz"]
        temporary.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert [p.name for p in target.parent.iterdir()] == ["file.nii.gz"]


def test_others_may_read_what_is_written(tmp_path):
    write_json(tmp_path / "a.json", {"ä": 1})
    assert (tmp_path / "a.json").stat().st_mode & stat.S_IRGRP
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"ä": 1}


def test_json_holds_no_nan(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"dice": float("nan")})
    assert list(tmp_path.iterdir()) == []
