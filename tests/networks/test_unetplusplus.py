# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from network_tester import NetworkTester, fill
from torch.nn import functional as F

from custom.networks import SCOATNet, UNetPlusPlus
from custom.networks.unetplusplus import GatedNode


def parameters(**arguments) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in UNetPlusPlus(**arguments).parameters())


class TestUNetPlusPlus(NetworkTester):
    network = UNetPlusPlus
    small = {"channels": (4, 8, 16, 32, 64), "attention_gates": True}
    variants = ({"attention_gates": False},)
    spatial_dims = (2, 3)
    outputs = 4
    supervised = {"deep_supervision": True}
    maps = {"x1_1": 2, "x2_1": 4, "x3_1": 8, "x1_2": 2, "x2_2": 4, "x1_3": 2}
    test_logits_are_the_stored_ones = None  # logits are computed independently below


def test_parameters_of_table_3():
    assert parameters(in_channels=3) == 9_163_585
    assert parameters(in_channels=3, deep_supervision=True) == 9_164_452
    # The gates by hand: W_g, W_x and psi with biases, and three batch normalisations.
    gates = 0
    for channels, lower, nodes in ((64, 128, 3), (128, 256, 2), (256, 512, 1)):
        convolutions = lower * lower + lower + channels * lower + lower + lower + 1
        gates += nodes * (convolutions + 2 * (lower + lower + 1))
    assert parameters(in_channels=3, attention_gates=True) == 9_163_585 + gates == 9_837_011
    assert parameters() == 9_163_009 and parameters(attention_gates=True) == 9_836_435


@pytest.mark.parametrize(("attention_gates", "printed"), [(False, 35.02), (True, 37.63)])
def test_table_3_prints_the_size_of_the_weights_file(attention_gates, printed):
    with torch.device("meta"):
        state = UNetPlusPlus(in_channels=3, attention_gates=attention_gates).state_dict()
    # Its "M" are MiB of a file, with some KiB of names and headers.
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values()) / 2**20
    assert size == pytest.approx(printed, rel=2e-3)


def conv_bn(conv, bn, x: torch.Tensor) -> torch.Tensor:
    """Convolution and batch normalisation in evaluation mode, in plain functions."""
    x = F.conv2d(x, conv.weight, conv.bias, padding=conv.weight.shape[-1] // 2)
    scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    return (x - bn.running_mean.view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1) + bn.bias.view(1, -1, 1, 1)


def reference_gate(gate, lower: torch.Tensor, skip: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mixed = F.relu(
        conv_bn(gate.W_g[0].conv, gate.W_g[1], lower) + conv_bn(gate.W_x[0].conv, gate.W_x[1], skip)
    )
    m = torch.sigmoid(conv_bn(gate.psi[0].conv, gate.psi[1], mixed))
    return m, m * skip


def reference(network: UNetPlusPlus, image: torch.Tensor, gates: bool) -> torch.Tensor:
    """Nodes X(i, j) written out."""

    def block(unit, x):
        for part in unit:
            x = F.relu(conv_bn(part.conv, part.adn.N, x))
        return x

    depth = len(network.encoder)
    x = {}
    for i in range(depth):
        x[i, 0] = block(network.encoder[i], image if i == 0 else F.max_pool2d(x[i - 1, 0], 2))
    for j in range(1, depth):
        for i in range(depth - j):
            node = network.columns[j - 1][f"x{i}_{j}"]
            lower = F.interpolate(x[i + 1, j - 1], scale_factor=2, mode="bilinear", align_corners=True)
            row = [x[i, k] for k in range(j)]
            if gates and i > 0:
                row[-1] = reference_gate(node.gate, lower, row[-1])[1]
            x[i, j] = block(node.block, torch.cat([*row, lower], 1))
    return F.conv2d(x[0, depth - 1], network.head.weight, network.head.bias, padding=1)


@pytest.mark.parametrize("gates", [False, True])
def test_network_is_the_graph_written_out(gates):
    network = UNetPlusPlus(channels=(4, 8, 16, 32), attention_gates=gates).eval()
    fill(network)
    image = torch.rand(2, 1, 16, 24, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = reference(network, image, gates)
        torch.testing.assert_close(network(image), expected, rtol=1e-4, atol=1e-5)
        assert expected.std() > 0.01


def test_gate_follows_its_equation():
    torch.manual_seed(3)
    node = GatedNode(2, 2, 8, 16).eval()
    fill(node)
    skips, lower = [torch.randn(2, 8, 6, 6), torch.randn(2, 8, 6, 6)], torch.randn(2, 16, 6, 6)
    with torch.no_grad():
        m, gated = reference_gate(node.gate, lower, skips[-1])
        torch.testing.assert_close(node.gate(lower, skips[-1]), gated, rtol=1e-5, atol=1e-6)
        assert m.shape == (2, 1, 6, 6) and m.max() - m.min() > 0.1
        # A shut gate takes away the last skip alone.
        node.gate.psi[1].bias.fill_(-1e4)
        without = node.block(torch.cat([skips[0], torch.zeros_like(skips[1]), lower], 1))
        torch.testing.assert_close(node(skips, lower), without)


def test_gates_are_named_as_scoatnets_maps():
    small = {"channels": (4, 8, 16, 32, 64)}
    gated = UNetPlusPlus(attention_gates=True, **small)
    scoatnet = SCOATNet(reduction=4, **small)
    assert list(gated.attention_map_modules()) == list(scoatnet.attention_map_modules())
    assert gated.shown_attention_maps == scoatnet.shown_attention_maps


def test_without_gates_there_are_no_maps():
    network = UNetPlusPlus(channels=(4, 8, 16))
    assert network.shown_attention_maps == ()
    assert network.attention_maps(torch.rand(1, 1, 16, 16)) == {}
    with pytest.raises(ValueError, match="without attention"):
        network.attention_maps(torch.rand(1, 1, 16, 16), ["x1_1"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"channels": (32,)}, "UNetPlusPlus needs at least two levels"), ({"spatial_dims": 1}, "spatial_dims")],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        UNetPlusPlus(**arguments)
