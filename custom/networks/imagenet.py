# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""ImageNet weights for the ResNet-50 backbone, with a strict account of what was loaded."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from monai.utils import optional_import
from torch import nn

from custom.data.files import file_sha256

__all__ = ["ImageNetReport", "load_imagenet_resnet50"]

logger = logging.getLogger(__name__)
load_safetensors, has_safetensors = optional_import("safetensors.torch", name="load")

_CLASSIFIER = "fc."
#: Keys of the backbone that a complete file may lack, and why.
_EXCUSED = {
    re.compile(r"\.eca\.conv\.weight$"): "channel attention, which ImageNet's ResNet-50 does not have",
    re.compile(r"\.num_batches_tracked$"): "counters without influence, which older files do not have",
}
_HEADER_SAYS = {True: re.compile(r"stride in (1x1|conv1)"), False: re.compile(r"stride in (3x3|conv2)")}
_WHERE = {
    True: "the first convolution (1x1, ResNet v1)",
    False: "the second convolution (3x3, as torchvision)",
}


@dataclass(frozen=True)
class ImageNetReport:
    """What was loaded from where, and what was not.

    Args:
        source: the file or URL.
        sha256: of the file.
        loaded: keys that were loaded.
        excused: keys of the backbone that the file lacks by nature, by reason; they keep their values.
        left_out: keys of the file's classifier, which the backbone does not have.
        missing: further keys of the backbone that are not in the file; they keep their values.
        unexpected: further keys of the file that are not in the backbone.
        mismatched: keys whose shapes differ; they keep their values.
        key_coverage: part of the backbone's keys that were loaded, those in ``excused`` not counted.
        coverage: part of the backbone's parameters that were loaded, those in ``excused`` not counted.
        file_stride_in_conv1: whether the weights were trained with the stride of down-sampling bottlenecks in
            their first convolution; None where neither the file's header nor the caller says.
        backbone_stride_in_conv1: whether the backbone has it there.
    """

    source: str
    sha256: str
    loaded: tuple[str, ...]
    excused: dict[str, tuple[str, ...]]
    left_out: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]
    key_coverage: float
    coverage: float
    file_stride_in_conv1: bool | None
    backbone_stride_in_conv1: bool

    @property
    def stride_warning(self) -> str:
        """What is wrong with the place of the stride, or ""."""
        trained, built = self.file_stride_in_conv1, self.backbone_stride_in_conv1
        if trained is None:
            return (
                "neither the file nor the caller says where the weights have their stride; "
                f"the backbone has it in {_WHERE[built]}"
            )
        if trained != built:
            return (
                f"the weights were trained with the stride in {_WHERE[trained]}, and the backbone has it in "
                f"{_WHERE[not trained]}: build it with stride_in_conv1={trained}"
            )
        return ""

    def summary(self) -> str:
        """One paragraph for people."""
        sentences = [
            f"{len(self.loaded)} tensors from {self.source} (SHA-256 {self.sha256}) cover "
            f"{self.coverage:.1%} of the backbone's parameters and {self.key_coverage:.1%} of its keys",
            *(f"not in the file: {len(keys)} keys, {why}" for why, keys in self.excused.items()),
        ]
        if self.left_out:
            sentences.append(f"left out: {', '.join(self.left_out)}, the classifier")
        for name in ("missing", "mismatched", "unexpected"):
            if keys := getattr(self, name):
                sentences.append(f"{name}: {_few(keys)}")
        if self.stride_warning:
            sentences.append(f"attention: {self.stride_warning}")
        return "; ".join(sentences) + "."

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain values for JSON."""
        plain = json.loads(json.dumps(asdict(self)))
        return plain | {"stride_warning": self.stride_warning}


def load_imagenet_resnet50(
    backbone: nn.Module,
    source: str | os.PathLike,
    sha256: str | None = None,
    partial: bool = False,
    stride_in_conv1: bool | None = None,
) -> ImageNetReport:
    """Load ImageNet weights, under torchvision's names for ``resnet50``, into the backbone.

    The backbone is changed only when everything is right. Its ECA weights have no counterpart and keep their
    values; the file's classifier (``fc.*``) is left out. No other difference is accepted without ``partial``.

    ResNet v1 (Keras, Caffe) has the same shapes as torchvision's and its stride elsewhere, see
    :class:`custom.networks.ncovsegnet.ECAResNet50`. Where a safetensors file's header says "stride in 1x1"
    (or "3x3"), the report compares it with the backbone, and a difference is logged as a warning.

    Args:
        backbone: :class:`custom.networks.ncovsegnet.ECAResNet50`, or another network with its names.
        source: a .pth, .pt or .safetensors file, or the URL of one, which is downloaded once into torch.hub's
            folder.
        sha256: expected SHA-256 of the file; needed for a URL.
        partial: load what fits even if keys are missing, unexpected or of another shape.
        stride_in_conv1: where the weights were trained with their stride, if the file does not say.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: In one line, when the hash is another, the file is not what its suffix says, holds more
            than tensors (a pickle with code is never run), has values that are not finite, lacks or adds
            keys, or has other shapes; when safetensors is needed and not installed; or when
            ``stride_in_conv1`` contradicts the file.
        OSError: When a download fails.

    Reference:
        Deng et al., ImageNet: a large-scale hierarchical image database, CVPR 2009; He et al., Deep residual
        learning for image recognition, CVPR 2016.
    """
    content, digest = _read(os.fspath(source), sha256)
    name = os.fspath(source)
    try:
        weights, header = _parse(name, content)
        said = _stride_in_header(header)
        if stride_in_conv1 is not None and said is not None and stride_in_conv1 != said:
            raise ValueError(
                f"the file's header has the stride in {_WHERE[said]}, the caller in {_WHERE[not said]}"
            )
        target = backbone.state_dict()
        excused = {
            why: tuple(k for k in target if pattern.search(k) and k not in weights)
            for pattern, why in _EXCUSED.items()
        }
        excused = {why: keys for why, keys in excused.items() if keys}
        expected = set(target).difference(*excused.values())
        left_out = tuple(sorted(k for k in weights if k.startswith(_CLASSIFIER) and k not in target))
        unexpected = tuple(sorted(k for k in weights if k not in target and k not in left_out))
        missing = tuple(k for k in target if k in expected and k not in weights)
        mismatched = tuple(k for k in target if k in weights and weights[k].shape != target[k].shape)
        loaded = tuple(k for k in target if k in weights and k not in mismatched)
        if not partial:
            _refuse_differences(missing, unexpected, mismatched, weights, target)
        if not loaded:
            raise ValueError("none of its tensors fits the backbone")
        if wrong := [k for k in loaded if not torch.isfinite(weights[k]).all()]:
            raise ValueError(f"values that are not finite in {_few(wrong)}")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    backbone.load_state_dict(target | {key: weights[key] for key in loaded})
    sizes = {key: p.numel() for key, p in backbone.named_parameters() if key in expected}
    report = ImageNetReport(
        source=name,
        sha256=digest,
        loaded=loaded,
        excused=excused,
        left_out=left_out,
        missing=missing,
        unexpected=unexpected,
        mismatched=mismatched,
        key_coverage=len(loaded) / len(expected),
        coverage=sum(sizes.get(key, 0) for key in loaded) / sum(sizes.values()),
        file_stride_in_conv1=said if stride_in_conv1 is None else stride_in_conv1,
        backbone_stride_in_conv1=backbone.get_submodule("layer2.0.conv1").stride[0] == 2,  # type: ignore
    )
    if report.stride_warning:
        logger.warning("%s: %s", name, report.stride_warning)
    return report


def _read(source: str, sha256: str | None) -> tuple[bytes, str]:
    """The file's bytes and their SHA-256; what is checked is what is loaded."""
    expected = None if sha256 is None else sha256.strip().lower()
    if expected is not None and not re.fullmatch(r"[0-9a-f]{64}", expected):
        raise ValueError(f"sha256 must be 64 hexadecimal digits, got '{sha256}'")
    path = _download(source, expected) if "://" in source else Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"weights {path} not found")
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if expected not in (None, digest):
        raise ValueError(f"{path}: SHA-256 is {digest}, not {expected}; it is another file, or a damaged one")
    return content, digest


def _download(url: str, sha256: str | None) -> Path:
    if sha256 is None:
        raise ValueError(f"{url}: give the file's sha256; nothing is downloaded without one")
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"{sha256[:16]}-{Path(urlparse(url).path).name}"
    if not path.is_file() or file_sha256(path) != sha256:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
        except RuntimeError as error:  # its word for a wrong hash
            raise ValueError(f"{url}: {error}; nothing was kept") from None
    return path


def _parse(name: str, content: bytes) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors by name, and the header's remarks."""
    suffix = Path(urlparse(name).path if "://" in name else name).suffix.lower()
    header: dict[str, str] = {}
    if suffix == ".safetensors":
        if not has_safetensors:
            raise ValueError("reading it needs safetensors, which is not installed: pip install safetensors")
        try:
            weights = load_safetensors(content)
        except Exception as error:  # the library's own class, which is not there without the library
            raise ValueError(f"not a safetensors file, or a damaged one: {error}") from None
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length]).get("__metadata__") or {}
    elif suffix in (".pth", ".pt"):
        try:
            weights = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            raise ValueError(
                "it holds more than tensors, or is no file of torch's; such a file could run code and is not "
                "loaded: save the bare state_dict"
            ) from None
        except (RuntimeError, EOFError, ValueError, KeyError, IndexError) as error:
            why = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"not a file of torch's, or a damaged one: {why}") from None
    else:
        raise ValueError(f"'{suffix}' is not .pth, .pt or .safetensors")
    if not isinstance(weights, Mapping) or not all(isinstance(v, torch.Tensor) for v in weights.values()):
        raise ValueError("it is no bare state_dict: names with tensors")
    return dict(weights), header


def _stride_in_header(header: Mapping[str, str]) -> bool | None:
    text = " ".join(map(str, header.values())).lower()
    found = {answer for answer, pattern in _HEADER_SAYS.items() if pattern.search(text)}
    return found.pop() if len(found) == 1 else None


def _refuse_differences(missing, unexpected, mismatched, weights, target) -> None:
    faults = []
    if missing:
        faults.append(f"missing {_few(missing)}")
    if unexpected:
        faults.append(f"unexpected {_few(unexpected)}")
    if mismatched:
        key = mismatched[0]
        faults.append(
            f"of another shape {_few(mismatched)} ({tuple(weights[key].shape)} in the file, "
            f"{tuple(target[key].shape)} in the backbone)"
        )
    if faults:
        raise ValueError(f"{'; '.join(faults)}; partial=True loads the rest all the same")


def _few(keys) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(keys[:3]) + more
