# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from monai.networks.nets import resnet50
from network_tester import NetworkTester, fill
from torch import nn

from custom.networks import ECAResNet50, NCoVSegNet

NARROW = 1 / 8


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module")
def narrow() -> NCoVSegNet:
    torch.manual_seed(0)
    return NCoVSegNet(width=NARROW)


class TestNCoVSegNet(NetworkTester):
    network = NCoVSegNet
    small = {"width": NARROW}
    side = 64
    single_side = 64
    multiple = 32
    outputs = 4
    maps = {"daf_3": 16, "daf_2": 8, "daf_1": 4}
    golden = {"ncovsegnet": {}, "ncovsegnet_v1": {"stride_in_conv1": True}}


def test_parameters_of_the_published_network():
    with torch.device("meta"):
        network = NCoVSegNet()
    assert parameters(network) == 168_169_968
    assert parameters(network.backbone) == 23_508_080
    assert [parameters(block) for block in network.gca] == [1_691_392, 6_757_888, 27_016_192, 72_374_272]
    assert parameters(network.daf) == 36_820_224
    assert parameters(network.head) + parameters(network.auxiliary_heads) == 1_920


@pytest.mark.parametrize(
    ("gca", "daf", "deep_supervision"),
    [(g, d, s) for g in (False, True) for d in (False, True) for s in (False, True)],
)
def test_rows_of_the_ablation(gca, daf, deep_supervision):
    with torch.device("meta"):
        network = NCoVSegNet(gca=gca, daf=daf, deep_supervision=deep_supervision)
    # Left out: GCA keeps conv1x1 (C x C/2) and BN (2 C/2) of its shortcut; DAF loses the 4x4 deconvolution
    # (16 C C), the 1x1 convolution (C C/2) and its BN (2 C/2); three heads of 256, 512 and 1024 weights go.
    shortcuts = sum(c * c // 2 + c for c in (256, 512, 1024, 2048))
    weights = sum(16 * c * c + c * c // 2 + c for c in (256, 512, 1024))
    expected = 168_169_968
    expected -= 0 if gca else 107_839_744 - shortcuts
    expected -= 0 if daf else weights
    expected -= 0 if deep_supervision else 1_792
    assert parameters(network) == expected
    assert network.shown_attention_maps == (("daf_3", "daf_2", "daf_1") if daf else ())


def test_the_barest_row_trains_every_parameter():
    network = NCoVSegNet(width=NARROW, gca=False, daf=False, deep_supervision=False).train()
    logits = network(torch.rand(2, 1, 64, 64))
    assert logits.shape == (2, 1, 64, 64)
    logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    with pytest.raises(ValueError, match="without attention"):
        network.attention_maps(torch.rand(1, 1, 64, 64), ["daf_1"])


def test_backbone_has_the_names_and_shapes_of_imagenet_weights():
    def bn(name: str, channels: int) -> dict[str, tuple[int, ...]]:
        keys = ("weight", "bias", "running_mean", "running_var")
        return {f"{name}.{key}": (channels,) for key in keys} | {f"{name}.num_batches_tracked": ()}

    expected: dict[str, tuple[int, ...]] = {"conv1.weight": (64, 3, 7, 7)} | bn("bn1", 64)
    wide = 64
    for layer, (blocks, planes) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), start=1):
        for block in range(blocks):
            name = f"layer{layer}.{block}"
            expected |= {f"{name}.conv1.weight": (planes, wide, 1, 1)} | bn(f"{name}.bn1", planes)
            expected |= {f"{name}.conv2.weight": (planes, planes, 3, 3)} | bn(f"{name}.bn2", planes)
            expected |= {f"{name}.conv3.weight": (4 * planes, planes, 1, 1)} | bn(f"{name}.bn3", 4 * planes)
            if block == 0:
                expected |= {f"{name}.downsample.0.weight": (4 * planes, wide, 1, 1)}
                expected |= bn(f"{name}.downsample.1", 4 * planes)
            wide = 4 * planes
            expected[f"{name}.eca.conv.weight"] = (1, 1, 3)
    with torch.device("meta"):
        state = ECAResNet50().state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected
    assert sum("eca" in name for name in expected) == 16
    assert len(expected) - 16 == 318  # the 320 of the classification network less fc.weight and fc.bias


def test_backbone_without_eca_is_resnet50():
    backbone = ECAResNet50().eval()
    fill(backbone)
    plain = resnet50(
        spatial_dims=2, n_input_channels=3, conv1_t_stride=2, bias_downsample=False, feed_forward=False
    )
    state = {name: tensor for name, tensor in backbone.state_dict().items() if "eca" not in name}
    plain.load_state_dict(state)
    plain.eval()
    for module in backbone.modules():
        if hasattr(module, "eca"):
            module.eca = nn.Identity()
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = plain.maxpool(plain.act(plain.bn1(plain.conv1(image))))
        for index, feature in enumerate(backbone(image)):
            expected = getattr(plain, f"layer{index + 1}")(expected)
            assert torch.equal(feature, expected)
            assert feature.shape == (1, 256 << index, 16 >> index, 16 >> index)


def test_stride_in_the_first_convolution():
    with torch.device("meta"):
        second, first = ECAResNet50(), ECAResNet50(stride_in_conv1=True)
    for layer in (2, 3, 4):
        for block, (one, two) in ((getattr(second, f"layer{layer}")[0], (1, 2)),
                                  (getattr(first, f"layer{layer}")[0], (2, 1))):  # fmt: skip
            assert block.conv1.stride == (one, one) and block.conv2.stride == (two, two)
    assert list(first.state_dict()) == list(second.state_dict())
    features = first(torch.empty(1, 3, 64, 64, device="meta"))
    assert [tuple(f.shape[1:]) for f in features] == [(256, 16, 16), (512, 8, 8), (1024, 4, 4), (2048, 2, 2)]


def test_a_ct_slice_is_replicated_and_normalised(narrow):
    narrow.eval()
    image = torch.rand(1, 1, 64, 64)
    seen = []
    handle = narrow.backbone.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with torch.no_grad():
        assert torch.equal(narrow(image), narrow(image.repeat(1, 3, 1, 1)))
    handle.remove()
    expected = [(image[:, 0] - mean) / std for mean, std in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))]
    torch.testing.assert_close(seen[0], torch.stack(expected, 1))
    with torch.device("meta"):
        plain = NCoVSegNet(width=NARROW, imagenet_normalization=False)
    assert list(plain.state_dict()) == list(narrow.state_dict())
    assert not any("imagenet" in name for name in plain.state_dict())


def test_without_normalisation_the_backbone_sees_the_image_itself():
    network = NCoVSegNet(width=NARROW, in_channels=2, imagenet_normalization=False).eval()
    image = torch.rand(1, 2, 64, 64)
    seen = []
    network.backbone.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with torch.no_grad():
        network(image)
    assert torch.equal(seen[0], image)


def test_the_coarsest_head_sees_no_fusion(narrow):
    narrow.train()
    outputs = narrow(torch.rand(2, 1, 64, 64))
    # Finest first: map k rests on DAF k and all deeper ones, the last on GCA 4 alone.
    for depth, output in enumerate(outputs):
        narrow.zero_grad(set_to_none=True)
        output.sum().backward(retain_graph=True)
        used = [next(block.parameters()).grad is not None for block in narrow.daf]
        assert used == [index + depth < 3 for index in range(3)]
    narrow.zero_grad(set_to_none=True)


def test_width_leaves_the_backbone_whole(narrow):
    assert parameters(narrow.backbone) == 23_508_080
    assert [block.fuse.conv.out_channels for block in narrow.gca] == [16, 32, 64, 128]
    assert len(narrow.gca[0].branches) == 4 and len(narrow.gca[3].branches) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spatial_dims": 3}, "2-D"),
        ({"width": 0}, "width"),
        ({"in_channels": 1}, "imagenet_normalization.*in_channels=3"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        NCoVSegNet(**arguments)


def test_a_wrong_number_of_channels_is_refused(narrow):
    with pytest.raises(ValueError, match="1 or 3 channels, got 2"):
        narrow(torch.rand(1, 2, 64, 64))
