# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Data lists: which images, which labels, whose patient, which fold."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from custom.data.files import write_json

__all__ = [
    "ANY_FOLD",
    "HELD_OUT",
    "assign_folds",
    "load_cases",
    "read_datalist",
    "relative_path",
    "write_datalist",
]

SECTIONS = ("training", "validation", "testing")
HELD_OUT = "held_out_fold"
ANY_FOLD = "any"  # value of it where no network that drew masks had seen a fold


def _fail(path: Path, where: str, what: str) -> ValueError:
    return ValueError(f"data list {path}, {where}: {what}")


def _check_entry(path: Path, section: str, position: int, entry: Any) -> None:
    where = f"{section}[{position}]"
    if not isinstance(entry, Mapping):
        raise _fail(path, where, f"an object with an 'image' is needed, found {type(entry).__name__}")
    if not isinstance(entry.get("image"), str) or not entry["image"]:
        raise _fail(path, where, "'image' is missing; give the path of the scan, relative to dataset_dir")
    for key in ("label", "lung"):
        if key in entry and (not isinstance(entry[key], str) or not entry[key]):
            raise _fail(path, where, f"'{key}' must be a path, or be left out")
    if "fold" in entry and (isinstance(entry["fold"], bool) or not isinstance(entry["fold"], int)):
        raise _fail(path, where, f"'fold' must be a whole number, found {entry['fold']!r}")
    if not isinstance(entry.get("patient_id", ""), str):
        raise _fail(path, where, f"'patient_id' must be a string, found {entry['patient_id']!r}")
    if section == "training" and "patient_id" not in entry:
        raise _fail(path, where, "'patient_id' is missing; without it one patient could be in two folds")


def read_datalist(path: str | os.PathLike) -> dict[str, Any]:
    """Read and check a Decathlon-style data list.

    The list is a JSON object whose sections ``training``, ``validation`` and ``testing`` hold entries
    ``{"image": ..., "label": ..., "patient_id": ..., "fold": ...}`` with paths relative to the data set's
    folder. A patient is never in two folds or in two sections. Entries of ``training`` without a ``fold`` are
    trained on whichever fold is held out, and never validated on.

    Where masks were drawn by networks that had seen all folds but one, ``held_out_fold`` names that one, and
    :func:`load_cases` refuses to hold out another; None means that they had seen them all.

    Args:
        path: the JSON file.

    Returns:
        The list as it was written.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When the file is no JSON, a field is missing or wrong, an image is named twice, or a
            patient is in two folds or sections.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data list {path} not found; make one with the scripts/prepare commands")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # numbers and nesting without end included
        raise ValueError(f"data list {path} is not valid JSON: {error}") from None
    if not isinstance(content, Mapping) or not any(isinstance(content.get(s), list) for s in SECTIONS):
        raise ValueError(f"data list {path} has none of the sections {', '.join(SECTIONS)}")

    seen_images: dict[str, str] = {}
    seen_patients: dict[str, tuple[str, Any]] = {}
    for section in SECTIONS:
        entries = content.get(section, [])
        if not isinstance(entries, list):
            raise ValueError(f"data list {path}: '{section}' must be a list")
        for position, entry in enumerate(entries):
            _check_entry(path, section, position, entry)
            where = f"{section}[{position}]"
            if entry["image"] in seen_images:
                raise _fail(path, where, f"'{entry['image']}' is already in {seen_images[entry['image']]}")
            seen_images[entry["image"]] = where
            patient = entry.get("patient_id")
            if patient is None:
                continue
            place = (section, entry.get("fold"))
            if seen_patients.setdefault(patient, place) != place:
                raise _fail(
                    path,
                    where,
                    f"patient '{patient}' is in {place} and in {seen_patients[patient]}; keep them together",
                )
    return dict(content)


def load_cases(
    path: str | os.PathLike,
    dataset_dir: str | os.PathLike,
    section: str = "training",
    fold: int | None = None,
    exclude_fold: int | Sequence[int] | None = None,
    label: bool = True,
    labelled_share: float = 0.0,
) -> list[dict[str, Any]]:
    """The cases of one section, with absolute paths, in the order of the list.

    Args:
        path: data list.
        dataset_dir: folder that the list's paths are relative to.
        section: ``training``, ``validation`` or ``testing``.
        fold: keep this fold only.
        exclude_fold: leave this fold, or these folds, out; ``None`` keeps all.
        label: whether every case must have a label.
        labelled_share: in a list that "prepare_covid.py join" made, the cases with a fold, whose masks people
            drew, are repeated until they are at least this share of all (0: not repeated, below 1).

    Returns:
        One dictionary a case: ``image``, ``label`` (and ``lung`` where given) as absolute paths,
        ``patient_id`` and ``name``, which is unique and fit for a file name.

    Raises:
        FileNotFoundError: When the list or a file it names does not exist.
        ValueError: When the list is wrong, nothing is left, or a fold is left out that what drew masks of the
            list had seen.
    """
    content = read_datalist(path)
    if section not in SECTIONS:
        raise ValueError(
            f"unknown section '{section}' of data list {path}; choose from {', '.join(SECTIONS)}"
        )
    entries = content.get(section, [])
    folds = sorted({e["fold"] for e in entries if "fold" in e})
    excluded = [exclude_fold] if isinstance(exclude_fold, int) else list(exclude_fold or ())
    for wanted in (fold, *excluded):
        if wanted is not None and wanted not in folds:
            raise ValueError(
                f"data list {path} has no fold {wanted} in '{section}'; it has {folds or 'none'}"
            )
    if excluded and HELD_OUT in content and content[HELD_OUT] not in (ANY_FOLD, *excluded):
        raise ValueError(
            f"data list {path} holds masks drawn by networks that had seen all folds but "
            f"{'none' if content[HELD_OUT] is None else content[HELD_OUT]}; with fold {excluded[0]} held out "
            "its scores would be too good"
        )
    if fold is not None:
        entries = [e for e in entries if e.get("fold") == fold]
    entries = [e for e in entries if e.get("fold") not in excluded]
    if not entries:
        raise ValueError(
            f"data list {path}: no case is left in '{section}' (fold {fold}, without {exclude_fold})"
        )

    root = Path(dataset_dir)
    cases = []
    for entry in entries:
        if label and "label" not in entry:
            raise ValueError(f"data list {path}: '{entry['image']}' has no label; give one or leave it out")
        case: dict[str, Any] = {"patient_id": entry.get("patient_id", "")}
        for key in ("image", "label", "lung"):
            if key in entry:
                file = root / entry[key]
                if not file.exists():
                    raise FileNotFoundError(
                        f"{file} not found; data list {path} names it, is dataset_dir right?"
                    )
                case[key] = str(file.resolve())
        case["name"] = _stem(entry["image"])
        cases.append(case)
    shared = {name for name, count in Counter(c["name"] for c in cases).items() if count > 1}
    for case, entry in zip(cases, entries, strict=True):
        if case["name"] in shared:  # the same file name in several folders
            case["name"] = "_".join(Path(entry["image"]).parts[:-1] + (case["name"],))
    if not 0 <= labelled_share < 1:
        raise ValueError(f"labelled_share must be 0 or more and below 1, got {labelled_share}")
    drawn = [case for case, entry in zip(cases, entries, strict=True) if "fold" in entry]
    if HELD_OUT in content and drawn and labelled_share:
        needed = labelled_share / (1 - labelled_share) * (len(cases) - len(drawn))
        cases += drawn * (math.ceil(needed / len(drawn)) - 1)
    return cases


def _stem(name: str) -> str:
    stem = Path(name).name
    for suffix in (".nii.gz", ".nii", ".png", ".jpg", ".jpeg"):
        if stem.lower().endswith(suffix):
            return stem[: -len(suffix)]
    return stem


def assign_folds(patients: Sequence[str], n_folds: int, seed: int = 0) -> list[int]:
    """Give every case a fold so that a patient's cases stay together and folds are alike in size.

    Patients are shuffled, then taken largest first, each into the fold that has the fewest cases so far.

    Args:
        patients: the patient id of each case.
        n_folds: number of folds, at least 2 and at most the number of patients.
        seed: seed of the shuffle.

    Returns:
        A fold number for each case.

    Raises:
        ValueError: When there are fewer patients than folds.
    """
    counts = Counter(patients)
    if not 2 <= n_folds <= len(counts):
        raise ValueError(f"{n_folds} folds are asked for, {len(counts)} patients allow 2 to {len(counts)}")
    order = sorted(counts)
    np.random.default_rng(seed).shuffle(order)
    order.sort(key=lambda patient: -counts[patient])  # stable: ties stay shuffled
    sizes = [0] * n_folds
    fold_of: dict[str, int] = {}
    for patient in order:
        fold = sizes.index(min(sizes))
        fold_of[patient] = fold
        sizes[fold] += counts[patient]
    return [fold_of[patient] for patient in patients]


def relative_path(file: Path, folder: Path) -> str:
    """How a data list in ``folder`` names a file, so that both can be moved together.

    Args:
        file: what is named.
        folder: where the data list is, or will be.
    """
    # ".." leads out of the folder that a link points to, so links to folders are followed first. The file's
    # own name stays: what it links to may be named by a hash.
    return Path(os.path.relpath(file.parent.resolve() / file.name, folder.resolve())).as_posix()


def write_datalist(path: str | os.PathLike, name: str, description: str, **sections: Any) -> None:
    """Write a data list atomically, after checking it as :func:`read_datalist` does.

    Args:
        path: JSON file to write.
        name: the data set's name.
        description: where it comes from, its licence and protocol.
        sections: ``training``, ``validation``, ``testing`` and any further documented fields.

    Raises:
        ValueError: When the list is wrong; nothing is written then.
    """
    content = {
        "name": name,
        "description": description,
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "opacity"},
        **sections,
    }
    path = Path(path)
    draft = path.with_name(f".draft-{path.name}")
    write_json(draft, content)
    try:
        read_datalist(draft)
        write_json(path, content)
    finally:
        draft.unlink(missing_ok=True)
