# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.data import decollate_batch, list_data_collate
from torch import nn

from custom.inferers import BACKENDS, AxialSliceInferer, BackendSliceInferer, NetworkBackend, export_onnx

ROOT = Path(__file__).resolve().parents[2]
BUNDLES = ROOT / "bundles"
SCOATNET = "covid_ct_scoatnet_segmentation"
SMALL: dict[str, dict[str, Any]] = {  # what makes each bundle's network small
    SCOATNET: {"network_def::channels": [8] * 5},
    "covid_ct_attention_unet_segmentation": {"network_def::channels": [8] * 5},
    "covid_ct_ncovsegnet_segmentation": {"width": 0.02},
}
EXACT = ("onnx", "openvino")  # to rounding
EXPORT = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(EXPORT), reason=f"not installed: {', '.join(EXPORT)}")


def need(backend: str) -> None:
    for library in BACKENDS[backend]:
        pytest.importorskip(library)
    # Minutes, and processes of its own that outlive the test.
    if backend == "compile" and os.environ.get("TEST_COMPILE") != "1":
        pytest.skip("torch.compile is tested where TEST_COMPILE=1 asks for it")


def tiny() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))
    return nn.Sequential(*layers).eval()


def parse(name: str, **overrides: Any) -> ConfigParser:
    """A bundle's inference.json with a small network."""
    parser = ConfigParser()
    parser.read_config(BUNDLES / name / "configs" / "inference.json")
    parser.update({"device": torch.device("cpu"), **SMALL[name], **overrides})
    return parser


def small_network(name: str) -> nn.Module:
    """Random, with a mask that is neither empty nor full."""
    torch.manual_seed(0)
    network = parse(name).get_parsed_content("network_def")
    with torch.no_grad():  # statistics of batch normalisation, so that something reaches the last layer
        network.train()(torch.rand(4, 1, 64, 64))
    return network.eval()


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_computes_the_same_for_every_batch(backend):
    need(backend)
    network = tiny()
    volume = torch.rand((1, 1, 24, 16, 7), generator=torch.Generator().manual_seed(1))
    tolerance = 2e-2 if backend == "bf16" else 1e-5
    inferer = BackendSliceInferer(batch_size=3, backend=backend)  # batches of 3, 3 and 1
    with torch.no_grad():
        expected = AxialSliceInferer(batch_size=3)(volume, network)
        logits = inferer(volume, network)
        assert logits.dtype == torch.float32 and logits.shape == (1, 2, 24, 16, 7)
        torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)
        if backend != "compile":  # another size, built anew, and a batch of 1 first
            plane = volume[..., :16, 0].mT
            torch.testing.assert_close(
                inferer(plane, network), network(plane), rtol=tolerance, atol=tolerance
            )
    if backend != "torch":
        assert not torch.equal(logits, expected) or backend in EXACT + ("compile",)


@pytest.mark.parametrize("backend", EXACT)
def test_a_real_network_and_mirroring(backend):
    need(backend)
    network = small_network(SCOATNET)
    volume = torch.rand((1, 1, 32, 32, 5), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = AxialSliceInferer(batch_size=2, flip=True)(volume, network)
        logits = BackendSliceInferer(batch_size=2, flip=True, backend=backend)(volume, network)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


@needs_onnx
def test_changed_weights_are_noticed():
    network, image = tiny(), torch.rand(2, 1, 16, 16)
    backend = NetworkBackend(network, "onnx")
    with torch.no_grad():
        first = backend(image)
        network[3].bias += 1  # in place, as an optimizer does
        torch.testing.assert_close(backend(image), first + 1)
        state = {name: torch.zeros_like(value) for name, value in network.state_dict().items()}
        network.load_state_dict(state)
        assert not backend(image).any()


@needs_onnx
def test_the_model_is_built_once(monkeypatch):
    from custom.inferers import backends

    network, built = tiny(), []
    monkeypatch.setattr(backends, "export_onnx", lambda *args: built.append(1) or export_onnx(*args))
    inferer = BackendSliceInferer(batch_size=2, backend="onnx")
    assert built == []
    with torch.no_grad():
        for _ in range(2):
            inferer(torch.rand(1, 1, 16, 16, 3), network)
    assert built == [1]


@needs_onnx
def test_the_onnx_file_has_a_free_batch_and_names():
    import onnx

    model = onnx.load_from_string(export_onnx(tiny(), torch.rand(1, 1, 24, 16)))
    onnx.checker.check_model(model)
    (image,), (logits,) = model.graph.input, model.graph.output
    assert (image.name, logits.name) == ("image", "logits")
    for value, channels in ((image, 1), (logits, 2)):
        batch, *rest = value.type.tensor_type.shape.dim
        assert batch.dim_param and [dim.dim_value for dim in rest] == [channels, 24, 16]


def test_what_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="^backend must be one of torch, compile.*got 'tensorrt'$"):
        BackendSliceInferer(backend="tensorrt")
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        BackendSliceInferer(batch_size=0)
    with pytest.raises(TypeError, match="backend bf16 runs a torch.nn.Module of one image"):
        BackendSliceInferer(backend="bf16")(torch.zeros(1, 1, 8, 8), lambda batch: batch)
    with pytest.raises(ValueError, match="backend bf16 is for inference"):
        NetworkBackend(tiny().train(), "bf16")(torch.zeros(1, 1, 8, 8))

    def broken(*args, **kwargs):
        raise RuntimeError("no C++ compiler\nwas found")

    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: broken)
    with pytest.raises(
        ValueError, match="compile does not work here, choose another: no C.. compiler was found$"
    ):
        NetworkBackend(tiny(), "compile")(torch.zeros(1, 1, 8, 8))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "openvino" else find_spec(name)
    )
    if not EXPORT:
        with pytest.raises(ModuleNotFoundError) as caught:
            BackendSliceInferer(backend="openvino")
        assert str(caught.value) == "backend openvino needs openvino: install covid-ct-bundles[openvino]"


def test_a_gpus_image_is_not_moved_silently():
    need("onnx")
    backend = NetworkBackend(tiny(), "onnx")
    with pytest.raises(
        ValueError, match="backend onnx computes on the CPU and the image is on meta; set device"
    ):
        backend(torch.zeros(1, 1, 8, 8, device="meta"))


def test_no_library_is_imported_unless_asked_for():
    code = "import sys, custom.inferers as i; i.BackendSliceInferer()"
    code += "; print(set(sys.argv[1:]) & set(sys.modules))"
    names = ["onnx", "onnxscript", "onnxruntime", "openvino"]
    done = subprocess.run(
        [sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def infer(name: str, scans: Path, work: Path, backend: str, side: int) -> tuple[np.ndarray, dict]:
    """Mask and report of the only study, through the bundle's own inference.json."""
    weights = work / "model.pt"
    if not weights.is_file():
        torch.save(small_network(name).state_dict(), weights)
    workflow = ConfigWorkflow(
        workflow_type="infer",
        config_file=str(BUNDLES / name / "configs" / "inference.json"),
        meta_file=str(BUNDLES / name / "configs" / "metadata.json"),
        logging_file=False,
        **{
            "bundle_root": str(BUNDLES / name),
            "dataset_dir": str(scans),
            "output_dir": str(work / backend),
            "ckpt_path": str(weights),
            "image_size": [side, side],
            "device": "$torch.device('cpu')",
            "dicom_output": False,
            "backend": backend,
            **SMALL[name],
        },
    )
    workflow.initialize()
    assert workflow.check_properties() == []
    workflow.run()
    (report,) = (work / backend).rglob("*_report.json")
    content = json.loads(report.read_text(encoding="utf-8"))
    mask = nib.load(report.parent / content["files"]["opacity"])
    assert (report.parent / f"{content['study']}_overview.png").is_file()  # its maps are the torch network's
    return np.asarray(mask.dataobj) > 0, content


def exact_backends() -> list[str]:
    return [name for name in EXACT if all(importlib.util.find_spec(library) for library in BACKENDS[name])]


def check_same(mask: np.ndarray, expected: np.ndarray) -> None:
    assert 0.001 < expected.mean() < 0.5
    dice = 2 * (mask & expected).sum() / (mask.sum() + expected.sum())
    assert dice >= 0.999, dice


@needs_onnx
def test_the_bundle_gives_the_same_mask_with_every_backend(cohort, tmp_path):
    (tmp_path / "scans").mkdir()
    shutil.copy(sorted(cohort.glob("*_ct.nii.gz"))[0], tmp_path / "scans")
    expected, report = infer(SCOATNET, tmp_path / "scans", tmp_path, "torch", 64)
    for backend in exact_backends():
        mask, content = infer(SCOATNET, tmp_path / "scans", tmp_path, backend, 64)
        check_same(mask, expected)
        assert content["opacity_volume_ml"]["total"] == pytest.approx(
            report["opacity_volume_ml"]["total"], rel=2e-3
        )


@needs_onnx
@pytest.mark.parametrize("name", SMALL)
def test_masks_of_a_real_series(name, ct_data):
    """By the bundle's own preparation and way back; the lungs are found once."""
    parser = parse(name, image_size=[96, 96])
    network = small_network(name)
    item = parser.get_parsed_content("preprocessing")({"image": str(ct_data / "ct_lung_dicom")})
    batch = list_data_collate([{"image": item["image"]}])
    way_back = parser.get_parsed_content("postprocessing")
    masks = {}
    for backend in ["torch", *exact_backends()]:
        with torch.no_grad():
            logits = BackendSliceInferer(4, backend=backend)(batch["image"], network)
        (study,) = decollate_batch({**batch, "pred": logits})
        masks[backend] = way_back(study)["pred"].numpy()[0] > 0
    for mask in masks.values():
        assert mask.shape == (512, 512, 30), "on the scan's own grid"
        check_same(mask, masks["torch"])
