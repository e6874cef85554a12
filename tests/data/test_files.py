# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import resource
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from custom.data.files import atomic_folder, atomic_path, write_json, write_nifti


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


def test_a_file_that_is_replaced_can_be_kept(tmp_path):
    latest, previous = tmp_path / "latest", tmp_path / "previous"
    for text in "123":
        with atomic_path(latest, keep=previous) as temporary:
            temporary.write_text(text)
    assert (latest.read_text(), previous.read_text()) == ("3", "2")
    with pytest.raises(RuntimeError), atomic_path(latest, keep=previous):
        raise RuntimeError
    assert (latest.read_text(), previous.read_text()) == ("3", "2")


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "sub" / "case"
    for text in "12":
        with atomic_folder(target) as temporary:
            (temporary / "a").write_text(text)
    assert target.stat().st_mode & stat.S_IXGRP
    with pytest.raises(KeyboardInterrupt), atomic_folder(target) as temporary:
        (temporary / "a").write_text("3")
        raise KeyboardInterrupt
    assert [p.name for p in target.parent.iterdir()] == ["case"] and (target / "a").read_text() == "2"


def test_everything_is_synced_before_it_is_renamed_and_the_folder_after(tmp_path, monkeypatch):
    done = []
    fsync, replace, rename = os.fsync, os.replace, type(tmp_path).rename

    def note(kind, call):
        def noted(*args):
            done.append(kind if kind != "sync" else f"sync {stat.S_IFMT(os.fstat(args[0]).st_mode):o}")
            return call(*args)

        return noted

    monkeypatch.setattr(os, "fsync", note("sync", fsync))
    monkeypatch.setattr(os, "replace", note("replace", replace))
    monkeypatch.setattr(type(tmp_path), "rename", note("rename", rename))
    file, folder = f"sync {stat.S_IFREG:o}", f"sync {stat.S_IFDIR:o}"
    write_json(tmp_path / "a.json", {})
    assert done == [file, "replace", folder]
    done.clear()
    with atomic_folder(tmp_path / "b") as temporary:
        for name in "12":
            (temporary / name).touch()
    assert done == [file, file, folder, "rename", folder]


WRITERS = {
    "json": lambda path: write_json(path, list(range(10000))),
    "nii": lambda path: write_nifti(path, np.zeros((40, 40, 40), np.int16), np.eye(4)),
    "nii.gz": lambda path: write_nifti(path, np.random.default_rng(0).random((40, 40, 40)), np.eye(4)),
    "npy": lambda path: save_through(path, lambda target: np.save(target, np.zeros(10000))),
    "pt": lambda path: save_through(path, lambda target: torch.save(torch.zeros(10000), target)),
}


def save_through(path, save):
    with atomic_path(path) as temporary:
        save(temporary)


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_disk_that_fills_up_loses_nothing_and_is_named(tmp_path, suffix):
    """A limit on the size of files stops a write halfway, as a full disk does."""
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b"what was there")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            WRITERS[suffix](path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert path.read_bytes() == b"what was there" and len(list(tmp_path.iterdir())) == 1


def test_a_killed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.nii.gz"
    path.write_bytes(b"what was there")
    code = "import os, signal, sys\nfrom custom.data.files import atomic_path\n"
    code += "with atomic_path(sys.argv[1]) as temporary:\n    temporary.write_bytes(b'half')\n"
    code += "    os.kill(os.getpid(), signal.SIGKILL)\n"
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -9 and path.read_bytes() == b"what was there"
    # What is left over is hidden, so that no listing of scans or slices takes it for one.
    assert all(p == path or p.name.startswith(".partial-") for p in tmp_path.iterdir())


def test_several_writers_of_one_folder_do_not_fail(tmp_path):
    def write(writer: int) -> None:
        for _ in range(40):
            with atomic_folder(tmp_path / "case") as temporary:
                (temporary / "writer").write_text(str(writer))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))  # raises what a writer raised
    assert [p.name for p in tmp_path.iterdir()] == ["case"]
    assert [p.name for p in (tmp_path / "case").iterdir()] == ["writer"]
