# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from monai.networks.nets import AttentionUnet, BasicUNet, BasicUNetPlusPlus
from network_tester import NetworkTester, fill
from torch import nn

from custom.networks import BaselineNetwork, SegmentationModel

LIBRARY = "segmentation_models_pytorch"
PLANES = {"spatial_dims": 2, "in_channels": 1, "out_channels": 1}


def unet(**arguments) -> BaselineNetwork:
    return BaselineNetwork(BasicUNet(**arguments))


def unetplusplus(deep_supervision: bool = False, **arguments) -> BaselineNetwork:
    return BaselineNetwork(BasicUNetPlusPlus(**arguments), deep_supervision=deep_supervision)


def attention_unet(**arguments) -> BaselineNetwork:
    return BaselineNetwork(AttentionUnet(strides=(2, 2, 2, 2), **arguments))


class BaselineTester(NetworkTester):
    """A library's network has no attention maps to show, and its logits are the library's to test."""

    spatial_dims = (2, 3)
    test_attention_maps = None
    test_an_unknown_attention_map_is_refused_with_the_known_ones = None
    test_logits_are_the_stored_ones = None
    test_the_onnx_model_computes_the_same = None


class TestUNet(BaselineTester):
    network = staticmethod(unet)
    small = {**PLANES, "features": (8, 16, 32, 32, 64, 8)}


class TestUNetPlusPlus(BaselineTester):
    network = staticmethod(unetplusplus)
    small = {**PLANES, "features": (4, 8, 16, 32, 64, 4)}
    outputs = 4
    supervised = {"deep_supervision": True}
    test_the_onnx_model_computes_the_same = NetworkTester.test_the_onnx_model_computes_the_same


class TestAttentionUNet(BaselineTester):
    network = staticmethod(attention_unet)
    small = {**PLANES, "channels": (4, 8, 16, 32, 64)}


def test_the_finest_of_monais_maps_comes_first():
    image = torch.rand(2, 1, 16, 16)
    inner = BasicUNetPlusPlus(features=(4, 4, 4, 4, 4, 4), norm="batch", deep_supervision=True, **PLANES)
    network = BaselineNetwork(inner, deep_supervision=True)
    fill(network)
    with torch.no_grad():
        inner.eval()
        coarse_to_fine = inner(image)
        network.training = True  # of the adapter alone: batch normalisation goes on as in evaluation
        for ours, theirs in zip(network(image), reversed(coarse_to_fine), strict=True):
            assert torch.equal(ours, theirs)
        assert torch.equal(network.eval()(image), coarse_to_fine[-1])
    assert not torch.equal(coarse_to_fine[0], coarse_to_fine[-1])


def test_names_of_the_weights():
    small = {**PLANES, "features": (4, 4, 4, 4, 4, 4)}
    inner = BasicUNetPlusPlus(**small)
    theirs = list(inner.state_dict())
    ours = list(BaselineNetwork(inner, deep_supervision=True).state_dict())
    assert ours == [f"network.{name}" for name in theirs]
    # Three heads of a weight and a bias each are left out where they are not trained.
    unused = set(ours) - set(unetplusplus(**small).state_dict())
    assert unused == {f"network.final_conv_0_{j}.{kind}" for j in (1, 2, 3) for kind in ("weight", "bias")}


def test_deep_supervision_of_a_network_that_has_none_is_refused():
    with pytest.raises(ValueError, match="BasicUNet has no deep supervision"):
        BaselineNetwork(BasicUNet(features=(4, 4, 4, 4, 4, 4), **PLANES), deep_supervision=True)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, LIBRARY, None)
    with pytest.raises(ValueError, match=r"^DeepLabV3Plus needs .*baselines\]'.*torchvision") as error:
        SegmentationModel("DeepLabV3Plus")
    assert "\n" not in str(error.value)


def fake_library(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    (folder / LIBRARY).mkdir()
    (folder / LIBRARY / "__init__.py").write_text(code)
    monkeypatch.setitem(sys.modules, LIBRARY, None)  # what is there now comes back after the test
    del sys.modules[LIBRARY]
    monkeypatch.syspath_prepend(folder)


def test_a_broken_library_is_named_with_the_reason(monkeypatch, tmp_path):
    fake_library(tmp_path, monkeypatch, "raise RuntimeError('operator torchvision::nms\\ndoes not exist')")
    with pytest.raises(ValueError, match=r"\(operator torchvision::nms does not exist\)") as error:
        SegmentationModel("PSPNet")
    assert error.value.__cause__ is None and error.value.__suppress_context__


class Pooled(nn.Sequential):
    """Normalises one value per image, as DeepLab's global pooling does."""

    def __init__(self, **arguments) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(1))
        self.arguments = arguments


def test_errors_that_need_the_library_to_be_there(monkeypatch, tmp_path):
    fake_library(tmp_path, monkeypatch, "PSPNet = len")
    with pytest.raises(ValueError, match="no architecture 'DeepLabV4'"):
        SegmentationModel("DeepLabV4")
    monkeypatch.setattr(f"{LIBRARY}.DeepLabV3Plus", Pooled, raising=False)
    network = SegmentationModel("DeepLabV3Plus", encoder="resnet18", out_channels=2).train()
    # Nothing is downloaded unless it is asked for.
    expected = {"encoder_name": "resnet18", "encoder_weights": None, "in_channels": 1, "classes": 2}
    assert network.model.arguments == expected
    assert network(torch.rand(2, 1, 8, 8)).shape == (2, 1, 1, 1)
    with pytest.raises(ValueError, match="DeepLabV3Plus cannot .* one slice.*drop_last true"):
        network(torch.rand(1, 1, 8, 8))


@pytest.fixture(scope="module", params=["DeepLabV3Plus", "PSPNet"])
def library_network(request: pytest.FixtureRequest) -> BaselineNetwork:
    try:
        return BaselineNetwork(SegmentationModel(request.param, "resnet18", out_channels=2))
    except ValueError as error:
        if "cannot be imported" not in str(error):
            raise
        pytest.skip(str(error))


def test_a_network_of_the_library(library_network, tmp_path):
    image = torch.rand(2, 1, 32, 48)
    assert library_network.train()(image).shape == (2, 2, 32, 48)
    assert library_network.eval()(image[:1]).shape == (1, 2, 32, 48)
    with pytest.raises(ValueError, match="32 x 40.*multiple of 16"):
        library_network(image[..., :40])
    torch.save(library_network.state_dict(), tmp_path / "model.pt")
    again = BaselineNetwork(
        SegmentationModel(library_network.network.architecture, "resnet18", out_channels=2)
    )
    again.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    with torch.no_grad():
        assert torch.equal(again.eval()(image), library_network(image))
    if library_network.network.architecture == "DeepLabV3Plus":
        with pytest.raises(ValueError, match="one slice"):
            library_network.train()(image[:1])
