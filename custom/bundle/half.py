# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Weights in half precision, for files of half the size; what loads them computes in float32."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from custom.bundle.loading import read_weights
from custom.bundle.settings import read_settings, settings_file
from custom.data.files import atomic_path

__all__ = ["export_half", "to_half"]


def to_half(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Round convolutions and other matrices to float16.

    Counters stay as they are. So do vectors, which take hardly any place: a variance that batch normalisation
    keeps may lie beyond float16's range, or so low that a rounding error moves all that it scales.

    Args:
        weights: a ``state_dict``.

    Raises:
        ValueError: When a value is not finite, or not within float16's range.
    """
    rounded = {}
    for key, tensor in weights.items():
        if not tensor.is_floating_point():
            rounded[key] = tensor.clone()
            continue
        if tensor.ndim < 2:
            if not torch.isfinite(tensor).all():
                raise ValueError(f"'{key}' has values that are not finite; the training that gave it failed")
            rounded[key] = tensor.to(torch.float32, copy=True)
            continue
        half = tensor.to(torch.float16, copy=True)
        if not torch.isfinite(half).all():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"'{key}' has values that are not finite; the training that gave it failed")
            most = float(tensor.abs().max())
            raise ValueError(f"'{key}' has values up to {most:g}, beyond 65504, the greatest of float16")
        rounded[key] = half
    return rounded


def export_half(source: str | os.PathLike, output: str | os.PathLike) -> Path:
    """Write weights in half precision, with the settings beside them; equal weights give equal bytes.

    Args:
        source: weights file of a training, with or without ``model.json`` beside it.
        output: file to write; its settings go beside it.

    Returns:
        The file.

    Raises:
        FileNotFoundError: When there are no such weights.
        ValueError: When they do not fit into float16, or settings are there that are not theirs.
    """
    source, output = Path(source), Path(output)
    weights = read_weights(source)
    settings, beside = settings_file(source), settings_file(output)
    read_settings(source)  # refuses broken ones
    if beside.exists() and not settings.exists():
        raise ValueError(f"{beside} belongs to other weights and {source} has no settings; remove it first")
    try:
        rounded = to_half(weights)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    # As in a training: settings are in place before the weights that need them.
    if settings.exists() and settings.resolve() != beside.resolve():
        with atomic_path(beside) as temporary:
            shutil.copyfile(settings, temporary)
    with atomic_path(output) as temporary, open(temporary, "wb") as file:
        torch.save(rounded, file)
    return output
