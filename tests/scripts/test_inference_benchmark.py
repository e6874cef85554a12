# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""The gate and the table of benchmarks/inference_backends.py, on masks that are made up."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "inference_backends.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("inference_backends", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Pipeline:
    """An "inferer" is the number of voxels that its mask has, or an error."""

    def prepare(self) -> float:
        return 1.0

    def run(self, inferer):
        if isinstance(inferer, Exception):
            raise inferer
        mask = torch.zeros(10000, dtype=torch.bool)
        mask[:inferer] = True
        return 2.0, 3.0, mask


def test_a_backend_below_the_gate_or_with_an_error_gets_no_times(benchmark):
    inferers = {"torch": 1000, "onnx": 1001, "bf16": 1003, "compile": RuntimeError("no\ncompiler")}
    torch_row, onnx, bf16, compiled = benchmark.compare(Pipeline(), inferers, 2)
    assert torch_row[:6] == ["torch", "1.00000", "2.00", "1.00", "6.00", "1.00"]
    assert onnx[:6] == ["onnx", "0.99950", "2.00", "1.00", "6.00", "1.00"]  # 2 x 1000 / 2001
    assert bf16 == ["bf16", "0.99850", "failed: below 0.999", *[""] * 5]  # 2 x 1000 / 2003
    assert compiled == ["compile", "-", "failed: no compiler", *[""] * 5]
    assert len(torch_row) + 2 == len(benchmark.HEADER), "bundle and scan stand before it"


@pytest.mark.parametrize("voxels", [0, 6000])
def test_masks_that_show_nothing_pass_no_gate(benchmark, voxels):
    rows = benchmark.compare(Pipeline(), {"torch": voxels, "onnx": voxels}, 1)
    assert [row[0] for row in rows] == ["torch", "onnx"]
    assert all("of the scan is in the mask, which shows nothing" in row[2] for row in rows)


def test_without_eager_torch_there_is_nothing_to_compare_with(benchmark):
    with pytest.raises(RuntimeError, match="broken"):
        benchmark.compare(Pipeline(), {"torch": RuntimeError("broken"), "onnx": 10}, 1)


def test_the_network_has_the_width_and_size_of_the_weights(benchmark):
    bundle = benchmark.ROOT / "bundles" / "covid_ct_attention_unet_segmentation"
    weights = bundle / "models" / "model.pt"
    _, network, size = benchmark.read_bundle(bundle, weights, None)
    assert (network.channels[0], size) == (16, [256, 256])
    assert benchmark.read_bundle(bundle, weights, 64)[2] == [64, 64]
    other = bundle.with_name("covid_ct_scoatnet_segmentation")
    with pytest.raises(ValueError, match="does not hold weights of covid_ct_scoatnet_segmentation"):
        benchmark.read_bundle(other, weights, None)


def test_the_table_is_written_and_given_back(benchmark, tmp_path):
    rows = [["a_bundle", "a_scan", *benchmark.compare(Pipeline(), {"torch": 1000}, 1)[0]]]
    text = benchmark.write_table(tmp_path / "table.md", rows, ["a machine"])
    assert (tmp_path / "table.md").read_text() == text + "\n"
    head, rule, row = text.splitlines()[-3:]
    assert head.count("|") == rule.count("|") == row.count("|") and "a_bundle | a_scan | torch" in row
