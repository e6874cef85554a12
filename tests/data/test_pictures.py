# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from custom.data.pictures import list_pictures, read_grey, write_picture

GREY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20


def test_grey_values_come_back_however_they_are_stored(tmp_path):
    picture = Image.fromarray(GREY)
    for name, kind in (("a.png", "L"), ("b.bmp", "L"), ("c.tiff", "L"), ("d.png", "RGB"), ("e.png", "P")):
        picture.convert(kind).save(tmp_path / name)
        pixels = read_grey(tmp_path / name)
        assert np.array_equal(pixels, GREY) and pixels.dtype == np.uint8, name
    Image.fromarray(GREY > 100).save(tmp_path / "f.png")
    assert np.array_equal(read_grey(tmp_path / "f.png"), np.where(GREY > 100, 255, 0))
    write_picture(tmp_path / "out" / "g.png", GREY.T)
    assert np.array_equal(read_grey(tmp_path / "out" / "g.png"), GREY.T)


def test_what_is_no_picture_of_grey_values_is_refused_in_one_line(tmp_path):
    colours = np.repeat(GREY[..., None], 3, axis=-1)
    colours[0, 0] = (9, 8, 9)
    Image.fromarray(colours).save(tmp_path / "colour.png")
    Image.fromarray(GREY.astype(np.uint16) * 200).save(tmp_path / "deep.png")
    Image.fromarray(GREY.astype(np.float32)).save(tmp_path / "float.tiff")
    Image.fromarray(GREY).convert("RGBA").save(tmp_path / "clear.png")
    Image.fromarray(GREY).save(tmp_path / "two.tiff", save_all=True, append_images=[Image.fromarray(GREY)])
    (tmp_path / "torn.png").write_bytes((tmp_path / "colour.png").read_bytes()[:60])
    (tmp_path / "empty.png").touch()
    for name, reason in (
        ("colour.png", "in colour"),
        ("deep.png", "more than 8 bits"),
        ("float.tiff", "more than 8 bits"),
        ("clear.png", "transparency"),
        ("two.tiff", "holds 2 pictures"),
        ("torn.png", "cannot be read as a picture"),
        ("empty.png", "cannot be read as a picture"),
    ):
        with pytest.raises(ValueError, match=reason) as caught:
            read_grey(tmp_path / name)
        assert "\n" not in str(caught.value) and name in str(caught.value)
    with pytest.raises(FileNotFoundError):
        read_grey(tmp_path / "none.png")


def test_pictures_are_listed_as_people_count_and_told_apart(tmp_path):
    for name in ("s10.png", "s2.JPG", "s1.bmp", ".hidden.png", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "more.png").mkdir()
    assert [item["name"] for item in list_pictures(tmp_path)] == ["s1", "s2", "s10"]
    assert list_pictures(tmp_path)[1]["image"] == str(tmp_path / "s2.JPG")
    (tmp_path / "s1.png").touch()
    with pytest.raises(ValueError, match="same name"):
        list_pictures(tmp_path)
    for folder in (tmp_path / "more.png", tmp_path / "none"):
        with pytest.raises(FileNotFoundError):
            list_pictures(folder)
