# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv

import numpy as np
import pytest
from lidc_phantom import Outlined, outline, write_chest_xray, write_readings

from custom.data import lidc
from custom.data.lidc import ChestXrayError, read_annotations

SLICES = [(-10.5, "1.2.3.1"), (-8.0, "1.2.3.2"), (-5.5, "1.2.3.3")]


@pytest.fixture
def xml(tmp_path):
    mask = np.zeros((64, 64, 3), bool)
    mask[20:25, 30:33, 1:] = True
    hole = np.zeros_like(mask)
    hole[22, 31, 1] = True
    path = tmp_path / "readings.xml"
    readers = [[Outlined("Nodule 001", mask, hole)], [], [Outlined("0", mask)], []]
    write_readings(path, "1.2.3", SLICES, readers)
    return path


def test_outlines_are_read_and_small_nodules_and_non_nodules_are_not(xml):
    readings = read_annotations(xml)
    assert (readings.series_uid, readings.study_uid) == ("1.2.3", "1.2.4")
    assert [len(reader) for reader in readings.readers] == [1, 0, 1, 0]
    assert [(a.reader, a.nodule_id) for a in readings.annotations] == [(0, "Nodule 001"), (2, "0")]
    contours = readings.annotations[0].contours
    assert [(c.z, c.sop_uid, c.inclusion) for c in contours] == [
        (-8.0, "1.2.3.2", True),
        (-5.5, "1.2.3.3", True),
        (-8.0, "1.2.3.2", False),
    ]
    # 4-connected ring around 5 x 3 pixels, closed; around one pixel.
    assert contours[0].points.shape == (17, 2) and np.array_equal(
        contours[0].points[0], contours[0].points[-1]
    )
    assert set(map(tuple, contours[2].points.tolist())) == {(21, 31), (23, 31), (22, 30), (22, 32)}


def test_single_points_among_the_outlines_of_a_nodule_enclose_nothing(xml):
    text = xml.read_text()
    point = "<roi><imageZposition>-10.5</imageZposition><inclusion>TRUE</inclusion>"
    point += "<edgeMap><xCoord>1</xCoord><yCoord>2</yCoord></edgeMap></roi>"
    xml.write_text(text.replace("</characteristics>", "</characteristics>" + point, 1))
    assert len(read_annotations(xml).annotations[0].contours) == 3


def test_a_chest_xray_is_told_apart(tmp_path):
    write_chest_xray(tmp_path / "cxr.xml")
    with pytest.raises(ChestXrayError, match="cxr.xml reads a chest X-ray, not a CT"):
        read_annotations(tmp_path / "cxr.xml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("</LidcReadMessage>", "", "is not valid XML: no element found"),
        ("LidcReadMessage", "Other", "is no LIDC-IDRI reading, its root element is 'Other'"),
        ("<SeriesInstanceUid>1.2.3<", "<SeriesInstanceUid> <", "SeriesInstanceUid is missing"),
        ("readingSession", "session", "has no reading session"),
        ("-5.500000", "high", "reader 1, nodule 'Nodule 001': imageZposition 'high' is no number"),
        ("-5.500000", "nan", "imageZposition 'nan' is no number"),
        (">TRUE<", ">maybe<", "inclusion is 'MAYBE' at z -8, neither TRUE nor FALSE"),
        ("<xCoord>22<", "<xCoord>22.5<", "a point at z -8 has coordinates that are no whole numbers"),
        ("<yCoord>31<", "<zCoord>31<", "is not valid XML"),
        ("UTF-8", "no-such-code", "is not valid XML: unknown encoding"),
    ],
)
def test_bad_files_are_refused_in_one_line(xml, old, new, message):
    text = xml.read_text()
    assert old in text
    xml.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=message) as error:
        read_annotations(xml)
    assert str(error.value).startswith(str(xml)) and "\n" not in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_document_types_and_so_entities_are_refused(tmp_path, encoding):
    entities = '<!ENTITY a "aaaaaaaaaa">'
    entities += "".join(
        f'<!ENTITY {b} "{f"&{a};" * 10}">' for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    text = f'<?xml version="1.0" encoding="{encoding}"?><!DOCTYPE x [{entities}]>'
    text += "<LidcReadMessage>&i;</LidcReadMessage>"
    (tmp_path / "bomb.xml").write_text(text, encoding=encoding)
    with pytest.raises(ValueError, match="bomb.xml declares a document type"):
        read_annotations(tmp_path / "bomb.xml")


def test_size_is_bounded_and_a_missing_file_named(xml, tmp_path, monkeypatch):
    monkeypatch.setattr(lidc, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="it is no LIDC-IDRI reading"):
        read_annotations(xml)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_annotations(tmp_path / "none.xml")


def test_outline_of_the_phantom_is_an_8_connected_ring():
    mask = np.zeros((9, 9), bool)
    mask[3:6, 2:6] = True
    ring = np.array(outline(mask))
    assert np.abs(np.diff(ring, axis=0)).max() == 1


def test_real_files_agree_with_pylidc(ct_data):
    with open(ct_data / "lidc_xml" / "expected.csv", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 146
    for row in rows:
        path = ct_data / "lidc_xml" / row["file"]
        if row["modality"] == "CXR":
            with pytest.raises(ChestXrayError):
                read_annotations(path)
            continue
        readings = read_annotations(path)
        inclusions = [c.inclusion for a in readings.annotations for c in a.contours]
        found = (readings.series_uid, len(readings.annotations), sum(inclusions), inclusions.count(False))
        columns = ("nodule_annotations_3mm", "inclusion_contours", "exclusion_contours")
        assert found == (row["series_instance_uid"], *(int(row[c]) for c in columns)), row["file"]
