# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Data lists of checked COVID-19 CT volumes and of slices made from them, and a summary of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from custom.data.covid_checks import HU
from custom.data.covid_volumes import CovidVolume
from custom.data.datalist import assign_folds, read_datalist, relative_path, write_datalist
from custom.data.work import LISTED, LeftOut, describe_left_out, write_left_out

__all__ = [
    "CovidSummary",
    "check_folds",
    "list_slices",
    "list_volumes",
    "slice_entry",
    "with_folds",
    "write_lists",
]


@dataclass(frozen=True)
class CovidSummary:
    """What one of the ``prepare`` functions did.

    Args:
        datalist: data list of the volumes, None where there are none in HU.
        slice_list: data list of the plain slices, None where none were asked for.
        cases: one dictionary a volume, as in its file ``cases/<name>.json``.
        reused: how many of them an earlier run had finished.
        left_out: everything else; also in ``skipped.json``.
    """

    datalist: Path | None
    slice_list: Path | None
    cases: tuple[dict[str, Any], ...]
    reused: int
    left_out: tuple[LeftOut, ...]

    @property
    def failed(self) -> tuple[LeftOut, ...]:
        """What should have become a case and did not."""
        return tuple(one for one in self.left_out if one.failed)

    def __str__(self) -> str:
        lines = []
        for path, unit in ((self.datalist, "volumes"), (self.slice_list, "slices")):
            if path is None:
                continue
            content = read_datalist(path)
            for section in ("training", "validation", "testing"):
                if entries := content.get(section):
                    patients = len({entry["patient_id"] for entry in entries})
                    folds = len({entry["fold"] for entry in entries if "fold" in entry})
                    lines.append(
                        f"{path}: {len(entries)} {unit} of {patients} patients for {section}"
                        + (f" in {folds} folds" if folds else "")
                    )
        if self.reused:
            lines.append(f"checked in an earlier run: {self.reused} of {len(self.cases)} volumes")
        notes = [f"{case['name']}: {note}" for case in self.cases for note in case["notes"]]
        lines += [f"note, {note}" for note in notes[:LISTED]]
        lines += [f"note: {len(notes) - LISTED} more"] if len(notes) > LISTED else []
        return "\n".join([*lines, *describe_left_out(self.left_out)])


def list_volumes(
    volumes: Sequence[CovidVolume], cases: Sequence[dict[str, Any]], output: Path
) -> list[dict[str, Any]]:
    """Entries of the volumes in HU for a data list in ``output``.

    Images, and masks that are used in place, are named by their path relative to ``output``: the data set and
    the data list can be moved together.

    Args:
        volumes: the cases' files.
        cases: their records, from :func:`custom.data.covid_volumes.check_volumes`.
        output: where the data list will be.
    """
    files = {volume.name: volume for volume in volumes}
    entries = []
    for case in cases:
        if case["values"] != HU:
            continue
        volume, name = files[case["name"]], f"{case['name']}.nii.gz"
        label = relative_path(volume.mask, output) if case["label_in_place"] else f"labels/{name}"
        entry = {"image": relative_path(volume.image, output), "label": label}
        if volume.lung is not None and case["lung_in_place"]:
            entry["lung"] = relative_path(volume.lung, output)
        elif f"lungs/{name}" in case["written"]:
            entry["lung"] = f"lungs/{name}"
        entries.append(entry | {"patient_id": case["patient_id"]})
    return entries


def list_slices(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries of the pictures of volumes for a data list in ``slices/``.

    Args:
        cases: the volumes' records, from :func:`custom.data.covid_volumes.check_volumes`.
    """
    return [slice_entry(stem, case["patient_id"]) for case in cases for stem in case["slices"]]


def slice_entry(stem: str, patient: str) -> dict[str, Any]:
    """The entry of a picture for a data list in ``slices/``.

    Args:
        stem: name of the picture, without ``.png``.
        patient: whose it is.
    """
    return {"image": f"images/{stem}.png", "label": f"masks/{stem}.png", "patient_id": patient}


def check_folds(n_folds: int) -> None:
    """Refuse fewer than 2 folds, before hours of work.

    Args:
        n_folds: number of folds.

    Raises:
        ValueError: When they are fewer.
    """
    if n_folds < 2:
        raise ValueError(f"n_folds must be at least 2, got {n_folds}")


def with_folds(entries: Sequence[dict[str, Any]], n_folds: int, seed: int) -> list[dict[str, Any]]:
    """Entries with folds by patient, fewer folds where there are fewer patients.

    Args:
        entries: of a data list, each with a ``patient_id``.
        n_folds: number of folds.
        seed: seed of the folds.
    """
    patients = [entry["patient_id"] for entry in entries]
    n_folds = min(n_folds, len(set(patients)))
    folds = assign_folds(patients, n_folds, seed) if n_folds > 1 else [0] * len(patients)
    return [entry | {"fold": fold} for entry, fold in zip(entries, folds, strict=True)]


def write_lists(
    output: Path,
    source: Path,
    name: str,
    description: str,
    sections: Mapping[str, Sequence[dict[str, Any]]],
    slices: Sequence[dict[str, Any]],
    cases: Sequence[dict[str, Any]],
    left_out: Sequence[LeftOut],
    **more: Any,
) -> CovidSummary:
    """Write ``skipped.json`` and the data lists that have an entry.

    Args:
        output: gets ``skipped.json``, ``datalist.json`` and ``slices/datalist.json``.
        source: the data set's folder, for the message.
        name: of the data set.
        description: where it comes from, its licence.
        sections: entries of the volumes.
        slices: entries of the pictures, which are all for training.
        cases: records of the volumes.
        left_out: everything else.
        more: further fields of both lists.

    Raises:
        ValueError: When there is not one entry.
    """
    left_out = write_left_out(output, left_out)
    filled = {section: list(entries) for section, entries in sections.items() if entries}
    if not filled and not slices:
        first = f"; the first is {left_out[0].what}: {left_out[0].reason}" if left_out else ""
        raise ValueError(f"no case of {name} under {source} can be used, {len(left_out)} left out{first}")
    if filled:
        write_datalist(output / "datalist.json", name, description, **more, **filled)
    if slices:
        write_datalist(output / "slices" / "datalist.json", name, description, **more, training=list(slices))
    reused = sum(case["reused"] for case in cases)
    kept = tuple({key: value for key, value in case.items() if key != "reused"} for case in cases)
    return CovidSummary(
        output / "datalist.json" if filled else None,
        output / "slices" / "datalist.json" if slices else None,
        kept,
        reused,
        tuple(left_out),
    )
