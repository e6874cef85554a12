# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Training in bfloat16 where the processor computes in it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from monai.inferers import Inferer

__all__ = ["Bfloat16Inferer"]

logger = logging.getLogger(__name__)


class Bfloat16Inferer(Inferer):
    """Runs the network under autocast to bfloat16 where that is faster; the loss sees float32.

    For training on processors with AMX or AVX-512 BF16 (MONAI's ``amp`` is CUDA's only). Weights and
    optimiser stay in float32, and bfloat16 has float32's range, so the loss needs no scaling. An x86
    processor without these instructions would only emulate them, at half of float32's speed: there the
    network runs in float32, and the log says so.

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
        enabled = inputs.device.type != "cpu" or _has_bfloat16()
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=enabled):
            output = network(inputs, *args, **kwargs)
        return _as_float32(output)


@cache
def _has_bfloat16() -> bool:
    ask = getattr(torch.cpu, "get_capabilities", None)  # older releases of torch cannot tell
    found = ask() if ask else {}
    if found.get("architecture") != "x86_64" or found.get("avx512_bf16") or found.get("amx_bf16"):
        return True
    logger.info("this processor has no bfloat16; the network runs in float32")
    return False


def _normalizes_instances(network: torch.nn.Module) -> bool:
    instance = torch.nn.modules.instancenorm._InstanceNorm
    return any(isinstance(module, instance) for module in network.modules())


def _as_float32(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output.float()
    if isinstance(output, dict):
        return {key: _as_float32(value) for key, value in output.items()}
    return type(output)(_as_float32(value) for value in output)
