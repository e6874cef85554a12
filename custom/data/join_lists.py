# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Labelled slices, pseudo-labels and negatives on one data list, which holds out labelled slices alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from custom.console import bar_interval
from custom.data.datalist import ANY_FOLD, HELD_OUT, SECTIONS, read_datalist, relative_path, write_datalist
from custom.data.files import file_sha256
from custom.data.plain_slices import SAME_PATIENT_CORRELATION, read_picture, thumbnails

__all__ = ["JoinedList", "join_datalists", "parse_fold"]


@dataclass(frozen=True)
class JoinedList:
    """What :func:`join_datalists` wrote.

    Args:
        datalist: the list.
        sources: name, hash and number of entries of each list that went into it.
        left_out: images that look like a held-out slice, with the reason.
    """

    datalist: Path
    sources: tuple[dict[str, Any], ...]
    left_out: tuple[dict[str, str], ...]

    def __str__(self) -> str:
        total = sum(source["entries"] for source in self.sources)
        lines = [f"{total} slices: {self.datalist}"]
        lines += [f"{source['entries']} of {source['name']}" for source in self.sources]
        lines += [f"left out, {one['image']}: {one['reason']}" for one in self.left_out]
        return "\n".join(lines)


def join_datalists(
    labelled: str | os.PathLike,
    additions: Sequence[str | os.PathLike],
    output_dir: str | os.PathLike,
    held_out_fold: int | str | None,
) -> JoinedList:
    """Join a data list in folds with lists that are only trained on.

    The labelled list keeps its folds; what is added has none, so it is trained on whichever fold is held out
    and never validated on. The joined list records the held-out fold, and
    :func:`custom.data.datalist.load_cases` refuses to hold out another.

    Args:
        labelled: data list of 8-bit slices in folds.
        additions: data lists without folds: pseudo-labels, negatives.
        output_dir: gets ``datalist.json``, with paths relative to it; no picture is copied.
        held_out_fold: the fold that will be held out, which the networks that drew pseudo-labels must not
            have seen; "any" where no list holds masks that networks drew; None for the final training, after
            which nothing of the labelled list can be scored.

    Raises:
        FileNotFoundError: When a list or a picture is not there.
        ValueError: When pseudo-labels come from networks that had seen the held-out fold, or lists cannot be
            joined.
    """
    output = Path(output_dir)
    first = Path(labelled)
    content = read_datalist(first)
    entries = content.get("training", [])
    folds = sorted({entry["fold"] for entry in entries if "fold" in entry})
    if HELD_OUT in content or len(folds) < 2 or any("fold" not in entry for entry in entries):
        raise ValueError(
            f"data list {first} must be a labelled one, with every entry of 'training' in a fold"
        )
    if held_out_fold not in (None, ANY_FOLD, *folds):
        raise ValueError(f"data list {first} has no fold {held_out_fold}; it has {folds}")
    held_out = [entry for entry in entries if held_out_fold in (ANY_FOLD, entry["fold"])]
    joined = [_rebase(entry, first.parent, output) for entry in entries]
    sources = [_source(content, first, len(entries))]
    seen = {_digest(first.parent / entry["image"]): entry["image"] for entry in entries}
    patients = {entry["patient_id"] for entry in entries}
    looks = _looks(first.parent / entry["image"] for entry in held_out)
    left_out: list[dict[str, str]] = []
    for path in map(Path, additions):
        content = read_datalist(path)
        _check_addition(path, content, held_out_fold)
        kept = 0
        bar = tqdm(
            content["training"],
            desc=path.parent.name,
            unit="slice",
            dynamic_ncols=True,
            mininterval=bar_interval(),
        )
        for entry in bar:
            image = path.parent / entry["image"]
            if entry["patient_id"] in patients:
                raise ValueError(f"{path}: patient '{entry['patient_id']}' is in {first} too")
            if (twin := seen.setdefault(_digest(image), str(image))) != str(image):
                raise ValueError(f"{path}: {image} is the same picture as {twin}")
            alike = (looks @ _looks([image]).T).ravel() if held_out else np.zeros(0)
            if len(alike) and alike.max() >= SAME_PATIENT_CORRELATION:
                other = held_out[int(alike.argmax())]["image"]
                reason = f"looks like {other}, which can be held out (correlation {alike.max():.2f})"
                left_out.append({"image": str(image), "reason": reason})
                continue
            joined.append(_rebase(entry, path.parent, output))
            kept += 1
        sources.append(_source(content, path, kept))
    names = " + ".join(source["name"] for source in sources)
    words: dict[Any, str] = {None: "no fold", ANY_FOLD: "any fold"}
    which = words.get(held_out_fold, f"only fold {held_out_fold}")
    end = f"{which} can be held out"
    write_datalist(
        output / "datalist.json",
        names,
        " | ".join(source["description"] for source in sources if source["description"]),
        protocol=f"what has no fold is trained on only; {end}",
        **{HELD_OUT: held_out_fold},
        sources=sources,
        left_out=[{**one, "image": relative_path(Path(one["image"]), output)} for one in left_out],
        training=joined,
    )
    return JoinedList(output / "datalist.json", tuple(sources), tuple(left_out))


def parse_fold(text: str) -> int | None:
    """A fold as it is given on a command line.

    Args:
        text: its number, or "none".

    Raises:
        ValueError: When it is neither.
    """
    if text == "none":
        return None
    if not text.isdecimal():
        raise ValueError(f"'{text}' is no fold; give its number, or 'none'")
    return int(text)


def _check_addition(path: Path, content: dict[str, Any], held_out_fold: int | str | None) -> None:
    filled = [section for section in SECTIONS if content.get(section)]
    if filled != ["training"]:
        raise ValueError(f"data list {path} has the sections {filled}; only 'training' can be added")
    for entry in content["training"]:
        if "fold" in entry:
            raise ValueError(
                f"data list {path}: '{entry['image']}' is in a fold; only lists without can be added"
            )
        if "label" not in entry:
            raise ValueError(f"data list {path}: '{entry['image']}' has no label")
    teachers = content.get("teachers")
    if teachers is None or held_out_fold is None:
        return
    unseen = teachers.get("unseen_fold") if isinstance(teachers, dict) else None
    if unseen != held_out_fold:
        what = "all folds" if unseen is None else f"all folds but {unseen}"
        which = "not any fold can" if held_out_fold == ANY_FOLD else f"fold {held_out_fold} cannot"
        raise ValueError(
            f"data list {path} has masks of networks that had seen {what}; {which} be held out with them"
        )


def _rebase(entry: dict[str, Any], folder: Path, output: Path) -> dict[str, Any]:
    named = [key for key in ("image", "label", "lung") if key in entry]
    return {**entry, **{str(key): relative_path(folder / entry[key], output) for key in named}}


def _source(content: dict[str, Any], path: Path, entries: int) -> dict[str, Any]:
    found = {"name": content.get("name", ""), "description": content.get("description", "")}
    teachers = {"teachers": content["teachers"]} if "teachers" in content else {}
    return {**found, "sha256": _digest(path), "entries": entries, **teachers}


def _looks(files: Iterable[Path]) -> np.ndarray:
    return thumbnails(read_picture(file) for file in files)


def _digest(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found; a data list names it")
    return file_sha256(path)
