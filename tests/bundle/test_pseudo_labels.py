# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from PIL import Image

from custom.bundle import pseudo_labels
from custom.bundle.pseudo_labels import write_pseudo_labels
from custom.bundle.teachers import Teachers
from custom.console import CohortError
from custom.data.confidence import ConfidenceRules
from custom.data.datalist import load_cases, read_datalist
from custom.data.slices import SliceDataset

ROOT = Path(__file__).resolve().parent.parent.parent
BUNDLE = ROOT / "bundles" / "covid_ct_scoatnet_segmentation"
SIZE = (32, 40)
RULES = ConfidenceRules(keep_empty=0.5)
# A network whose answer is known: the logit is a weighted sum of a pixel and its right neighbour.
NETWORK = {
    "_target_": "torch.nn.Conv2d",
    "in_channels": 1,
    "out_channels": 1,
    "kernel_size": [1, 3],
    "padding": [0, 1],
}
OVERRIDES = {"network_def": NETWORK, "image_size": list(SIZE)}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def save(path, here, right, bias, dtype=torch.float32):
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {"weight": torch.tensor([[[[0.0, here, right]]]]), "bias": torch.tensor([bias])}
    torch.save({key: value.to(dtype) for key, value in weights.items()}, path)
    return path


def make_slices(folder, pictures):
    (folder / "images").mkdir(parents=True)
    slices = []
    for number, pixels in enumerate(pictures):
        name = f"images/v_{number}.png"
        Image.fromarray(pixels).save(folder / name)
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        slices.append({"image": name, "number": number, "sha256": digest})
    (folder / "unlabelled.json").write_text(json.dumps({"volumes": [{"name": "v", "slices": slices}]}))
    return folder


def square(side, bright=255, size=SIZE):
    pixels = np.zeros(size, np.uint8)
    pixels[:side, :side] = bright
    return pixels


@pytest.fixture
def threshold(tmp_path):
    """Opacity is what is brighter than one half: p is 0.9998 or 0.0003."""
    return save(tmp_path / "threshold.pt", 16.0, 0.0, -8.0)


@pytest.fixture
def slices(tmp_path):
    """A sure one, a doubtful one, a speck, four empty ones."""
    pictures = [square(16), square(16, bright=140), square(1)] + [square(0)] * 4
    return make_slices(tmp_path / "in", pictures)


def label(slices, weights, output, rules=RULES, fold=0, **options):
    teachers = Teachers(BUNDLE, [weights], overrides=OVERRIDES, unseen_fold=fold, **options)
    return write_pseudo_labels(slices, teachers, output, rules)


def test_the_mean_over_networks_and_mirror_images(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    weights = [
        save(tmp_path / "1.pt", 2.0, 1.5, -1.0),
        save(tmp_path / "2.pt", -1.0, 0.5, 0.25, torch.float16),
    ]
    found = Teachers(BUNDLE, weights, overrides=OVERRIDES).predict(tmp_path / "a.png")
    x = np.pad(pixels / 255, ((0, 0), (1, 1)))
    left, here, right = x[:, :-2], x[:, 1:-1], x[:, 2:]
    first = (sigmoid(2 * here + 1.5 * right - 1) + sigmoid(2 * here + 1.5 * left - 1)) / 2
    second = (sigmoid(-here + 0.5 * right + 0.25) + sigmoid(-here + 0.5 * left + 0.25)) / 2
    assert found.shape == SIZE
    np.testing.assert_allclose(found, (first + second) / 2, atol=1e-5)


def test_probabilities_come_back_at_the_size_of_the_slice(tmp_path, threshold):
    Image.fromarray(square(40, size=(80, 60))).save(tmp_path / "a.png")
    found = Teachers(BUNDLE, [threshold], overrides=OVERRIDES).predict(tmp_path / "a.png")
    assert found.shape == (80, 60)
    assert found[:35, :35].min() > 0.99 and found[45:].max() < 0.01 and found[:, 45:].max() < 0.01


def test_masks_list_and_account(tmp_path, slices, threshold):
    done = label(slices, threshold, tmp_path / "out")
    assert done.summary["kept"] == {"positive": 1, "empty": 2}
    assert done.summary["dropped"] == {
        "a speck": 1,
        "certainly empty, beyond the share": 2,
        "uncertain": 1,
    }
    content = read_datalist(done.datalist)
    assert [e["image"] for e in content["training"]] == [f"../in/images/v_{n}.png" for n in (0, 4, 6)]
    assert not any("fold" in entry for entry in content["training"])
    cases = load_cases(done.datalist, tmp_path / "out")
    masks = [np.asarray(Image.open(case["label"])) for case in cases]
    assert np.array_equal(masks[0], square(16)) and not masks[1].any() and not masks[2].any()
    assert content["teachers"]["unseen_fold"] == 0
    digest = hashlib.sha256(threshold.read_bytes()).hexdigest()
    assert done.summary["teachers"]["weights"][0]["sha256"] == digest
    # 140 of 255 is a logit of 0.784 and p 0.687.
    doubtful = done.summary["slices"][1]
    assert doubtful["certainty"] == pytest.approx(sigmoid(16 * 140 / 255 - 8), abs=0.002)
    assert doubtful["fate"] == "uncertain" and doubtful["area"] == pytest.approx(16 * 16 / (32 * 40))


def test_training_reads_the_list(tmp_path, slices, threshold):
    label(slices, threshold, tmp_path / "out")
    parser = ConfigParser()
    parser.read_config([str(BUNDLE / "configs" / f"{name}.json") for name in ("train", "train_slices")])
    parser.update(
        {"dataset_dir": str(tmp_path / "out"), "cache_dir": str(tmp_path / "cache"), "num_workers": 0}
        | {
            "image_size": list(SIZE),
            "train#dataset#data": "$custom.data.load_cases(@data_list_file, @dataset_dir)",
        }
    )
    dataset: SliceDataset = parser.get_parsed_content("train#dataset")
    assert len(dataset) == 3
    assert [int(dataset[n]["label"].sum() > 0) for n in range(3)] == [1, 0, 0]


def test_stopped_or_run_again_it_goes_on(tmp_path, slices, threshold, monkeypatch):
    whole = label(slices, threshold, tmp_path / "whole")
    predict, seen = Teachers.predict, []

    def stop_after_three(self, image):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(Path(image).name)
        return predict(self, image)

    monkeypatch.setattr(Teachers, "predict", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        label(slices, threshold, tmp_path / "out")
    (tmp_path / "out" / "predictions" / "v_1.png").write_bytes(b"torn")
    seen.clear()
    monkeypatch.setattr(Teachers, "predict", lambda self, i: (seen.append(Path(i).name), predict(self, i))[1])
    again = label(slices, threshold, tmp_path / "out")
    assert seen == ["v_1.png", "v_3.png", "v_4.png", "v_5.png", "v_6.png"]
    for file in ("datalist.json", "pseudo_labels.json", "teachers.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert again.summary == whole.summary
    # Other rules need no network, and take masks away that no longer count.
    seen.clear()
    lenient = label(slices, threshold, tmp_path / "out", ConfidenceRules(0.001, 0.6, 0, 0.3, 0))
    assert not seen and lenient.summary["kept"] == {"positive": 2, "empty": 0}
    assert sorted(f.name for f in (tmp_path / "out" / "masks").iterdir()) == ["v_0.png", "v_1.png"]


def test_other_networks_are_not_mixed_in(tmp_path, slices, threshold):
    label(slices, threshold, tmp_path / "out")
    with pytest.raises(ValueError, match=r"predictions of other networks \(weights changed\)"):
        label(slices, save(tmp_path / "threshold2.pt", 16.0, 0.0, -9.0), tmp_path / "out")
    with pytest.raises(ValueError, match=r"predictions of other networks \(unseen_fold changed\)"):
        label(slices, threshold, tmp_path / "out", fold=1)


def test_the_fold_of_a_cross_validation_must_agree(tmp_path, slices):
    run = tmp_path / "runs" / "x" / "fold_2"
    weights = save(run / "models" / "model.pt", 16.0, 0.0, -8.0)
    (run / "settings.json").write_text(json.dumps({"fold": 2}))
    assert (
        label(slices, weights, tmp_path / "out", fold=2).summary["teachers"]["weights"][0]["held_out_fold"]
        == 2
    )
    for wrong in (0, None):
        with pytest.raises(ValueError, match="was trained with fold 2 held out"):
            label(slices, weights, tmp_path / "other", fold=wrong)


def test_settings_beside_the_weights_are_taken_over(tmp_path, threshold):
    network = {"network_def": NETWORK}
    file = threshold.with_suffix(".json")
    content = {"schema": "covid-ct-bundles-weights-1.0", "settings": {"image_size": [16, 16], "unknown": 1}}
    file.write_text(json.dumps(content))
    Image.fromarray(square(1)).save(tmp_path / "a.png")  # which is lost at half the size
    assert Teachers(BUNDLE, [threshold], overrides=network).predict(tmp_path / "a.png").max() < 0.5
    assert Teachers(BUNDLE, [threshold], overrides=OVERRIDES).predict(tmp_path / "a.png").max() > 0.9


def test_what_cannot_be_used_is_named(tmp_path, slices, threshold):
    with pytest.raises(ValueError, match="does not fit this SCOATNet"):
        Teachers(BUNDLE, [threshold], overrides={"network_def::channels": [16, 16, 16, 16, 16]})
    with pytest.raises(ValueError, match="'image_sise' is no key"):
        Teachers(BUNDLE, [threshold], overrides={"image_sise": [8, 8]})
    with pytest.raises(FileNotFoundError, match="train_slises.json not found"):
        Teachers(BUNDLE, [threshold], overlays=["train_slises"])
    with pytest.raises(ValueError, match="at least one weights file"):
        Teachers(BUNDLE, [])
    with pytest.raises(ValueError, match="no slice is certain enough"):
        label(slices, threshold, tmp_path / "none", ConfidenceRules(min_area=1.0, keep_empty=0))
    (slices / "images" / "v_2.png").write_bytes(b"no picture")
    with pytest.raises(CohortError, match="1 of 7 slices failed: images/v_2.png"):
        label(slices, threshold, tmp_path / "out")
    assert len(read_datalist(tmp_path / "out" / "datalist.json")["training"]) == 3


def test_command_line(tmp_path, slices, capsys):
    main = runpy.run_path(str(ROOT / "scripts" / "pseudo_label.py"))["main"]
    weights = save(tmp_path / "t.pt", 16.0, 0.0, -8.0, torch.float16)
    words = [
        str(slices),
        "--bundle",
        str(BUNDLE),
        "--weights",
        str(weights),
        "--output-dir",
        str(tmp_path / "o"),
    ]
    words += ["--set", f"network_def={json.dumps(NETWORK)}", "--set", "image_size=[32,40]", "--unseen-fold"]
    assert main([*words, "1", "--keep-empty", "1"]) == 0
    assert "1 slices with opacities, 4 without" in capsys.readouterr().out
    assert main([*words, "one"]) == 2
    assert "'one' is no fold" in capsys.readouterr().err
    assert main([*words, "1", "--min-area", "2"]) == 2
    assert "min_area must be from 0 to 1" in capsys.readouterr().err
    assert main([*words, "1", "--set", "oops"]) == 2
    assert "'oops' is no KEY=VALUE" in capsys.readouterr().err


def test_kept_empty_slices_are_spread_over_all():
    empty = ConfidenceRules().judge(np.zeros((4, 4)))
    fates = pseudo_labels._choose([({}, empty)] * 8, ConfidenceRules(keep_empty=0.25))
    assert [position for position, fate in enumerate(fates) if fate == "empty"] == [2, 6]


def test_the_most_certain_share_is_kept():
    p = [np.full((4, 4), value) for value in (0.9, 0.99, 0.95, 0.99, 0.86, 0.5)]
    verdicts = [({}, ConfidenceRules().judge(one)) for one in p]
    fates = pseudo_labels._choose(verdicts, ConfidenceRules(keep_positive=0.6))  # 3 of the 5 that pass
    assert [fate == "positive" for fate in fates] == [False, True, True, True, False, False]
    assert fates[0] == "positive, beyond the most certain share" and fates[5] == "uncertain"
    assert "positive" not in pseudo_labels._choose(verdicts, ConfidenceRules(keep_positive=0))
