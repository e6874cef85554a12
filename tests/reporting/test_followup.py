# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from box_chest import KEY, LUNG_ML, MODEL, Box, Chest, make_chest, report_chest
from browser import open_page

from custom.data.files import write_json
from custom.data.phantom import Lesion, make_phantom
from custom.reporting.figures import AttentionView
from custom.reporting.followup import STAGES, compare_studies
from custom.reporting.followup_files import find_reports, group_by_patient, write_followup
from custom.reporting.followup_page import build_followup_page
from custom.reporting.followup_step import RULE, judge_course
from custom.reporting.page import build_page
from custom.reporting.report import build_failure

RIGHT = Box("right", 10, 80, 120)  # 20 mL
COURSE = (  # of the left lung 20, 80 and 40 mL: LOV 40, 100 and 60 mL
    ("20200301", (5, 5, 10), 10),
    ("20200309", (2, 2, 8), 40),
    ("20200320", (5, 5, 5), 20),
)


def follow(studies: list[tuple[dict, Any]]) -> dict[str, Any]:
    levels = {report["study"]: shown.levels for report, shown in studies if shown is not None}
    return compare_studies([report for report, _ in studies], levels)


@pytest.fixture(scope="module")
def three():
    """Three dates of one patient with other slices and another scanner each time."""
    return [
        report_chest(make_chest((RIGHT, Box("left", width, 160, 200)), spacing), day, model=f"M{spacing[2]}")
        for day, spacing, width in COURSE
    ]


def failed(name: str, day: str = "20200305") -> tuple[dict, None]:
    study = {
        "source": "dicom",
        "files": ["/nowhere"],
        "study_uid": "1.2",
        "study_date": day,
        "study_time": None,
    }
    report = build_failure(name, MODEL, "no lung was found; is it a chest CT?", study=study)
    report["source"]["patient_key"] = KEY
    return report, None


def unexplained(followup: dict[str, Any]) -> list[str]:
    def nulls(value: Any, path: str) -> Iterator[str]:
        if value is None:
            yield path
        elif isinstance(value, (dict, list)):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, inner in items:
                yield from nulls(inner, f"{path}.{key}".lstrip("."))

    def explained(path: str) -> bool:
        parts = path.split(".")
        return any(followup["reasons"].get(".".join(parts[:n])) for n in range(1, len(parts) + 1))

    content = {key: value for key, value in followup.items() if key != "reasons"}
    passed = {
        f"studies.{n}.reason" for n, entry in enumerate(followup["studies"]) if entry["status"] == "segmented"
    }
    return [path for path in nulls(content, "") if path not in passed and not explained(path)]


def test_three_dates_give_the_numbers_worked_out_by_hand(three):
    followup = follow(three[::-1])  # in any order
    studies = followup["studies"]
    assert [entry["study_date"] for entry in studies] == [day for day, *_ in COURSE]
    assert [entry["days_since_first"] for entry in studies] == [0, 8, 19]
    assert [entry["opacity_volume_ml"]["total"] for entry in studies] == [40.0, 100.0, 60.0]
    assert studies[0]["since_prior"] is None
    first, second = studies[1]["since_prior"], studies[2]["since_prior"]
    assert (first["days"], second["days"]) == (8, 11)
    assert first["basis"] == second["basis"] == "whole_lungs"
    assert first["change_ml"] == {"left": 60.0, "right": 0.0, "outside_lungs": 0.0, "total": 60.0}
    assert second["change_ml"] == {"left": -40.0, "right": 0.0, "outside_lungs": 0.0, "total": -40.0}
    assert {k: first["change_percent"][k] for k in ("left", "right", "total")} == {
        **{"left": 300.0, "right": 0.0, "total": 150.0}
    }
    assert second["change_percent"]["left"] == -50.0 and second["change_percent"]["total"] == -40.0
    assert first["change_percentage_points"]["total"] == pytest.approx(100 * 60 / (2 * LUNG_ML), abs=2e-3)
    assert second["change_percentage_points"]["left"] == pytest.approx(-100 * 40 / LUNG_ML, abs=2e-3)
    assert (first["course"], second["course"]) == ("increasing", "resolving")
    assert followup["course"] == "resolving" and followup["patient_key"] == KEY
    assert {item["name"] for item in first["differences"]} == {
        *("slice thickness (mm)", "slice distance (mm)", "pixel spacing (mm)", "scanner")
    }
    assert unexplained(followup) == []
    assert json.loads(json.dumps(followup)) == followup


@pytest.mark.parametrize(
    ("before", "after", "course"),
    [
        ((0.0, 0.0), (0.0, 0.0), "stable"),
        ((0.0, 0.0), (10.0, 0.2), "stable"),  # not more than 10 mL
        ((0.0, 0.0), (10.1, 0.2), "increasing"),
        ((8.0, 0.2), (0.0, 0.0), "stable"),
        ((100.0, 2.0), (125.0, 2.5), "stable"),  # not more than a quarter
        ((100.0, 2.0), (125.1, 2.5), "increasing"),
        ((100.0, 2.0), (75.0, 1.5), "stable"),
        ((100.0, 2.0), (74.9, 1.5), "resolving"),
        ((30.0, 1.0), (39.0, 1.3), "stable"),  # 30 %, but 9 mL
        ((100.0, None), (200.0, None), "increasing"),
        ((100.0, 2.0), (200.0, 1.9), None),
        ((100.0, 2.0), (50.0, 2.1), None),
    ],
)
def test_the_rule_of_the_course(before, after, course):
    found, reason = judge_course(before[0], after[0], before[1], after[1])
    assert found == course and bool(reason) == (course is None)


def test_the_rule_and_what_is_not_inferred_are_stated(three):
    followup = follow(three)
    assert followup["rule"] == RULE and "25 %" in RULE and "10 mL" in RULE and "rule of thumb" in RULE
    assert followup["clinical_stages"] is None and followup["reasons"]["clinical_stages"] == STAGES
    page = build_followup_page(followup, [r for r, _ in three], {})
    assert RULE in page and STAGES in page


def test_a_scan_that_shows_less_is_compared_where_both_show_it():
    # 40 mL of the left lung lie below 120 mm, which the second scan does not show.
    hidden, seen = Box("left", 20, 40, 80), Box("left", 20, 160, 200)
    whole = report_chest(make_chest((hidden, seen)))
    upper = report_chest(make_chest((Box("left", 40, 160, 200),), (5, 5, 5), low=120), "20200310")
    for studies, change, course in (
        ([whole, upper], 40.0, "increasing"),
        ([report_chest(make_chest((Box("left", 40, 160, 200),), low=120)), upper], 0.0, "stable"),
    ):
        step = follow(studies)["studies"][1]["since_prior"]
        assert step["basis"] == "shared_part" and "120 mm from the top" in step["basis_said"]
        assert step["shared_part"]["after"]["opacity_volume_ml"]["total"] == 80.0
        assert step["shared_part"]["after"]["lung_volume_ml"]["left"] == pytest.approx(0.6 * LUNG_ML)
        assert step["change_ml"]["total"] == change and step["course"] == course
    followup = follow([whole, upper])
    assert followup["studies"][0]["opacity_volume_ml"]["total"] == 80.0, "the whole scan's number stays"
    assert followup["studies"][1]["since_prior"]["change_percent"]["total"] == 100.0
    assert any(
        item["name"].startswith("extent") for item in followup["studies"][1]["since_prior"]["differences"]
    )
    assert unexplained(followup) == []
    page = build_followup_page(
        followup, [whole[0], upper[0]], {r["study"]: p.to_json() for r, p in (whole, upper)}
    )
    assert "compared is what both show, 120 mm from the top" in page
    assert "LOV of this part 40.0 mL, then 80.0 mL" in page and "of the part that both show" in page


@pytest.mark.parametrize("case", ["single slices", "opposite ends", "no page", "no lungs", "one lung absent"])
def test_what_cannot_be_compared_has_no_course_and_a_reason(case):
    box = (Box("left", 40, 160, 200),)
    before, after = make_chest(box), make_chest((Box("left", 20, 160, 200),))
    options: dict[str, Any] = {}
    if case == "single slices":
        before, after = (make_chest(box, low=170, high=180) for _ in range(2))
    elif case == "opposite ends":
        before, after = make_chest(box, high=200), make_chest(box, low=120)
    elif case == "no lungs":
        options["lungs"] = False
    elif case == "one lung absent":
        after = make_chest(box, without="right")
    studies = [report_chest(before), report_chest(after, "20200310", **options)]
    if case == "no page":
        studies[0] = (studies[0][0], None)
    followup = follow(studies)
    step = followup["studies"][1]["since_prior"]
    assert step["basis"] == "as_scanned" and step["course"] is None and followup["course"] is None
    expected = {
        "single slices": "single slice",
        "opposite ends": "no end of the lungs that all scans show",
        "no page": "a page with its slices is missing",
        "no lungs": "the lungs are not known on 2020-03-10",
        "one lung absent": "the right lung was not found on 2020-03-10",
    }[case]
    assert expected in followup["reasons"]["course"]
    assert unexplained(followup) == []
    page = build_followup_page(followup, [r for r, _ in studies], {})
    assert 'data-field="course">not stated' in page and expected in page
    if case in ("no lungs", "one lung absent"):
        assert step["change_percentage_points"]["total"] is None


def test_another_breath_is_not_taken_for_a_course(three):
    """The LOV goes down, the share of the lungs up: half of the air is gone."""
    before, after = ({**report} for report, _ in three[:2])
    levels = {report["study"]: shown.levels for report, shown in three[:2]}
    after["opacity_volume_ml"] = {"left": 10.0, "right": 10.0, "outside_lungs": 0.0, "total": 20.0}
    after["opacity_percent_of_lung"] = {"left": 2.0, "right": 2.0, "total": 2.0}
    after["lung_volume_ml"] = {"left": 500.0, "right": 500.0, "total": 1000.0}
    followup = compare_studies([before, after], levels)
    assert followup["course"] is None and "more or less air" in followup["reasons"]["course"]
    assert any(i["name"] == "lung volume (mL)" for i in followup["studies"][1]["since_prior"]["differences"])


def test_a_failed_study_is_listed_and_passed_over(three):
    followup = follow([three[0], failed("study-bad"), three[1]])
    bad, last = followup["studies"][1:]
    assert bad["study"] == "study-bad" and bad["opacity_volume_ml"]["total"] is None
    assert "no lung was found" in followup["reasons"]["studies.1.since_prior"]
    assert last["since_prior"]["study"] == three[0][0]["study"] and last["since_prior"]["days"] == 8
    assert followup["course"] == "increasing" and unexplained(followup) == []
    both = follow([failed("study-a"), failed("study-b", "20200311")])
    assert both["course"] is None and unexplained(both) == []
    page = build_followup_page(both, [failed("study-a")[0], failed("study-b")[0]], {})
    assert page.count("no numbers: no lung was found") == 2 and "<circle" not in page


def test_studies_without_a_date_have_no_place_in_time(three):
    undated = report_chest(make_chest((RIGHT,)), None, name="study-undated")
    followup = follow([undated, *three[:2]])
    assert followup["studies"][2]["study"] == "study-undated"
    assert "has no place in the course" in followup["reasons"]["studies.2.since_prior"]
    assert followup["course"] == "increasing" and unexplained(followup) == []
    alone = follow([undated, three[0]])
    assert alone["course"] is None and "fewer than two studies" in alone["reasons"]["course"]
    page = build_followup_page(followup, [undated[0], *(r for r, _ in three[:2])], {})
    assert "no date" in page and "1 without a date" in page


def test_two_studies_of_one_day_need_their_times():
    boxes = (Box("left", 10, 160, 200),), (Box("left", 40, 160, 200),)

    def both(*times: str | None) -> dict[str, Any]:
        return follow(
            [
                report_chest(make_chest(box), name=f"s{n}", study_time=time)
                for n, (box, time) in enumerate(zip(boxes, times, strict=True))
            ]
        )

    later = both("1800", "0900")
    assert [entry["study"] for entry in later["studies"]] == ["s1", "s0"] and later["course"] == "resolving"
    unknown = both(None, "0900")
    assert unknown["course"] is None and "which came first is not known" in unknown["reasons"]["course"]


def test_what_is_no_follow_up_is_refused(three):
    (first, _), (second, _), _ = three
    with pytest.raises(ValueError, match="needs two studies"):
        compare_studies([first])
    with pytest.raises(ValueError, match="two reports of the study"):
        compare_studies([first, first])
    other = {**second, "source": {**second["source"], "patient_key": "patient-ffffffffffff"}}
    with pytest.raises(ValueError, match="of 2 patients"):
        compare_studies([first, other])


# Files and pages


@pytest.fixture
def written(three, tmp_path) -> Path:
    """What inference leaves of three studies."""
    for report, shown in three:
        folder = tmp_path / report["study"]
        folder.mkdir()
        page = build_page(report, shown, AttentionView(np.zeros((4, 4)), {}))
        (folder / f"{report['study']}_page.html").write_text(page, encoding="utf-8")
        write_json(folder / f"{report['study']}_report.json", report)
    return tmp_path


def test_the_pages_of_the_studies_get_the_course_and_links_that_work(written):
    ((key, group),) = group_by_patient(find_reports([written])).items()
    assert key == KEY and len(group) == 3
    page, followup = write_followup(written, group)
    assert page == written / f"followup_{KEY}.html"
    assert json.loads(page.with_suffix(".json").read_text(encoding="utf-8")) == followup
    assert followup["course"] == "resolving"
    pages = [page, *written.rglob("*_page.html")]
    assert len(pages) == 4
    for file in pages:
        text = file.read_text(encoding="utf-8")
        assert RULE in text and text.count('<svg class="curve"') == 2
        for link in re.findall(r'href="([^"#:]+)"', text):
            if "_page" in link or "followup" in link:
                assert (file.parent / link).is_file(), link
        assert str(written) not in text
    before = pages[1].read_text(encoding="utf-8")
    write_followup(written, group)
    assert pages[1].read_text(encoding="utf-8") == before, "once more changes nothing"


def test_pages_elsewhere_are_neither_linked_nor_changed(written, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    before = {file: file.read_bytes() for file in written.rglob("*.html")}
    page, followup = write_followup(elsewhere, find_reports([written]))
    assert {file: file.read_bytes() for file in written.rglob("*.html")} == before
    assert "<a " not in page.read_text(encoding="utf-8") and followup["course"] == "resolving"


def test_files_that_are_no_reports_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="report not found"):
        find_reports([tmp_path / "no.json"])
    with pytest.raises(FileNotFoundError, match="no report"):
        find_reports([tmp_path])
    for text, reason in (
        ("{", "not a report"),
        ("[]", "not a report"),
        ('{"schema_version": "1.0", "study": "s"}', "1.0"),
    ):
        (tmp_path / "a_report.json").write_text(text)
        with pytest.raises(ValueError, match=reason):
            find_reports([tmp_path])


def test_the_same_levels_are_shown_with_date_and_lov_on_each(three):
    followup = follow(three)
    reports = [report for report, _ in three]
    page = build_followup_page(followup, reports, {r["study"]: shown.to_json() for r, shown in three})
    levels = page[page.index('id="levels"') :]
    rows = re.findall(r'<p class="row">([^<]*)</p>', levels)
    shares = [int(share) for share in re.findall(r"axial, (\d+) %", " ".join(rows))]
    # 85, 65, 45 and 25 % of the height, but for 65 %, for which stands the level with most opacity close by.
    assert shares[0] == 85 and 60 <= shares[1] <= 65 and shares[2:] == [45, 25]
    assert len(rows) == 6 and all(row.startswith("coronal") for row in rows[4:])
    for day, lov in (("2020-03-01", "40.0"), ("2020-03-09", "100.0"), ("2020-03-20", "60.0")):
        assert len(re.findall(rf">{day}</text><text[^>]*>LOV {lov} mL</text>", levels)) == len(rows)
    assert "matched by their relative height within the lungs of each date" in levels
    # Opacity lies at 60 to 80 % of the left lung's height and at 20 to 40 % of the right lung's.
    for share, expected in zip(shares, (0, 3, 0, 3), strict=True):
        part = levels[levels.index(f"axial, {share} %") :]
        assert part[: part.index('<p class="row">')].count('class="mask"') == expected, share


def test_a_phantom_with_a_known_course_gives_the_known_numbers():
    """Ellipsoids whose volumes are known, drawn on three grids of the same patient."""
    studies, truth = [], []
    for day, radius, spacing, shape in (
        ("20200301", 15.0, (3.6, 3.6, 5.0), (96, 96, 60)),
        ("20200310", 24.0, (3.0, 3.0, 8.0), (114, 114, 38)),
        ("20200330", 18.0, (4.0, 4.0, 4.0), (86, 86, 76)),
    ):
        lesions = [
            Lesion("consolidation", (0.51, 0.69, 0.73), (radius, radius, radius), "right"),
            Lesion("ground_glass", (0.51, 0.48, 0.80), (15.0, 15.0, 15.0), "left"),
        ]
        phantom = make_phantom(shape, spacing, seed=4, lesions=lesions, scale=1.0)
        truth.append({"right": phantom.lesions[1].volume_ml, "left": phantom.lesions[0].volume_ml})
        label = (phantom.label > 0).astype(np.uint8)
        studies.append(report_chest(Chest(phantom.image, label, phantom.lungs, phantom.affine), day))
    followup = follow(studies)
    for entry, known in zip(followup["studies"], truth, strict=True):
        for side in ("left", "right"):
            assert entry["opacity_volume_ml"][side] == pytest.approx(known[side], rel=0.06), side
    steps = [entry["since_prior"] for entry in followup["studies"][1:]]
    for step, old, new in zip(steps, truth[:-1], truth[1:], strict=True):
        assert step["basis"] == "whole_lungs"
        assert step["change_ml"]["total"] == pytest.approx(new["right"] - old["right"], abs=2.5)
    assert [step["course"] for step in steps] == ["increasing", "resolving"]


def test_a_browser_opens_it_and_switches_the_masks(three, tmp_path):
    followup = follow(three)
    file = tmp_path / "followup.html"
    contents = {r["study"]: shown.to_json() for r, shown in three}
    file.write_text(build_followup_page(followup, [r for r, _ in three], contents), encoding="utf-8")
    script = 'document.dispatchEvent(new KeyboardEvent("keydown", {key: "m"}));'
    opened = open_page(file, script=script)
    assert opened.console == [] and opened.state("mask") == "off" and opened.state("lungs") == "on"
    script = "document.body.dataset.over = document.documentElement.scrollWidth - innerWidth;"
    assert int(open_page(file, "mask=off", script, width=400).state("over")) <= 0
