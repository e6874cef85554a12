# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from ignite.engine import Engine
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.metrics import DiceMetric, MeanIoU

from custom import metrics

VOLUME_METRICS = {
    "va": metrics.VolumeAccuracyMetric,
    "voe": metrics.VolumeOverlapErrorMetric,
    "rvd": metrics.RelativeVolumeDifferenceMetric,
    "rvd_signed": lambda **kwargs: metrics.RelativeVolumeDifferenceMetric(signed=True, **kwargs),
}
ALL_METRICS = {
    **VOLUME_METRICS,
    "rlp": metrics.RegionPrecisionMetric,
    "rlr": metrics.RegionRecallMetric,
    "rlr_overlap": lambda **kwargs: metrics.RegionRecallMetric(mode="overlap", **kwargs),
}


def batch(*masks) -> torch.Tensor:
    return torch.from_numpy(np.stack(masks))[:, None].float()


def by_hand(pred: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """The formulas on sets of indices."""
    a, b = ({tuple(p) for p in np.argwhere(m)} for m in (pred, truth))
    if not b:
        return dict.fromkeys(VOLUME_METRICS, math.nan)
    return {
        "va": 1 - 2 * abs(len(a) - len(b)) / (len(a) + len(b)),
        "voe": 1 - len(a & b) / len(a | b),
        "rvd": abs(len(a) - len(b)) / len(b),
        "rvd_signed": (len(a) - len(b)) / len(b),
    }


@pytest.mark.parametrize("name", VOLUME_METRICS)
def test_worked_example(name):
    """|a| = 6, |b| = 4, |a and b| = 2."""
    pred, truth = np.zeros((4, 4)), np.zeros((4, 4))
    pred[0, :3] = pred[1, :3] = 1
    truth[1, 1:3] = truth[2, 1:3] = 1
    expected = {"va": 1 - 2 * 2 / 10, "voe": 1 - 2 / 8, "rvd": 2 / 4, "rvd_signed": 2 / 4}[name]
    metric = VOLUME_METRICS[name]()
    assert metric(batch(pred), batch(truth)).tolist() == [[pytest.approx(expected)]]
    if name == "rvd_signed":
        assert metric(batch(truth), batch(pred)).item() == pytest.approx(-2 / 6)


@pytest.mark.parametrize("name", VOLUME_METRICS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_agrees_with_the_formulas_on_sets(name, data):
    shape = data.draw(st.sampled_from([(5, 4), (3, 4, 2)]))
    pred, truth = (data.draw(arrays(np.bool_, shape)) for _ in range(2))
    value = VOLUME_METRICS[name]()(batch(pred), batch(truth)).item()
    assert value == pytest.approx(by_hand(pred, truth)[name], nan_ok=True)


@pytest.mark.parametrize("dims", [2, 3])
def test_voe_follows_from_monai(dims):
    rng = np.random.default_rng(dims)
    pred, truth = (batch(*(rng.random((6,) + (7,) * dims) < 0.4)) for _ in range(2))
    voe = metrics.VolumeOverlapErrorMetric(reduction="none")
    iou, dice = MeanIoU(reduction="none"), DiceMetric(reduction="none")
    for metric in (voe, iou, dice):
        metric(pred, truth)
    assert torch.allclose(voe.aggregate(), 1 - iou.aggregate())
    d = dice.aggregate()
    assert torch.allclose(voe.aggregate(), 1 - d / (2 - d))


# The table in custom/metrics/__init__.py: truth empty, prediction empty, both; then the truth itself.
POLICY = {
    "va": (math.nan, -1, math.nan, 1),
    "voe": (math.nan, 1, math.nan, 0),
    "rvd": (math.nan, 1, math.nan, 0),
    "rvd_signed": (math.nan, -1, math.nan, 0),
    "rlp": (0, math.nan, math.nan, 1),
    "rlr": (math.nan, 0, math.nan, 1),
    "rlr_overlap": (math.nan, 0, math.nan, 1),
}


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3)])
@pytest.mark.parametrize("name", ALL_METRICS)
def test_empty_policy(name, shape):
    some, none = np.zeros(shape), np.zeros(shape)
    some[1:3, 2:4] = 1
    metric = ALL_METRICS[name](get_not_nans=True)
    values = metric(batch(some, none, none, some), batch(none, some, none, some)).flatten().tolist()
    assert values == pytest.approx(POLICY[name], nan_ok=True)
    defined = [v for v in POLICY[name] if not math.isnan(v)]
    mean, count = metric.aggregate()
    assert (mean.item(), count.item()) == (pytest.approx(np.mean(defined)), len(defined))


@pytest.mark.parametrize("name", ALL_METRICS)
def test_nothing_but_undefined_cases_gives_nan_and_not_zero(name):
    metric = ALL_METRICS[name](get_not_nans=True)
    metric(torch.zeros(3, 1, 4, 4), torch.zeros(3, 1, 4, 4))
    mean, count = metric.aggregate()
    assert math.isnan(mean.item()) and count.item() == 0
    metric.reset()
    with pytest.raises(ValueError, match="not been called"):
        metric.aggregate()


@pytest.mark.parametrize("name", ALL_METRICS)
def test_is_called_like_monai(name):
    """Lists of channel-first MetaTensors, several channels, several calls: as DiceMetric takes them."""
    rng = np.random.default_rng(3)
    pred, truth = (torch.from_numpy((rng.random((3, 2, 6, 6, 2)) < 0.3).astype(np.uint8)) for _ in range(2))
    one, two, dice = ALL_METRICS[name](reduction="none"), ALL_METRICS[name](), DiceMetric(reduction="none")
    one(pred, truth)
    assert dice(pred, truth).shape == one.aggregate().shape == (3, 2)
    two([MetaTensor(p) for p in pred[:2]], list(truth[:2]))
    two(pred[2:].bool(), truth[2:].float())
    assert torch.equal(two.get_buffer(), one.get_buffer())
    assert two.aggregate().item() == pytest.approx(np.nanmean(np.nanmean(one.aggregate().numpy(), 1)))
    single = ALL_METRICS[name]()
    assert single(pred[1:2, 1:], truth[1:2, 1:]).item() == one.aggregate()[1, 1].item()


@pytest.mark.parametrize("name", ALL_METRICS)
def test_user_errors(name):
    metric = ALL_METRICS[name]()
    mask = torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="same shape"):
        metric(mask, mask[..., :3])
    with pytest.raises(ValueError, match="same shape"):
        metric(mask[0], mask[0])
    with pytest.raises(ValueError, match="missing"):
        metric(mask)
    with pytest.raises(ValueError, match="the prediction holds values other than 0 and 1"):
        metric(mask + 0.5, mask)
    with pytest.raises(ValueError, match="the truth holds values other than 0 and 1"):
        metric(mask, mask * torch.nan)


@pytest.mark.parametrize(
    "handler, extra, expected",
    [
        ("VolumeAccuracy", {}, (7 / 9, -1)),
        ("VolumeOverlapError", {}, (5 / 7, 1)),
        ("RelativeVolumeDifference", {}, (0.25, 1)),
        ("RelativeVolumeDifference", {"signed": True}, (0.25, -1)),
        ("RegionPrecision", {}, (0.5, math.nan)),
        ("RegionPrecision", {"spatial": "volume"}, (0, math.nan)),
        ("RegionRecall", {}, (0.5, 0)),
        ("RegionRecall", {"spatial": "volume"}, (0, 0)),
        ("RegionRecall", {"mode": "overlap"}, (0.5, 0)),
    ],
)
def test_handlers_in_a_config(handler, extra, expected):
    """Two cases: |a| = 5, |b| = 4, |a and b| = 2, |a or b| = 7; and one pixel of which nothing was found."""
    pred, truth = torch.zeros(2, 1, 6, 5, 2), torch.zeros(2, 1, 6, 5, 2)
    pred[0, 0, 3, :2, 0] = 1  # its centre (3, 0, 0) is outside the truth
    pred[0, 0, 4, 2:5, 1] = 1  # its centre (4, 3, 1) is inside; in 3-D both are one, with centre (4, 2, 1)
    truth[0, 0, 4, 3:5, 1] = 1
    truth[0, 0, 0, 0:2, 0] = 1
    truth[1, 0, 2, 2, 0] = 1
    config = {
        "_target_": f"custom.metrics.{handler}",
        "output_transform": "$monai.handlers.from_engine(['pred', 'label'])",
        **extra,
    }
    parser = ConfigParser({"imports": ["$import monai"], "metric": config})
    parser.parse()
    output = [{"pred": p, "label": t} for p, t in zip(pred, truth, strict=True)]
    engine = Engine(lambda engine, data: output)
    parser.get_parsed_content("metric").attach(engine, "val")
    engine.run([0])
    assert engine.state.metric_details["val"].flatten().tolist() == pytest.approx(expected, nan_ok=True)
    assert engine.state.metrics["val"] == pytest.approx(np.nanmean(expected))
