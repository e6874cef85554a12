# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from custom.data.plain_slices import turn_back
from custom.data.unlabelled import evenly_spaced, prepare_unlabelled, read_unlabelled

SCRIPT = Path(__file__).resolve().parent.parent.parent / "scripts" / "prepare_covid.py"
SHAPE = (100, 60)


def upright(number):
    """A dark half and a bright one below it; the bright one is smaller from slice to slice."""
    rng = np.random.default_rng(number)
    hu = rng.normal(-870, 40, SHAPE)
    hu[60 + number :] = rng.normal(40, 30, (40 - number, SHAPE[1]))
    return hu


@pytest.fixture
def folder(tmp_path):
    """Volume a in a wide window, transposed; volume b in a narrow one, turned by 90 degrees."""
    source = tmp_path / "in"
    source.mkdir()
    for name, (low, high), orientation in (
        ("a_x", (-1024, 2000), "transposed"),
        ("b", (-1120, 280), "rotated-90"),
    ):
        for number in range(1, 8):
            grey = np.clip(np.rint((upright(number) - low) * 255 / (high - low)), 0, 255).astype(np.uint8)
            stored = np.ascontiguousarray(turn_back(grey, orientation))
            Image.fromarray(stored).save(source / f"{name}_{number}.png")
    return source


def prepare(folder, output, **options):
    return prepare_unlabelled(folder, output, "transposed", {"b*": "rotated-90"}, **options)


def picture(path):
    return np.asarray(Image.open(path)).astype(int)


def test_volumes_come_out_upright_and_alike(folder, tmp_path):
    summary = prepare(folder, tmp_path / "out")
    assert not summary.failed and summary.reused == 0
    slices = read_unlabelled(tmp_path / "out")
    assert [(s["volume"], s["number"]) for s in slices] == [(v, n) for v in ("a_x", "b") for n in range(1, 8)]
    for first, second in zip(slices[:7], slices[7:], strict=True):
        one, other = (picture(tmp_path / "out" / s["image"]) for s in (first, second))
        number = first["number"]
        for pixels in (one, other):
            assert pixels.shape == SHAPE
            assert abs(np.median(pixels[: 60 + number]) - 45) <= 3
            assert abs(np.median(pixels[60 + number :]) - 211) <= 3
        assert np.median(np.abs(one - other)) <= 3
    wide, narrow = summary.volumes
    assert wide["stored_orientation"] == "transposed" and narrow["stored_orientation"] == "rotated-90"
    # A window of 3024 HU onto one of 1400.
    assert wide["mapping"]["scale"] == pytest.approx(3024 / 1400, rel=0.05)
    assert narrow["mapping"]["scale"] == pytest.approx(1, abs=0.03)
    assert Image.open(tmp_path / "out" / "overview.png").size == (320, 160)


def test_slices_are_evenly_spaced():
    assert evenly_spaced(7, None) == [0, 1, 2, 3, 4, 5, 6] == evenly_spaced(7, 9)
    assert evenly_spaced(7, 3) == [1, 3, 5]
    assert evenly_spaced(8, 2) == [2, 6]
    assert evenly_spaced(3, 1) == [1]


def test_the_mapping_is_that_of_the_whole_volume(folder, tmp_path):
    whole = prepare(folder, tmp_path / "out")
    some = prepare(folder, tmp_path / "some", per_volume=2)
    assert [v["mapping"] for v in some.volumes] == [v["mapping"] for v in whole.volumes]
    assert [s["number"] for s in some.volumes[0]["slices"]] == [2, 6]
    name = some.volumes[0]["slices"][0]["image"]
    assert (tmp_path / "some" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_what_is_done_is_not_done_again_unless_it_changed(folder, tmp_path):
    before = prepare(folder, tmp_path / "out")
    listed = before.list_file.read_bytes()
    assert prepare(folder, tmp_path / "out").reused == 2
    assert before.list_file.read_bytes() == listed
    (tmp_path / "out" / before.volumes[0]["slices"][3]["image"]).write_bytes(b"torn")
    assert prepare(folder, tmp_path / "out").reused == 1
    assert before.list_file.read_bytes() == listed
    (folder / "b_7.png").unlink()
    again = prepare(folder, tmp_path / "out")
    assert again.reused == 1 and len(again.volumes[1]["slices"]) == 6
    assert prepare(folder, tmp_path / "out", per_volume=3).reused == 0


def test_bad_files_and_volumes_are_named_and_the_others_done(folder, tmp_path):
    (folder / "b_3.png").write_bytes(b"no picture")
    Image.fromarray(np.full((200, 200), 7, np.uint8)).save(folder / "grey_1.png")
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(folder / "scout.png")
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(folder / "b_02.png")
    summary = prepare(folder, tmp_path / "out")
    reasons = {one.what: one.reason for one in summary.failed}
    assert set(reasons) == {"b_3.png", "scout.png", "volume grey", "b_2.png"}
    assert "cannot be read as a picture" in reasons["b_3.png"]
    assert "does not end in an underscore" in reasons["scout.png"]
    assert "40000 pixels of 1 grey values are no chest CT" in reasons["volume grey"]
    assert "b_02.png is the same slice" in reasons["b_2.png"]
    assert "failed, volume grey: 40000 pixels" in str(summary)
    assert len(json.loads((tmp_path / "out" / "skipped.json").read_text())) == 4
    assert prepare(folder, tmp_path / "out").failed == summary.failed  # told again in a later run


def test_wrong_options_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="unknown orientation 'sideways'"):
        prepare_unlabelled(folder, tmp_path / "out", "sideways")
    with pytest.raises(ValueError, match=r"no volume under .* is named like 'c\*'"):
        prepare_unlabelled(folder, tmp_path / "out", orientations={"c*": "upright"})
    with pytest.raises(ValueError, match="at least 1 slice"):
        prepare(folder, tmp_path / "out", per_volume=0)
    with pytest.raises(FileNotFoundError, match="not found"):
        prepare_unlabelled(folder / "none", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no slices named VOLUME_NUMBER"):
        prepare_unlabelled(tmp_path, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="prepare_covid.py unlabelled"):
        read_unlabelled(tmp_path)
    (tmp_path / "unlabelled.json").write_text('{"volumes": [{"name": "a", "slices": [{}]}]}')
    with pytest.raises(ValueError, match="no list of unlabelled slices"):
        read_unlabelled(tmp_path)


def test_command_line(folder, tmp_path, capsys):
    main = runpy.run_path(str(SCRIPT))["main"]
    words = ["unlabelled", str(folder), str(tmp_path / "out"), "--orientation", "transposed"]
    words += ["--orientation-of", "b*", "rotated-90", "--per-volume", "2"]
    assert main(words) == 0
    assert "4 slices of 2 volumes" in capsys.readouterr().out
    (folder / "b_3.png").write_bytes(b"no picture")
    assert main(words) == 1
    assert "failed, b_3.png: " in capsys.readouterr().out
