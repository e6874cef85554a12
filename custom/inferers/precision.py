# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Training in bfloat16 on processors that have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from monai.inferers import Inferer

__all__ = ["Bfloat16Inferer"]


class Bfloat16Inferer(Inferer):
    """Runs the network under autocast to bfloat16; the loss sees float32.

    For training on processors with AMX or AVX-512 BF16 (MONAI's ``amp`` is CUDA's only). Weights and
    optimiser stay in float32, and bfloat16 has float32's range, so the loss needs no scaling.

    Inputs and weights are laid out channels last (weights too, or each convolution would lay them out anew),
    which is a quarter faster with batch normalisation. Networks with instance normalisation keep the usual
    layout: PyTorch normalises instances in that one alone, and laying out anew at every layer would take a
    third of the time.
    """

    def __call__(self, inputs: torch.Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """
        Args:
            inputs: (B, C, H, W).
            network: maps inputs to a tensor or a list, tuple or dictionary of tensors.

        Returns:
            The network's output, its tensors in float32.
        """
        if isinstance(network, torch.nn.Module) and not _normalizes_instances(network):
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16):
            output = network(inputs, *args, **kwargs)
        return _as_float32(output)


def _normalizes_instances(network: torch.nn.Module) -> bool:
    instance = torch.nn.modules.instancenorm._InstanceNorm
    return any(isinstance(module, instance) for module in network.modules())


def _as_float32(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output.float()
    if isinstance(output, dict):
        return {key: _as_float32(value) for key, value in output.items()}
    return type(output)(_as_float32(value) for value in output)
