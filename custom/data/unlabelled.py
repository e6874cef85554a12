# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Volumes stored as single 8-bit slices without masks, made to look like the slices of a training."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from custom.console import bar_interval
from custom.data.files import atomic_path, file_sha256, write_json
from custom.data.grey_match import LEVELS, count_greys, match_peaks
from custom.data.plain_slices import ORIENTATIONS, SUFFIXES, read_picture, turn
from custom.data.work import LeftOut, describe_left_out, write_left_out

__all__ = ["LIST_NAME", "UnlabelledSummary", "evenly_spaced", "prepare_unlabelled", "read_unlabelled"]

LIST_NAME = "unlabelled.json"
VERSION = 1  # raise it when the slices would come out differently


@dataclass(frozen=True)
class UnlabelledSummary:
    """What :func:`prepare_unlabelled` did.

    Args:
        list_file: the list of slices.
        volumes: one dictionary a volume, as in ``list_file``.
        reused: how many of them an earlier run had finished.
        failed: files and volumes that could not be used.
    """

    list_file: Path
    volumes: tuple[dict[str, Any], ...]
    reused: int
    failed: tuple[LeftOut, ...]

    def __str__(self) -> str:
        count = sum(len(volume["slices"]) for volume in self.volumes)
        reused = f" ({self.reused} from an earlier run)" if self.reused else ""
        lines = [f"{count} slices of {len(self.volumes)} volumes{reused}: {self.list_file}"]
        return "\n".join([*lines, *describe_left_out(self.failed)])


@dataclass(frozen=True)
class _Job:
    name: str
    files: tuple[tuple[int, Path], ...]  # by slice number
    orientation: str
    per_volume: int | None
    output: Path

    @property
    def key(self) -> str:
        """Changes when the slices would come out differently."""
        sources = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for _, file in self.files]
        text = json.dumps([VERSION, self.orientation, self.per_volume, sources])
        return hashlib.sha256(text.encode()).hexdigest()


def prepare_unlabelled(
    source: str | os.PathLike,
    output_dir: str | os.PathLike,
    orientation: str = "upright",
    orientations: Mapping[str, str] | None = None,
    per_volume: int | None = None,
) -> UnlabelledSummary:
    """Turn slices upright and bring their grey values to those of the labelled slices, volume by volume.

    A file's name is its volume, an underscore, and the number of its slice. Each volume has one linear
    mapping of grey values, from the histogram of all its slices, see :mod:`custom.data.grey_match`.

    Args:
        source: folder of 8-bit slices.
        output_dir: gets ``images/``, ``volumes/`` (one JSON a volume), ``unlabelled.json``, ``skipped.json``
            and ``overview.png``, the middle slice of each volume, to look at: it shows a volume that is
            turned another way, which nothing else does.
        orientation: how the slices are stored, one of :data:`custom.data.plain_slices.ORIENTATIONS`.
        orientations: other orientations for volumes whose names match a pattern (``*``, ``?``); the first
            pattern that fits is taken.
        per_volume: slices to write of each volume, evenly spaced; all where None.

    Raises:
        FileNotFoundError: When there is no folder, or no slice in it.
        ValueError: When an option is wrong, or no volume can be used.
    """
    _check_options(orientation, orientations or {}, per_volume)
    output = Path(output_dir)
    groups, failed = _group(Path(source))
    for pattern in orientations or {}:
        if not any(fnmatchcase(name, pattern) for name in groups):
            raise ValueError(
                f"no volume under {source} is named like '{pattern}'; the first is {min(groups)}"
            )
    total = sum(len(files) for files in groups.values())
    volumes: list[dict[str, Any]] = []
    with tqdm(
        total=total, desc="slices", unit="slice", dynamic_ncols=True, mininterval=bar_interval()
    ) as bar:
        for name, files in sorted(groups.items()):
            stored = next((o for p, o in (orientations or {}).items() if fnmatchcase(name, p)), orientation)
            done, broken = _prepare_volume(_Job(name, tuple(sorted(files)), stored, per_volume, output))
            failed += broken
            volumes += [done] if done is not None else []
            bar.update(len(files))
    failed = write_left_out(output, failed)
    if not volumes:
        raise ValueError(f"no volume under {source} can be used; {failed[0].what}: {failed[0].reason}")
    reused = sum(volume.pop("reused") for volume in volumes)
    content = {"per_volume": per_volume, "volumes": volumes}
    write_json(output / LIST_NAME, content)
    _write_overview(output, volumes)
    return UnlabelledSummary(output / LIST_NAME, tuple(volumes), reused, tuple(failed))


def read_unlabelled(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The slices that :func:`prepare_unlabelled` wrote, in the order of volumes and slices.

    Args:
        folder: its ``output_dir``.

    Returns:
        One dictionary a slice: ``image`` (path relative to the folder), ``sha256``, ``number``, ``volume``.

    Raises:
        FileNotFoundError: When there is no list.
        ValueError: When it is none of ours.
    """
    path = Path(folder) / LIST_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found; make it with scripts/prepare_covid.py unlabelled")
    try:
        volumes = json.loads(path.read_text(encoding="utf-8"))["volumes"]
        return [
            {"image": str(one["image"]), "sha256": str(one["sha256"]), "number": int(one["number"])}
            | {"volume": str(volume["name"])}
            for volume in volumes
            for one in volume["slices"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no list of unlabelled slices: {error}; make it again") from None


def evenly_spaced(count: int, wanted: int | None) -> list[int]:
    """Positions of ``wanted`` of ``count`` things, the middles of as many equal parts; all where None."""
    if wanted is None or wanted >= count:
        return list(range(count))
    return [int((part + 0.5) * count / wanted) for part in range(wanted)]


def _check_options(orientation: str, orientations: Mapping[str, str], per_volume: int | None) -> None:
    for one in (orientation, *orientations.values()):
        if one not in ORIENTATIONS:
            raise ValueError(f"unknown orientation '{one}'; choose from {', '.join(ORIENTATIONS)}")
    if per_volume is not None and per_volume < 1:
        raise ValueError(f"at least 1 slice per volume is needed, got {per_volume}")


def _group(source: Path) -> tuple[dict[str, list[tuple[int, Path]]], list[LeftOut]]:
    """Slices by volume."""
    if not source.is_dir():
        raise FileNotFoundError(f"folder {source} not found")
    groups: dict[str, dict[int, Path]] = {}
    failed = []
    for path in sorted(source.iterdir()):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
            continue
        parts = re.fullmatch(r"(.+)_(\d+)", path.stem)
        if parts is None:
            reason = "its name does not end in an underscore and the number of its slice"
            failed.append(LeftOut(path.name, "bad file", reason, True))
            continue
        slices, number = groups.setdefault(parts[1], {}), int(parts[2])
        if number in slices:
            reason = f"{slices[number].name} is the same slice of the same volume"
            failed.append(LeftOut(path.name, "bad file", reason, True))
        else:
            slices[number] = path
    if not groups:
        raise FileNotFoundError(f"no slices named VOLUME_NUMBER ({', '.join(SUFFIXES)}) in {source}")
    return {name: list(slices.items()) for name, slices in groups.items()}, failed


def _prepare_volume(job: _Job) -> tuple[dict[str, Any] | None, list[LeftOut]]:
    record = job.output / "volumes" / f"{job.name}.json"
    if (finished := _finished(record, job)) is not None:
        return finished, []
    histogram, readable, broken = np.zeros(LEVELS, int), [], []
    for number, file in job.files:
        try:
            histogram += count_greys(read_picture(file))
            readable.append((number, file))
        except ValueError as error:
            broken.append(LeftOut(file.name, "bad file", str(error), True))
    try:
        mapping = match_peaks(histogram)
    except ValueError as error:
        broken.append(LeftOut(f"volume {job.name}", "grey values", str(error), True))
        return None, broken
    slices = []
    for position in evenly_spaced(len(readable), job.per_volume):
        number, file = readable[position]
        name = f"images/{job.name}_{number:04d}.png"
        pixels = np.ascontiguousarray(turn(mapping(read_picture(file)), job.orientation))
        with atomic_path(job.output / name) as temporary:
            Image.fromarray(pixels).save(temporary, format="PNG")
        digest = file_sha256(job.output / name)
        slices.append({"image": name, "number": number, "source": file.name, "sha256": digest})
    volume = {
        "name": job.name,
        "stored_orientation": job.orientation,
        "peaks": {"lung": mapping.lung, "tissue": mapping.tissue},
        "reference_peaks": {"lung": mapping.reference[0], "tissue": mapping.reference[1]},
        "mapping": {"scale": round(mapping.scale, 6), "offset": round(mapping.offset, 4)},
        "slices_in_volume": len(job.files),
        "slices": slices,
    }
    if not broken:  # else a later run looks at the bad files again, and says so
        write_json(record, volume | {"key": job.key})
    return volume | {"reused": False}, broken


def _finished(record: Path, job: _Job) -> dict[str, Any] | None:
    """The record of a volume that an earlier run finished, and whose slices are still the same."""
    try:
        volume = json.loads(record.read_text(encoding="utf-8"))
        if volume.pop("key") != job.key:
            return None
        for one in volume["slices"]:
            if file_sha256(job.output / one["image"]) != one["sha256"]:
                return None
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return volume | {"reused": True}


def _write_overview(
    output: Path, volumes: Sequence[Mapping[str, Any]], side: int = 160, columns: int = 10
) -> None:
    sheet = np.zeros((-(-len(volumes) // columns) * side, min(columns, len(volumes)) * side), np.uint8)
    for position, volume in enumerate(volumes):
        middle = volume["slices"][len(volume["slices"]) // 2]
        with Image.open(output / middle["image"]) as picture:
            small = np.asarray(picture.resize((side, side)))
        row, column = (side * place for place in divmod(position, columns))
        sheet[row : row + side, column : column + side] = small
    with atomic_path(output / "overview.png") as temporary:
        Image.fromarray(sheet).save(temporary, format="PNG")
