# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""A bundle's evaluation scores every case on the grid that its label was drawn on."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import naive
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow

from custom.data.phantom import Lesion, make_phantom

BUNDLES = Path(__file__).resolve().parent.parent.parent / "bundles"
CONFIGS = BUNDLES / "covid_ct_scoatnet_segmentation" / "configs"
SPACING, LESION_HU, LUNG_HU = (3.6, 4.1, 15.0), 3000.0, -850.0
THRESHOLD_HU = (LESION_HU + LUNG_HU) / 2


def turned(array: np.ndarray, affine: np.ndarray, axes: str) -> nib.Nifti1Image:
    """The same volume stored with its axes in another order and direction."""
    start = nib.orientations.io_orientation(affine)
    change = nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(axes))
    image = nib.Nifti1Image(array, affine).as_reoriented(change)
    return nib.Nifti1Image(np.ascontiguousarray(image.dataobj), image.affine)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Three phantoms in three orders of axes; opacity is what is bright, which is not quite the labels."""
    data, work = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("work")
    entries = []
    for name, axes in (("axial", "LPS"), ("sagittal", "SAR"), ("coronal", "PIL")):
        lesion = Lesion("consolidation", (0.55, 0.7, 0.62), (18.0, 23.4, 27.0), side="left", hu=LESION_HU)
        phantom = make_phantom((96, 84, 18), SPACING, seed=2, lesions=[lesion], noise_hu=5.0)
        label = phantom.label > 0
        if name == "sagittal":  # half of it was not drawn
            label[: int(np.argwhere(label)[:, 0].mean())] = False
        if name == "coronal":  # nothing was drawn
            label[:] = False
        nib.save(turned(phantom.image.astype(np.float32), phantom.affine, axes), data / f"{name}.nii.gz")
        nib.save(turned(label.astype(np.uint8), phantom.affine, axes), data / f"{name}_mask.nii.gz")
        entries.append({"image": f"{name}.nii.gz", "label": f"{name}_mask.nii.gz", "patient_id": name})
    (data / "datalist.json").write_text(json.dumps({"name": "test", "testing": entries}), encoding="utf-8")

    share = (THRESHOLD_HU + 1000) / (LESION_HU + 1000)
    (work / "models").mkdir()
    torch.save(
        {"weight": torch.full((1, 1, 1, 1), 4.0), "bias": torch.tensor([-4 * share])},
        work / "models" / "model.pt",
    )
    workflow = ConfigWorkflow(
        workflow_type="train",
        config_file=[str(CONFIGS / "train.json"), str(CONFIGS / "evaluate.json")],
        meta_file=str(CONFIGS / "metadata.json"),
        logging_file=str(CONFIGS / "logging.conf"),
        bundle_root=str(CONFIGS.parent),
        dataset_dir=str(data),
        section="testing",
        fold="$None",  # test cases have none
        output_dir=str(work / "eval"),
        ckpt_dir=str(work / "models"),
        cache_dir=str(work / "cache"),
        num_workers=0,
        network_def={"_target_": "torch.nn.Conv2d", "in_channels": 1, "out_channels": 1, "kernel_size": 1},
        hu_window=[-1000, LESION_HU],
        image_size=[128, 128],
    )
    workflow.initialize()
    workflow.run()
    return data, work / "eval"


def read(file: Path) -> tuple[np.ndarray, np.ndarray]:
    image = nib.load(file)
    return np.asarray(image.dataobj), image.affine


def test_predictions_lie_where_the_scan_shows_them(evaluated):
    data, scores = evaluated
    for name in ("axial", "sagittal", "coronal"):
        image, affine = read(data / f"{name}.nii.gz")
        pred, placed = read(scores / "predictions" / f"{name}.nii.gz")
        assert pred.shape == image.shape and np.allclose(placed, affine)
        bright = image > THRESHOLD_HU
        assert naive.overlap(pred > 0, bright)["dice"] > 0.95, name


def test_scores_are_those_of_masks_and_labels_as_stored(evaluated):
    """Recomputed from the files in plain Python: per case, per slice along the patient's axis, and pooled."""
    data, scores = evaluated
    content = json.loads((scores / "scores.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in content["cases"]] == ["axial", "coronal", "sagittal"]
    pairs, expected, slices = [], [], []
    for row in content["cases"]:
        truth, affine = read(data / f"{row['name']}_mask.nii.gz")
        pred, _ = read(scores / "predictions" / f"{row['name']}.nii.gz")
        axis = nib.aff2axcodes(affine).index("S" if row["name"] != "coronal" else "I")
        pred, truth = (np.moveaxis(mask > 0, axis, 2) for mask in (pred, truth))
        of_case = naive.all_scores(pred, truth)
        del of_case["hd95_mm"], of_case["surface_dice"], of_case["mae"]  # mae is of probabilities
        for metric, value in of_case.items():
            assert row[metric] == (None if value is None else pytest.approx(value)), (row["name"], metric)
        assert row["true_ml"] == pytest.approx(np.count_nonzero(truth) * np.prod(SPACING) / 1000)
        assert row["slices"] == 18
        expected.append(of_case)
        parts = list(zip(naive.slices(pred), naive.slices(truth), strict=True))
        pairs.append((pred.ravel(), truth.ravel()))
        slices += [naive.all_scores(*part) for part in parts]
    summary = content["summary"]
    for part, units in (("per_case", expected), ("per_slice", slices)):
        for metric in expected[0]:
            mean, n = naive.mean([unit[metric] for unit in units])
            found = summary[part]["metrics"][metric]
            assert (found["mean"], found["n"]) == (pytest.approx(mean), n), (part, metric)
    pooled = naive.overlap(*(np.concatenate(masks)[None] for masks in zip(*pairs, strict=True)))
    for metric in set(pooled) - {"mae"}:
        assert summary["pooled"]["metrics"][metric] == pytest.approx(pooled[metric]), metric
    # The three protocols do differ here: a test in which they agree would prove nothing.
    values = {round(summary[part]["metrics"]["dice"]["mean"], 3) for part in ("per_case", "per_slice")}
    assert len(values | {round(pooled["dice"], 3)}) == 3


def test_an_undefined_value_is_null_and_an_empty_cell(evaluated):
    _, scores = evaluated
    coronal = json.loads((scores / "scores.json").read_text(encoding="utf-8"))["cases"][1]
    assert coronal["empty_truth"] and coronal["dice"] is None and coronal["ppv"] == 0
    for file in ("scores.json", "scores.csv"):
        assert "nan" not in (scores / file).read_text(encoding="utf-8").lower()
    with open(scores / "scores.csv", encoding="utf-8") as file:
        assert [row["dice"] == "" for row in csv.DictReader(file)] == [False, True, False]


@pytest.mark.parametrize("folder", sorted(BUNDLES.iterdir()), ids=lambda folder: folder.name)
def test_every_bundle_inverts_the_prediction_and_leaves_the_label_alone(folder):
    train, evaluate = (
        json.loads((folder / "configs" / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("train", "evaluate")
    )
    assert [train["validate"][step]["keys"] for step in ("crop", "orientation", "resize")] == ["image"] * 3
    for steps in (
        train["validate"]["postprocessing"]["transforms"],
        evaluate["validate#postprocessing#transforms"],
    ):
        kinds = [step["_target_"] for step in steps]
        invert = steps[kinds.index("Invertd")]
        assert (invert["keys"], invert["transform"]) == ("pred", "@validate#preprocessing")
        assert kinds.index("Invertd") < kinds.index("AsDiscreted"), "probabilities are resampled, not masks"
