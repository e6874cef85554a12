# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""A cohort shared among processes, of which some studies may be done already."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import custom
from custom.console import read_switch
from custom.data.files import file_sha256

__all__ = ["SharedStudies", "gather_on_first", "meet"]

logger = logging.getLogger(__name__)


class SharedStudies(Sequence[int]):
    """The numbers of the studies that this process is to do: its share of those that are not done.

    A study is done when an earlier run has left its ``*_report.json``, which is written last, with the status
    ``segmented``, of the same bundle, its version and its weights, with all files that it names, and not
    older than the scan. (What failed is tried again.) Other settings do not show in a report: whoever changes
    them gives another ``output_dir`` or leaves ``skip_done`` off.

    The first process looks, and all share what it found: others may look when some studies more are done.

    Args:
        data: items of the cohort, with ``name`` and ``image``.
        output_dir: folder of the studies' folders.
        bundle: name of the bundle.
        weights: its weights file.
        skip_done: whether to leave out what is done.

    Raises:
        ValueError: When ``skip_done`` is neither true nor false.
    """

    def __init__(
        self,
        data: Sequence[Mapping[str, Any]],
        output_dir: str | os.PathLike,
        bundle: str,
        weights: str | os.PathLike,
        skip_done: bool | str = True,
    ) -> None:
        rank, world = _place()
        self.done: dict[Path, dict[str, Any]] = {}
        """Reports of the studies that are done, by file."""
        if read_switch("skip_done", skip_done) and rank == 0:
            model = {
                "bundle": bundle,
                "software_version": custom.__version__,
                "weights_sha256": file_sha256(Path(weights)),
            }
            files = (Path(output_dir) / item["name"] / f"{item['name']}_report.json" for item in data)
            for item, file in zip(data, files, strict=True):
                if (report := _read_done(file, item["image"], model)) is not None:
                    self.done[file.resolve()] = report
        if world > 1:
            found: list[Any] = [self.done]
            torch.distributed.broadcast_object_list(found, src=0)
            self.done = found[0]
        names = {report["study"] for report in self.done.values()}
        left = [number for number, item in enumerate(data) if item["name"] not in names]
        self._numbers = left[rank::world]
        if rank == 0:
            skipped = f"{len(names)} of {len(data)} studies are done already; " if names else ""
            logger.info(f"{skipped}{len(left)} to do by {world} processes")

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, position: Any) -> Any:
        return self._numbers[position]


def gather_on_first(part: Any) -> list[Any] | None:
    """Bring what every process has to the first.

    Args:
        part: of this process.

    Returns:
        The parts by rank, on the first process; None on others.
    """
    rank, world = _place()
    if world == 1:
        return [part]
    parts: list[Any] | None = [None] * world if rank == 0 else None
    torch.distributed.gather_object(part, parts, dst=0)
    return parts


def meet() -> None:
    """Wait for all processes: whoever ends before the first has written all ends it for all."""
    if _place()[1] > 1:
        torch.distributed.barrier()


def _place() -> tuple[int, int]:
    """Rank and number of processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _read_done(file: Path, image: Any, model: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        files = [file.parent / name for name in report["files"].values() if name]
        same = report["status"] == "segmented" and report["model"] == dict(model)
        images = [image] if isinstance(image, (str, os.PathLike)) else image
        newest = max(Path(one).stat().st_mtime_ns for one in images)
        whole = all(one.is_file() for one in files) and file.stat().st_mtime_ns >= newest
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # not there, or not a report
    return report if same and whole else None
