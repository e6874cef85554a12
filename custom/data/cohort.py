# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Going through a cohort of which some studies may be unfit."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from monai.data import Dataset
from monai.data.utils import list_data_collate

from custom.console import describe_error

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
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.total = len(dataset)
        self.position = 0
        self.failures: list[dict[str, str]] = []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.position, self.failures = 0, []
        for number in range(self.total):
            self.position = number + 1
            try:
                study = self.dataset[number]
            except Exception as error:
                reason = describe_error(error)
                if reason is None:
                    raise
                name = self.dataset.data[number]["name"]
                self.failures.append({"name": name, "reason": reason})
                logger.warning(f"{name}: {reason}")
                continue
            yield list_data_collate([study])
