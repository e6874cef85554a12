# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Weights in half precision: what is written, and that whatever loads them computes in float32."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser

from custom.bundle import WeightsLoader, prepare_network
from custom.bundle.half import export_half, to_half
from custom.bundle.network_check import check_values
from custom.bundle.settings import read_settings, write_settings
from custom.data.files import file_sha256
from custom.deployment.label_bundle import check_weights
from custom.inferers import BackendSliceInferer
from custom.networks import DilatedAttentionUNet, SCOATNet

ROOT = Path(__file__).resolve().parent.parent.parent
SETTINGS = {"hu_window": [-1100, 300], "channels": [8, 8, 8]}


def script():
    spec = importlib.util.spec_from_file_location("export_weights", ROOT / "scripts" / "export_weights.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rounding_and_refusals():
    weights = {
        "a": torch.tensor([[1.0, 1 / 3, 6e-8]]),
        "n": torch.tensor(70_000),
        "d": torch.ones(1, 1).double(),
    }
    half = to_half(weights)
    assert half["a"].dtype == half["d"].dtype == torch.float16
    assert half["a"][0].tolist() == pytest.approx([1, 1365 / 4096, 2**-24]), "1/3 rounds to 1365 * 2**-12"
    assert half["n"].dtype == torch.int64 and half["n"] == 70_000
    assert to_half(half)["a"].data_ptr() != half["a"].data_ptr() and to_half(half)["a"].equal(half["a"])
    with pytest.raises(ValueError, match=r"'w' has values up to 65520, beyond 65504"):
        to_half({"w": torch.tensor([[-65520.0]])})
    for wrong in (torch.nan, torch.inf):
        for shape in ((2,), (1, 2)):
            with pytest.raises(ValueError, match="'w' has values that are not finite"):
                to_half({"w": torch.tensor([1.0, wrong]).reshape(shape)})


def test_variances_keep_their_precision():
    """The first variance of a ResNet-50 that was trained on ImageNet may be 119,718."""
    variance = torch.tensor([119_718.0, 1e-9])
    kept = to_half({"running_var": variance})["running_var"]
    assert kept.dtype == torch.float32 and torch.equal(kept, variance)


def test_the_command_writes_equal_bytes_and_takes_the_settings_with_it(tmp_path, capsys):
    export_weights = script()
    source = tmp_path / "trained" / "model.pt"
    source.parent.mkdir()
    torch.save(SCOATNet(channels=(8, 8, 8)).state_dict(), source)
    write_settings(source, SETTINGS)
    hashes = set()
    for place in ("a", "b"):
        output = tmp_path / place / "models" / "model.pt"
        assert export_weights.main([str(source), "--output", str(output)]) == 0
        hashes.add(file_sha256(output))
        assert read_settings(output) == SETTINGS
    printed = capsys.readouterr().out
    (digest,) = hashes
    assert digest in printed and "hu_window [-1100, 300]" in printed
    assert f"{output.stat().st_size:,} bytes (before: {source.stat().st_size:,})" in printed
    assert list(check_values(output)) == []
    export_half(output, output)  # in place, and what is half already stays
    assert file_sha256(output) == digest and read_settings(output) == SETTINGS

    source.with_suffix(".json").unlink()
    assert export_weights.main([str(source), "--output", str(output)]) == 2
    assert "belongs to other weights" in capsys.readouterr().err and file_sha256(output) == digest
    assert export_weights.main([str(tmp_path / "none.pt"), "--output", str(output)]) == 2
    torch.save({"w": torch.tensor([[1e6]])}, tmp_path / "big.pt")
    assert export_weights.main([str(tmp_path / "big.pt"), "--output", str(tmp_path / "c.pt")]) == 2
    assert "big.pt: 'w' has values up to 1e+06" in capsys.readouterr().err
    assert not (tmp_path / "c.pt").exists()


def lively(network: torch.nn.Module) -> torch.nn.Module:
    """A network with the statistics that batch normalisation has after a training."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(3):
            network.train()(torch.rand(2, 1, 64, 64, generator=generator))
    return network.eval()


def smooth(seed: int) -> torch.Tensor:
    noise = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(noise, (64, 64), mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SCOATNet(channels=(8, 8, 16), reduction=4),
        lambda: DilatedAttentionUNet(channels=(8, 8, 16), deep_supervision_levels=2),
    ],
    ids=["SCOATNet", "DilatedAttentionUNet"],
)
def test_every_loader_gives_float32_and_the_same_masks(make, tmp_path):
    torch.manual_seed(3)
    whole = lively(make())
    torch.save(whole.state_dict(), tmp_path / "model.pt")
    half = export_half(tmp_path / "model.pt", tmp_path / "half.pt")
    first, second = make(), make()
    WeightsLoader(str(half), {"model": first})(type("Engine", (), {"state": _State()})())
    prepare_network(second, pretrained=half)
    stored = torch.load(half, weights_only=True)
    for network in (first, second):
        for key, value in network.state_dict().items():
            assert value.dtype == whole.state_dict()[key].dtype, key
            assert torch.equal(value, stored[key].to(value.dtype)), key
    image = smooth(1)
    with torch.no_grad():
        inferer = BackendSliceInferer()
        exact, rounded = inferer(image, whole), inferer(image, first.eval())
    assert rounded.dtype == torch.float32
    # Around its own middle, so that there is a mask to compare whatever the random weights say.
    middle = exact.median()
    masks = exact > middle, rounded > middle
    agree = 2 * (masks[0] & masks[1]).sum() / (masks[0].sum() + masks[1].sum())
    assert agree > 0.99 and 0.3 < masks[0].float().mean() < 0.7
    assert (exact - rounded).abs().max() < 0.02 * (exact.max() - exact.min())


class _State:
    epoch, max_epochs = 0, 1


def test_monai_label_takes_them(tmp_path):
    parser = ConfigParser()
    parser.read_config(ROOT / "bundles" / "covid_ct_scoatnet_segmentation" / "configs" / "inference.json")
    parser["channels"] = [8] * 5
    torch.save(to_half(parser.get_parsed_content("network_def").state_dict()), tmp_path / "model.pt")
    config = parser.get()
    check_weights({"network_def": config["network_def"], "channels": [8] * 5}, tmp_path / "model.pt")
