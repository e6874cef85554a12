# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Metrics of the segmented volume that MONAI does not have: VA, VOE and RVD."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from monai.metrics import CumulativeIterationMetric, compute_iou
from monai.metrics.utils import do_metric_reduction
from monai.utils import MetricReduction, convert_to_tensor

__all__ = ["MaskMetric", "RelativeVolumeDifferenceMetric", "VolumeAccuracyMetric", "VolumeOverlapErrorMetric"]


class MaskMetric(CumulativeIterationMetric):
    """Base of the metrics here: one value for each case and channel, NaN where it is undefined.

    They are called like MONAI's, with ``y_pred`` and ``y`` as batch-first tensors or lists of channel-first
    ones, hold 0 and 1 only, and differ from MONAI's in one point: where no case at all has a value,
    :meth:`aggregate` returns NaN, not 0. What is undefined: see :mod:`custom.metrics`.

    Args:
        reduction: over the values that are not NaN: ``"mean"``, ``"sum"``, ``"mean_batch"``, ``"sum_batch"``,
            ``"mean_channel"``, ``"sum_channel"`` or ``"none"``.
        get_not_nans: whether :meth:`aggregate` also returns how many values are not NaN.
    """

    def __init__(
        self, reduction: MetricReduction | str = MetricReduction.MEAN, get_not_nans: bool = False
    ) -> None:
        super().__init__()
        self.reduction = reduction
        self.get_not_nans = get_not_nans

    def _compute_tensor(  # type: ignore[override]
        self, y_pred: torch.Tensor, y: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Args:
            y_pred: binarised prediction, (B, C, H, W[, D]).
            y: truth, (B, C, H, W[, D]).

        Returns:
            One value for each case and channel, (B, C).

        Raises:
            ValueError: when the shapes differ or are not these, or a value is neither 0 nor 1.
        """
        name = type(self).__name__
        if y is None:
            raise ValueError(f"{name} compares a prediction with a truth, which is missing.")
        if y_pred.shape != y.shape or y_pred.ndim not in (4, 5):
            raise ValueError(
                f"{name} takes prediction and truth of the same shape (B, C, H, W[, D]), "
                f"got {tuple(y_pred.shape)} and {tuple(y.shape)}."
            )
        return self._score(_to_mask(y_pred, f"{name}: the prediction"), _to_mask(y, f"{name}: the truth"))

    @abstractmethod
    def _score(self, pred: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        """Values (B, C) of masks (B, C, H, W[, D]) of type bool."""

    def aggregate(self, reduction: MetricReduction | str | None = None) -> Any:
        """Reduce the values of all cases so far.

        Args:
            reduction: takes the place of the constructor's.

        Returns:
            The reduced value, NaN where no case has one; with ``get_not_nans`` also their number.

        Raises:
            ValueError: when nothing has been scored yet.
        """
        data = self.get_buffer()
        if not isinstance(data, torch.Tensor):
            raise ValueError(f"{type(self).__name__} has not been called on any case yet.")
        value, not_nans = do_metric_reduction(data, reduction or self.reduction)
        value = torch.where(not_nans > 0, value, torch.nan)
        return (value, not_nans) if self.get_not_nans else value


def _to_mask(values: torch.Tensor, what: str) -> torch.Tensor:
    values = convert_to_tensor(values)  # without meta data, which would cost at every operation
    mask = values == 1
    if values.dtype != torch.bool and not bool(((values == 0) | mask).all()):
        raise ValueError(f"{what} holds values other than 0 and 1; binarise it first, as with AsDiscrete.")
    return mask


def _volumes(pred: torch.Tensor, truth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    axes = tuple(range(2, pred.ndim))
    return pred.sum(axes).double(), truth.sum(axes).double()


class VolumeAccuracyMetric(MaskMetric):
    """Volume accuracy, VA = 1 - 2 abs(|a| - |b|) / (|a| + |b|), from -1 to 1.

    a is the prediction and b the truth; only how many voxels they have matters, not where. 1 where the
    volumes are equal, -1 where nothing was predicted of what is there, NaN where the truth is empty.

    Args:
        reduction: see :class:`MaskMetric`.
        get_not_nans: see :class:`MaskMetric`.

    Reference:
        Zhao et al., SCOAT-Net, doi:10.1101/2020.09.23.20191726.
    """

    def _score(self, pred: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        a, b = _volumes(pred, truth)
        return torch.where(b > 0, 1 - 2 * (a - b).abs() / (a + b), torch.nan).float()


class VolumeOverlapErrorMetric(MaskMetric):
    """Volumetric overlap error, VOE = 1 - |a and b| / |a or b|, from 0 to 1; NaN where the truth is empty.

    Args:
        reduction: see :class:`MaskMetric`.
        get_not_nans: see :class:`MaskMetric`.

    Reference:
        Liu et al., nCoVSegNet, Medical Image Analysis 74:102205, 2021, section 4.
    """

    def _score(self, pred: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        # MONAI sums in the type it is given: of bool it counts exactly, of float32 not beyond 2**24 voxels.
        return 1 - compute_iou(pred, truth, ignore_empty=True)


class RelativeVolumeDifferenceMetric(MaskMetric):
    """Relative volume difference, RVD = abs(|a| - |b|) / |b|, 0 or more; NaN where the truth is empty.

    Args:
        signed: whether to give (|a| - |b|) / |b|, negative where too little is found. In a mean over cases
            the signs cancel, which is how the code published with the paper comes to its small values.
        reduction: see :class:`MaskMetric`.
        get_not_nans: see :class:`MaskMetric`.

    Reference:
        Liu et al., nCoVSegNet, Medical Image Analysis 74:102205, 2021, section 4.
    """

    def __init__(
        self,
        signed: bool = False,
        reduction: MetricReduction | str = MetricReduction.MEAN,
        get_not_nans: bool = False,
    ) -> None:
        super().__init__(reduction, get_not_nans)
        self.signed = signed

    def _score(self, pred: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        a, b = _volumes(pred, truth)
        difference = a - b if self.signed else (a - b).abs()
        return torch.where(b > 0, difference / b, torch.nan).float()
