# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Whether a bundle's network gives what its metadata promise, and its weights fit it.

The network is built and run on the meta device, where tensors have shapes and no values: it takes a second
and no memory, whatever its size.
"""

from __future__ import annotations

import ast
import copy
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.bundle.reference_resolver import ReferenceResolver

from custom.bundle.config_code import code_in, find_target, shown, strings_in
from custom.bundle.loading import describe_misfit, read_weights
from custom.bundle.manifest import SETTINGS, WEIGHTS
from custom.bundle.settings import read_settings, trained_with

__all__ = ["build_network", "check_network", "check_values"]


def build_network(config: Mapping[str, Any], weights: str | os.PathLike | None = None) -> torch.nn.Module:
    """Build ``network_def`` of a config without memory for its weights.

    Args:
        config: content of a config whose code is known to be harmless.
        weights: file of the weights whose settings it takes; None for the published settings.

    Raises:
        ValueError: In one line, when it cannot be built or is no network.
    """
    content = copy.deepcopy(dict(config))
    if "ckpt_path" in content:
        content["ckpt_path"] = None if weights is None else os.fspath(weights)
    parser = ConfigParser(content)
    definition = parser.get("network_def")
    if isinstance(definition, dict):
        definition.pop("_requires_", None)  # where the code is; this process has its own
    for name in _reached(parser, "network_def"):
        _refuse_side_effects(parser.get(name))
    try:
        with torch.device("meta"):
            network: Any = parser.get_parsed_content("network_def")
    except Exception as error:  # a constructor can raise anything
        raise ValueError(f"network_def cannot be built: {_reason(error)}") from None
    if not isinstance(network, torch.nn.Module):
        raise ValueError(f"network_def is {type(network).__name__}, not a network")
    return network.eval()


def check_network(configs: Mapping[str, Any], metadata: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """Findings about the networks of train.json and inference.json, and the weights beside them.

    Args:
        configs: content by name without suffix; their code must be known to be harmless.
        metadata: content of metadata.json, which must fit its schema.
        folder: of the bundle.
    """
    networks = {}
    for name in ("train", "inference"):
        try:
            networks[name] = build_network(configs[name])
            yield from (f"configs/{name}.json: {fault}" for fault in _check_output(networks[name], metadata))
        except ValueError as error:
            yield f"configs/{name}.json: {error}"
    if len(networks) < 2:
        return
    if misfit := describe_misfit(networks["train"].state_dict(), networks["inference"]):
        yield f"configs/inference.json: what train.json trains does not fit its network: {misfit}"
    if (folder / WEIGHTS).is_file():
        try:
            weights = read_weights(folder / WEIGHTS)
            settings = read_settings(folder / WEIGHTS)
        except ValueError:
            return  # a finding of its own
        try:
            network = networks["inference"]
            if settings:
                network = build_network(configs["inference"], folder / WEIGHTS)
        except ValueError as error:
            yield f"{SETTINGS}: {error}"
            return
        if misfit := describe_misfit(weights, network):
            yield f"{WEIGHTS}: does not fit the network of configs/inference.json: {misfit}"


def check_values(path: Path) -> Iterator[str]:
    """Findings about one weights file by itself.

    Args:
        path: the file.
    """
    try:
        weights = read_weights(path)
    except ValueError as error:
        yield str(error).removeprefix(str(path)).strip()
        return
    for key, tensor in weights.items():
        # Strides of 0 make a tensor of any size out of one number.
        if tensor.layout is not torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
            yield f"{ascii(str(key)[:80])} is no plain tensor"
        elif tensor.is_floating_point() and not torch.isfinite(tensor).all():
            yield f"{ascii(str(key)[:80])} has values that are not finite"


def _reached(parser: ConfigParser, start: str) -> list[str]:
    """The id itself and all that it refers to, directly or through others."""
    reached = [start]
    for ident in reached:  # which grows meanwhile
        for where, value in strings_in(parser.get(ident), ident):
            text = ConfigParser.resolve_relative_ids(where, value)
            found = set(ReferenceResolver.match_refs_pattern(text))
            if text.startswith("%"):
                found.add(ReferenceResolver.normalize_id(text[1:]))
            reached += sorted(found - set(reached))
    return reached


def _refuse_side_effects(content: Any) -> None:
    # Harmless parts can be put together to do harm: a check builds networks and plain values only.
    for _, kind, text in code_in(content):
        if kind == "target":
            found = find_target(text)
            if found is trained_with:  # which reads a file of plain numbers
                continue
            if not (isinstance(found, type) and issubclass(found, torch.nn.Module)):
                raise ValueError(f"network_def depends on {text}, which is no network; it was not built")
        elif kind == "expression":
            tree = ast.parse(ReferenceResolver.id_matcher.sub("x", ReferenceResolver.normalize_id(text[1:])))
            if any(isinstance(node, ast.Call) for node in ast.walk(tree)):
                raise ValueError(f"network_def depends on a call, {shown(text)}; it was not built")


def _check_output(network: torch.nn.Module, metadata: Mapping[str, Any]) -> Iterator[str]:
    formats = metadata["network_data_format"]
    try:
        image, pred = formats["inputs"]["image"], formats["outputs"]["pred"]
        given, wanted = ((1, s["num_channels"], *s["spatial_shape"]) for s in (image, pred))
        dtypes = [getattr(torch, side["dtype"]) for side in (image, pred)]
    except (KeyError, TypeError, AttributeError) as error:
        yield f"metadata.json does not say what goes into the network as image and comes out as pred: {error}"
        return
    if not all(isinstance(side, int) and 0 < side <= 4096 for side in (*given, *wanted)):
        yield "metadata.json must give spatial_shape and num_channels as plain numbers from 1 to 4096"
        return
    try:
        with torch.no_grad(), torch.device("meta"):
            output = network(torch.empty(given, dtype=dtypes[0]))
    except Exception as error:  # a network can raise anything
        yield f"the network does not take {given} as metadata.json says: {_reason(error)}"
        return
    if not isinstance(output, torch.Tensor):
        yield f"the network gives {type(output).__name__}, not one tensor, when it is evaluated"
    elif tuple(output.shape) != wanted or output.dtype != dtypes[1]:
        yield (
            f"the network turns {given} into {tuple(output.shape)} {output.dtype}; metadata.json promises "
            f"{wanted} {dtypes[1]}"
        )


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:  # MONAI wraps what a constructor raises
        error = error.__cause__
    return " ".join(str(error).split())[:200] or type(error).__name__
