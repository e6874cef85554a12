# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from bundle_tester import Bundle
from ignite.engine import Engine
from ignite.handlers import EMAHandler
from PIL import Image

from custom.bundle.settings import write_settings

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


@pytest.mark.parametrize("absolute", [False, True])
def test_grey_values_reach_the_network_as_it_was_trained(absolute, tmp_path):
    """The attention U-Net's recipe keeps the Hounsfield scale; published, it normalises each slice."""
    bundle = Bundle("covid_ct_attention_unet_segmentation", {"image_size": [32, 32]})
    names = ("train", "train_slices", *(["recipe_slices"] if absolute else []))
    training = bundle.workflow("train", names, {}).parser
    settings = training.get_parsed_content("weights_settings")
    assert settings["absolute_intensity"] is absolute
    (tmp_path / "model.pt").touch()
    write_settings(tmp_path / "model.pt", settings)
    (tmp_path / "images").mkdir()
    grey = np.linspace(0, 255, 32 * 32).reshape(32, 32).astype(np.uint8)
    Image.fromarray(grey).save(tmp_path / "images" / "a.png")
    Image.fromarray((grey > 99).astype(np.uint8) * 255).save(tmp_path / "truth.png")
    pair = {"image": str(tmp_path / "images" / "a.png"), "label": str(tmp_path / "truth.png")}
    trained = training.get_parsed_content("validate#preprocessing")(pair)["image"]
    overrides = {"dataset_dir": str(tmp_path / "images"), "ckpt_path": str(tmp_path / "model.pt")}
    inference = bundle.workflow("infer", ("inference", "inference_slices"), overrides).parser
    seen = inference.get_parsed_content("dataset")[0]["image"]
    assert torch.allclose(trained.as_tensor(), seen.as_tensor(), atol=1e-6)
    assert float(trained.max()) == pytest.approx(1.0 if absolute else 3**0.5, abs=0.01)
    for parser in (training, inference):
        kinds = {type(module) for module in parser.get_parsed_content("network_def").modules()}
        assert (torch.nn.BatchNorm2d in kinds) is absolute
        assert (torch.nn.InstanceNorm2d in kinds) is not absolute
