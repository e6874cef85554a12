# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch
from network_tester import NetworkTester, fill
from torch import nn
from torch.nn import functional as F

from custom.networks import SCOATNet
from custom.networks.scoatnet import AttentionNode


def parameters(**arguments) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in SCOATNet(**arguments).parameters())


class TestSCOATNet(NetworkTester):
    network = SCOATNet
    small = {"channels": (4, 8, 16, 32, 64), "reduction": 4}
    variants = ({"variant": "released"},)
    spatial_dims = (2, 3)
    outputs = 4
    supervised = {"deep_supervision": True}
    maps = {"x1_1": 2, "x2_1": 4, "x3_1": 8, "x1_2": 2, "x2_2": 4, "x1_3": 2}
    golden = {"scoatnet_paper": {}, "scoatnet_released": {"variant": "released"}}


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_parameters_of_the_published_network(variant):
    assert parameters(variant=variant) == 10_208_723
    assert parameters(variant=variant, in_channels=3) == 10_209_363
    assert parameters(variant=variant, in_channels=3, deep_supervision=True) == 10_210_230


def test_channels_at_the_attention_nodes():
    with torch.device("meta"):
        columns = SCOATNet().columns
    nodes = {name: node for column in columns for name, node in column.items() if name[1] != "0"}
    widths = {name: node.conv1.conv.in_channels for name, node in nodes.items()}
    hidden = {name: node.channel.weight[1].out_features for name, node in nodes.items()}
    assert widths == {
        "x1_1": 192, "x2_1": 384, "x3_1": 768, "x1_2": 256, "x2_2": 512, "x1_3": 320
    }  # fmt: skip
    assert hidden == {"x1_1": 12, "x2_1": 24, "x3_1": 48, "x1_2": 16, "x2_2": 32, "x1_3": 20}


def reference_node(node: AttentionNode, skips: list, lower: torch.Tensor, released: bool) -> torch.Tensor:
    """Eqs. (1)-(6) written out with plain functions, evaluation mode."""

    def conv_bn(block, x):
        conv, bn = block.conv, block.adn.N
        x = F.conv2d(x, conv.weight, conv.bias, padding=conv.weight.shape[-1] // 2)
        scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
        return (x - bn.running_mean.view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1) + bn.bias.view(1, -1, 1, 1)

    same, up = conv_bn(node.spatial.same, skips[-1]), conv_bn(node.spatial.lower, lower)
    mixed = F.relu(same + up) if released else F.relu(same) + F.relu(up)
    x_s = (1 + torch.sigmoid(conv_bn(node.spatial.map[0], mixed))) * lower
    x_c = torch.cat([*skips, x_s], 1)
    w_1, w_2 = node.channel.weight[1].weight, node.channel.weight[3].weight
    x_v = torch.sigmoid(F.relu(x_c.mean((2, 3)) @ w_1.T) @ w_2.T)
    gated = x_v[:, :, None, None] * x_c
    twice = conv_bn(node.conv2, F.relu(conv_bn(node.conv1, gated)))
    if released:
        return F.relu(twice + conv_bn(node.shortcut, gated))
    return twice + F.relu(conv_bn(node.shortcut, x_c))


@pytest.mark.parametrize("released", [False, True])
def test_attention_node_follows_the_equations(released):
    torch.manual_seed(3)
    node = AttentionNode(2, 2, 8, 16, 4, released).eval()
    fill(node)
    skips, lower = [torch.randn(2, 8, 6, 6), torch.randn(2, 8, 6, 6)], torch.randn(2, 16, 6, 6)
    with torch.no_grad():
        expected = reference_node(node, skips, lower, released)
        torch.testing.assert_close(node(skips, lower), expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(
            node(skips, lower), reference_node(node, skips, lower, not released), atol=1e-2
        )


def test_variants_share_their_checkpoints_and_not_their_result():
    paper = SCOATNet(channels=(4, 8, 16), reduction=4).eval()
    released = SCOATNet(channels=(4, 8, 16), reduction=4, variant="released").eval()
    fill(paper)
    released.load_state_dict(paper.state_dict())
    image = torch.rand(1, 1, 16, 16)
    assert not torch.allclose(paper(image), released(image), atol=1e-2)


def test_a_head_sees_only_the_nodes_that_feed_it():
    network = SCOATNet(channels=(4, 8, 16, 32, 64), reduction=4, deep_supervision=True).train()
    outputs = network(torch.rand(2, 1, 32, 32))
    for depth, output in zip((4, 3, 2, 1), outputs, strict=True):
        # X(0, j) rests on encoder levels 0 to j and on the nodes of columns 1 to j.
        network.zero_grad(set_to_none=True)
        output.sum().backward(retain_graph=True)
        levels = [block.conv1.conv.weight.grad is not None for block in network.encoder]
        assert levels == [level <= depth for level in range(5)]
        used = {
            name
            for column in network.columns
            for name, node in column.items()
            if next(node.parameters()).grad is not None
        }
        assert used == {f"x{i}_{j}" for j in range(1, depth + 1) for i in range(depth + 1 - j)}


def test_enlargement_keeps_the_corners():
    ramp = torch.tensor([[[[0.0, 3.0], [6.0, 9.0]]]])
    enlarged = SCOATNet(channels=(4, 8), reduction=4).up(ramp)
    torch.testing.assert_close(enlarged[0, 0, 0], torch.tensor([0.0, 1.0, 2.0, 3.0]))
    torch.testing.assert_close(enlarged[0, 0, :, 0], torch.tensor([0.0, 2.0, 4.0, 6.0]))


def test_initialisation():
    torch.manual_seed(0)
    network = SCOATNet()
    conv = network.encoder[4].conv2.conv
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (512 * 9)), rel=0.01)
    norms = torch.cat([m.weight for m in network.modules() if isinstance(m, nn.BatchNorm2d)])
    assert norms.mean().item() == pytest.approx(1, abs=0.002)
    assert norms.std().item() == pytest.approx(0.02, rel=0.05)
    assert all(not p.any() for name, p in network.named_parameters() if name.endswith("bias"))


def test_fewer_levels_show_the_maps_they_have():
    network = SCOATNet(channels=(4, 8, 16, 32), reduction=4)
    assert network.shown_attention_maps == ("x1_1",)
    assert SCOATNet.shown_attention_maps == ("x1_1", "x2_2", "x1_3")
    assert set(network.attention_maps(torch.rand(1, 1, 16, 16))) == {"x1_1", "x2_1", "x1_2"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "papr"}, "papr.*paper, released"),
        ({"channels": (32,)}, "two levels"),
        ({"spatial_dims": 1}, "spatial_dims"),
        ({"channels": (4, 8, 16), "reduction": 1000}, "reduction"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SCOATNet(**arguments)
