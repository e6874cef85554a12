# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Writes what the prediction for a single slice means: mask, numbers, picture."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from skimage.segmentation import find_boundaries

from custom.console import CohortError, read_switch
from custom.data.cohort import CohortLoader
from custom.data.pictures import write_picture
from custom.data.plain_slices import turn_back
from custom.data.slice_pose import SIDEWAYS_ORIENTATIONS, SIDEWAYS_WARNING, lie_sideways, measure_pose
from custom.reporting.table import write_table
from custom.transforms.greys import GREY_MATCH
from custom.transforms.invert import check_threshold

__all__ = ["SliceReport"]

logger = logging.getLogger(__name__)

_RED = (255, 40, 40)


class SliceReport:
    """Writes, for every picture of a slice that an evaluator has segmented, into ``output_dir``:

    - ``masks/<name>.png``: 255 where there is opacity, else 0; as large as the picture and stored as it is;
    - ``probabilities/<name>.png``: the probability times 255, if asked for;
    - ``overlays/<name>.png``: the slice upright with the mask's contour.

    ``finish`` adds ``slices.csv``: name, size, pixels of opacity and their share of the whole picture, body
    or not, and what :class:`custom.transforms.MatchGreysd` did; a picture that failed has a row with the
    reason. ``scripts/score.py`` scores ``masks`` and ``probabilities``. Slices that seem to lie on their side
    are warned of.

    The batch must hold ``picture`` (the slice upright, values from 0 to 255), ``image`` and ``name``; the
    output's ``pred`` (mask) and ``probability`` are those after inversion of every spatial step.

    Args:
        output_dir: folder for the files.
        cohort: the loader of the pictures, which knows those that failed.
        stored_orientation: how the pictures are stored; see :class:`custom.transforms.LoadPictured`.
        probabilities: write the probabilities too.
        threshold: probability from which on postprocessing puts a pixel into the mask, which the log tells.

    Raises:
        ValueError: When a switch is neither on nor off, or the threshold is no probability.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        cohort: CohortLoader,
        stored_orientation: str = "upright",
        probabilities: bool | str = False,
        threshold: float = 0.5,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.cohort = cohort
        self.stored_orientation = stored_orientation
        self.probabilities = read_switch("probabilities", probabilities)
        self.threshold = check_threshold(threshold)
        self._rows: dict[str, dict[str, Any]] = {}
        self._poses: list[float | None] = []

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: the evaluator; its postprocessing must invert ``pred`` and ``probability``.
        """
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        """
        Args:
            engine: the evaluator after an iteration.
        """
        for item, output in zip(engine.state.batch, engine.state.output, strict=True):
            self.write(item, output)

    def write(self, item: dict[str, Any], output: dict[str, Any]) -> None:
        """Write one slice's files.

        Args:
            item: item of the decollated batch.
            output: item of the decollated output.

        Raises:
            RuntimeError: When the mask is not on the picture's grid.
        """
        name = item["name"]
        grey, mask, probability = (
            np.asarray(values.cpu())[0] for values in (item["picture"], output["pred"], output["probability"])
        )
        if not grey.shape == mask.shape == probability.shape:
            raise RuntimeError(
                f"{name}: the picture has {grey.shape} pixels and its mask {mask.shape}; postprocessing must "
                "invert every spatial step of preprocessing"
            )
        mask = mask > 0
        self._clear(name)
        grey = grey.astype(np.uint8)
        self._poses.append(measure_pose(grey))
        overlay = np.repeat(grey[..., None], 3, axis=-1)
        overlay[find_boundaries(mask, mode="inner")] = _RED
        write_picture(self._file("overlays", name), overlay)
        if self.probabilities:
            shades = np.rint(probability * np.float32(255)).astype(np.uint8)
            write_picture(self._file("probabilities", name), turn_back(shades, self.stored_orientation))
        stored = turn_back(np.where(mask, 255, 0).astype(np.uint8), self.stored_orientation)
        write_picture(self._file("masks", name), stored)
        found = int(np.count_nonzero(mask))
        self._rows[name] = {
            "name": name,
            "height": stored.shape[0],
            "width": stored.shape[1],
            "opacity_pixels": found,
            "opacity_percent_of_picture": round(100 * found / mask.size, 4),
            "grey_match": getattr(item["image"], "meta", {}).get(GREY_MATCH),
            "reason": None,
        }

    def finish(self) -> None:
        """Write the table after the last picture.

        Raises:
            CohortError: When any picture has failed.
        """
        for failure in self.cohort.failures:
            self._clear(failure["name"])
        total = len(self._rows) + len(self.cohort.failures)
        failed = {failure["name"]: failure for failure in self.cohort.failures}
        numbers = ("height", "width", "opacity_pixels", "opacity_percent_of_picture")
        blank = dict.fromkeys((*numbers, "grey_match"))
        rows = [
            self._rows.get(name) or {"name": name, **blank, "reason": failed[name]["reason"]}
            for name in (item["name"] for item in self.cohort.dataset.data)
            if name in self._rows or name in failed
        ]
        write_table(self.output_dir / "slices.csv", rows)
        with_opacity = sum(bool(row["opacity_pixels"]) for row in rows)
        logger.info(
            f"{len(self._rows)} slices, {with_opacity} with opacity (probability from {self.threshold} on): "
            f"{self.output_dir / 'slices.csv'}"
        )
        if lie_sideways(self._poses):
            logger.warning(f"{SIDEWAYS_WARNING}: --stored_orientation {' or '.join(SIDEWAYS_ORIENTATIONS)}")
        if failed:
            raise CohortError(self.cohort.failures, total, "pictures")

    def _file(self, kind: str, name: str) -> Path:
        return self.output_dir / kind / f"{name}.png"

    def _clear(self, name: str) -> None:
        """Remove an earlier run's results, which must not pass for this one's."""
        for kind in ("masks", "probabilities", "overlays"):
            self._file(kind, name).unlink(missing_ok=True)
