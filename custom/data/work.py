# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Working through a data set: in processes, with a bar, and with an account of what was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from custom.console import bar_interval
from custom.data.files import write_json
from custom.interrupts import deaf_children

__all__ = ["LISTED", "LeftOut", "describe_left_out", "part", "work_through", "write_left_out"]

LISTED = 20  # failures that a summary spells out

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


def part(results: Iterable[R | LeftOut]) -> tuple[list[R], list[LeftOut]]:
    """Part what became a case from what did not.

    Args:
        results: of :func:`work_through`.
    """
    cases: list[R] = []
    left_out: list[LeftOut] = []
    for result in results:
        if isinstance(result, LeftOut):
            left_out.append(result)
        else:
            cases.append(result)
    return cases, left_out


def write_left_out(folder: Path, left_out: Iterable[LeftOut]) -> list[LeftOut]:
    """Write ``skipped.json``, what failed first.

    Args:
        folder: gets the file.
        left_out: what did not become a case.

    Returns:
        ``left_out`` in that order.
    """
    ordered = sorted(left_out, key=lambda one: (not one.failed, one.kind, one.what))
    write_json(folder / "skipped.json", [asdict(one) for one in ordered])
    return ordered


def describe_left_out(left_out: Sequence[LeftOut]) -> list[str]:
    """Lines for a summary: how many of each kind were rightly left out, and what failed.

    Args:
        left_out: what did not become a case.
    """
    counts = Counter(one.kind for one in left_out if not one.failed)
    failed = [one for one in left_out if one.failed]
    lines = [f"left out, {kind}: {count}" for kind, count in counts.most_common()]
    lines += [f"failed, {one.what}: {one.reason}" for one in failed[:LISTED]]
    if len(failed) > LISTED:
        lines.append(f"failed: {len(failed) - LISTED} more")
    return [*lines, "all that was left out: skipped.json"] if left_out else lines


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
