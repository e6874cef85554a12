# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""From a network's logits back to a mask on the scan's own grid, in the memory of a mask."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from copy import deepcopy
from typing import Any, cast

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Compose, InvertibleTransform, MapTransform, Resize, Resized
from monai.transforms.utils import allow_missing_keys_mode
from monai.utils import TraceKeys

__all__ = ["InvertToMaskD", "InvertToMaskDict", "InvertToMaskd", "check_threshold"]

_STEP = 16  # slices at a time
_WITHOUT_INTERPOLATION = {"Crop", "Flip", "Orientation", "Pad", "SpatialCrop", "SpatialPad"}


def check_threshold(threshold: float) -> float:
    """A probability from which on a voxel is in the mask.

    Args:
        threshold: above 0 and below 1: with others every mask is full or empty.

    Raises:
        ValueError: When it is something else.
    """
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 < threshold < 1:
        raise ValueError(f"threshold must be a probability above 0 and below 1, got {threshold!r}")
    return threshold


class InvertToMaskd(MapTransform):
    """Makes a mask of logits: sigmoid, the inverse of every spatial step of preprocessing, threshold.

    The mask is voxel for voxel what ``Activationsd(sigmoid=True)``, ``Invertd(nearest_interp=False)`` and
    ``AsDiscreted(threshold=...)`` make of the same logits, one after the other. These hold several volumes of
    float32 at a time, of which each is a gigabyte for a thousand slices of 512x512. Here, where preprocessing
    resized the slices as its last step and only turned and cropped the scan before, slices are resized and
    thresholded a few at a time, and what is turned and padded is a byte a voxel.

    Args:
        keys: the logits.
        transform: what preprocessed the image.
        orig_keys: the image, which bears the trace of preprocessing.
        threshold: probability from which on a voxel is in the mask.
        allow_missing_keys: whether missing logits are passed over.

    Raises:
        ValueError: When the threshold is no probability.
    """

    def __init__(
        self,
        keys: KeysCollection,
        transform: Compose,
        orig_keys: str = "image",
        threshold: float = 0.5,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.transform = transform
        self.orig_keys = orig_keys
        self.threshold = check_threshold(threshold)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """
        Args:
            data: holds the image and logits of its size, (K, H, W) or (K, H, W, D).

        Returns:
            The item with masks in place of the logits, uint8 on the scan's grid.
        """
        d = dict(data)
        image: MetaTensor = d[self.orig_keys]
        for key in self.key_iterator(d):
            logits = d[key].as_tensor() if isinstance(d[key], MetaTensor) else d[key]
            trace = deepcopy(image.applied_operations)
            undo = [t for t in self.transform.flatten().transforms if isinstance(t, InvertibleTransform)]
            if undo and isinstance(undo[-1], Resized) and _resized_slices(trace, logits):
                undo.pop()
                back = self._resize_back(logits.detach(), image, trace.pop())
                back.applied_operations = trace
            else:
                probability = torch.sigmoid(logits.detach())
                back = MetaTensor(probability, meta=deepcopy(image.meta), applied_operations=trace)
            if undo:
                rest = Compose(undo)
                with allow_missing_keys_mode(rest):  # type: ignore[arg-type]
                    back = rest.inverse({self.orig_keys: back})[self.orig_keys]
            d[key] = back if back.dtype == torch.uint8 else (back >= self.threshold).to(torch.uint8)
        return d

    def _resize_back(self, logits: torch.Tensor, image: MetaTensor, step: Mapping[str, Any]) -> MetaTensor:
        """The mask on the grid that slices had before they were resized."""
        size, extra = step[TraceKeys.ORIG_SIZE], step[TraceKeys.EXTRA_INFO]
        mask = torch.empty((len(logits), *size), dtype=torch.uint8, device=logits.device)
        meta: dict[str, Any] | None = None
        for start in range(0, logits.shape[-1], _STEP):
            some = torch.sigmoid(logits[..., start : start + _STEP])
            resize = Resize(
                spatial_size=(*size[:2], some.shape[-1]),
                mode=extra["mode"],
                align_corners=None if extra["align_corners"] == TraceKeys.NONE else extra["align_corners"],
                dtype=extra["dtype"],
            )
            with resize.trace_transform(False):
                back = cast(MetaTensor, resize(MetaTensor(some, meta=deepcopy(image.meta))))
            mask[..., start : start + _STEP] = back.as_tensor() >= self.threshold
            meta = back.meta if meta is None else meta  # the first slices lie where the whole begins
        return MetaTensor(mask, meta=meta)


def _resized_slices(trace: list[dict[str, Any]], logits: torch.Tensor) -> bool:
    """Whether slices were resized one by one, as the last step and the only one that interpolates."""
    if logits.ndim != 4 or not trace:
        return False
    *before, last = trace
    return (
        last[TraceKeys.CLASS_NAME] == "Resize"
        and len(last[TraceKeys.ORIG_SIZE]) == 3
        and last[TraceKeys.ORIG_SIZE][2] == logits.shape[3]
        and not last[TraceKeys.EXTRA_INFO]["new_dim"]
        and all(step[TraceKeys.CLASS_NAME] in _WITHOUT_INTERPOLATION for step in before)
    )


InvertToMaskD = InvertToMaskDict = InvertToMaskd
