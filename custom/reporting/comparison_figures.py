# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Pictures of a comparison: box plots over the cases, and a sheet of contours."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cbook import boxplot_stats
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from custom.data.files import atomic_path
from custom.metrics.scores import METRICS, CaseScores
from custom.reporting.comparison import LOWER_IS_BETTER, TERMS, match_cases
from custom.reporting.figures import _contour

__all__ = ["CHOICE", "SheetCase", "choose_cases", "draw_box_plots", "draw_contour_sheet"]

# Okabe and Ito, Color Universal Design, 2008: told apart by people who are colour-blind.
COLOURS = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#0072b2", "#d55e00", "#f0e442", "#999999")
TRUTH_COLOUR = "#56b4e9"
PREDICTION_COLOUR = "#e69f00"
MAX_ROWS = 8
CHOICE = (
    "The cases were chosen by rule, not by hand: they lie evenly spaced in the order of the mean Dice over "
    "the systems, from the worst case (top) to the best (bottom). Cases without opacity have no Dice and are "
    "not shown."
)
"""Caption of a sheet whose cases :func:`choose_cases` chose."""

# Measures of the sheet, in inches.
MARGIN, GAP, LABEL, STRIP = 0.15, 0.05, 0.45, 0.25


@dataclass(frozen=True)
class SheetCase:
    """One row of the sheet.

    Args:
        name: name of the case.
        image: (H, W), upright, already windowed: it is shown from its least to its greatest value.
        truth: mask (H, W).
        predictions: mask (H, W) of each system by name.
        dice: Dice of each system by name; None where it is undefined.
    """

    name: str
    image: np.ndarray
    truth: np.ndarray
    predictions: Mapping[str, np.ndarray]
    dice: Mapping[str, float | None]


def choose_cases(scores: Mapping[str, Sequence[CaseScores]], count: int = 6) -> list[str]:
    """Names of cases from the worst to the best, evenly spaced in the order of their mean Dice over systems.

    Args:
        scores: scores of the same cases for each system by name.
        count: how many to choose; fewer where fewer have a Dice, which those without opacity do not.

    Raises:
        ValueError: When ``count`` is below 1, and as :func:`~custom.reporting.comparison.match_cases`.
    """
    if count < 1:
        raise ValueError(f"at least one case must be chosen, got count={count}")
    ranked = []
    for same_case in zip(*match_cases(scores).values(), strict=True):
        dice = [case.row["dice"] for case in same_case]
        if None not in dice:  # a Dice is undefined for an empty truth, hence for all systems or for none
            ranked.append((float(np.mean(dice)), same_case[0].row["name"]))
    ranked.sort()
    places = (
        np.linspace(0, len(ranked) - 1, min(count, len(ranked))) if count > 1 else [(len(ranked) - 1) // 2]
    )
    return [ranked[round(place)][1] for place in places] if ranked else []


def draw_box_plots(
    path: str | os.PathLike,
    scores: Mapping[str, Sequence[CaseScores]],
    metrics: Sequence[str] = ("dice", "sensitivity", "ppv", "va", "rlp", "rlr"),
) -> None:
    """Draw a panel for each metric with a box for each system: median, quartiles, and every case as a point.

    Whiskers reach to the farthest case within 1.5 interquartile ranges of the box. The number of cases n is
    printed where a metric is undefined in some.

    Args:
        path: PNG to write.
        scores: scores of the same cases for each system by name.
        metrics: names of metrics, of :data:`custom.metrics.scores.METRICS`.

    Raises:
        ValueError: When a metric is unknown, and as :func:`~custom.reporting.comparison.match_cases`.
    """
    unknown = [key for key in metrics if key not in METRICS]
    if unknown or not metrics:
        raise ValueError(f"unknown metrics {unknown}; give some of {', '.join(METRICS)}")
    cases = match_cases(scores)
    columns = min(3, len(metrics))
    rows = -(-len(metrics) // columns)
    width = 3.4 * columns + 1.4
    caption = (
        f"{len(next(iter(cases.values())))} cases. Box: median and quartiles. Whiskers: farthest case within "
        "1.5 interquartile ranges. Points: cases. n: cases with a value, where not all have one."
    )
    figure = Figure(figsize=(width, (0.34 * len(cases) + 0.85) * rows + 0.5), facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.08, wspace=0.03, hspace=0.05)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for place, axes in enumerate(grid.flat):
        if place < len(metrics):
            _draw_boxes(axes, cases, metrics[place])
        else:
            axes.set_visible(False)
    figure.supxlabel(textwrap.fill(caption, int(width * 14)), fontsize=8, color="0.3")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def _draw_boxes(axes: Axes, cases: Mapping[str, Sequence[CaseScores]], metric: str) -> None:
    values = [np.array([v for c in scored if (v := c.row[metric]) is not None]) for scored in cases.values()]
    numbers = [len(known) for known in values]
    jitter = np.random.default_rng(0)
    for place, known in enumerate(values):
        if len(known):
            box = boxplot_stats(known)[0]
            colour = COLOURS[place % len(COLOURS)]
            span = box["q3"] - box["q1"]
            axes.hlines(
                [place] * 2, [box["whislo"], box["q3"]], [box["q1"], box["whishi"]], color="0.1", linewidth=1
            )
            axes.barh(
                place, span, 0.6, box["q1"], color=(colour, 0.65), edgecolor="0.2", linewidth=1, zorder=3
            )
            for at, half, line in (
                (box["whislo"], 0.15, 1.0),
                (box["whishi"], 0.15, 1.0),
                (box["med"], 0.3, 2.4),
            ):
                axes.vlines(at, place - half, place + half, color="0.1", linewidth=line, zorder=4)
            height = place + jitter.uniform(-0.2, 0.2, len(known))
            axes.plot(
                known, height, "o", color="0.25", markersize=2.8, markeredgewidth=0, alpha=0.4, zorder=5
            )
        if len(set(numbers)) > 1:
            text = f"n = {len(known)}"
            axes.text(1.01, place, text, transform=axes.get_yaxis_transform(), va="center", fontsize=7.5)
    title = TERMS[metric][0] if metric in TERMS else metric
    if len(set(numbers)) == 1 and numbers[0] < len(next(iter(cases.values()))):
        title += f", n = {numbers[0]}"
    axes.set_title(title + (", lower is better" if metric in LOWER_IS_BETTER else ""), fontsize=10)
    axes.set_yticks(range(len(cases)), [textwrap.fill(name, 24) for name in cases], fontsize=9)
    axes.use_sticky_edges = False  # bars would have no margin at 0
    axes.set_ylim(len(cases) - 0.4, -0.6)  # the first system on top
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def draw_contour_sheet(
    path: str | os.PathLike, cases: Sequence[SheetCase], systems: Sequence[str], caption: str = CHOICE
) -> None:
    """Draw a row for each case: the image, and for each system the contours of truth and prediction.

    Args:
        path: PNG to write.
        cases: at most 8 cases.
        systems: names of the systems, in the order of the columns.
        caption: printed below, best how the cases were chosen.

    Raises:
        ValueError: When there is no case or system or there are more than 8 cases, or when a case lacks a
            system or its masks differ from its image in shape.
    """
    if not 1 <= len(cases) <= MAX_ROWS or not systems:
        raise ValueError(
            f"a sheet shows 1 to {MAX_ROWS} cases and one system or more, got {len(cases)} and {len(systems)}"
        )
    for case in cases:
        _check(case, systems)
    columns = 1 + len(systems)
    side = float(np.clip(15 / columns, 1.7, 2.4))
    heights = [side * float(np.clip(case.image.shape[0] / case.image.shape[1], 0.5, 1.5)) for case in cases]
    width = 2 * MARGIN + LABEL + columns * (side + GAP) - GAP
    names = [textwrap.fill(name, int(side * 11)) for name in ("Image", *systems)]
    header = 0.17 * max(name.count("\n") + 1 for name in names) + 0.08
    text = textwrap.wrap(caption, int((width - 2 * MARGIN) * 14))
    footer = 0.35 + 0.15 * len(text)
    height = 2 * MARGIN + header + sum(heights) + STRIP * len(cases) + footer
    figure = Figure(figsize=(width, height), facecolor="white")

    def write(x: float, y: float, words: str, size: float, **style: Any) -> None:
        figure.text(x / width, y / height, words, fontsize=size, **style)

    lefts = [MARGIN + LABEL + column * (side + GAP) for column in range(columns)]
    top = height - MARGIN - header
    for left, name in zip(lefts, names, strict=True):
        write(left + side / 2, top + 0.06, name, 10, ha="center", va="bottom")
    for case, tall in zip(cases, heights, strict=True):
        name = "\n".join(textwrap.wrap(case.name, int(tall * 15), max_lines=3, placeholder="…"))
        write(lefts[0] - 0.06, top - tall / 2, name, 8, rotation=90, ha="right", va="center")
        for left, system in zip(lefts, (None, *systems), strict=True):
            axes = figure.add_axes((left / width, (top - tall) / height, side / width, tall / height))
            axes.imshow(case.image, cmap="gray")
            axes.set_axis_off()
            if system is None:
                continue
            # The truth is wider and lies below, so that both are seen where they coincide.
            _contour(axes, case.truth, TRUTH_COLOUR, 0.9 * side)
            _contour(axes, case.predictions[system], PREDICTION_COLOUR, 0.36 * side)
            dice = case.dice[system]
            words = "Dice undefined" if dice is None else f"Dice {dice:.2f}"
            write(left + side / 2, top - tall - 0.03, words, 8.5, ha="center", va="top")
        top -= tall + STRIP
    figure.legend(
        handles=[
            Line2D([], [], color=TRUTH_COLOUR, linewidth=3, label="Truth"),
            Line2D([], [], color=PREDICTION_COLOUR, linewidth=1.5, label="Prediction"),
        ],
        loc="upper left",
        bbox_to_anchor=(lefts[0] / width, top / height),
        ncols=2,
        frameon=False,
        fontsize=10,
        borderpad=0,
        borderaxespad=0,
    )
    write(lefts[0], MARGIN, "\n".join(text), 8, va="bottom", color="0.3")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=200)


def _check(case: SheetCase, systems: Sequence[str]) -> None:
    for given in (case.predictions, case.dice):
        missing = [system for system in systems if system not in given]
        if missing:
            raise ValueError(f"case '{case.name}' has no prediction or no Dice of {', '.join(missing)}")
    shapes = {mask.shape for mask in (case.truth, *(case.predictions[s] for s in systems))}
    if case.image.ndim != 2 or shapes != {case.image.shape}:
        raise ValueError(
            f"case '{case.name}': image {case.image.shape} and masks {', '.join(map(str, sorted(shapes)))} "
            "must have the same (H, W)"
        )
