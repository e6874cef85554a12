# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Handlers that bring checkpoints, progress and reports into an ignite engine."""

from custom.handlers.checkpoint import TrainingCheckpoint
from custom.handlers.progress import ProgressBar
from custom.handlers.report import StudyReport
from custom.handlers.scores import ScoreReport
from custom.handlers.slices import SliceReport

__all__ = ["ProgressBar", "ScoreReport", "SliceReport", "StudyReport", "TrainingCheckpoint"]
