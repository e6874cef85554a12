# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Weights files: read without running anything in them, and compared with the network they are for."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from ignite.engine import Engine
from monai.handlers import CheckpointLoader
from torch.nn.parallel import DistributedDataParallel

from custom.bundle.settings import settings_file
from custom.data.files import refuse_denied

__all__ = ["WeightsLoader", "describe_misfit", "load_safely", "read_weights"]


def load_safely(path: str | os.PathLike) -> Any:
    """Read a file of ``torch.save``; a pickle that holds more than tensors and plain values is not run.

    Tensors stay in the file until they are used, so that a file of any size costs no memory here.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: When there is no such file.
        PermissionError: When it may not be read.
        ValueError: In one line, when it is another file, a damaged one, or could run code.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} not found; it should hold weights")
    refuse_denied([path])
    name = os.fspath(path)
    try:
        with zipfile.ZipFile(name) as archive:
            compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
        content = None if compressed else torch.load(name, map_location="cpu", weights_only=True, mmap=True)
    except zipfile.BadZipFile:
        raise ValueError(f"{name} is not a file of torch.save, or a damaged one") from None
    except pickle.UnpicklingError:
        raise ValueError(
            f"{name} holds more than tensors; such a file could run code and is not loaded"
        ) from None
    except Exception as error:  # a damaged file can raise anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{name} is not a file of torch.save, or a damaged one: {reason}") from None
    if compressed:
        raise ValueError(f"{name} is compressed inside, which torch.save never does; it is not loaded")
    return content


def read_weights(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Read a ``state_dict``, bare or under the name "model".

    Args:
        path: file that ``torch.save`` wrote.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: In one line, when it is not a weights file.
    """
    content = load_safely(path)
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]  # the other form that MONAI's tools accept
    if not isinstance(content, Mapping) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise ValueError(f"{path} is no state_dict, names with tensors; give the model.pt of a training")
    return dict(content)


def describe_misfit(weights: Mapping[str, torch.Tensor], network: torch.nn.Module) -> str:
    """Say in one line how weights differ from what a network needs, "" where they fit.

    Args:
        weights: a ``state_dict``.
        network: the network; its tensors may be on the meta device.
    """
    needed = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in weights.items()}
    complaints = []
    for what, keys in (
        ("missing", [key for key in needed if key not in found]),
        ("unexpected", [key for key in found if key not in needed]),
        ("of another shape", [key for key in needed if key in found and needed[key] != found[key]]),
    ):
        if keys:
            complaints.append(f"{len(keys)} {what} (first {str(keys[0])[:80]!a})")
    return f"of {len(needed)} tensors {', '.join(complaints)}" if complaints else ""


class WeightsLoader(CheckpointLoader):
    """MONAI's CheckpointLoader for a file of weights, with one clear line where it does not fit.

    The network keeps its number format: weights in half precision become float32 in a network of float32.

    Args:
        load_path: file with a ``state_dict``.
        load_dict: any name with the network; wrapped for several processes or not.
        name: of the logger.
        map_location: device of the weights.
    """

    def __call__(self, engine: Engine) -> None:
        """Load the weights when the engine starts.

        Args:
            engine: the engine.

        Raises:
            FileNotFoundError: When there is no such file.
            ValueError: When it holds no weights, or those of another network.
        """
        weights = read_weights(self.load_path)
        for network in self.load_dict.values():
            bare = network.module if isinstance(network, DistributedDataParallel) else network
            if misfit := describe_misfit(weights, bare):
                file = settings_file(self.load_path)
                told = "" if file.is_file() else f"; there is no {file.name} beside it, which would name them"
                raise ValueError(
                    f"{self.load_path} does not fit this {type(bare).__name__}: {misfit}; give the weights "
                    f"that were trained with these settings{told}"
                )
        super().__call__(engine)
