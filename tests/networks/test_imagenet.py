# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import pytest
import torch
from monai.networks.nets import resnet50
from torch import nn

from custom.networks import imagenet
from custom.networks.imagenet import load_imagenet_resnet50
from custom.networks.ncovsegnet import ECAResNet50


class Tiny(nn.Module):
    """A backbone with the names of the real one, one block deep: 12 + 8 + 8 + 16 parameters and ECA's 3."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        block = nn.Module()
        block.conv1 = nn.Conv2d(4, 2, 1, bias=False)
        block.conv2 = nn.Conv2d(2, 8, 1, stride=2, bias=False)
        block.eca = nn.Module()
        block.eca.conv = nn.Conv1d(1, 1, 3, bias=False)
        self.layer2 = nn.Sequential(block)


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    return Tiny()


@pytest.fixture
def weights():
    """What a complete file holds."""
    torch.manual_seed(1)
    state = {
        k: torch.randn(v.shape) if v.ndim else v for k, v in Tiny().state_dict().items() if "eca" not in k
    }
    return state | {"fc.weight": torch.zeros(10, 8), "fc.bias": torch.zeros(10)}


def save(weights, path, **metadata):
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch", reason="safetensors is not installed").save_file(
            weights, path, metadata=metadata
        )
    else:
        torch.save(weights, path)
    return path


def test_a_full_file_covers_the_backbone(tmp_path):
    torch.manual_seed(0)
    full = resnet50(
        spatial_dims=2, n_input_channels=3, conv1_t_stride=2, bias_downsample=False, num_classes=9
    )
    path = save(full.state_dict(), tmp_path / "resnet50.pth")
    backbone = ECAResNet50()
    attention = {k: v.clone() for k, v in backbone.state_dict().items() if ".eca." in k}
    report = load_imagenet_resnet50(backbone, path, hashlib.sha256(path.read_bytes()).hexdigest())
    assert report.coverage == report.key_coverage == 1
    assert len(report.loaded) == 318 and report.left_out == ("fc.bias", "fc.weight")
    assert [len(keys) for keys in report.excused.values()] == [16]
    assert not report.missing and not report.unexpected and not report.mismatched
    expected = {k: v for k, v in full.state_dict().items() if not k.startswith("fc.")} | attention
    assert all(torch.equal(value, expected[key]) for key, value in backbone.state_dict().items())
    path.unlink()


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_formats_and_the_report(backbone, weights, tmp_path, suffix):
    before = backbone.layer2[0].eca.conv.weight.clone()
    path = save(weights, tmp_path / f"w{suffix}")
    report = load_imagenet_resnet50(backbone, str(path))
    assert all(torch.equal(v, weights[k]) for k, v in backbone.state_dict().items() if "eca" not in k)
    assert torch.equal(backbone.layer2[0].eca.conv.weight, before)
    assert report.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    plain = report.to_dict()
    assert json.loads(json.dumps(plain)) == plain and plain["coverage"] == 1
    assert plain["excused"] == {
        "channel attention, which ImageNet's ResNet-50 does not have": ["layer2.0.eca.conv.weight"]
    }
    text = report.summary()
    assert "\n" not in text and str(path) in text and report.sha256 in text
    assert "cover 100.0% of the backbone's parameters and 100.0% of its keys" in text
    assert "left out: fc.bias, fc.weight, the classifier" in text


def test_files_without_counters_are_complete(backbone, weights, tmp_path):
    del weights["bn1.num_batches_tracked"]
    report = load_imagenet_resnet50(backbone, save(weights, tmp_path / "w.pth"))
    assert report.coverage == report.key_coverage == 1 and not report.missing
    assert ("bn1.num_batches_tracked",) in report.excused.values()


def change(weights, how):
    if how == "missing":
        del weights["layer2.0.conv2.weight"]
    elif how == "unexpected":
        weights["layer5.weight"] = torch.zeros(1)
    elif how == "shape":
        weights["conv1.weight"] = torch.zeros(4, 1, 1, 1)
    return weights


@pytest.mark.parametrize(
    ("how", "message", "coverage"),
    [
        ("missing", "missing layer2.0.conv2.weight; partial=True", 28 / 44),
        ("unexpected", "unexpected layer5.weight; partial=True", 1),
        ("shape", r"of another shape conv1.weight \(\(4, 1, 1, 1\) in the file, \(4, 3, 1, 1\) in", 32 / 44),
    ],
)
def test_differences_are_refused_unless_partial(backbone, weights, tmp_path, how, message, coverage):
    path = save(change(weights, how), tmp_path / "w.pth")
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    with pytest.raises(ValueError, match=message) as error:
        load_imagenet_resnet50(backbone, path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())
    report = load_imagenet_resnet50(backbone, path, partial=True)
    assert report.coverage == pytest.approx(coverage)
    assert (
        bool(report.missing) == (how == "missing")
        and f"{how.replace('shape', 'mismatched')}: " in report.summary()
    )
    assert torch.equal(backbone.bn1.weight, weights["bn1.weight"])


def test_wrong_hashes_are_refused(backbone, weights, tmp_path):
    path = save(weights, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="SHA-256 is .*, not 0000"):
        load_imagenet_resnet50(backbone, path, sha256="0" * 64)
    with pytest.raises(ValueError, match="64 hexadecimal digits, got 'abc'"):
        load_imagenet_resnet50(backbone, path, sha256="abc")


class Code:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "ran")


def test_a_pickle_with_code_is_refused_and_not_run(backbone, tmp_path):
    torch.save({"conv1.weight": Code(tmp_path / "trace")}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="it holds more than tensors"):
        load_imagenet_resnet50(backbone, tmp_path / "w.pth")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.pth", b"no weights", "or is no file of torch's"),
        ("w.pth", b"", "not a file of torch's, or a damaged one"),
        ("w.safetensors", b"no weights at all", "not a safetensors file, or a damaged one"),
        ("w.h5", b"x", "'.h5' is not .pth, .pt or .safetensors"),
    ],
)
def test_damaged_and_foreign_files(backbone, tmp_path, name, content, message):
    if name.endswith(".safetensors"):
        pytest.importorskip("safetensors", reason="safetensors is not installed")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_imagenet_resnet50(backbone, tmp_path / name)
    assert "\n" not in str(error.value)


def test_other_things_than_finite_tensors_by_name(backbone, weights, tmp_path):
    with pytest.raises(ValueError, match="it is no bare state_dict"):
        load_imagenet_resnet50(backbone, save({"state_dict": weights}, tmp_path / "w.pth"))
    with pytest.raises(ValueError, match="none of its tensors fits"):
        load_imagenet_resnet50(backbone, save({"a": torch.ones(1)}, tmp_path / "w.pth"), partial=True)
    weights["bn1.bias"][0] = float("nan")
    with pytest.raises(ValueError, match="values that are not finite in bn1.bias"):
        load_imagenet_resnet50(backbone, save(weights, tmp_path / "w.pth"))
    with pytest.raises(FileNotFoundError, match="none.pth not found"):
        load_imagenet_resnet50(backbone, tmp_path / "none.pth")


def test_without_safetensors_it_says_how_to_get_it(backbone, weights, tmp_path, monkeypatch):
    path = save(weights, tmp_path / "w.safetensors")
    monkeypatch.setattr(imagenet, "has_safetensors", False)
    with pytest.raises(ValueError, match="pip install safetensors"):
        load_imagenet_resnet50(backbone, path)


def test_a_download_needs_a_hash_and_is_kept(backbone, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    path = save(weights, tmp_path / "w.pth")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="give the file's sha256; nothing is downloaded without one"):
        load_imagenet_resnet50(backbone, path.as_uri())
    with pytest.raises(ValueError, match="invalid hash value"):
        load_imagenet_resnet50(backbone, path.as_uri(), sha256="1" * 64)
    assert not list((tmp_path / "hub").rglob("*.pth*"))
    report = load_imagenet_resnet50(backbone, path.as_uri(), sha256=digest)
    assert report.coverage == 1 and report.source == path.as_uri()
    (kept,) = (tmp_path / "hub").rglob("*.pth")
    kept.write_bytes(b"damaged since")
    assert load_imagenet_resnet50(backbone, path.as_uri(), sha256=digest).coverage == 1
    path.unlink()
    assert load_imagenet_resnet50(backbone, path.as_uri(), sha256=digest).coverage == 1


@pytest.mark.parametrize(
    ("header", "said", "flag", "warning"),
    [
        ("ResNet50 (stride in 1x1)", True, None, "build it with stride_in_conv1=True"),
        ("stride in conv2", False, None, ""),
        ("unknown", None, None, "neither the file nor the caller says"),
        ("unknown", True, True, "build it with stride_in_conv1=True"),
        ("unknown", False, False, ""),
    ],
)
def test_the_place_of_the_stride_is_checked(backbone, weights, tmp_path, caplog, header, said, flag, warning):
    path = save(weights, tmp_path / "w.safetensors", source=header)
    with caplog.at_level(logging.WARNING):
        report = load_imagenet_resnet50(backbone, path, stride_in_conv1=flag)
    assert (report.file_stride_in_conv1, report.backbone_stride_in_conv1) == (said, False)
    assert warning in report.stride_warning and bool(report.stride_warning) == bool(warning)
    assert report.stride_warning in report.summary() and bool(caplog.records) == bool(warning)


def test_a_caller_who_contradicts_the_file_is_told(backbone, weights, tmp_path):
    path = save(weights, tmp_path / "w.safetensors", source="stride in 1x1")
    with pytest.raises(ValueError, match="the file's header has the stride in the first convolution"):
        load_imagenet_resnet50(backbone, path, stride_in_conv1=False)


def test_genuine_weights(ct_data):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    path = ct_data / "weights" / "resnet50_imagenet_partial.safetensors"
    features, reports = {}, {}
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for place in (True, False):
        torch.manual_seed(0)
        backbone = ECAResNet50(stride_in_conv1=place).eval()
        with pytest.raises(ValueError, match="missing layer4.0.conv2.weight, .* and 42 more"):
            load_imagenet_resnet50(backbone, path)
        reports[place] = load_imagenet_resnet50(backbone, path, partial=True)
        with torch.no_grad():
            features[place] = backbone(image)
    assert reports[True].stride_warning == "" and "stride_in_conv1=True" in reports[False].stride_warning
    for report in reports.values():
        assert report.file_stride_in_conv1 is True and not report.unexpected and not report.mismatched
        assert {key.split(".")[0] for key in report.missing} == {"layer4"}
        assert len(report.loaded) == 264 and report.key_coverage == pytest.approx(264 / 309)
        assert report.coverage == pytest.approx(0.386, abs=1e-3)
    # Up to the first stride both are the same; behind it they are not.
    assert torch.equal(features[True][0], features[False][0])
    for one, other in zip(features[True][1:3], features[False][1:3], strict=True):
        assert (one - other).abs().mean() > 0.1 * one.abs().mean()
