# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from custom.data.datalist import load_cases, read_datalist, write_datalist
from custom.data.join_lists import join_datalists, parse_fold

SCRIPT = Path(__file__).resolve().parent.parent.parent / "scripts" / "prepare_covid.py"


def write(folder, number, patients, **more):
    """A list of random slices; the same number gives the same slice."""
    entries = []
    for position, patient in enumerate(patients):
        for kind in ("images", "masks"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number + position).integers(0, 256, (40, 40), dtype=np.uint8)
            Image.fromarray(pixels * (kind == "images")).save(folder / kind / f"{position}.png")
        entries.append({"image": f"images/{position}.png", "label": f"masks/{position}.png"})
        entries[-1]["patient_id"] = patient
        if "folds" in more:
            entries[-1]["fold"] = more["folds"][position]
    extra = {key: value for key, value in more.items() if key != "folds"}
    write_datalist(folder / "datalist.json", folder.name, f"about {folder.name}", training=entries, **extra)
    return folder / "datalist.json"


@pytest.fixture
def lists(tmp_path):
    """Three labelled slices in three folds, two of networks that had not seen fold 1, and a negative."""
    return {
        "labelled": write(tmp_path / "labelled", 0, ["p0", "p1", "p2"], folds=[0, 1, 2]),
        "pseudo": write(tmp_path / "pseudo", 10, ["v1", "v2"], teachers={"unseen_fold": 1}),
        "negatives": write(tmp_path / "negatives", 20, ["n"]),
    }


def join(lists, tmp_path, fold):
    return join_datalists(lists["labelled"], [lists["pseudo"], lists["negatives"]], tmp_path / "joined", fold)


def test_what_is_added_is_trained_on_and_never_held_out(lists, tmp_path):
    joined = join(lists, tmp_path, 1)
    assert [source["entries"] for source in joined.sources] == [3, 2, 1] and not joined.left_out
    training = load_cases(joined.datalist, tmp_path / "joined", exclude_fold=1)
    held_out = load_cases(joined.datalist, tmp_path / "joined", fold=1)
    assert [case["patient_id"] for case in training] == ["p0", "p2", "v1", "v2", "n"]
    assert [case["patient_id"] for case in held_out] == ["p1"]
    assert held_out[0]["image"] == str((tmp_path / "labelled" / "images" / "1.png").resolve())
    assert len({case["name"] for case in training}) == 5
    content = read_datalist(joined.datalist)
    assert content["training"][3]["image"] == "../pseudo/images/0.png"
    assert content["sources"][1]["teachers"] == {"unseen_fold": 1}
    assert content["description"] == "about labelled | about pseudo | about negatives"


def test_negatives_alone_leave_every_fold_to_be_held_out(lists, tmp_path):
    joined = join_datalists(lists["labelled"], [lists["negatives"]], tmp_path / "joined", "any")
    for fold in (0, 1, 2):
        assert len(load_cases(joined.datalist, tmp_path / "joined", exclude_fold=fold)) == 3
    with pytest.raises(ValueError, match="all folds but 1; not any fold can be held out with them"):
        join(lists, tmp_path, "any")


def test_masks_that_people_drew_are_repeated_to_their_share(lists, tmp_path):
    path, root = join(lists, tmp_path, 1).datalist, tmp_path / "joined"

    def patients(**options) -> list[str]:
        return [case["patient_id"] for case in load_cases(path, root, exclude_fold=1, **options)]

    once = ["p0", "p2", "v1", "v2", "n"]
    assert patients() == patients(labelled_share=0.4) == once
    assert patients(labelled_share=0.5) == [*once, "p0", "p2"]
    assert patients(labelled_share=0.7) == [*once, *["p0", "p2"] * 3]
    with pytest.raises(ValueError, match="labelled_share must be 0 or more and below 1, got 1"):
        patients(labelled_share=1)
    plain = load_cases(lists["labelled"], tmp_path / "labelled", labelled_share=0.9)
    assert len(plain) == 3, "a list without other masks stays as it is"


def test_another_fold_is_refused_when_joining_and_when_training(lists, tmp_path):
    with pytest.raises(ValueError, match="had seen all folds but 1; fold 0 cannot be held out with them"):
        join(lists, tmp_path, 0)
    joined = join(lists, tmp_path, 1)
    with pytest.raises(ValueError, match="had seen all folds but 1; with fold 0 held out"):
        load_cases(joined.datalist, tmp_path / "joined", exclude_fold=0)
    # An inner fold may be left out besides, and nothing at all for the final training.
    assert len(load_cases(joined.datalist, tmp_path / "joined", exclude_fold=[1, 2])) == 4
    assert len(load_cases(joined.datalist, tmp_path / "joined")) == 6


def test_networks_that_had_seen_all_leave_nothing_to_hold_out(lists, tmp_path):
    lists["pseudo"] = write(tmp_path / "pseudo", 10, ["v1", "v2"], teachers={"unseen_fold": None})
    with pytest.raises(ValueError, match="had seen all folds; fold 1 cannot be held out"):
        join(lists, tmp_path, 1)
    joined = join(lists, tmp_path, None)
    with pytest.raises(ValueError, match="had seen all folds but none; with fold 1 held out"):
        load_cases(joined.datalist, tmp_path / "joined", exclude_fold=1)
    assert len(load_cases(joined.datalist, tmp_path / "joined")) == 6


def test_what_looks_like_a_held_out_slice_is_left_out(lists, tmp_path):
    held_out = np.asarray(Image.open(tmp_path / "labelled" / "images" / "1.png")).astype(int)
    near = np.clip(held_out + 3, 0, 255).astype(np.uint8)
    Image.fromarray(near).save(tmp_path / "pseudo" / "images" / "1.png")
    joined = join(lists, tmp_path, 1)
    assert [Path(one["image"]).name for one in joined.left_out] == ["1.png"]
    assert "looks like images/1.png, which can be held out (correlation 1.00)" in joined.left_out[0]["reason"]
    assert [e["patient_id"] for e in read_datalist(joined.datalist)["training"]] == [
        "p0",
        "p1",
        "p2",
        "v1",
        "n",
    ]
    Image.fromarray(near - near // 2).save(tmp_path / "pseudo" / "images" / "0.png")
    assert len(join(lists, tmp_path, 1).left_out) == 2  # whatever the brightness and contrast


def test_lists_that_cannot_be_joined_are_refused(lists, tmp_path):
    labelled, pseudo = lists["labelled"], lists["pseudo"]
    out = tmp_path / "joined"
    with pytest.raises(ValueError, match="has no fold 7; it has"):
        join_datalists(labelled, [pseudo], out, 7)
    with pytest.raises(ValueError, match="must be a labelled one"):
        join_datalists(pseudo, [labelled], out, 1)
    with pytest.raises(ValueError, match="is in a fold; only lists without"):
        join_datalists(labelled, [write(tmp_path / "x", 30, ["x"], folds=[0])], out, 1)
    with pytest.raises(ValueError, match="patient 'p2' is in"):
        join_datalists(labelled, [write(tmp_path / "x", 30, ["p2"])], out, 1)
    with pytest.raises(ValueError, match=r"is the same picture as .*0.png"):
        join_datalists(labelled, [write(tmp_path / "x", 0, ["x"])], out, 1)
    with pytest.raises(ValueError, match="only 'training' can be added"):
        entry = read_datalist(write(tmp_path / "x", 40, ["x"]))["training"]
        write_datalist(tmp_path / "x" / "datalist.json", "x", "", testing=entry)
        join_datalists(labelled, [tmp_path / "x" / "datalist.json"], out, 1)
    (tmp_path / "pseudo" / "images" / "0.png").unlink()
    with pytest.raises(FileNotFoundError, match="0.png not found"):
        join_datalists(labelled, [pseudo], out, 1)
    assert not out.exists()


def test_command_line(lists, tmp_path, capsys):
    assert (parse_fold("3"), parse_fold("none")) == (3, None)
    main = runpy.run_path(str(SCRIPT))["main"]
    words = ["join", "--labelled", str(lists["labelled"]), "--add", str(lists["pseudo"])]
    words += ["--output-dir", str(tmp_path / "joined"), "--held-out-fold"]
    assert main([*words, "1"]) == 0
    assert "5 slices" in capsys.readouterr().out
    assert json.loads((tmp_path / "joined" / "datalist.json").read_text())["held_out_fold"] == 1
    assert main([*words, "2"]) == 2
    assert "fold 2 cannot be held out" in capsys.readouterr().err
    assert main([*words, "first"]) == 2
    assert "'first' is no fold" in capsys.readouterr().err
