# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from network_tester import NetworkTester
from torch import nn
from torch.nn import functional as F

from custom.networks import DilatedAttentionUNet, DilatedResidualUnit


def parameters(**arguments) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in DilatedAttentionUNet(**arguments).parameters())


class TestDilatedAttentionUNet(NetworkTester):
    network = DilatedAttentionUNet
    small = {"channels": (8, 16, 32, 64, 128)}
    variants = (
        {"attention": False},
        {"upsample": "bilinear"},
        {"deep_supervision_levels": 1},
        {"deep_supervision_levels": 4},
    )
    spatial_dims = (2, 3)
    maps = {
        "encoder_1": 1,
        "encoder_2": 2,
        "encoder_3": 4,
        "encoder_4": 8,
        "encoder_5": 16,
        "decoder_4": 8,
        "decoder_3": 4,
        "decoder_2": 2,
        "decoder_1": 1,
    }
    golden = {"dilated_attention_unet": {}, "dilated_attention_unet_plain": {"attention": False}}


def test_parameters():
    assert parameters() == 13_005_091
    assert parameters(attention=False) == 12_567_395
    assert parameters(deep_supervision_levels=4) == 13_005_091 + 257


def test_receptive_field_of_the_unit():
    # Without normalisation and activation, and with ones for weights, nothing hides a connection.
    unit = DilatedResidualUnit(2, 1, 2, norm=None, act=None)
    for parameter in unit.parameters():
        nn.init.ones_(parameter)
    image = torch.zeros(1, 1, 31, 31, requires_grad=True)
    unit(image)[0, 0, 15, 15].backward()
    rows, columns = torch.nonzero(image.grad[0, 0], as_tuple=True)
    assert (rows.min(), rows.max()) == (columns.min(), columns.max()) == (8, 22)
    assert len(rows) == 15 * 15


def test_the_unit_adds_what_its_leading_convolution_found():
    unit = DilatedResidualUnit(2, 1, 4)
    image = torch.rand(1, 1, 16, 16)
    for block in unit.dilated:
        nn.init.zeros_(
            block.adn.N.weight
        )  # the branch's normalised values, and hence the branch, become zero
    torch.testing.assert_close(unit(image), unit.conv(image))
    assert [block.conv.dilation for block in unit.dilated] == [(2, 2), (4, 4)]


@pytest.mark.parametrize(("upsample", "levels"), [("nearest", 3), ("bilinear", 4), ("nearest", 1)])
def test_logits_are_the_sum_over_the_finest_levels(upsample, levels):
    torch.manual_seed(0)
    network = DilatedAttentionUNet(
        channels=(4, 8, 16, 32, 64), deep_supervision_levels=levels, upsample=upsample
    ).eval()
    maps = []
    for head in network.heads:
        head.register_forward_hook(lambda module, inputs, output: maps.append(output))
    with torch.no_grad():
        logits = network(torch.rand(1, 1, 32, 32))
    assert [map_.shape[-1] for map_ in maps] == [32 >> level for level in reversed(range(levels))]
    expected = maps[0]
    for map_ in maps[1:]:
        expected = F.interpolate(expected, scale_factor=2, mode=upsample) + map_
    torch.testing.assert_close(logits, expected)


def test_downsampling_is_by_stride_and_normalisation_by_image():
    network = DilatedAttentionUNet(channels=(4, 8, 16, 32, 64))
    kinds = {type(module) for module in network.modules()}
    assert nn.MaxPool2d not in kinds and nn.AvgPool2d not in kinds and nn.BatchNorm2d not in kinds
    assert nn.InstanceNorm2d in kinds
    assert [level.unit.conv.conv.stride for level in network.encoder] == [(1, 1)] + 4 * [(2, 2)]


def test_the_gated_map_is_both_skip_and_input_of_the_next_level():
    network = DilatedAttentionUNet(channels=(4, 8, 16), deep_supervision_levels=2).eval()
    seen = {}
    network.encoder[0].attention.register_forward_hook(lambda m, i, o: seen.update(gated=o))
    network.encoder[1].register_forward_hook(lambda m, i, o: seen.update(below=i[0]))
    network.decoder[-1].register_forward_hook(lambda m, i, o: seen.update(skip=i[1]))
    network(torch.rand(1, 1, 16, 16))
    assert seen["below"] is seen["gated"] and seen["skip"] is seen["gated"]


def test_without_attention_there_are_no_maps():
    network = DilatedAttentionUNet(channels=(4, 8, 16), attention=False, deep_supervision_levels=1)
    assert network.shown_attention_maps == ()
    assert network.attention_maps(torch.rand(1, 1, 16, 16)) == {}
    with pytest.raises(ValueError, match="without attention"):
        network.attention_maps(torch.rand(1, 1, 16, 16), ["decoder_1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"deep_supervision_levels": 0}, "between 1 and 4"),
        ({"deep_supervision_levels": 5}, "between 1 and 4"),
        ({"upsample": "cubic"}, "cubic.*nearest, bilinear"),
        ({"channels": (32,)}, "two levels"),
        ({"spatial_dims": 1}, "spatial_dims"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DilatedAttentionUNet(**arguments)
