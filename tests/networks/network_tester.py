# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""What every network must do; it joins by a class in its test file that declares a small version of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.networks import convert_to_torchscript
from torch import nn

GOLDEN = Path(__file__).parent / "data"
PRIME = 65521


def noise(shape: tuple[int, ...] | torch.Size, seed: int) -> torch.Tensor:
    """Values in [-1, 1) from integer arithmetic: the same with every version and on every processor."""
    index = torch.arange(math.prod(shape)) % PRIME
    mixed = (index * index % PRIME * 7919 + index * 104729 + seed * 31337) % PRIME
    return (2 * mixed / PRIME - 1).reshape(shape)


def fill(network: nn.Module) -> None:
    """Give every weight a fixed value of a size that keeps activations near one."""
    for number, (name, tensor) in enumerate(network.state_dict().items()):
        values = noise(tensor.shape, number)
        if tensor.ndim > 1:
            tensor.copy_(values * math.sqrt(3 / tensor[0].numel()))
        elif not name.endswith("num_batches_tracked"):
            scale = name.endswith(("weight", "running_var"))
            tensor.copy_(1 + 0.2 * values if scale else 0.1 * values)


class NetworkTester:
    """Base class of the networks' tests.

    Attributes:
        network: the class under test.
        small: arguments of a small and quick version.
        variants: changes to ``small`` that are trained as well, one after the other.
        spatial_dims: supported numbers of spatial dimensions.
        side: side of the input, in every dimension.
        single_side: smallest side at which a batch of one can be trained.
        multiple: what sides must be a multiple of.
        outputs: number of maps in training mode with deep supervision; 1 where it is always one tensor.
        supervised: the change to ``small`` that switches deep supervision on.
        maps: name of every attention map with the factor by which it is smaller than the input.
        golden: name of every file with stored logits and the change to ``small`` it belongs to. A file holds
            mean, standard deviation and 16 logits of ``golden_logits`` in double precision.
    """

    network: type[nn.Module]
    small: dict[str, Any]
    variants: tuple[dict[str, Any], ...] = ()
    spatial_dims: tuple[int, ...] = (2,)
    side = 32
    single_side = 32
    multiple = 16
    outputs = 1
    supervised: dict[str, Any] = {}
    maps: dict[str, int]
    golden: dict[str, dict[str, Any]]

    def build(self, **changes: Any) -> nn.Module:
        torch.manual_seed(0)
        return self.network(**{**self.small, **changes})

    def image(self, batch: int = 2, side: int | None = None, spatial_dims: int = 2) -> torch.Tensor:
        shape = (batch, 1) + (side or self.side,) * spatial_dims
        return torch.rand(shape, generator=torch.Generator().manual_seed(1))

    @pytest.fixture(scope="class")
    def exported(self) -> tuple[nn.Module, torch.export.ExportedProgram]:
        """A network and its exported program with a free batch size."""
        network = self.build().eval()
        fill(network)
        batch = {0: torch.export.Dim("batch", min=1, max=64)}
        return network, torch.export.export(network, (self.image(),), dynamic_shapes=(batch,))

    def test_evaluation_gives_one_map_of_logits(self):
        for dims in self.spatial_dims:
            image = self.image(spatial_dims=dims)
            network = self.build(spatial_dims=dims, out_channels=2, **self.supervised).eval()
            with torch.no_grad():
                logits = network(image)
            assert logits.shape == (2, 2, *image.shape[2:])
            assert logits.min() < 0 < logits.max()

    def test_every_parameter_learns(self):
        for dims in self.spatial_dims:
            for changes in ({}, self.supervised, *self.variants):
                network = self.build(spatial_dims=dims, **changes).train()
                outputs = network(self.image(spatial_dims=dims))
                maps = outputs if isinstance(outputs, list) else [outputs]
                sum(map_.square().mean() for map_ in maps).backward()
                for name, parameter in network.named_parameters():
                    assert parameter.grad is not None, f"{name} is not in use ({changes})"
                    assert parameter.grad.isfinite().all(), name
                    if parameter.ndim > 1:
                        assert parameter.grad.abs().max() > 0, f"{name} has no influence ({changes})"

    def test_training_gives_maps_of_full_size(self):
        network = self.build(**self.supervised).train()
        image = self.image()
        outputs = network(image)
        if self.outputs == 1:
            assert outputs.shape == image.shape
        else:
            assert isinstance(outputs, list)
            assert [output.shape for output in outputs] == [image.shape] * self.outputs
            # The first of them is the one that evaluation returns: with the same weights and statistics.
            for module in network.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
            torch.testing.assert_close(network(image)[0], network.eval()(image))

    def test_a_few_steps_lower_the_loss(self):
        network = self.build().train()
        image = 0.5 * self.image()
        target = torch.zeros_like(image)
        target[..., self.side // 4 : self.side // 2, self.side // 4 :] = 1
        image += 0.5 * target
        optimizer = torch.optim.Adam(network.parameters(), 1e-3)
        losses = []
        for _ in range(8):
            outputs = network(image)
            logits = outputs[0] if isinstance(outputs, list) else outputs
            loss = nn.functional.binary_cross_entropy_with_logits(logits, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]

    def test_a_batch_of_one_can_be_trained(self):
        network = self.build().train()
        outputs = network(self.image(batch=1, side=self.single_side))
        logits = outputs[0] if isinstance(outputs, list) else outputs
        assert logits.shape == (1, 1, self.single_side, self.single_side)
        logits.sum().backward()

    def test_sides_may_differ(self):
        image = torch.rand(2, 1, 2 * self.multiple, 3 * self.multiple)
        with torch.no_grad():
            assert self.build().eval()(image).shape == image.shape

    def test_a_side_that_does_not_fit_is_refused(self):
        image = torch.rand(1, 1, 2 * self.multiple, 2 * self.multiple + 1)
        with pytest.raises(ValueError, match=f"{2 * self.multiple + 1}.*multiple of {self.multiple}"):
            self.build().eval()(image)

    def test_evaluation_is_deterministic_and_sees_each_image_alone(self):
        network = self.build().eval()
        image = self.image()
        with torch.no_grad():
            logits = network(image)
            assert torch.equal(logits, network(image))
            torch.testing.assert_close(logits[1:], network(image[1:]), rtol=1e-4, atol=1e-4)

    def test_a_checkpoint_restores_the_network(self, tmp_path):
        network = self.build()
        fill(network)
        torch.save(network.state_dict(), tmp_path / "model.pt")
        restored = self.network(**self.small)
        restored.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
        with torch.no_grad():
            assert torch.equal(restored.eval()(self.image()), network.eval()(self.image()))

    def test_state_dict_does_not_depend_on_the_mode(self):
        network = self.build(**self.supervised)
        assert list(network.train().state_dict()) == list(network.eval().state_dict())

    def golden_logits(self, dtype: torch.dtype = torch.float32, **changes: Any) -> torch.Tensor:
        """Logits of a network whose weights and input are fixed."""
        network = self.build(**changes).eval()
        fill(network)
        image = 0.5 + 0.5 * noise((1, 1, self.side, self.side), 1)
        with torch.no_grad():
            return network.to(dtype)(image.to(dtype)).flatten()

    def test_logits_are_the_stored_ones(self):
        for name, changes in self.golden.items():
            stored = json.loads((GOLDEN / f"{name}.json").read_text())
            logits = self.golden_logits(**changes)
            tolerance = 1e-3 * stored["std"]
            assert logits.mean().item() == pytest.approx(stored["mean"], abs=tolerance), name
            assert logits.std().item() == pytest.approx(stored["std"], abs=tolerance), name
            some = logits[:: logits.numel() // 16].tolist()
            assert some == pytest.approx(stored["logits"], abs=tolerance), name

    def test_the_exported_program_computes_the_same(self, exported):
        network, program = exported
        image = self.image(batch=3)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(image), network(image), rtol=1e-4, atol=1e-4)

    def test_the_onnx_model_computes_the_same(self, exported, tmp_path):
        pytest.importorskip("onnxscript")
        runtime = pytest.importorskip("onnxruntime")
        network, program = exported
        path = tmp_path / "model.onnx"
        torch.onnx.export(program, f=path, dynamo=True, verbose=False)
        image = self.image(batch=3)
        session = runtime.InferenceSession(path)
        (logits,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(logits, network(image).numpy(), rtol=1e-3, atol=1e-3)

    def test_torchscript_computes_the_same(self):
        network = self.build(**self.supervised)
        fill(network)
        image = self.image()
        scripted = convert_to_torchscript(network)
        with torch.no_grad():
            torch.testing.assert_close(scripted(image), network.eval()(image), rtol=1e-4, atol=1e-4)

    def test_attention_maps(self):
        network = self.build().train()
        image = self.image()
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        maps = network.attention_maps(image)
        assert list(maps) == list(self.maps)
        for name, map_ in maps.items():
            assert map_.shape == (2, 1, self.side // self.maps[name], self.side // self.maps[name]), name
            assert 0 <= map_.min() < map_.max() <= 1, name
            assert not map_.requires_grad
        shown = network.attention_maps(image, network.shown_attention_maps)
        assert list(shown) == list(network.shown_attention_maps)
        assert all(torch.equal(map_, maps[name]) for name, map_ in shown.items())
        # Looking leaves no trace.
        assert network.training
        assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
        assert not any(module._forward_hooks for module in network.modules())

    def test_an_unknown_attention_map_is_refused_with_the_known_ones(self):
        first = next(iter(self.maps))
        with pytest.raises(ValueError, match=f"nowhere.*{first}"):
            self.build().attention_maps(self.image(), [first, "nowhere"])
