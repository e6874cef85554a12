# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""The networks SCOAT-Net is compared with, as overlays on its bundle."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from bundle_tester import Bundle, run_bundle
from monai.bundle import ConfigParser

BUNDLE = Bundle("covid_ct_scoatnet_segmentation", reduced={"image_size": [32, 32], "batch_size": 4})
FEATURES = {"network_def::network::features": [4, 4, 8, 8, 8, 4]}
CHANNELS = {"network_def::channels": [4, 4, 8, 8, 8]}
SMALL_ENCODER = {"network_def::network::encoder": "resnet18"}

#: Overlay, what makes it small, the parameters of the network as it stands there.
OVERLAYS = {
    "baseline_unet": (FEATURES, 7_782_849),
    "baseline_unetplusplus": (FEATURES, 9_118_657),
    "baseline_attention_unet": ({"network_def::network::channels": [4, 4, 8, 8, 8]}, 7_939_745),
    "baseline_deeplabv3plus": (SMALL_ENCODER, 26_671_313),
    "baseline_pspnet": (SMALL_ENCODER, 24_294_721),
    "table3_unetplusplus": (CHANNELS, 9_163_009),
    "table3_attention_gates": (CHANNELS, 9_836_435),
}
SUPERVISED = ("baseline_unetplusplus", "table3_unetplusplus", "table3_attention_gates")


def config(*names: str, **overrides) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config(BUNDLE.config(*names))
    parser.update(overrides)
    return parser


def build(parser: ConfigParser) -> torch.nn.Module:
    """The config's network, or a skip where it is of a library that cannot be imported."""
    try:
        return parser.get_parsed_content("network_def")
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if "needs segmentation-models-pytorch, which cannot be imported" in str(cause):
                pytest.skip(str(cause))
            cause = cause.__cause__
        raise


def test_every_overlay_is_in_the_table():
    files = (BUNDLE.folder / "configs").iterdir()
    assert {file.stem for file in files if file.stem.startswith(("baseline_", "table3_"))} == set(OVERLAYS)


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize(
    "under", [("train",), ("train", "train_slices", "evaluate"), ("inference",)], ids="+".join
)
def test_an_overlay_gives_a_network(overlay, under):
    small, _ = OVERLAYS[overlay]
    parser = config(*under, overlay, **small)
    network = build(parser).eval()
    with torch.no_grad():
        logits = network(torch.rand(2, 1, 32, 32))
        assert logits.shape == (2, 1, 32, 32) and logits.is_floating_point()
        with pytest.raises(ValueError, match="33 x 32.*multiple of 16"):
            network(torch.rand(1, 1, 33, 32))
    assert len(parser["_desc_"]) > 20


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_deep_supervision_is_heard_or_refused(overlay):
    small, _ = OVERLAYS[overlay]
    parser = config("train", overlay, **small, deep_supervision=True)
    if overlay in SUPERVISED:
        outputs = build(parser).train()(torch.rand(2, 1, 32, 32))
        assert [output.shape for output in outputs] == [(2, 1, 32, 32)] * 4
    else:
        with pytest.raises(Exception) as error:
            build(parser)
        assert "has no deep supervision" in str(error.value.__cause__ or error.value)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_parameters_are_those_of_the_readme(overlay):
    _, expected = OVERLAYS[overlay]
    with torch.device("meta"):
        network = build(config("train", overlay))
    assert sum(parameter.numel() for parameter in network.parameters()) == expected
    readme = (BUNDLE.folder / "docs" / "README.md").read_text(encoding="utf-8")
    (line,) = [line for line in readme.splitlines() if line.startswith(f"| `{overlay}` |")]
    assert f"{expected:,}" in line


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_have_all_properties(overlay, cohort, tmp_path):
    build(config("train", overlay, **OVERLAYS[overlay][0]))  # or a skip
    overrides = {**BUNDLE.training_paths(tmp_path, cohort), **OVERLAYS[overlay][0]}
    workflow = BUNDLE.workflow("train", ("train", overlay), overrides)
    assert workflow.check_properties() == []


def test_train_evaluate_and_infer(cohort: Path, tmp_path: Path):
    overlay = "baseline_unetplusplus"
    paths = {**BUNDLE.training_paths(tmp_path, cohort), **FEATURES}
    BUNDLE.workflow("train", ("train", overlay), {**paths, "epochs": 2}).run()
    state = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    assert all(name.startswith("network.") for name in state)

    evaluation = BUNDLE.workflow("train", ("train", overlay, "evaluate"), paths)
    evaluation.run()
    metrics = evaluation.parser.get_parsed_content("validate::evaluator").state.metrics
    assert 0 <= metrics["val_mean_dice"] <= 1

    source = sorted(cohort.glob("*_ct.nii.gz"))[0]
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / source.name).symlink_to(source)
    inference = BUNDLE.workflow(
        "infer",
        ("inference", overlay),
        {
            **FEATURES,
            "bundle_root": str(BUNDLE.folder),
            "dataset_dir": str(tmp_path / "scans"),
            "output_dir": str(tmp_path / "output"),
            "ckpt_path": str(tmp_path / "models" / "model.pt"),
        },
    )
    assert inference.check_properties() == []
    inference.run()
    (mask,) = (tmp_path / "output").rglob("*_opacity.nii.gz")
    scan = nib.load(source)
    assert nib.load(mask).shape == scan.shape and np.array_equal(nib.load(mask).affine, scan.affine)


def test_a_network_without_its_library_ends_in_one_line_and_code_2(cohort, tmp_path):
    build_small = config("train", "baseline_pspnet", **SMALL_ENCODER)
    try:
        build(build_small)
    except pytest.skip.Exception:
        pass
    else:
        pytest.skip("segmentation-models-pytorch is there")
    done = run_bundle(BUNDLE, ("train", "baseline_pspnet"), BUNDLE.training_paths(tmp_path, cohort))
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and len(errors) == 1, done.stderr
    assert "baselines" in errors[0] and "Traceback" not in done.stderr + done.stdout
