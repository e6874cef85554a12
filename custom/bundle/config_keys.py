# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Keys of configs: what MONAI needs is there, what is there is used, what is referred to exists.

MONAI accepts any key, so a misspelt one changes nothing and says nothing.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from monai.bundle import ConfigParser
from monai.bundle.properties import InferProperties, TrainProperties
from monai.bundle.reference_resolver import ReferenceResolver
from monai.bundle.utils import merge_kv
from monai.utils.enums import BundleProperty, BundlePropertyConfig

from custom.bundle.config_code import shown, strings_in

__all__ = ["check_keys"]

_PROPERTIES = {"train": TrainProperties, "inference": InferProperties}
# Keys that MONAI's command, its server and our documentation use by name.
_CALLED = {
    "_meta_",
    "_desc_",
    "imports",
    "initialize",
    "run",
    "finalize",
    "training",
    "evaluating",
    "inferring",
    "checkpointloader",
    "displayable_configs",
}
_WELL_KNOWN = _CALLED.union(
    str(wanted[BundlePropertyConfig.ID]).split("::")[0]
    for properties in _PROPERTIES.values()
    for wanted in properties.values()
)


def check_keys(configs: Mapping[str, dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Findings about the keys of a bundle's configs; nothing is evaluated.

    A config with ``imports`` stands for itself; any other is laid over train.json, over both train.json and
    evaluate.json, or over inference.json, and must be right over one of them.

    Args:
        configs: content by name without suffix; must have train, evaluate and inference.

    Yields:
        Name of the config and the finding.
    """
    for name, properties in _PROPERTIES.items():
        for wanted in properties.values():
            ident = str(wanted[BundlePropertyConfig.ID])
            if wanted[BundleProperty.REQUIRED] and not _exists(configs[name], ident):
                yield name, f"{ident} is missing, which MONAI requires"
    for name, config in configs.items():
        if "imports" in config:
            ways = [[config]]
        else:
            train, evaluate, inference = (configs[base] for base in ("train", "evaluate", "inference"))
            ways = [[train, config], [train, evaluate, config], [inference, config]]
        first: list[str] | None = None
        for stack in ways:
            findings = list(_check_stack(stack))
            first = findings if first is None else first
            if not findings:
                break
        else:
            yield from ((name, finding) for finding in first or ())


def _check_stack(stack: list[dict[str, Any]]) -> Iterator[str]:
    """Findings about the last of configs that are laid over each other."""
    merged, before = ConfigParser({}), {}
    for config in stack:
        before = copy.deepcopy(merged.get())
        for key, value in copy.deepcopy(config).items():
            parent, last = ReferenceResolver.split_id(key.lstrip("+"), last=True)
            if not last or (parent and not _exists(merged.get(), parent)):
                yield f"{shown(key)} changes a part of {shown(parent)}, which does not exist"
                continue
            try:
                merge_kv(merged, key, value)
            except (KeyError, IndexError, ValueError, TypeError) as error:
                yield f"{shown(key)} cannot be laid over the config: {' '.join(str(error).split())[:200]}"
    used, missing = _references(merged.get())
    for where, reference in missing:
        yield f"{shown(where)[1:-1]} refers to {shown(reference)}, which does not exist"
    for key in stack[-1]:
        ident = ReferenceResolver.normalize_id(key.lstrip("+"))
        parent = ReferenceResolver.split_id(ident, last=True)[0]
        argument = parent and _exists(before, f"{parent}::_target_")
        if _exists(before, ident) or ident in used or argument or ident in _WELL_KNOWN:
            continue
        close = difflib.get_close_matches(ident[:100], sorted(_WELL_KNOWN | used), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        yield f"unknown key {shown(key)}: nothing refers to it, and MONAI does not know it{hint}"


def _exists(config: Any, ident: str) -> bool:
    # MONAI's own look-up measures how alike all keys are when one is missing, which a hostile config can
    # make take for ever.
    for part in ident.split("::"):
        if isinstance(config, dict) and part in config:
            config = config[part]
        elif isinstance(config, list) and re.fullmatch(r"\d{1,6}", part) and int(part) < len(config):
            config = config[int(part)]
        else:
            return False
    return True


def _references(config: Any) -> tuple[set[str], list[tuple[str, str]]]:
    """Ids that are referred to, with every id above each, and those of them that do not exist."""
    used: set[str] = set()
    missing = []
    for where, value in strings_in(config):
        try:
            text = ConfigParser.resolve_relative_ids(where, value)
        except ValueError:
            missing.append((where, value))
            continue
        found = set(ReferenceResolver.match_refs_pattern(text))
        if text.startswith("%"):
            found.add(ReferenceResolver.normalize_id(text[1:]))
        for reference in found:
            parts = reference.split("::")
            used.update("::".join(parts[: n + 1]) for n in range(len(parts)))
            if not _exists(config, reference) and not re.fullmatch(r"_meta_(::.*)?", reference):
                missing.append((where, reference))
    return used, missing
