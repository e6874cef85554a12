# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Masks for unlabelled slices, drawn by trained networks, for further networks to train on."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from custom.bundle.teachers import Teachers
from custom.console import CohortError, bar_interval, describe_error
from custom.data.confidence import EMPTY, POSITIVE, ConfidenceRules, Verdict
from custom.data.datalist import relative_path, write_datalist
from custom.data.files import atomic_path, write_json
from custom.data.unlabelled import evenly_spaced, read_unlabelled

__all__ = ["PseudoLabels", "write_pseudo_labels"]

SOURCE_KEY = "source_sha256"  # text in a prediction's PNG: the slice it is of
EMPTY_LEFT = "certainly empty, beyond the share"
POSITIVE_LEFT = "positive, beyond the most certain share"


@dataclass(frozen=True)
class PseudoLabels:
    """What :func:`write_pseudo_labels` did.

    Args:
        datalist: data list of the slices that were kept, all for training and in no fold.
        summary: as in ``pseudo_labels.json``.
    """

    datalist: Path
    summary: dict[str, Any]

    def __str__(self) -> str:
        kept = self.summary["kept"]
        lines = [f"{kept[POSITIVE]} slices with opacities, {kept[EMPTY]} without: {self.datalist}"]
        lines += [f"dropped, {why}: {count}" for why, count in self.summary["dropped"].items()]
        return "\n".join(lines)


def write_pseudo_labels(
    source: str | os.PathLike,
    teachers: Teachers,
    output_dir: str | os.PathLike,
    rules: ConfidenceRules | None = None,
) -> PseudoLabels:
    """Predict prepared slices and keep those predictions as masks that rules trust.

    Predictions are kept on disk: a run that was stopped goes on, and one with other rules needs no network.
    The same slices, weights and rules give the same files.

    Args:
        source: what :func:`custom.data.unlabelled.prepare_unlabelled` wrote.
        teachers: the networks.
        output_dir: gets ``predictions/`` (probabilities, 255 being 1), ``teachers.json``, ``masks/`` (0/255),
            ``datalist.json`` and ``pseudo_labels.json``, an account of every slice.
        rules: which predictions are trusted.

    Raises:
        CohortError: When slices could not be predicted; the list has the others.
        FileNotFoundError: When there are no prepared slices.
        ValueError: When the folder has predictions of other networks, or no slice is kept.
    """
    rules = rules or ConfidenceRules()
    source, output = Path(source), Path(output_dir)
    slices = read_unlabelled(source)
    _check_teachers(output / "teachers.json", teachers)
    verdicts: list[tuple[dict[str, Any], Verdict]] = []
    failures: list[dict[str, str]] = []
    for one in tqdm(slices, desc="slices", unit="slice", dynamic_ncols=True, mininterval=bar_interval()):
        try:
            probability = _predict(source, one, teachers, output)
        except Exception as error:  # MONAI wraps what a transform raises
            if (reason := describe_error(error)) is None:
                raise
            failures.append({"name": one["image"], "reason": reason})
            continue
        verdicts.append((one, rules.judge(probability / 255)))
    failed = CohortError(failures, len(slices), "slices")
    if not verdicts:
        raise failed
    fates = _choose(verdicts, rules)
    entries = []
    for (one, _), fate in zip(verdicts, fates, strict=True):
        name = Path(one["image"]).name
        mask = output / "masks" / name
        if fate not in (POSITIVE, EMPTY):
            mask.unlink(missing_ok=True)  # of an earlier run with other rules
            continue
        with Image.open(output / "predictions" / name) as picture:
            # 128 of 255 is the first level at or above one half.
            pixels = np.where(np.asarray(picture) >= 128, 255, 0).astype(np.uint8)
        with atomic_path(mask) as temporary:
            Image.fromarray(pixels).save(temporary, format="PNG")
        image = relative_path(source / one["image"], output)
        entries.append({"image": image, "label": f"masks/{name}", "patient_id": one["volume"]})
    summary = _summarize(source, teachers, rules, verdicts, fates, failures)
    write_json(output / "pseudo_labels.json", summary)
    if not entries:
        found = ", ".join(f"{why}: {count}" for why, count in summary["dropped"].items())
        raise ValueError(f"no slice is certain enough ({found}); see pseudo_labels.json in {output}")
    _write_list(output, teachers, rules, entries)
    if failures:
        raise failed
    return PseudoLabels(output / "datalist.json", summary)


def _check_teachers(file: Path, teachers: Teachers) -> None:
    """Refuse to mix predictions of different networks."""
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        now = json.loads(json.dumps(teachers.description))
        if changed := [key for key in now if now[key] != before.get(key)]:
            raise ValueError(
                f"{file.parent} has predictions of other networks ({', '.join(changed)} changed); give "
                "another output folder, or remove that one"
            )
    else:
        write_json(file, teachers.description)


def _predict(source: Path, one: dict[str, Any], teachers: Teachers, output: Path) -> np.ndarray:
    """The probabilities of a slice, (H, W) uint8, from the disk where they are there."""
    file = output / "predictions" / Path(one["image"]).name
    try:
        with Image.open(file) as picture:
            if picture.info.get(SOURCE_KEY) == one["sha256"]:
                return np.asarray(picture)
    except (FileNotFoundError, OSError):
        pass  # not predicted yet, or damaged
    probability = np.rint(teachers.predict(source / one["image"]) * 255).astype(np.uint8)
    info = PngInfo()
    info.add_text(SOURCE_KEY, one["sha256"])
    with atomic_path(file) as temporary:
        Image.fromarray(probability).save(temporary, format="PNG", pnginfo=info)
    return probability


def _choose(verdicts: Sequence[tuple[dict[str, Any], Verdict]], rules: ConfidenceRules) -> list[str]:
    """What becomes of each slice, after the shares that are kept."""
    fates = [verdict.kind for _, verdict in verdicts]
    empty = [position for position, fate in enumerate(fates) if fate == EMPTY]
    wanted = round(rules.keep_empty * len(empty))
    kept = {empty[place] for place in evenly_spaced(len(empty), wanted)} if wanted else set()
    positive = [position for position, fate in enumerate(fates) if fate == POSITIVE]
    positive.sort(key=lambda position: -verdicts[position][1].certainty)  # stable: ties stay in order
    kept.update(positive[: round(rules.keep_positive * len(positive))])
    left = {EMPTY: EMPTY_LEFT, POSITIVE: POSITIVE_LEFT}
    return [fate if position in kept else left.get(fate, fate) for position, fate in enumerate(fates)]


def _summarize(
    source: Path,
    teachers: Teachers,
    rules: ConfidenceRules,
    verdicts: Sequence[tuple[dict[str, Any], Verdict]],
    fates: Sequence[str],
    failures: Sequence[dict[str, str]],
) -> dict[str, Any]:
    counts = Counter(fates)
    return {
        "source": source.name,
        "teachers": teachers.description,
        "rules": asdict(rules),
        "kept": {POSITIVE: counts.pop(POSITIVE, 0), EMPTY: counts.pop(EMPTY, 0)},
        "dropped": dict(sorted(counts.items())),
        "failed": list(failures),
        "slices": [
            {"image": one["image"], "sha256": one["sha256"], "volume": one["volume"], "fate": fate}
            | {key: round(value, 4) for key, value in asdict(verdict).items() if key != "kind"}
            for (one, verdict), fate in zip(verdicts, fates, strict=True)
        ],
    }


def _write_list(
    output: Path, teachers: Teachers, rules: ConfidenceRules, entries: Sequence[dict[str, Any]]
) -> None:
    about = teachers.description
    seen = "all folds" if teachers.unseen_fold is None else f"all folds but {teachers.unseen_fold}"
    write_datalist(
        output / "datalist.json",
        "pseudo-labels",
        f"Masks drawn by networks of {about['bundle']} ({len(about['weights'])}), trained on {seen}; no "
        "radiologist has seen them",
        protocol="all slices are for training and in no fold",
        teachers=about,
        rules=asdict(rules),
        training=list(entries),
    )
