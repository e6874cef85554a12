# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Zips of bundles: written so that equal content gives equal bytes, read so that nothing can escape."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from custom.data.files import atomic_path

__all__ = ["MAX_BYTES", "MAX_ENTRIES", "MAX_RATIO", "check_archive", "extract_archive", "write_archive"]

MAX_ENTRIES = 5000
MAX_BYTES = 4 << 30
MAX_RATIO = 100
"""What a zip may hold at most: files, bytes once unpacked, and unpacked bytes for each byte of an entry."""

_RATIO_FROM = 1 << 20  # small files of one repeated letter are no bomb
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip can name
_COMPONENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
_ENCRYPTED = 0x1 | 0x40 | 0x2000


def write_archive(path: Path, folder: str, files: Mapping[str, bytes | Path]) -> dict[str, str]:
    """Write files into a zip whose bytes depend on nothing but their names and contents.

    They are stored and not compressed: compressed bytes differ between versions of zlib, and weights, nearly
    all of a bundle, hardly shrink.

    Args:
        path: the zip, which appears whole or not at all.
        folder: the one folder at its top.
        files: content or file for each name in the folder, in the order in which they are written.

    Returns:
        SHA-256 of each file as it was written.
    """
    hashes = {}
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, source in files.items():
            entry = zipfile.ZipInfo(f"{folder}/{name}", _EPOCH)
            entry.create_system = 3  # Unix, which the permissions below are for
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            entry.file_size = len(source) if isinstance(source, bytes) else source.stat().st_size
            digest = hashlib.sha256()
            with archive.open(entry, "w") as target:
                for block in [source] if isinstance(source, bytes) else _blocks(source):
                    digest.update(block)
                    target.write(block)
            hashes[name] = digest.hexdigest()
    return hashes


def _blocks(path: Path) -> Iterable[bytes]:
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            yield block


def check_archive(path: Path) -> list[str]:
    """Findings about a zip that make it unsafe to unpack; only its directory is read.

    Args:
        path: the zip.
    """
    if path.stat().st_size > MAX_BYTES:
        return [f"the zip has more than {MAX_BYTES} bytes"]
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        return [f"not a zip, or a damaged one: {error}"]
    if len(entries) > MAX_ENTRIES:
        return [f"the zip holds {len(entries)} files, more than {MAX_ENTRIES}"]
    findings = []
    total = sum(entry.file_size for entry in entries)
    if total > MAX_BYTES:
        findings.append(f"unpacked it would have {total} bytes, more than {MAX_BYTES}: a zip bomb")
    for entry in entries:
        if fault := _entry_fault(entry):
            findings.append(f"{_shown(entry)}: {fault}")
    files = {entry.filename for entry in entries if not entry.is_dir()}
    for name, count in Counter(entry.filename.rstrip("/").lower() for entry in entries).items():
        if count > 1:
            findings.append(f"{name!a}: {count} entries have this name")
    above = {os.fspath(folder) for name in files for folder in PurePosixPath(name).parents}
    findings += [f"{name!a}: is a file and a folder" for name in sorted(files & above)]
    tops = {entry.filename.split("/")[0] for entry in entries}
    if not files or len(tops) != 1 or not all("/" in name for name in files):
        findings.append("the zip must hold one folder, the bundle, and nothing beside it")
    return findings


def _entry_fault(entry: zipfile.ZipInfo) -> str:
    # The name as it is stored: zipfile cuts at a zero byte and turns Windows' separators.
    name = entry.orig_filename
    parts = name.rstrip("/").split("/")
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or re.match(r"[A-Za-z]:", name):
        return "would be written outside the bundle's folder"
    if not all(_COMPONENT.fullmatch(part) and not part.endswith(".") for part in parts):
        return "has a name that is hidden or not safe on every system"
    if kind == stat.S_IFLNK:
        return "is a symbolic link"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is neither a file nor a folder"
    if entry.flag_bits & _ENCRYPTED:
        return "is encrypted"
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "is compressed by an uncommon method"
    if entry.file_size > max(_RATIO_FROM, MAX_RATIO * entry.compress_size):
        return f"grows from {entry.compress_size} to {entry.file_size} bytes when unpacked: a zip bomb"
    return ""


def _shown(entry: zipfile.ZipInfo) -> str:
    return ascii(entry.orig_filename[:100])


def extract_archive(path: Path, folder: Path) -> Path:
    """Unpack a zip that :func:`check_archive` has nothing against.

    Args:
        path: the zip.
        folder: an empty folder to unpack into.

    Returns:
        The bundle's folder in it.

    Raises:
        ValueError: When an entry is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        entries = [entry for entry in archive.infolist() if not entry.is_dir()]
        for entry in entries:
            target = folder / entry.filename
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with archive.open(entry) as source, open(target, "xb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
            except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, OSError) as error:
                raise ValueError(f"{_shown(entry)} cannot be unpacked: {error}") from None
            except Exception as error:  # zlib's own
                raise ValueError(f"{_shown(entry)} is damaged: {error}") from None
    return folder / entries[0].filename.split("/")[0]
