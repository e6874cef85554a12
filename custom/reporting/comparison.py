# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Several systems scored on the same cases: statistics and paired tests."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from custom.metrics.scores import METRICS, CaseScores, summarize_scores
from custom.reporting.comparison_report import (
    LOWER_IS_BETTER,
    PICTURES,
    TERMS,
    TESTS,
    write_comparison,
)

__all__ = [
    "LOWER_IS_BETTER",
    "PICTURES",
    "TERMS",
    "adjust_holm",
    "compare_systems",
    "match_cases",
    "write_comparison",
]


def match_cases(scores: Mapping[str, Sequence[CaseScores]]) -> dict[str, list[CaseScores]]:
    """The scores of each system in one order, by name of case.

    Args:
        scores: scores of the same cases for each system by name, in any order.

    Raises:
        ValueError: When there is no case, or a system lacks one, has one twice or met another truth.
    """
    found = {system: {case.row["name"]: case for case in cases} for system, cases in scores.items()}
    names = sorted({name for cases in found.values() for name in cases})
    if not names:
        raise ValueError("there is no case to compare systems on")
    first = next(iter(found))
    for system, cases in found.items():
        missing = [f"'{name}'" for name in names if name not in cases]
        if missing:
            raise ValueError(
                f"system '{system}' has no scores of {', '.join(missing)}, which others have; score every "
                "system on the same cases"
            )
        if len(cases) < len(scores[system]):
            raise ValueError(f"system '{system}' has several scores of one case; give one for each")
        for name in names:
            truths = [found[s][name].row["true_voxels"] for s in (first, system)]
            if truths[0] != truths[1]:
                raise ValueError(
                    f"case '{name}' was scored against different truths: {truths[0]} voxels in '{first}', "
                    f"{truths[1]} in '{system}'"
                )
    return {system: [cases[name] for name in names] for system, cases in found.items()}


def compare_systems(
    scores: Mapping[str, Sequence[CaseScores]], reference: str, seed: int = 0, resamples: int = 10_000
) -> dict[str, Any]:
    """Describe each system and test it against a reference, case by case.

    Every interval draws its resamples anew from the seed, so nothing depends on the order of cases, and
    nothing but the Holm-adjusted p-values on which other systems are compared.

    Args:
        scores: scores of the same cases for each system by name, in any order.
        reference: name of the system that the others are compared with.
        seed: seed of the bootstrap.
        resamples: how many times the bootstrap draws.

    Returns:
        ``protocol``, one sentence a line, ``reference``, ``cases``, ``slices``, ``empty_policy``,
        ``definitions`` and:

        - ``systems``: by name what :func:`~custom.metrics.scores.summarize_scores` says; metrics per case
          have also ``median`` and ``ci``, and ``empty_in_both`` counts empty predictions of empty truths;
        - ``differences``: by name of each other system and metric ``n`` pairs, ``mean_difference``, ``ci``,
          ``t_p``, ``t_p_holm``, ``wilcoxon_p`` and ``wilcoxon_p_holm``;
        - ``rows``: one for each system and case.

        What is undefined is None; every value can be written as JSON.

    Raises:
        ValueError: When the reference is none of the systems, and as :func:`match_cases`.

    Reference:
        Efron, Better bootstrap confidence intervals, JASA 82(397), 1987 (BCa). Holm, A simple sequentially
        rejective multiple test procedure, Scand. J. Statist. 6, 1979.
    """
    cases = match_cases(scores)
    if reference not in cases:
        raise ValueError(f"the reference '{reference}' is none of the systems: {', '.join(cases)}")
    values = {s: {key: [case.row[key] for case in cases[s]] for key in METRICS} for s in cases}
    systems = {}
    for system in cases:
        summary = summarize_scores(cases[system])
        for key, entry in summary["per_case"]["metrics"].items():
            known = np.array([v for v in values[system][key] if v is not None])
            entry["median"] = float(np.median(known)) if len(known) else None
            entry["ci"] = _interval(known, seed, resamples)
        summary["per_case"]["empty_in_both"] = sum(
            case.row["empty_truth"] and case.row["empty_prediction"] for case in cases[system]
        )
        shared = {key: summary.pop(key) for key in ("cases", "slices", "empty_policy", "definitions")}
        systems[system] = summary
    others = [system for system in cases if system != reference]
    differences = {
        system: {key: _test(values[system][key], values[reference][key], seed, resamples) for key in METRICS}
        for system in others
    }
    for key in METRICS:
        for test in ("t_p", "wilcoxon_p"):
            adjusted = adjust_holm([differences[system][key][test] for system in others])
            for system, p in zip(others, adjusted, strict=True):
                differences[system][key][f"{test}_holm"] = p
    return {
        "protocol": _protocol(reference, seed, resamples),
        "reference": reference,
        **shared,
        "systems": systems,
        "differences": differences,
        "rows": [{"system": system, **case.row} for system in cases for case in cases[system]],
    }


def adjust_holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjustment of the p-values of one family; None is left out of the family and stays None."""
    order = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    greatest = 0.0
    for rank, (p, place) in enumerate(order):
        greatest = max(greatest, min(1.0, (len(order) - rank) * p))  # never below that of a smaller p
        adjusted[place] = greatest
    return adjusted


def _interval(values: np.ndarray, seed: int, resamples: int) -> list[float] | None:
    """95 % interval of the mean, None for fewer than two values or for equal ones."""
    if len(values) < 2 or np.ptp(values) < 1e-12:
        return None
    with warnings.catch_warnings():  # a degenerate distribution gives NaN, which becomes None below
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        interval = stats.bootstrap(
            (values,),
            np.mean,
            n_resamples=resamples,
            method="BCa",
            batch=max(1, 10**7 // len(values)),  # so that thousands of cases do not take gigabytes
            random_state=np.random.default_rng(seed),
        ).confidence_interval
    ends = [float(interval.low), float(interval.high)]
    return ends if all(map(math.isfinite, ends)) else None


def _test(
    ours: Sequence[float | None], theirs: Sequence[float | None], seed: int, resamples: int
) -> dict[str, Any]:
    """Paired differences of two systems in one metric."""
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    # Rounded, since what is equal must count as equal: 0.9 - 0.8 is not 0.5 - 0.4 in binary.
    change = np.round([a - b for a, b in pairs], 12)
    p: dict[str, float | None] = dict.fromkeys(TESTS)
    if len(change) > 1 and not change.any():
        p |= {"t_p": 1.0, "wilcoxon_p": 1.0}
    elif len(change) > 1:
        # Without zeros SciPy takes the exact distribution for few pairs, whatever its version.
        p["wilcoxon_p"] = float(stats.wilcoxon(change[change != 0]).pvalue)
        p["t_p"] = float(stats.ttest_1samp(change, 0).pvalue) if np.ptp(change) > 0 else None
    mean = float(change.mean()) if len(change) else None
    return {"n": len(change), "mean_difference": mean, "ci": _interval(change, seed, resamples), **p}


def _protocol(reference: str, seed: int, resamples: int) -> str:
    return "\n".join(
        [
            "A case is what was scored as one, a volume or a single slice.",
            "Means, sample standard deviations and medians are over the cases in which a metric is defined; "
            "n is their number. Where n differs between systems, their means are of different cases.",
            f"Intervals are 95 % bootstrap confidence intervals of the mean over cases (BCa, bias-corrected "
            f"and accelerated; {resamples} resamples, seed {seed}). There is none for fewer than two values "
            "or for equal ones, and with fewer than about 20 cases they are too narrow.",
            f"A difference is a system minus {reference}, taken case by case where both are defined.",
            "The tests are two-sided: the paired t-test, and the Wilcoxon signed-rank test, which leaves out "
            "pairs that do not differ. Both p are 1 where no pair differs, and undefined for fewer than two "
            "pairs; the t-test is also undefined where all pairs differ by the same amount.",
            f"p is adjusted by Holm's method within each metric and test: the family is all systems compared "
            f"with {reference}. There is no adjustment across metrics.",
            "No level of significance is applied. The smallest possible p of a Wilcoxon test of n pairs that "
            "differ is 2 / 2^n, above 0.05 for five or fewer.",
            "Cases count as independent. Where several are of one patient, or were predicted by the same "
            "trained network, they are not quite independent, and p is too small. Nothing here tells how "
            "much a second training of the same system would differ.",
        ]
    )
