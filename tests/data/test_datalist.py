# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from custom.data.datalist import assign_folds, load_cases, read_datalist, write_datalist


def entry(name: str, patient: str, fold: int = 0, **more) -> dict:
    return {
        "image": f"{name}.nii.gz",
        "label": f"{name}_seg.nii.gz",
        "patient_id": patient,
        "fold": fold,
        **more,
    }


def make(folder: Path, training: list) -> Path:
    for e in training:
        for key in ("image", "label"):
            if key in e:
                file = folder / e[key]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()
    path = folder / "datalist.json"
    path.write_text(json.dumps({"training": training}))
    return path


def test_folds_are_chosen_and_left_out(tmp_path):
    path = make(tmp_path, [entry("a", "p1", 0), entry("b", "p2", 1), entry("c", "p3", 1)])
    assert [c["name"] for c in load_cases(path, tmp_path, fold=1)] == ["b", "c"]
    assert [c["name"] for c in load_cases(path, tmp_path, exclude_fold=1)] == ["a"]
    assert load_cases(path, tmp_path, exclude_fold=[]) == load_cases(path, tmp_path)
    with pytest.raises(ValueError, match="no case is left"):
        load_cases(path, tmp_path, exclude_fold=[0, 1])
    assert len(load_cases(path, tmp_path)) == 3
    assert load_cases(path, tmp_path)[0]["image"] == str((tmp_path / "a.nii.gz").resolve())


def test_same_file_name_in_two_folders_gives_two_names(tmp_path):
    path = make(tmp_path, [entry("x/ct", "p1"), entry("y/ct", "p2", 1)])
    assert [c["name"] for c in load_cases(path, tmp_path)] == ["x_ct", "y_ct"]


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ([entry("a", "p1", 0), entry("b", "p1", 1)], "patient 'p1'"),
        ([entry("a", "p1"), entry("a", "p2")], "already in"),
        ([{"label": "a.nii.gz", "patient_id": "p"}], "'image' is missing"),
        ([{"image": "a.nii.gz", "label": "b.nii.gz"}], "'patient_id' is missing"),
        ([entry("a", "p1", fold="0")], "'fold' must be a whole number"),
        ([entry("a", 7)], "'patient_id' must be a string"),
        (["a.nii.gz"], "an object"),
    ],
)
def test_wrong_lists_are_refused_with_the_place(tmp_path, training, message):
    path = tmp_path / "datalist.json"
    path.write_text(json.dumps({"training": training}))
    with pytest.raises(ValueError, match=message) as error:
        read_datalist(path)
    assert "training[" in str(error.value)


def test_other_mistakes_have_clear_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="not found"):
        read_datalist(tmp_path / "none.json")
    broken = tmp_path / "broken.json"
    broken.write_text("{training")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_datalist(broken)
    broken.write_text("[]")
    with pytest.raises(ValueError, match="none of the sections"):
        read_datalist(broken)
    path = make(tmp_path, [entry("a", "p1", 0)])
    with pytest.raises(ValueError, match="no fold 4"):
        load_cases(path, tmp_path, fold=4)
    with pytest.raises(ValueError, match="no case is left"):
        load_cases(path, tmp_path, exclude_fold=0)
    with pytest.raises(ValueError, match="unknown section"):
        load_cases(path, tmp_path, section="train")
    (tmp_path / "a.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match="is dataset_dir right"):
        load_cases(path, tmp_path)


def test_a_case_without_label_is_named(tmp_path):
    path = make(tmp_path, [{"image": "a.nii.gz", "patient_id": "p"}])
    with pytest.raises(ValueError, match="has no label"):
        load_cases(path, tmp_path)
    assert "label" not in load_cases(path, tmp_path, label=False)[0]


def test_a_wrong_list_is_not_written(tmp_path):
    path = tmp_path / "list.json"
    with pytest.raises(ValueError, match="patient 'p'"):
        write_datalist(path, "n", "d", training=[entry("a", "p", 0), entry("b", "p", 1)])
    assert list(tmp_path.iterdir()) == []


@given(
    patients=st.lists(st.sampled_from([f"p{i}" for i in range(12)]), min_size=4, max_size=60),
    seed=st.integers(0, 1000),
)
def test_folds_keep_patients_together_and_are_alike(patients, seed):
    counts = Counter(patients)
    if len(counts) < 2:
        with pytest.raises(ValueError, match="patients allow"):
            assign_folds(patients, 2, seed)
        return
    n_folds = min(3, len(counts))
    folds = assign_folds(patients, n_folds, seed)
    assert all(
        len({f for p, f in zip(patients, folds, strict=True) if p == patient}) == 1 for patient in counts
    )
    sizes = Counter(folds)
    assert set(sizes) == set(range(n_folds))
    assert max(sizes.values()) - min(sizes.values()) <= max(counts.values())
    assert folds == assign_folds(patients, n_folds, seed)
