# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""The metrics as ignite handlers, for a bundle's ``key_metric`` and ``additional_metrics``."""

from __future__ import annotations

from collections.abc import Callable

from monai.handlers import IgniteMetricHandler
from monai.utils import MetricReduction

from custom.metrics.regions import RegionPrecisionMetric, RegionRecallMetric
from custom.metrics.volume import (
    RelativeVolumeDifferenceMetric,
    VolumeAccuracyMetric,
    VolumeOverlapErrorMetric,
)

__all__ = [
    "RegionPrecision",
    "RegionRecall",
    "RelativeVolumeDifference",
    "VolumeAccuracy",
    "VolumeOverlapError",
]


class VolumeAccuracy(IgniteMetricHandler):
    """Handler of :class:`custom.metrics.VolumeAccuracyMetric`.

    Args:
        reduction: see the metric.
        output_transform: makes ``(y_pred, y)`` of the engine's output, usually
            ``monai.handlers.from_engine(['pred', 'label'])``.
        save_details: whether to keep the value of each case in ``engine.state.metric_details``.
    """

    def __init__(
        self,
        reduction: MetricReduction | str = MetricReduction.MEAN,
        output_transform: Callable = lambda x: x,
        save_details: bool = True,
    ) -> None:
        super().__init__(
            VolumeAccuracyMetric(reduction), output_transform=output_transform, save_details=save_details
        )


class VolumeOverlapError(IgniteMetricHandler):
    """Handler of :class:`custom.metrics.VolumeOverlapErrorMetric`.

    Args:
        reduction: see the metric.
        output_transform: see :class:`VolumeAccuracy`.
        save_details: see :class:`VolumeAccuracy`.
    """

    def __init__(
        self,
        reduction: MetricReduction | str = MetricReduction.MEAN,
        output_transform: Callable = lambda x: x,
        save_details: bool = True,
    ) -> None:
        super().__init__(
            VolumeOverlapErrorMetric(reduction), output_transform=output_transform, save_details=save_details
        )


class RelativeVolumeDifference(IgniteMetricHandler):
    """Handler of :class:`custom.metrics.RelativeVolumeDifferenceMetric`.

    Args:
        signed: see the metric.
        reduction: see the metric.
        output_transform: see :class:`VolumeAccuracy`.
        save_details: see :class:`VolumeAccuracy`.
    """

    def __init__(
        self,
        signed: bool = False,
        reduction: MetricReduction | str = MetricReduction.MEAN,
        output_transform: Callable = lambda x: x,
        save_details: bool = True,
    ) -> None:
        super().__init__(
            RelativeVolumeDifferenceMetric(signed, reduction),
            output_transform=output_transform,
            save_details=save_details,
        )


class RegionPrecision(IgniteMetricHandler):
    """Handler of :class:`custom.metrics.RegionPrecisionMetric`.

    Args:
        spatial: see the metric.
        reduction: see the metric.
        output_transform: see :class:`VolumeAccuracy`.
        save_details: see :class:`VolumeAccuracy`.
    """

    def __init__(
        self,
        spatial: str = "slice",
        reduction: MetricReduction | str = MetricReduction.MEAN,
        output_transform: Callable = lambda x: x,
        save_details: bool = True,
    ) -> None:
        super().__init__(
            RegionPrecisionMetric(spatial, reduction),
            output_transform=output_transform,
            save_details=save_details,
        )


class RegionRecall(IgniteMetricHandler):
    """Handler of :class:`custom.metrics.RegionRecallMetric`.

    Args:
        mode: see the metric.
        spatial: see the metric.
        reduction: see the metric.
        output_transform: see :class:`VolumeAccuracy`.
        save_details: see :class:`VolumeAccuracy`.
    """

    def __init__(
        self,
        mode: str = "center",
        spatial: str = "slice",
        reduction: MetricReduction | str = MetricReduction.MEAN,
        output_transform: Callable = lambda x: x,
        save_details: bool = True,
    ) -> None:
        super().__init__(
            RegionRecallMetric(mode, spatial, reduction),
            output_transform=output_transform,
            save_details=save_details,
        )
