# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine
from ignite.handlers import EMAHandler

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("file", sorted(ROOT.glob("bundles/*/configs/recipe_slices.json")), ids=str)
def test_the_average_forgets_the_weights_it_began_with(file):
    """With a constant momentum 2 % of a random start were left, too much for a variance of 0.001."""
    handlers = json.loads(file.read_text(encoding="utf-8"))["train#handlers"]
    options = {key: value for key, value in handlers[0].items() if key not in ("_target_", "model")}
    options["momentum"] = 0.01  # @ema_momentum
    layer = torch.nn.BatchNorm1d(1)
    ema = EMAHandler(layer, **options)
    layer.running_var.fill_(0.001)
    trainer = Engine(lambda engine, batch: None)
    ema.attach(trainer)
    trainer.run(range(200), max_epochs=1)
    assert float(ema.ema_model.running_var) == pytest.approx(0.001, rel=0.05)
