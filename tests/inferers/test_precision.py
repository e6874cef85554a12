# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from custom.inferers import Bfloat16Inferer
from custom.inferers.precision import _has_bfloat16


class Heads(nn.Module):
    """Tells in which type it worked and gives its output in the shape that is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 2, 3, padding=1)
        self.seen = None

    def forward(self, x, shape="tensor"):
        y = self.layer(x)
        self.seen = y.dtype
        return {"tensor": y, "list": [y, y], "dict": {"pred": y}}[shape]


@pytest.fixture
def processor(monkeypatch):
    """Say what the processor has; bfloat16 itself is computed on any, if slowly."""

    def have(**capabilities) -> None:
        _has_bfloat16.cache_clear()
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)

    yield have
    _has_bfloat16.cache_clear()


def test_network_works_in_bfloat16_and_the_loss_in_float32(processor):
    processor(architecture="x86_64", avx512_bf16=True, amx_bf16=False)
    torch.manual_seed(0)
    network, x = Heads(), torch.randn(2, 1, 8, 8)
    output = Bfloat16Inferer()(x, network)
    assert network.seen is torch.bfloat16
    assert network.layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert output.dtype is torch.float32
    exact = network(x)
    assert network.seen is torch.float32, "nothing stays switched on"
    assert not torch.equal(output, exact)
    torch.testing.assert_close(output, exact, atol=0.02, rtol=0.02)
    output.mean().backward()
    assert network.layer.weight.grad.dtype is torch.float32


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"architecture": "aarch64"}, torch.bfloat16),
        ({}, torch.bfloat16),
    ],
)
def test_an_x86_processor_without_bfloat16_works_in_float32(processor, caplog, capabilities, dtype):
    processor(**capabilities)
    network, x = Heads(), torch.randn(2, 1, 8, 8)
    with caplog.at_level("INFO"):
        outputs = [Bfloat16Inferer()(x, network) for _ in range(2)]
    assert network.seen is dtype
    assert caplog.text.count("float32") == (dtype is torch.float32), "said once"
    if dtype is torch.float32:
        assert torch.equal(outputs[0], network(x))


def test_networks_with_instance_normalisation_keep_the_usual_layout():
    network, seen = nn.Sequential(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4)), []
    network[1].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].is_contiguous()))
    Bfloat16Inferer()(torch.randn(2, 2, 8, 8), network)
    assert seen == [True] and network[0].weight.is_contiguous()


def test_outputs_of_deep_supervision_keep_their_form():
    network, x = Heads(), torch.randn(1, 1, 8, 8)
    heads = Bfloat16Inferer()(x, network, shape="list")
    assert isinstance(heads, list) and all(head.dtype is torch.float32 for head in heads)
    assert Bfloat16Inferer()(x, network, shape="dict")["pred"].dtype is torch.float32
