# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Settings that travel with weights: what inference must share with the training that made them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from custom.bundle.config_code import read_json, shown
from custom.data.files import write_json

__all__ = ["SCHEMA", "check_settings", "read_settings", "settings_file", "trained_with", "write_settings"]

SCHEMA = "covid-ct-bundles-weights-1.0"


def settings_file(weights: str | os.PathLike) -> Path:
    """The file beside weights that holds their settings: ``model.json`` beside ``model.pt``.

    Args:
        weights: the weights file.
    """
    return Path(weights).with_suffix(".json")


def trained_with(ckpt_path: str | os.PathLike | None, key: str, default: Any) -> Any:
    """The value that a setting had when weights were trained; configs take it for their default.

    Args:
        ckpt_path: the weights file; None where there is none.
        key: name of the setting, such as ``hu_window``.
        default: value where no file beside the weights tells of this setting: the published one.

    Raises:
        ValueError: In one line, when the file of settings cannot be read, or its value is of another kind.
    """
    value = default if ckpt_path is None else read_settings(ckpt_path).get(key, default)
    if _kind(value) is not _kind(default):
        file = settings_file(str(ckpt_path))
        raise ValueError(f"{file}: {key} is {value}, where a value like {default} is needed; {_ADVICE}")
    return value


def read_settings(weights: str | os.PathLike) -> dict[str, Any]:
    """The settings beside a weights file, empty where there are none.

    Args:
        weights: the weights file.

    Raises:
        ValueError: In one line, when they are there and cannot be read.
    """
    file = settings_file(weights)
    if not os.path.lexists(file):
        return {}
    try:
        content = read_json(file)
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise ValueError(f"is not of the schema {SCHEMA}")
        if not isinstance(content.get("settings"), dict):
            raise ValueError("has no settings")
        return check_settings(content["settings"])
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror or error}); {_ADVICE}") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}; {_ADVICE}") from None


def write_settings(weights: str | os.PathLike, settings: Mapping[str, Any] | None) -> None:
    """Put settings beside a weights file, or take away those of other weights.

    Args:
        weights: the weights file.
        settings: the settings; None where they are not known.

    Raises:
        ValueError: When a value is not plain, or cannot be right.
    """
    if settings is None:
        settings_file(weights).unlink(missing_ok=True)
    else:
        write_json(settings_file(weights), {"schema": SCHEMA, "settings": check_settings(settings)})


def check_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON holds them, without those that are None.

    Args:
        settings: numbers, true or false, and lists of numbers, by name.

    Raises:
        ValueError: In one line, when a value is something else, or cannot be right.
    """
    checked: dict[str, Any] = {}
    for key, value in settings.items():
        if value is None:
            continue
        plain = list(value) if isinstance(value, (list, tuple)) else value
        listed = plain if isinstance(plain, list) else [plain]
        number = all(type(item) in (int, float) and math.isfinite(item) for item in listed)
        if not listed or not (number or isinstance(plain, bool)):
            raise ValueError(f"{shown(key)[1:-1]} is {shown(value)}, no number, list of numbers or switch")
        right, wanted = _FORMS.get(key, (lambda _: True, ""))
        if not right(plain):
            raise ValueError(f"{key} is {plain}, it must be {wanted}")
        checked[key] = plain
    return checked


def _kind(value: Any) -> type:
    return list if isinstance(value, (list, tuple)) else bool if isinstance(value, bool) else float


def _whole(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, int) and item > 0 for item in value)


_ADVICE = "take the file that came with the weights, or none for the published settings"
# A wrong one of these would give wrong masks, or an error that names another cause.
_FORMS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "hu_window": (lambda v: isinstance(v, list) and len(v) == 2 and v[0] < v[1], "two HU, the lower first"),
    "image_size": (lambda v: _whole(v) and len(v) == 2, "two numbers of pixels"),
    "lung_margin_mm": (lambda v: not isinstance(v, (list, bool)) and v >= 0, "mm, 0 or more"),
    "channels": (_whole, "whole numbers above 0"),
    "flip_inference": (lambda v: isinstance(v, bool), "true or false"),
    "match_greys": (lambda v: isinstance(v, bool), "true or false"),
    "threshold": (lambda v: not isinstance(v, (list, bool)) and 0 < v < 1, "a probability between 0 and 1"),
    "absolute_intensity": (lambda v: isinstance(v, bool), "true or false"),
    "width": (lambda v: not isinstance(v, (list, bool)) and v > 0, "a number above 0"),
}
