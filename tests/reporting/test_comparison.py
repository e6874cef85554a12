# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from custom.metrics import CaseScores, ScoredCase, score_case, summarize_scores
from custom.metrics.scores import METRICS
from custom.reporting.comparison import (
    PICTURES,
    TERMS,
    _interval,
    _test,
    adjust_holm,
    compare_systems,
    match_cases,
    write_comparison,
)

FAST = 200  # resamples where the interval does not matter
System = Callable[[np.ndarray, np.random.Generator], np.ndarray]
SYSTEMS: dict[str, System] = {
    "noisy": lambda truth, rng: truth ^ (rng.random(truth.shape) < 0.1),
    "noisier": lambda truth, rng: truth ^ (rng.random(truth.shape) < 0.2),
    "nothing": lambda truth, rng: np.zeros_like(truth),
    "everything": lambda truth, rng: np.ones_like(truth),
    "truth": lambda truth, rng: truth.copy(),
}


def truths(n: int = 9) -> dict[str, np.ndarray]:
    """Masks (8, 9, 3) by name; that of case 4 is empty."""
    rng = np.random.default_rng(5)
    return {f"case {i}": (rng.random((8, 9, 3)) < 0.15 + 0.02 * i) & (i != 4) for i in range(n)}


def score(names: tuple[str, ...] = tuple(SYSTEMS), spacing: bool = True) -> dict[str, list[CaseScores]]:
    geometry = {"voxel_ml": 0.01, "spacing": (1.0, 1.0, 5.0)} if spacing else {}
    scores: dict[str, list[CaseScores]] = {}
    for name in names:
        rng = np.random.default_rng(len(name))
        scores[name] = [
            score_case(ScoredCase(case, SYSTEMS[name](truth, rng), truth, **geometry))
            for case, truth in truths().items()
        ]
    return scores


@pytest.fixture(scope="module")
def scores() -> dict[str, list[CaseScores]]:
    return score()


@pytest.fixture(scope="module")
def comparison(scores):
    return compare_systems(scores, "noisy", resamples=FAST)


def test_holm_by_hand():
    """Ranks .005 .01 .03 .04 times 4 3 2 1: .02 .03 .06 .04, the last raised to .06."""
    assert adjust_holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert adjust_holm([0.4, None, 0.6]) == [0.8, None, 0.8]  # a family of two; 0.6 is raised to 0.8
    assert adjust_holm([0.7, 0.9]) == [1.0, 1.0]
    assert adjust_holm([0.03]) == [0.03]
    assert adjust_holm([None]) == [None]


def test_tests_are_those_of_scipy_on_the_joined_values(scores, comparison):
    for system in ("noisier", "everything"):
        for key in METRICS:
            rows = {s: {c.row["name"]: c.row[key] for c in scores[s]} for s in ("noisy", system)}
            both = [n for n in rows["noisy"] if rows["noisy"][n] is not None and rows[system][n] is not None]
            ours, theirs = ([rows[s][n] for n in both] for s in (system, "noisy"))
            entry = comparison["differences"][system][key]
            assert entry["n"] == len(both)
            assert entry["mean_difference"] == pytest.approx(np.mean(ours) - np.mean(theirs), abs=1e-9)
            assert entry["t_p"] == pytest.approx(stats.ttest_rel(ours, theirs).pvalue, rel=1e-6)
            differ = [(a, b) for a, b in zip(ours, theirs, strict=True) if abs(a - b) > 1e-9]
            assert entry["wilcoxon_p"] == pytest.approx(
                stats.wilcoxon(*np.transpose(differ)).pvalue, rel=1e-6
            )
            assert entry["ci"][0] <= entry["mean_difference"] <= entry["ci"][1]


def test_wilcoxon_by_hand():
    """Of the 32 signs of ranks 1 to 5, a sum of 15 or of 0 has one each; all pairs rise: p = 2 / 32."""
    entry = _test([0.2, 0.4, 0.6, 0.8, 0.9], [0.1, 0.2, 0.3, 0.4, 0.4], 0, FAST)
    assert entry["wilcoxon_p"] == pytest.approx(2 / 32)
    entry = _test([0.2, 0.4, 0.6, 0.8, 0.9, 0.5, 0.5], [0.1, 0.2, 0.3, 0.4, 0.4, 0.5, 0.5], 0, FAST)
    assert entry["n"] == 7 and entry["wilcoxon_p"] == pytest.approx(2 / 32), "equal pairs are left out"


def test_holm_families_are_the_systems_within_a_metric_and_test(comparison):
    for key in METRICS:
        for test in ("t_p", "wilcoxon_p"):
            entries = [by_metric[key] for by_metric in comparison["differences"].values()]
            assert adjust_holm([e[test] for e in entries]) == [e[f"{test}_holm"] for e in entries]
    assert set(comparison["differences"]) == set(SYSTEMS) - {"noisy"}
    entry = comparison["differences"]["everything"]["dice"]
    assert entry["t_p_holm"] > entry["t_p"]


def test_undefined_and_degenerate_differences():
    same = [0.25, 0.5, None, 0.75]
    assert _test(same, same, 0, FAST) == {
        "n": 3,
        "mean_difference": 0.0,
        "ci": None,
        "t_p": 1.0,
        "t_p_holm": None,
        "wilcoxon_p": 1.0,
        "wilcoxon_p_holm": None,
    }
    shifted = _test([0.9, 0.5, 0.4], [0.8, 0.4, 0.3], 0, FAST)  # 0.1 each, but not to the last bit
    assert shifted["t_p"] is None and shifted["ci"] is None
    assert shifted["wilcoxon_p"] == pytest.approx(2 / 2**3)
    one = _test([0.9, None], [0.8, 0.4], 0, FAST)
    assert one["n"] == 1 and one["mean_difference"] == pytest.approx(0.1)
    assert one["ci"] is one["t_p"] is one["wilcoxon_p"] is None
    none = _test([None], [0.4], 0, FAST)
    assert none["n"] == 0 and none["mean_difference"] is none["t_p"] is None


def test_intervals_cover_a_known_mean():
    """Of 300 samples of 40 from a skewed distribution, about 95 % of the intervals hold its mean."""
    rng = np.random.default_rng(0)
    hits = sum(
        low <= 0.8 <= high for low, high in (_interval(rng.beta(4, 1, 40), 0, 500) for _ in range(300))
    )
    assert 0.91 <= hits / 300 <= 0.98  # 0.95 -+ three standard errors; bootstrap intervals run narrow


def test_intervals_are_those_of_scipy_and_absent_where_nothing_varies(scores, comparison):
    values = np.array([case.row["dice"] for case in scores["noisier"] if case.row["dice"] is not None])
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=FAST, method="BCa", random_state=np.random.default_rng(0)
    ).confidence_interval
    entry = comparison["systems"]["noisier"]["per_case"]["metrics"]["dice"]
    assert entry["ci"] == pytest.approx([expected.low, expected.high])
    assert entry["median"] == pytest.approx(np.median(values)) and entry["n"] == len(values) == 8
    for constant in (np.array([]), np.array([0.5]), np.full(6, 0.1)):
        assert _interval(constant, 0, FAST) is None


def test_systems_of_which_theory_knows_the_scores(comparison):
    case = {name: summary["per_case"] for name, summary in comparison["systems"].items()}
    mean = {name: {key: entry["mean"] for key, entry in c["metrics"].items()} for name, c in case.items()}
    for key in ("dice", "iou", "sensitivity", "specificity", "ppv", "va", "rlp", "rlr", "surface_dice"):
        assert mean["truth"][key] == 1, key
        assert case["truth"]["metrics"][key]["ci"] is None, "equal values have no interval"
    assert mean["truth"]["hd95_mm"] == mean["truth"]["mae"] == 0

    assert (mean["nothing"]["dice"], mean["nothing"]["sensitivity"], mean["nothing"]["specificity"]) == (
        0,
        0,
        1,
    )
    assert mean["nothing"]["ppv"] is mean["nothing"]["hd95_mm"] is None
    assert case["nothing"]["metrics"]["ppv"]["n"] == 0
    assert comparison["differences"]["nothing"]["ppv"]["n"] == 0

    shares = np.array([truth.mean() for truth in truths().values()])
    ill = shares[shares > 0]
    assert (mean["everything"]["sensitivity"], mean["everything"]["specificity"]) == (1, 0)
    assert mean["everything"]["dice"] == pytest.approx(np.mean(2 * ill / (1 + ill)))
    assert mean["everything"]["ppv"] == pytest.approx(shares.mean())
    pooled = comparison["systems"]["everything"]["pooled"]["metrics"]
    assert pooled["ppv"] == pytest.approx(shares.mean())  # all cases are of one size
    assert pooled["dice"] == pytest.approx(2 * shares.mean() / (1 + shares.mean()))


def test_empty_cases_are_counted_and_left_out(scores, comparison):
    assert (comparison["cases"], comparison["slices"]) == (9, 27)
    counted = {
        name: tuple(s["per_case"][k] for k in ("empty_truths", "empty_predictions", "empty_in_both"))
        for name, s in comparison["systems"].items()
    }
    assert counted == {
        "noisy": (1, 0, 0),
        "noisier": (1, 0, 0),
        "nothing": (1, 9, 1),
        "everything": (1, 0, 0),
        "truth": (1, 1, 1),
    }
    summary = summarize_scores(scores["noisy"])
    assert comparison["empty_policy"] == summary["empty_policy"]
    for part in ("pooled", "per_slice", "false_positives"):
        assert comparison["systems"]["noisy"][part] == summary[part]


def test_neither_order_nor_company_changes_anything(scores, comparison):
    turned = {name: scores[name][::-1] for name in reversed(scores)}
    again = compare_systems(turned, "noisy", resamples=FAST)
    assert again["systems"] == comparison["systems"]
    assert again["differences"] == comparison["differences"]
    pair = compare_systems({name: scores[name] for name in ("truth", "noisy")}, "noisy", resamples=FAST)
    for key in METRICS:
        alone, among = (c["differences"]["truth"][key] for c in (pair, comparison))
        assert {k: v for k, v in alone.items() if "holm" not in k} == {
            k: v for k, v in among.items() if "holm" not in k
        }
        assert alone["t_p_holm"] == alone["t_p"], "a family of one"
    other = compare_systems(scores, "noisy", seed=1, resamples=FAST)
    assert other["differences"] != comparison["differences"]


def test_the_protocol_says_what_was_done(comparison):
    text = comparison["protocol"]
    for words in ("BCa", f"{FAST} resamples", "seed 0", "two-sided", "Holm", "minus noisy", "No level"):
        assert words in text, words


def test_user_errors(scores):
    short = {**scores, "nothing": scores["nothing"][2:]}
    with pytest.raises(
        ValueError, match="system 'nothing' has no scores of 'case 0', 'case 1', which others"
    ):
        compare_systems(short, "noisy")
    with pytest.raises(ValueError, match="reference 'best' is none of the systems: noisy, noisier"):
        compare_systems(scores, "best")
    with pytest.raises(ValueError, match="no case"):
        compare_systems({"noisy": []}, "noisy")
    with pytest.raises(ValueError, match="no case"):
        match_cases({})
    with pytest.raises(ValueError, match="'noisy' has several scores of one case"):
        match_cases({"noisy": [*scores["noisy"], scores["noisy"][0]]})
    flipped = [score_case(ScoredCase(name, np.zeros_like(truth), ~truth)) for name, truth in truths().items()]
    with pytest.raises(ValueError, match="'case 0' was scored against different truths: .* in 'noisy'"):
        match_cases({"noisy": scores["noisy"], "flipped": flipped})


def read_table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_files(tmp_path, scores, comparison):
    (tmp_path / "box_plots.png").write_bytes(b"a picture")
    lines = ["Three folds, split by patient.", "Every system was trained alike."]
    write_comparison(tmp_path, comparison, "Five systems", lines)
    assert {path.name for path in tmp_path.iterdir()} == {
        "box_plots.png",
        "cases.csv",
        "comparison.csv",
        "comparison.json",
        "comparison.md",
    }
    content = json.loads((tmp_path / "comparison.json").read_text(encoding="utf-8"))
    assert content["title"] == "Five systems" and content["experiment"] == lines
    assert content["systems"] == comparison["systems"] and content["differences"] == comparison["differences"]
    assert len(content["rows"]) == 5 * 9

    rows = read_table(tmp_path / "cases.csv")
    assert len(rows) == 5 * 9 and "fold" not in rows[0]
    found = {(row["system"], row["name"]): row for row in rows}
    for case in scores["noisier"]:
        row = found["noisier", case.row["name"]]
        assert row["dice"] == ("" if case.row["dice"] is None else str(case.row["dice"]))

    rows = read_table(tmp_path / "comparison.csv")
    assert len(rows) == 5 * len(METRICS)
    found = {(row["system"], row["metric"]): row for row in rows}
    row, entry = found["noisier", "dice"], comparison["differences"]["noisier"]["dice"]
    assert float(row["difference_ci_low"]) == entry["ci"][0]
    assert float(row["difference_wilcoxon_p_holm"]) == entry["wilcoxon_p_holm"]
    assert float(row["pooled"]) == comparison["systems"]["noisier"]["pooled"]["metrics"]["dice"]
    assert found["noisy", "dice"]["difference_n"] == "", "the reference is not compared with itself"
    assert found["nothing", "ppv"]["case_mean"] == ""

    report = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    assert report.startswith("# Five systems\n")
    for words in [*SYSTEMS, *lines, *comparison["protocol"].splitlines(), *(t[0] for t in TERMS.values())]:
        assert words in report, words
    assert "(box_plots.png)" in report and "contour_sheet.png" not in report
    assert list(PICTURES) == ["box_plots.png", "contour_sheet.png"]
    assert "nan" not in report.lower().split() and "None" not in report


def table_rows(report: str, heading: str) -> dict[str, list[str]]:
    """The cells of the first table under a heading, by the first cell of a row."""
    lines = report.split(f"## {heading}\n")[1].split("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


def test_the_tables_of_the_report(tmp_path, comparison):
    write_comparison(tmp_path, comparison, "Five systems", ["One sentence."])
    report = (tmp_path / "comparison.md").read_text(encoding="utf-8")
    table = table_rows(report, "Scores per case")
    columns = table["System"]
    assert set(table) == {"System", "---", *SYSTEMS}
    entry = comparison["systems"]["noisier"]["per_case"]["metrics"]["dice"]
    low, high = entry["ci"]
    expected = f"{entry['mean']:.3f} ± {entry['std']:.3f}<br>[{low:.3f}, {high:.3f}]<br>n = 8"
    assert table["noisier"][columns.index("Dice")] == expected
    assert table["truth"][columns.index("Dice")] == "**1.000** ± 0.000<br>n = 8"
    assert table["nothing"][columns.index("PPV")] == "–"
    assert table["truth"][columns.index("HD95 (mm)")].startswith("**0.0**"), "the least distance is best"
    assert table["nothing"][columns.index("Specificity")] == "**1.000** ± 0.000", "a tie; n is all"
    assert table["truth"][columns.index("Specificity")] == "**1.000** ± 0.000"
    assert sum("**" in table[s][columns.index("VA")] for s in SYSTEMS) == 1

    pooled = table_rows(report, "Scores of all cases as one set (pooled)")
    assert pooled["truth"][0] == "**1.000**" and "HD95 (mm)" not in pooled["System"]
    per_slice = table_rows(report, "Scores per slice")
    n = comparison["systems"]["noisy"]["per_slice"]["metrics"]["dice"]["n"]
    assert per_slice["noisy"][0].endswith(f"<br>n = {n}") and n == 24

    lines = report.split("## Differences from noisy\n")[1].split("\n## ")[0].splitlines()
    entry = comparison["differences"]["noisier"]["rlr"]
    line = next(line for line in lines if line.startswith("| RLR | noisier |"))
    assert f"| {entry['n']} | {entry['mean_difference']:+.3f} [" in line
    assert line.count(" | ") == 7
    assert "| PPV | nothing | 0 | – | – | – | – | – |" in lines
    counts = table_rows(report, "Empty truths and predictions")
    assert counts["nothing"][:3] == ["1", "1", "8"]
    assert counts["everything"][3] == f"{8 * 9 * 3 * 0.01:.1f} mL"


def test_a_report_of_single_slices_of_one_system(tmp_path):
    """No spacing: surface metrics are left out, and it is said; folds and odd names come through."""
    rng = np.random.default_rng(0)
    scores = {"A|B": []}
    for i in range(3):
        case = score_case(ScoredCase(str(i), rng.random((6, 6)) < 0.5, rng.random((6, 6)) < 0.5))
        scores["A|B"].append(CaseScores({**case.row, "fold": i % 2}, case.slices))
    result = compare_systems(scores, "A|B", resamples=FAST)
    assert result["differences"] == {}
    write_comparison(tmp_path / "new", result, "One system", [])
    report = (tmp_path / "new" / "comparison.md").read_text(encoding="utf-8")
    assert "1 system, 3 cases, 3 slices." in report
    assert "Left out, since undefined in every case: HD95 (mm), Surface Dice." in report
    assert "Every case is a single slice" in report and "no system to compare A|B with" in report
    assert "| A\\|B | " in report and "## Pictures" not in report
    assert [row["fold"] for row in read_table(tmp_path / "new" / "cases.csv")] == ["0", "1", "0"]


def test_undefined_values_reach_no_file_as_nan(scores):
    result = compare_systems({name: scores[name][4:5] for name in scores}, "noisy", resamples=FAST)
    json.dumps(result, allow_nan=False)
    assert result["systems"]["noisy"]["per_case"]["metrics"]["dice"] == {
        "mean": None,
        "std": None,
        "n": 0,
        "median": None,
        "ci": None,
    }
    assert math.isfinite(result["systems"]["noisy"]["per_case"]["metrics"]["specificity"]["mean"])
