# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""The files that tell of a comparison: tables for spreadsheets, JSON, and a report for people."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from custom.data.files import atomic_path, write_json
from custom.metrics.scores import METRICS

__all__ = ["LOWER_IS_BETTER", "PICTURES", "TERMS", "TESTS", "write_comparison"]

TERMS = {
    "dice": ("Dice", "twice the voxels that prediction and truth share, divided by the sum of both"),
    "sensitivity": ("Sensitivity", "share of the true opacity that was found"),
    "ppv": ("PPV", "positive predictive value, share of the predicted opacity that is true"),
    "specificity": ("Specificity", "share of the voxels without opacity that were left unmarked"),
    "va": ("VA", "volume accuracy, from -1 to 1 for equal volumes, wherever they lie"),
    "rlp": ("RLP", "region-level precision, share of the predicted regions whose centre is in the truth"),
    "rlr": ("RLR", "region-level recall, share of the true regions that hold the centre of a predicted one"),
    "hd95_mm": ("HD95 (mm)", "95th percentile of the distances between the surfaces, lower is better"),
    "surface_dice": (
        "Surface Dice",
        "share of the surfaces within a tolerance of each other, 3 mm unless stated otherwise",
    ),
}
"""The metrics of the report: how each is written, and what it is."""
PICTURES = {
    "box_plots.png": "Box plots over the cases",
    "contour_sheet.png": "Contours of truth and predictions in some cases",
}
"""Pictures that the report shows where they lie beside it."""
LOWER_IS_BETTER = ("voe", "rvd", "mae", "hd95_mm")
TESTS = ("t_p", "t_p_holm", "wilcoxon_p", "wilcoxon_p_holm")


def write_comparison(
    folder: str | os.PathLike, comparison: Mapping[str, Any], title: str, protocol_lines: Sequence[str]
) -> None:
    """Write ``comparison.json``, ``cases.csv``, ``comparison.csv`` and ``comparison.md``, each atomically.

    Args:
        folder: folder to write to; those of :data:`PICTURES` that lie in it are shown in the report.
        comparison: what :func:`~custom.reporting.comparison.compare_systems` returned.
        title: heading of the report.
        protocol_lines: how the systems were trained and scored, one sentence each.
    """
    folder = Path(folder)
    content = {"schema_version": "1.0", "title": title, "experiment": list(protocol_lines), **comparison}
    write_json(folder / "comparison.json", content)
    _write_csv(folder / "cases.csv", comparison["rows"])
    _write_csv(folder / "comparison.csv", _metric_rows(comparison))
    with atomic_path(folder / "comparison.md") as temporary:
        temporary.write_text(_report(folder, content) + "\n", encoding="utf-8")


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def _metric_rows(comparison: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each system and metric; cells of what is undefined stay empty."""
    rows = []
    for system, summary in comparison["systems"].items():
        for key in METRICS:
            row = {"system": system, "metric": key, "pooled": summary["pooled"]["metrics"].get(key)}
            for part, entry in (
                ("case", summary["per_case"]["metrics"][key]),
                ("slice", summary["per_slice"]["metrics"].get(key, {})),
                ("difference", comparison["differences"].get(system, {}).get(key, {})),
            ):
                row |= {f"{part}_{name}": value for name, value in entry.items() if name != "ci"}
                if "ci" in entry:
                    row[f"{part}_ci_low"], row[f"{part}_ci_high"] = entry["ci"] or (None, None)
            rows.append(row)
    return rows


def _report(folder: Path, content: Mapping[str, Any]) -> str:
    """The report in Markdown."""
    systems, reference = content["systems"], content["reference"]
    metrics = [key for key in TERMS if any(_mean(s, "per_case", key) is not None for s in systems.values())]
    undefined = [TERMS[key][0] for key in TERMS if key not in metrics]
    cases, slices = content["cases"], content["slices"]
    parts = [
        f"# {content['title']}",
        f"{_plural(len(systems), 'system')}, {_plural(cases, 'case')}, {_plural(slices, 'slice')}. The best "
        "value of each column is bold.",
        _list([*content["experiment"], "Statistics are explained [below](#how-the-numbers-were-made)."]),
        "## Scores per case",
        "Mean over cases ± standard deviation (SD) [95 % confidence interval (CI) of the mean]; n is the "
        "number of cases in a mean, given where it is not all.",
        _score_table(systems, "per_case", metrics, cases),
    ]
    if undefined:
        parts.append(f"Left out, since undefined in every case: {', '.join(undefined)}.")
    parts += [
        _list(f"{TERMS[key][0]}: {TERMS[key][1]}." for key in metrics),
        "## Scores of all cases as one set (pooled)",
        "Voxels and regions of all cases are counted together, so large cases weigh more.",
        _score_table(systems, "pooled", metrics, cases),
        "## Scores per slice",
    ]
    if slices == cases:
        parts.append("Every case is a single slice: scores per slice are those per case.")
    else:
        parts += [
            "Mean over slices ± SD; n is the number of slices in a mean, given where it is not all.",
            _score_table(systems, "per_slice", metrics, slices),
        ]
    parts.append(f"## Differences from {reference}")
    if content["differences"]:
        parts += [
            f"Mean difference (system minus {reference}) over n cases [95 % CI], with the p-values of two "
            "tests, each as it is and adjusted by Holm's method.",
            _difference_table(content["differences"], metrics),
        ]
    else:
        parts.append(f"There is no system to compare {reference} with.")
    parts += ["## Empty truths and predictions", _empty_table(systems)]
    pictures = {name: text for name, text in PICTURES.items() if (folder / name).is_file()}
    if pictures:
        parts += ["## Pictures", *(f"{text}:\n\n![{text}]({name})" for name, text in pictures.items())]
    policy = content["empty_policy"]
    parts += [
        "## How the numbers were made",
        _list([*content["protocol"].splitlines(), f"{policy[0].upper()}{policy[1:]}."]),
        "## Files",
        "`cases.csv` holds the scores of every case, `comparison.csv` a row for each system and metric, "
        "`comparison.json` both. They have more metrics: IoU (intersection over union), VOE (volumetric "
        "overlap error, 1 - IoU), RVD (relative volume difference) and MAE (mean absolute error). In them "
        f"{content['definitions']}.",
    ]
    return "\n\n".join(parts)


def _score_table(systems: Mapping[str, Any], part: str, metrics: Sequence[str], total: int) -> str:
    """Systems by metrics; ``total`` is the n that need not be said."""
    metrics = [key for key in metrics if key in next(iter(systems.values()))[part]["metrics"]]
    best = {}
    for key in metrics:
        means = [float(_number(m, key)) for s in systems.values() if (m := _mean(s, part, key)) is not None]
        best[key] = _number((min if key in LOWER_IS_BETTER else max)(means, default=None), key)
    rows = []
    for system, summary in systems.items():
        cells = []
        for key in metrics:
            mean, entry = _mean(summary, part, key), summary[part]["metrics"][key]
            text = _number(mean, key)
            cell = f"**{text}**" if mean is not None and text == best[key] else text
            if mean is not None and isinstance(entry, Mapping):
                cell += "" if entry["std"] is None else f" ± {_number(entry['std'], key)}"
                cell += f"<br>{_interval_text(entry['ci'], key)}" if entry.get("ci") else ""
                cell += "" if entry["n"] == total else f"<br>n = {entry['n']}"
            cells.append(cell)
        rows.append([system, *cells])
    return _table(["System", *(TERMS[key][0] for key in metrics)], rows)


def _difference_table(differences: Mapping[str, Any], metrics: Sequence[str]) -> str:
    rows = []
    for key in metrics:
        for system, by_metric in differences.items():
            entry = by_metric[key]
            change = _number(entry["mean_difference"], key, "+") + (
                f" {_interval_text(entry['ci'], key, '+')}" if entry["ci"] else ""
            )
            rows.append([TERMS[key][0], system, str(entry["n"]), change, *(_p(entry[t]) for t in TESTS)])
    header = ["Metric", "System", "n", "Difference", "t-test p", "adjusted", "Wilcoxon p", "adjusted"]
    return _table(header, rows)


def _empty_table(systems: Mapping[str, Any]) -> str:
    rows = []
    for system, summary in systems.items():
        case, false = summary["per_case"], summary["false_positives"]
        unit, name = ("ml", "mL") if false["ml"]["n"] else ("voxels", "voxels")
        mean = false[unit]["mean"]
        rows.append(
            [
                system,
                str(case["empty_truths"]),
                str(case["empty_in_both"]),
                str(case["empty_predictions"] - case["empty_in_both"]),
                "–" if mean is None else f"{mean:.1f} {name}",
            ]
        )
    header = ["System", "Cases without opacity", "of these left empty", "Cases missed altogether"]
    return _table([*header, "Mean false volume in cases without opacity"], rows)


def _mean(summary: Mapping[str, Any], part: str, key: str) -> float | None:
    entry = summary[part]["metrics"].get(key)
    return entry["mean"] if isinstance(entry, Mapping) else entry


def _number(value: float | None, key: str, sign: str = "") -> str:
    digits = 1 if key == "hd95_mm" else 3
    return "–" if value is None else f"{round(value, digits) + 0.0:{sign}.{digits}f}"  # + 0.0: no "-0.000"


def _interval_text(ends: Sequence[float], key: str, sign: str = "") -> str:
    return f"[{_number(ends[0], key, sign)}, {_number(ends[1], key, sign)}]"


def _p(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _plural(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; a bar in a name would open another column."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    cells.insert(1, ["---"] * len(header))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
