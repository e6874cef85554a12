# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Scores every case of an evaluation on its own grid and keeps the masks that were scored."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from PIL import Image

from custom.console import CohortError
from custom.data.cohort import CohortLoader
from custom.data.files import atomic_path, write_nifti
from custom.metrics import CaseScores, ScoredCase, score_case, summarize_scores
from custom.reporting.scores import format_summary, grid_geometry, write_scores

__all__ = ["ScoreReport"]

logger = logging.getLogger(__name__)


class ScoreReport:
    """Writes ``scores.csv`` (a row for each case), ``scores.json`` (the same, with means over cases and
    slices, pooled values, and the protocol of each) and, in ``predictions/``, the mask of each case: NIfTI
    for volumes, PNG (0 and 255) for plain pictures. ``scripts/score.py`` gives the same scores for these.

    Each item of the output must hold ``label`` and ``pred``, both on the label's own grid; ``pred`` is a
    mask. Where ``probability`` is there too, from which the mask was made, the mean absolute error is that of
    the probabilities. In a distributed run the first process writes for all.

    Args:
        output_dir: folder for the files.
        threshold: probability from which on a voxel is in the mask.
        surface_tolerance_mm: see :func:`custom.metrics.score_case`.
        cohort: the loader of the cases, which knows those that could not be prepared: they are listed in
            ``scores.json`` and count in no mean.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        threshold: float = 0.5,
        surface_tolerance_mm: float = 3.0,
        cohort: CohortLoader | None = None,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.cohort = cohort
        self.settings = {"threshold": threshold, "surface_tolerance_mm": surface_tolerance_mm}
        self._scores: list[CaseScores] = []

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: the evaluator; its postprocessing must invert and threshold ``pred``.
        """
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self.finish)

    def _start(self, engine: Any) -> None:
        self._scores = []

    def __call__(self, engine: Any) -> None:
        """
        Args:
            engine: the evaluator after an iteration.

        Raises:
            ValueError: When a prediction is not on its label's grid.
        """
        for case, output in zip(engine.state.batch, engine.state.output, strict=True):
            self._scores.append(self._score(case["name"], output))

    def _score(self, name: str, output: dict[str, Any]) -> CaseScores:
        truth, mask = (np.asarray(output[key].cpu())[0] > 0 for key in ("label", "pred"))
        volume = truth.ndim == 3
        affine = np.asarray(output["label"].affine.cpu(), dtype=float) if volume else None
        geometry = {} if affine is None else grid_geometry(affine)
        scored = mask
        if "probability" in output:
            scored = np.asarray(output["probability"].cpu(), dtype=np.float32)[0]
            if not np.array_equal(scored >= self.settings["threshold"], mask):
                raise ValueError(
                    f"{name}: 'pred' is not 'probability' at the threshold {self.settings['threshold']}; "
                    "where postprocessing goes on after the threshold, do not copy the probability"
                )
        score = score_case(ScoredCase(name, scored, truth, **geometry), **self.settings)
        if affine is not None:
            write_nifti(self.output_dir / "predictions" / f"{name}.nii.gz", mask.astype(np.uint8), affine)
        else:
            picture = self.output_dir / "predictions" / f"{name}.png"
            with atomic_path(picture) as temporary:
                Image.fromarray(mask.astype(np.uint8) * 255).save(temporary, format="PNG")
        return score

    def finish(self, engine: Any) -> None:
        """Write the scores of all cases.

        Args:
            engine: the evaluator, which has run through.

        Raises:
            CohortError: When cases could not be prepared; the others are scored.
        """
        failures = [] if self.cohort is None else self.cohort.failures
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            self._write(self._scores, failures)
            return
        shares: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(shares, (self._scores, failures))
        try:
            if torch.distributed.get_rank() == 0:
                self._write(
                    [score for scores, _ in shares for score in scores],
                    [failure for _, failed in shares for failure in failed],
                )
        finally:
            torch.distributed.barrier()  # whoever ends the run before the files are written ends it for all

    def _write(self, scores: list[CaseScores], failures: list[dict[str, str]]) -> None:
        if scores:
            scores = sorted(scores, key=lambda score: score.row["name"])
            summary = summarize_scores(scores)
            table, _ = write_scores(self.output_dir / "scores", scores, summary, self.settings, failures)
            logger.info(f"scores of each case: {table}\n{format_summary(summary)}")
        if failures:
            raise CohortError(failures, len(scores) + len(failures), "cases")
