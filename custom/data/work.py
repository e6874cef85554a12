# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Working through a data set: in processes, with a bar, and with an account of what was left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from typing import Any, TypeVar

from tqdm import tqdm

from custom.console import bar_interval, deaf_children

__all__ = ["LeftOut", "work_through"]

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class LeftOut:
    """Something that did not become a case.

    Args:
        what: a series UID, or an XML file below the folder it was looked for in.
        kind: a few words that count it together with its like.
        reason: one line.
        failed: whether it should have become a case; False where leaving it out is right.
    """

    what: str
    kind: str
    reason: str
    failed: bool


def work_through(
    function: Callable[[T], R], items: Sequence[T], num_workers: int, desc: str, unit: str
) -> Iterator[R]:
    """Apply a function to all items, in processes if asked to, and show how long it will take.

    Args:
        function: of a module, if in processes.
        items: what to apply it to.
        num_workers: processes; 0 and 1 use none besides this one.
        desc: name of the progress bar.
        unit: what an item is.

    Yields:
        The results as they come.

    Raises:
        OSError: When a process dies.
    """
    if num_workers < 2 or len(items) < 2:
        yield from _bar(map(function, items), len(items), desc, unit)
        return
    # Not forked, which threads do not survive: torch and the progress bars have some.
    with ProcessPoolExecutor(min(num_workers, len(items)), mp_context=get_context("spawn")) as pool:
        try:
            with deaf_children():
                futures = [pool.submit(function, item) for item in items]
            for future in _bar(as_completed(futures), len(items), desc, unit):
                yield future.result()
        except BrokenProcessPool:
            raise OSError(
                "a worker process died, perhaps for lack of memory; run it again with fewer workers, "
                "it continues where it stopped"
            ) from None
        except KeyboardInterrupt:
            for process in active_children():  # whoever interrupts does not wait for what they are at
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _bar(items: Any, total: int, desc: str, unit: str) -> tqdm:
    return tqdm(items, total=total, desc=desc, unit=unit, dynamic_ncols=True, mininterval=bar_interval())
