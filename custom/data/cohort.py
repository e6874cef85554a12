# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Going through a cohort of which some studies may be unfit."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from typing import Any, cast

from monai.data import Dataset, MetaTensor
from monai.data.utils import list_data_collate
from torch.utils.data import DataLoader, Sampler

from custom.console import CohortError, describe_error

__all__ = ["CohortLoader"]

logger = logging.getLogger(__name__)


class CohortLoader:
    """Yields one prepared study at a time; a study that cannot be prepared is noted and passed over.

    A reader or transform that refuses a study (a gap in the series, no HU, no lung) raises a user error;
    its one line becomes the reason in :attr:`failures`, and the other studies are still done. An error
    that is not the user's is raised.

    It has no length on purpose: how many studies are fit is known at the end.

    Args:
        dataset: its items are dictionaries with ``name``.
        num_workers: processes that prepare studies ahead; each holds some in memory. 0 prepares them here,
            one after the other.
        sampler: yields the numbers of the studies to go through, such as a process's share; None: all.
        allow_empty: whether it may come to nothing. Metrics need a study; without one the failures are raised
            at the end of the iteration, as a :class:`custom.console.CohortError`.
    """

    def __init__(
        self,
        dataset: Dataset,
        num_workers: int = 0,
        sampler: Sampler[int] | None = None,
        allow_empty: bool = True,
    ) -> None:
        self.dataset = dataset
        self.allow_empty = allow_empty
        self.num_workers = num_workers
        self.sampler = sampler
        self.total = len(dataset if sampler is None else cast(Sized, sampler))
        self.position = 0
        self.failures: list[dict[str, str]] = []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.position, self.failures = 0, []
        numbers = list(range(len(self.dataset)) if self.sampler is None else self.sampler)
        prepared = iter(
            DataLoader(
                cast(Any, _Attempts(self.dataset)),
                batch_size=None,
                sampler=numbers,
                num_workers=min(self.num_workers, len(numbers)),
                collate_fn=_as_is,
            )
        )
        for number in numbers:
            study = next(prepared)
            self.position += 1
            if isinstance(study, _Failure):
                name = self.dataset.data[number]["name"]
                self.failures.append({"name": name, "reason": study.reason})
                logger.warning(f"{name}: {study.reason}")
                continue
            # Nothing here may still hold the study when it is done with, nor while the next one is prepared.
            given = [_batch_of_one(study)]
            del study
            yield given.pop()
        if self.failures and len(self.failures) == self.total and not self.allow_empty:
            raise CohortError(self.failures, self.total)


@dataclass(frozen=True)
class _Failure:
    reason: str


class _Attempts:
    """A data set whose items may be failures."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> Any:
        try:
            return self.dataset[number]
        except Exception as error:
            reason = describe_error(error)
            if reason is None:
                raise
            return _Failure(reason)


def _as_is(item: Any) -> Any:
    return item


def _batch_of_one(study: dict[str, Any]) -> dict[str, Any]:
    """What MONAI's collation makes of a single item, without copying its volumes, which are large."""
    corners = {key: _corner(value) if _is_volume(value) else value for key, value in study.items()}
    batch = cast(dict[str, Any], list_data_collate([corners]))
    for key, value in study.items():
        if _is_volume(value):
            whole = MetaTensor(
                value.as_tensor()[None],
                meta=batch[key].meta,
                applied_operations=batch[key].applied_operations,
            )
            whole.is_batch = True
            batch[key] = whole
    return batch


def _corner(value: MetaTensor) -> Any:
    return value[(slice(None),) + (slice(1),) * (value.ndim - 1)]


def _is_volume(value: Any) -> bool:
    return isinstance(value, MetaTensor) and value.ndim > 1 and not value.is_batch
