# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""What holds for every data list, and what a broken one may do: be refused in one line."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from custom.data import assign_folds, load_cases, read_datalist, write_datalist
from tests.fuzzing import fuzzed, json_values, mutated

patients = st.lists(st.sampled_from([f"patient {letter}" for letter in "abcdefghijäöü"]), min_size=2)
seeds = st.integers(0, 2**31)


@given(patients, st.integers(-1, 15), seeds)
@fuzzed()
def test_folds_keep_patients_together_and_are_alike_in_size(ids, n_folds, seed):
    counts = Counter(ids)
    if not 2 <= n_folds <= len(counts):
        with pytest.raises(ValueError, match="folds are asked for"):
            assign_folds(ids, n_folds, seed)
        return
    folds = assign_folds(ids, n_folds, seed)
    assert len(folds) == len(ids) and set(folds) == set(range(n_folds)), "no fold is empty"
    assert len(set(zip(ids, folds, strict=True))) == len(counts), "a patient has one fold"
    sizes = Counter(folds)
    assert max(sizes.values()) - min(sizes.values()) <= max(counts.values())
    assert folds == assign_folds(ids, n_folds, seed)
    # Which fold a patient is in does not depend on the order in which the cases are listed.
    backwards = assign_folds(ids[::-1], n_folds, seed)
    assert dict(zip(ids, folds, strict=True)) == dict(zip(ids[::-1], backwards, strict=True))


@given(patients, seeds)
@fuzzed(25)
def test_a_fold_and_the_others_are_all_cases_and_none_twice(tmp_path_factory, ids, seed):
    if len(set(ids)) < 2:
        return
    folder = tmp_path_factory.mktemp("list")
    folds = assign_folds(ids, 2, seed)
    entries = []
    for number, (patient, fold) in enumerate(zip(ids, folds, strict=True)):
        # Some share their file's name in different folders.
        image, label = (f"{patient}/{number % 3}/{kind}_{number // 3}.nii.gz" for kind in ("ct", "mask"))
        for name in (image, label):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        entries.append({"image": image, "label": label, "patient_id": patient, "fold": fold})
    unique = {entry["image"]: entry for entry in entries}
    path = folder / "datalist.json"
    write_datalist(path, "n", "d", training=list(unique.values()))
    whole = load_cases(path, folder)
    assert [case["image"] for case in whole] == [str((folder / image).resolve()) for image in unique]
    assert len({case["name"] for case in whole}) == len(whole)
    for fold in (0, 1):
        held_out, rest = load_cases(path, folder, fold=fold), load_cases(path, folder, exclude_fold=fold)
        images = [{case["image"] for case in cases} for cases in (held_out, rest)]
        assert not images[0] & images[1] and len(images[0] | images[1]) == len(whole)
        assert not {case["patient_id"] for case in held_out} & {case["patient_id"] for case in rest}


VALID = {
    "name": "n",
    "training": [
        {"image": "a.nii.gz", "label": "a_m.nii.gz", "patient_id": "a", "fold": 0},
        {"image": "b.nii.gz", "label": "b_m.nii.gz", "lung": "b_l.nii.gz", "patient_id": "b", "fold": 1},
    ],
    "testing": [{"image": "c.nii.gz", "patient_id": "c"}],
}


def read_or_refuse(path) -> None:
    """A list is read as it stands, or refused in one line that names it."""
    try:
        content = read_datalist(path)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    assert content == json.loads(path.read_text(encoding="utf-8"))
    for section in ("training", "validation", "testing"):
        for entry in content.get(section, []):
            assert isinstance(entry["image"], str) and entry["image"]


@given(st.data())
@fuzzed(150)
def test_a_list_of_anything_is_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "anything.json"
    section = st.sampled_from(["training", "validation", "testing", "name"])
    field = st.sampled_from(["image", "label", "lung", "patient_id", "fold", "other"])
    entry = st.dictionaries(field, json_values | st.sampled_from(["a", "b", 0, 1]))
    content = data.draw(json_values | st.dictionaries(section, json_values | st.lists(entry | json_values)))
    path.write_text(json.dumps(content), encoding="utf-8")
    read_or_refuse(path)


@given(mutated(json.dumps(VALID).encode()))
@fuzzed(200)
def test_a_damaged_list_is_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    path.write_bytes(content)
    read_or_refuse(path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"training": ' + "[" * 100_000, "9" * 100_000])
def test_depth_and_length_are_no_way_to_crash(tmp_path, text):
    (tmp_path / "deep.json").write_text(text)
    with pytest.raises(ValueError, match=r"deep\.json is not valid JSON"):
        read_datalist(tmp_path / "deep.json")
