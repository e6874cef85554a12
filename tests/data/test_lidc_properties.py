# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Readings of any content come back as they were written; of what is none, nothing is believed."""

from __future__ import annotations

import resource
import time
from xml.sax.saxutils import escape

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from custom.data.lidc import LidcReadings, read_annotations
from tests.fuzzing import fuzzed, mutated

words = st.text(st.characters(min_codepoint=32, exclude_categories=["Cs", "Cc"]), max_size=12).map(str.strip)
points = st.lists(st.tuples(st.integers(-600, 600), st.integers(-600, 600)), max_size=9)
contours = st.fixed_dictionaries(
    {
        "z": st.floats(-2000, 2000, allow_nan=False).map(lambda z: round(z, 3)),
        "sop": words,
        "inclusion": st.booleans(),
        "points": points,
    }
)
nodules = st.tuples(words, st.lists(contours, max_size=3))
readers = st.lists(st.lists(nodules, max_size=3), min_size=1, max_size=4)


def document(series: str, sessions: list) -> str:
    """A reading as text, written by nothing that the reader shares."""
    text = '<?xml version="1.0" encoding="UTF-8"?>\n<LidcReadMessage xmlns="http://www.nih.gov">'
    text += f"<ResponseHeader><SeriesInstanceUid>{escape(series)}</SeriesInstanceUid></ResponseHeader>"
    for session in sessions:
        text += "<readingSession><annotationVersion>3.12</annotationVersion>"
        for name, rois in session:
            text += f"<unblindedReadNodule><noduleID>{escape(name)}</noduleID>"
            for roi in rois:
                text += f"<roi><imageZposition>{roi['z']} </imageZposition>"
                text += f"<imageSOP_UID>{escape(roi['sop'])}</imageSOP_UID>"
                text += f"<inclusion>{str(roi['inclusion']).upper()}</inclusion>"
                for x, y in roi["points"]:
                    text += f"<edgeMap><xCoord>{x}</xCoord><yCoord>{y}</yCoord></edgeMap>"
                text += "</roi>"
            text += "</unblindedReadNodule>"
        text += "</readingSession>"
    return text + "</LidcReadMessage>"


@given(st.text("0123456789.", min_size=1, max_size=20), readers)
@fuzzed(60)
def test_what_was_written_is_read(tmp_path_factory, series, sessions):
    path = tmp_path_factory.getbasetemp() / "written.xml"
    path.write_text(document(series, sessions), encoding="utf-8")
    found = read_annotations(path)
    assert found.series_uid == series and len(found.readers) == len(sessions)
    for number, (reader, session) in enumerate(zip(found.readers, sessions, strict=True)):
        # Single points enclose nothing, and so does a nodule of exclusions.
        kept = [(name, [roi for roi in rois if len(roi["points"]) > 1]) for name, rois in session]
        kept = [(name, rois) for name, rois in kept if any(roi["inclusion"] for roi in rois)]
        assert [annotation.nodule_id for annotation in reader] == [name for name, _ in kept]
        for annotation, (_, rois) in zip(reader, kept, strict=True):
            assert annotation.reader == number
            for contour, roi in zip(annotation.contours, rois, strict=True):
                assert (contour.z, contour.sop_uid) == (roi["z"], roi["sop"])
                assert contour.inclusion == roi["inclusion"]
                assert np.array_equal(contour.points, roi["points"])


def read_or_refuse(path) -> None:
    try:
        found = read_annotations(path)
    except ValueError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
        return
    assert isinstance(found, LidcReadings) and found.series_uid and found.readers
    for annotation in found.annotations:
        for contour in annotation.contours:
            assert np.isfinite(contour.z) and contour.points.shape[1:] == (2,) and len(contour.points) > 1


EXAMPLE = document(
    "1.2.3",
    [
        [("Nodule 1", [{"z": -8.5, "sop": "1.2", "inclusion": True, "points": [(1, 2), (3, 2), (1, 2)]}])],
        [],
    ],
).encode()


@given(mutated(EXAMPLE))
@fuzzed(300)
def test_a_damaged_file_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "damaged.xml"
    path.write_bytes(content)
    read_or_refuse(path)


@given(st.binary(max_size=200) | st.text(max_size=100).map(lambda text: f"<{text}>".encode()))
@fuzzed(100)
def test_anything_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "anything.xml"
    path.write_bytes(content)
    read_or_refuse(path)


def laughs(count: int) -> str:
    """A billion and more by entities that name entities."""
    entities = '<!ENTITY l0 "lol">'
    entities += "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, count))
    return f"<!DOCTYPE LidcReadMessage [{entities}]>"


HOSTILE = {
    "billion laughs": laughs(12) + EXAMPLE.decode().split("?>", 1)[1].replace("Nodule 1", "&l11;"),
    "one long entity often": f'<!DOCTYPE LidcReadMessage [<!ENTITY a "{"a" * 100_000}">]>'
    + EXAMPLE.decode().split("?>", 1)[1].replace("Nodule 1", "&a;" * 100_000),
    "a file of this machine": '<!DOCTYPE LidcReadMessage [<!ENTITY a SYSTEM "file:///etc/passwd">]>'
    + EXAMPLE.decode().split("?>", 1)[1].replace("Nodule 1", "&a;"),
    "a document type elsewhere": '<!DOCTYPE LidcReadMessage SYSTEM "http://example.invalid/x.dtd">'
    + EXAMPLE.decode().split("?>", 1)[1],
    "parameter entities": '<!DOCTYPE LidcReadMessage [<!ENTITY % a SYSTEM "http://example.invalid/x">%a;]>'
    + EXAMPLE.decode().split("?>", 1)[1],
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_hostile_documents_are_refused_at_once(tmp_path, name, encoding):
    (tmp_path / "hostile.xml").write_text(HOSTILE[name], encoding=encoding)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(ValueError, match=r"hostile\.xml declares a document type"):
        read_annotations(tmp_path / "hostile.xml")
    assert time.perf_counter() - started < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, "kB"


def test_depth_is_no_way_to_crash(tmp_path):
    depth = 200_000
    text = "<LidcReadMessage>" + "<a>" * depth + "</a>" * depth + "</LidcReadMessage>"
    (tmp_path / "deep.xml").write_text(text)
    with pytest.raises(ValueError, match="SeriesInstanceUid is missing"):
        read_annotations(tmp_path / "deep.xml")
