# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import re
from datetime import date
from html.parser import HTMLParser

import nibabel as nib
import numpy as np
import pytest
from box_chest import HEIGHT, LUNG_ML, MODEL, Box, make_chest, report_chest
from browser import open_page

from custom.reporting import pictures as pictures_module
from custom.reporting.figures import AttentionView
from custom.reporting.levels import LungLevels, match_levels
from custom.reporting.page import build_page
from custom.reporting.page_frame import read_pictures, replace_course
from custom.reporting.picture_codes import data_uri, decode_classes, encode_outline, encode_overlay
from custom.reporting.pictures import StudyPictures, take_pictures
from custom.reporting.report import build_failure
from custom.reporting.svg import CurvePoint, draw_curve
from custom.reporting.wording import format_ml, format_signed, hide_paths, parse_date

BOXES = (Box("left", 10, 80, 120), Box("right", 40, 160, 200, hu=20.0))  # 20 mL and 80 mL


@pytest.fixture(scope="module")
def study():
    return report_chest(make_chest(BOXES))


def text_of(page: str) -> str:
    """What a reader sees."""

    class Reader(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.words: list[str] = []
            self.hidden = 0

        def handle_starttag(self, tag: str, attrs: list) -> None:
            self.hidden += tag in ("script", "style")

        def handle_endtag(self, tag: str) -> None:
            self.hidden -= tag in ("script", "style")

        def handle_data(self, data: str) -> None:
            if not self.hidden:
                self.words.append(data)

    reader = Reader()
    reader.feed(page)
    return " ".join(" ".join(reader.words).split())


def field(page: str, path: str) -> str:
    (found,) = re.findall(rf'<td class="number" data-field="{re.escape(path)}">([^<]*)</td>', page)
    return found


def test_the_numbers_are_those_of_the_report(study):
    report, pictures = study
    page = build_page(report, pictures)
    assert 'data-field="opacity_volume_ml.total">100.0<small>mL' in page
    assert (
        field(page, "opacity_volume_ml.left") == "20.0" and field(page, "opacity_volume_ml.right") == "80.0"
    )
    assert field(page, "opacity_volume_ml.outside_lungs") == "0.0"
    assert field(page, "consolidation_volume_ml.right") == "80.0"
    assert field(page, "ground_glass_volume_ml.right") == "0.0"
    assert field(page, "opacity_percent_of_lung.right") == format_ml(100 * 80 / LUNG_ML) == "4.2"
    assert field(page, "lung_volume_ml.total") == "3\N{NARROW NO-BREAK SPACE}840.0"
    assert field(page, "opacity_mean_hu.right") == "20"
    assert field(page, "opacity_mean_hu.left") == "\N{MINUS SIGN}450"
    seen = text_of(page)
    for words in ("Research use only. Not a medical device.", "2020-03-01, 10:15", "Maker M1", "a_bundle"):
        assert words in seen, words
    assert MODEL["weights_sha256"] in seen and "1.2.3" in seen
    assert "28 slices, one every 10 mm" in seen


def test_how_it_was_made_is_named(study):
    page = build_page(*study, settings={"hu_window": [-1000, 400]}, made_on=date(2026, 1, 2))
    seen = text_of(page)
    assert "Window of the input (HU) \N{MINUS SIGN}1 000, 400" in seen
    assert "Page made on 2026-01-02" in seen
    given = text_of(build_page({**study[0], "model": {**MODEL, "bundle": "", "weights_sha256": None}}))
    assert "Mask given, not made here" in given


def test_the_page_needs_nothing_but_itself(study):
    page = build_page(*study, AttentionView(np.zeros((8, 8)), {"gate": np.ones((2, 2))}))
    assert "default-src 'none'" in page
    assert not re.findall(r'(?:src|href|action)="(?!data:|#|study-2020)[^"]*"', page)
    assert not re.findall(r"<link|<iframe|@import|url\(|fetch\(|XMLHttpRequest|//[a-z]+\.[a-z]", page)


def test_what_comes_from_elsewhere_is_escaped(study):
    report, pictures = study
    bad = '<script>alert(1)</script>"&'
    source = {**report["source"], "manufacturer": bad, "notes": [bad], "series_choice": bad}
    page = build_page({**report, "source": source, "model": {**MODEL, "bundle": bad}}, pictures)
    assert bad not in page and page.count("<script>") == 1
    assert "&lt;script&gt;alert(1)" in page


def test_paths_in_reasons_and_notes_are_left_out(study):
    report, pictures = study
    source = {**report["source"], "notes": ["seen in /data/Mustermann Erika/1.dcm"]}
    assert "Mustermann" not in build_page({**report, "source": source}, pictures)
    failure = build_failure("s", MODEL, "empty file (0 bytes): scans/Mustermann Erika/ct.nii.gz")
    assert "Mustermann" not in build_page(failure) and "empty file (0 bytes)" in build_page(failure)
    for text, kept in (
        ("12.5 mm / 3 slices", "12.5 mm / 3 slices"),
        ("/a/Max Muster/ct.nii.gz: no lung was found", "no lung was found"),
        ("Max: Muster x/ct.NII: no lung: none", "no lung: none"),
        ("empty file: Max Muster/ct.nii", "empty file: (path left out)"),
        ("not DICOM: C:\\Max Muster\\1.dcm", "not DICOM: (path left out)"),
    ):
        assert hide_paths(text) == kept


def test_a_failed_study_says_why():
    seen = text_of(build_page(build_failure("s", MODEL, "no lung was found; is it a chest CT?")))
    assert "No result: this study could not be measured." in seen
    assert "Why: no lung was found; is it a chest CT?" in seen
    assert "Not a medical device" in seen and "mL" not in seen


def test_an_empty_mask_is_a_measured_zero():
    page = build_page(*report_chest(make_chest()))
    assert 'data-field="opacity_volume_ml.total">0.0<small>mL' in page
    assert "No opacity is marked in this study: 0 mL is what was measured." in text_of(page)
    assert 'data-field="severity.score">0<small>of 24' in page


def test_without_lungs_nothing_is_said_of_them():
    page = build_page(*report_chest(make_chest(BOXES), lungs=False))
    seen = text_of(page)
    assert "The lungs are not known (no lung mask was made)" in seen
    assert 'data-field="opacity_volume_ml.total">100.0<small>mL' in page
    assert 'data-field="opacity_percent_of_lung.total">not known' in page
    assert 'data-field="severity.score">not known' in page


def test_an_absent_lung_is_not_zero():
    page = build_page(*report_chest(make_chest((BOXES[0],), without="right")))
    seen = text_of(page)
    assert "The right lung was not found" in seen
    assert 'data-field="opacity_percent_of_lung.total">not known' in page
    assert "opacity_volume_ml.right" not in page, "its cell says not known"
    assert field(page, "opacity_volume_ml.left") == "20.0"


def test_a_missing_date_is_said():
    for day in (None, "20201399"):
        seen = text_of(build_page(*report_chest(make_chest(BOXES), date=day, name="s")))
        assert "study date not known" in seen and "No course: the date of this study is not known" in seen


def test_flagged_checks_are_seen_before_the_pictures():
    page = build_page(*report_chest(make_chest(BOXES), contrast_agent="IOHEXOL"))
    cautions = page[page.index('id="cautions"') : page.index('id="overview"')]
    assert "A contrast agent was given" in cautions and "A slice every 10 mm, more than 5 mm" in cautions
    assert 'id="cautions"' not in build_page(*report_chest(make_chest(BOXES, spacing=(5, 5, 5))))


def test_pictures_come_back_out_of_the_page(study):
    report, pictures = study
    back = StudyPictures.from_json(read_pictures(build_page(report, pictures)))
    assert np.array_equal(back.opacity, pictures.opacity) and np.array_equal(back.lungs, pictures.lungs)
    assert np.abs(back.image.astype(int) - pictures.image).mean() < 2
    assert back.slices == pictures.slices and back.pixel_mm == pictures.pixel_mm
    for name, ml in pictures.levels.opacity_ml.items():
        assert np.array_equal(back.levels.opacity_ml[name], ml)
    assert read_pictures(build_page(build_failure("s", MODEL, "no"))) is None
    with pytest.raises(ValueError, match="not a page"):
        read_pictures("<html></html>")
    with pytest.raises(ValueError, match="make the page anew"):
        StudyPictures.from_json({"format": 0})


def test_the_course_takes_the_place_that_the_page_has_for_it(study):
    page = build_page(*study)
    once = replace_course(page, "<p>first</p>")
    assert replace_course(once, "<p>second</p>").count("<p>first</p>") == 0
    assert len(replace_course(once, "<p>first</p>")) == len(once)
    with pytest.raises(ValueError, match="no place for the course"):
        replace_course("<html></html>", "")


@pytest.mark.parametrize("axes", ["LPS", "RAS", "PLS", "SAL", "LIP"])
def test_pictures_are_upright_whatever_the_order_of_the_axes(axes):
    chest = make_chest((Box("left", 10, 80, 120),)).turned(axes)
    assert "".join(nib.aff2axcodes(chest.affine)) == axes
    shown = take_pictures(chest.hu, chest.opacity, chest.lungs, chest.affine)
    assert shown.slices == tuple(range(4, 24)), "the slices with lung, 40 to 240 mm"
    rows, columns, slices = (np.flatnonzero(shown.opacity.any(axis=a)) for a in ((1, 2), (0, 2), (0, 1)))
    middle = shown.opacity.shape[1] / 2
    assert columns.min() > middle, "the patient's left is on the right of the picture"
    assert rows.mean() < shown.opacity.shape[0] / 2, "the front is on top"
    assert [shown.slices[k] for k in slices] == [8, 9, 10, 11], "80 to 120 mm from below"
    coronal = shown.coronal(int(rows[0]))
    assert np.flatnonzero(coronal.opacity.any(axis=1)).mean() > coronal.opacity.shape[0] / 2, "head up"
    assert (coronal.width_mm, coronal.height_mm) == (200.0, 200.0)
    assert shown.levels.opacity_ml["left"][8:12].tolist() == [5.0] * 4


def test_a_lung_that_was_not_found_is_still_in_the_picture():
    chest = make_chest((Box("left", 10, 80, 120),), without="right")
    shown = take_pictures(chest.hu, chest.opacity, chest.lungs, chest.affine)
    assert len(shown.slices) == 28 and shown.image.shape[:2] == (32, 40)


def test_large_slices_are_reduced_and_many_are_thinned_and_the_page_says_so(monkeypatch):
    monkeypatch.setattr(pictures_module, "MAX_SIDE", 50)
    monkeypatch.setattr(pictures_module, "MAX_SLICES", 6)
    report, shown = report_chest(make_chest(BOXES, spacing=(2, 2, 10)))
    assert shown.image.shape == (40, 50, 5) and shown.pixel_mm == 4.0
    assert shown.slices == (4, 8, 12, 16, 20)
    assert shown.axial(0).width_mm == pytest.approx(200)
    assert shown.coronal(20).height_mm == pytest.approx(200)
    seen = text_of(build_page(report, shown))
    assert "every 4th: those that show lung or opacity" in seen and "50 × 40 pixels of 4.00 mm" in seen
    assert sum(shown.levels.opacity_ml["right"]) == pytest.approx(80), "volumes are of all slices"


def test_a_scan_that_compresses_badly_is_compressed_more(monkeypatch):
    chest = make_chest(BOXES)
    noise = np.random.default_rng(0).normal(0, 200, chest.hu.shape)
    shown = take_pictures(chest.hu + noise, chest.opacity, chest.lungs, chest.affine)

    def letters() -> int:
        return sum(len(slice_["image"]) for slice_ in shown.to_json()["slices"])

    free = letters()
    monkeypatch.setattr(pictures_module, "MAX_LETTERS", int(0.8 * free))
    assert letters() < 0.85 * free


def test_masks_are_kept_to_the_pixel():
    classes = np.random.default_rng(0).integers(0, 3, (31, 17)).astype(np.uint8)
    for encode in (encode_overlay, encode_outline):
        assert np.array_equal(decode_classes(encode(classes), classes.shape), classes)
        assert encode(np.zeros((3, 4), np.uint8)) is None
    assert not decode_classes(None, (3, 4)).any()
    assert data_uri(str(encode_overlay(classes))).startswith("data:image/png;base64,iVBOR")


def test_levels_hold_the_volumes_by_height():
    chest = make_chest(BOXES)
    levels = LungLevels.measure(chest.opacity, chest.lungs, chest.affine)
    assert levels.extent_mm == (40.0, 240.0) and levels.sees("top") and levels.sees("bottom")
    inner = levels.within(100, 180)  # half of each box
    assert inner["opacity_volume_ml"] == {"left": 10.0, "right": 40.0, "outside_lungs": 0.0, "total": 50.0}
    assert inner["lung_volume_ml"]["left"] == pytest.approx(0.4 * LUNG_ML)
    assert inner["opacity_percent_of_lung"]["right"] == pytest.approx(100 * 40 / (0.4 * LUNG_ML), abs=1e-3)
    assert levels.within(85, 95)["opacity_volume_ml"]["left"] == 5.0, "two halves of slices"
    again = LungLevels.from_json(json.loads(json.dumps(levels.to_json())))
    assert again.within(0, 280) == levels.within(0, 280)


def test_what_scans_share_is_found_from_the_end_that_both_show():
    def levels(low: int = 0, high: int = HEIGHT, **options) -> LungLevels:
        chest = make_chest(low=low, high=high, **options)
        return LungLevels.measure(chest.opacity, chest.lungs, chest.affine)

    whole, upper, lower, middle = levels(), levels(low=120), levels(high=160), levels(low=80, high=160)
    assert match_levels([whole, levels(spacing=(2, 2, 8))]).kind == "relative"
    frame = match_levels([whole, upper])
    assert (frame.kind, frame.length_mm) == ("from_top", 120.0)
    # 60 mm below the top at 240 mm; the second scan begins at 120 mm.
    assert frame.place(whole, 0.5) == 180.0 and frame.place(upper, 0.5) == 60.0
    frame = match_levels([lower, whole])
    assert (frame.kind, frame.length_mm) == ("from_bottom", 120.0)
    assert frame.place(whole, 1.0) == 160.0 and frame.place(lower, 1.0) == 160.0
    for pair in ([upper, lower], [whole, middle]):
        assert match_levels(pair).kind == "none"
    single = levels(low=120, high=130)
    assert "single slice" in match_levels([single, single]).said


def test_numbers_are_written_as_they_are():
    assert [format_ml(v) for v in (0, 0.01, 0.06, 12.34, 1234.5)] == [
        *("0.0", "< 0.1", "0.1", "12.3", "1\N{NARROW NO-BREAK SPACE}234.5"),
    ]
    assert [format_signed(v) for v in (0, -0.01, 3.14, -3.16)] == ["0.0", "0.0", "+3.1", "\N{MINUS SIGN}3.2"]
    assert parse_date("20200229") == date(2020, 2, 29)
    assert [parse_date(t) for t in ("20200230", "2020", None, "2020-02-2")] == [None] * 4


def test_curves_stand_also_for_what_is_unknown_and_what_is_zero():
    points = [
        CurvePoint(n, f"2020-01-0{n}", {"total": v, "left": v}) for n, v in ((1, 0.0), (2, None), (4, 0.0))
    ]
    curve = draw_curve(points, "mL", "LOV")
    assert "no number" in curve and "nan" not in curve and curve.count("<circle") == 2
    spread = draw_curve([CurvePoint(0, "a", {"total": 1.0}), CurvePoint(0, "b", {"total": 2.0})], "mL", "LOV")
    assert "nan" not in spread and "inf" not in spread


# In a browser


@pytest.fixture(scope="module")
def page(study, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "s_page.html"
    view = AttentionView(np.zeros((8, 8)), {"gate": np.ones((2, 2))})
    file.write_text(build_page(*study, view), encoding="utf-8")
    return file


def test_a_browser_opens_it_at_the_slice_with_most_opacity(page):
    opened = open_page(page)
    assert opened.console == []
    assert opened.state("mask") == "on" and 17 <= int(opened.state("slice")) <= 20, "80 mL at 160 to 200 mm"
    assert "20.0 mL opacity" in opened.dom
    assert 'class="scan" alt="slice" src="data:image/webp' in opened.dom
    assert opened.dom.count("<figcaption>slice ") == 12, "a sheet of slices for printing"


def test_an_address_tells_slice_and_masks(page):
    opened = open_page(page, "slice=10&mask=off&lungs=off")
    assert opened.console == []
    assert (opened.state("slice"), opened.state("mask"), opened.state("lungs")) == ("10", "off", "off")
    assert '"mask" aria-pressed="false"' in opened.dom
    assert open_page(page, "slice=9999").state("slice") == "24", "the nearest that there is"
    assert open_page(page, "slice=x&mask=").console == []


def test_wheel_keys_and_buttons(page):
    script = """
      const seen = [], viewer = document.querySelector(".viewer"), stage = viewer.querySelector(".stage");
      const note = () => seen.push(viewer.dataset.slice + document.documentElement.dataset.mask);
      const press = (key) => document.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
      const wheel = (deltaY) => stage.dispatchEvent(new WheelEvent("wheel", {deltaY, cancelable: true}));
      location.hash = ""; note();
      press("ArrowRight"); note(); press("ArrowLeft"); note(); press("ArrowDown"); note();
      stage.focus(); press("ArrowDown"); note(); press("End"); note(); press("Home"); note();
      const leaves = wheel(-40); note(); const stays = !wheel(40); note();
      press("m"); note(); document.querySelector('button[data-layer="mask"]').click(); note();
      document.querySelector("[data-go]").click(); note();
      document.body.dataset.seen = [...seen, leaves, stays].join(" ");
    """
    opened = open_page(page, "slice=12", script)
    assert opened.console == []
    steps = opened.state("seen").split()
    # The head is up: on, down the body; at the upper end the page scrolls on, in between it does not.
    assert steps[:9] == ["12on", "11on", "12on", "12on", "11on", "5on", "24on", "24on", "23on"]
    assert steps[9:11] == ["23off", "23on"] and steps[12:] == ["true", "true"]
    assert 17 <= int(steps[11].removesuffix("on")) <= 20


def test_errors_in_a_page_would_be_seen(page):
    opened = open_page(page, script="console.error('planted'); missing_function();")
    assert len(opened.console) == 2 and "planted" in opened.console[0]
    blocked = open_page(page, script="new Image().src = 'https://example.org/a.png';")
    assert any("Content Security Policy" in line for line in blocked.console), "no page can reach the network"


@pytest.mark.parametrize("width", [400, 1280])
def test_no_page_is_wider_than_its_window(page, width):
    script = "document.body.dataset.over = document.documentElement.scrollWidth - innerWidth;"
    assert int(open_page(page, script=script, width=width).state("over")) <= 0
