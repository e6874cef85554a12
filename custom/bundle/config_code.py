# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""What a config can run: found by reading it, so that a stranger's can be judged before anything of it runs.

MONAI calls whatever a ``_target_`` names, evaluates every string that starts with ``$``, loads a file that a
``%`` names, and looks up some arguments (a reader, say) by their names. Hence each of these must be on
a list of known ones; patterns that try to tell good code from bad do not hold.
"""

from __future__ import annotations

import builtins
import configparser
import functools
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from pydoc import ErrorDuringImport, locate
from typing import Any

from monai.bundle import ComponentLocator, ConfigParser

__all__ = [
    "check_code",
    "check_logging",
    "check_targets",
    "code_in",
    "find_target",
    "read_json",
    "shown",
    "strings_in",
]

MAX_JSON_BYTES = 2 << 20
MAX_DEPTH = 50
_DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
_OUTSIDE = re.compile(r"^[/\\~]|^[A-Za-z]:[/\\]|(^|[/\\])\.\.([/\\]|$)")
_MODES = ("default", "callable")
_TEXT = ("_desc_",)  # keys whose values are for people


def shown(text: Any, length: int = 160) -> str:
    """Text of a stranger, on one line and without control characters.

    Args:
        text: what to show.
        length: letters after which it is cut.
    """
    line = json.dumps(text if isinstance(text, str) else str(text))
    return line if len(line) <= length else f'{line[:length]}..."'


def read_json(path: Path) -> Any:
    """Read a JSON file in which no key comes twice.

    Args:
        path: the file.

    Raises:
        ValueError: In one line, when it is none.
    """
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"has more than {MAX_JSON_BYTES} bytes")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        if twice:
            raise ValueError(f"has the key {shown(twice[0])} twice")
        return dict(pairs)

    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error}") from None
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8 text") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    level, depth = [content], 0
    while level := [item for value in level for item in _items(value)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError("is nested too deeply")
    return content


def _items(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def code_in(content: Any) -> Iterator[tuple[str, str, str]]:
    """Everything in a config that MONAI could run.

    Args:
        content: of a JSON file.

    Yields:
        The id where it stands, its kind ("expression", "target", "mode", "file" or "name") and the text.
    """
    for where, value in strings_in(content):
        last = re.split(r"::|#", where)[-1]
        if last == "_target_":
            yield where, "target", value
        elif last == "_mode_" and value not in _MODES:
            yield where, "mode", value
        elif value.startswith("$"):
            yield where, "expression", value
        elif value.startswith("%") and ConfigParser.split_path_id(value[1:])[0]:
            yield where, "file", value
        elif last not in _TEXT and (_DOTTED.fullmatch(value) or callable(getattr(builtins, value, None))):
            yield where, "name", value


def strings_in(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """All strings in a config with the ids where they stand.

    Args:
        value: a config or a part of one.
        where: id of the part.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            yield from strings_in(item, f"{where}::{key}" if where else key)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from strings_in(item, f"{where}::{number}")
    elif isinstance(value, str):
        yield where, value


def check_code(content: Any, known: Collection[str]) -> Iterator[tuple[str, str]]:
    """Findings about what a config can run or reach.

    Args:
        content: of a JSON file.
        known: expressions and targets that are known to be harmless.

    Yields:
        A finding, and the expression or target that would have to be known to avoid it, "" where none would.
    """
    for where, kind, text in code_in(content):
        at = shown(where)[1:-1]
        if kind == "mode":
            yield f"{at}: mode {shown(text)} is neither of {', '.join(_MODES)}", ""
        elif kind == "file":
            yield f"{at}: {shown(text)} takes in another file, which is not checked", ""
        elif text not in known:
            what = "a name that MONAI may look up and call" if kind == "name" else kind
            yield f"{at}: {what} that is not known: {shown(text, 500)}", text
    for where, value in strings_in(content):
        if _OUTSIDE.search(value) and not value.startswith("$") and not where.endswith("_desc_"):
            yield f"{shown(where)[1:-1]}: {shown(value)} is a path outside the bundle", ""
    if isinstance(content, dict) and content.get("bundle_root", ".") != ".":
        yield 'bundle_root must be ".", the folder that the bundle is run in', ""


@functools.cache
def _locator() -> ComponentLocator:
    return ComponentLocator()  # makes a table of all of MONAI when it is first used


def find_target(name: str) -> Any:
    """What MONAI takes a target for, None where there is no such thing; its module is imported.

    Args:
        name: of the target, which must be known.

    Raises:
        ErrorDuringImport: When its module cannot be imported.
    """
    module = _locator().get_component_module_name(name)
    if module is None:
        return locate(name)
    return locate(f"{module[0] if isinstance(module, list) else module}.{name}")


def check_targets(content: Any) -> Iterator[str]:
    """Findings about targets that name nothing.

    Their modules are imported: only for a config that :func:`check_code` has nothing against.

    Args:
        content: of a JSON file.
    """
    for where, kind, text in code_in(content):
        if kind != "target" or text.startswith("$"):
            continue
        try:
            found = find_target(text)
        except ErrorDuringImport as error:
            yield f"{where}: target {text} cannot be imported: {' '.join(str(error).split())}"
            continue
        if found is None:
            yield f"{where}: target {text} does not exist in custom, MONAI or another package"


def check_logging(path: Path) -> Iterator[str]:
    """Findings about a ``logging.conf`` that does more than print; a file handler could overwrite any file.

    Args:
        path: the file.
    """
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(path.read_text(encoding="utf-8"))
    except (configparser.Error, UnicodeDecodeError) as error:
        yield f"cannot be read: {' '.join(str(error).split())[:200]}"
        return
    for section in parser.sections():
        for option, allowed in (
            ("class", ("StreamHandler", "logging.StreamHandler")),
            ("args", ("(sys.stdout,)", "(sys.stderr,)", "()")),
            ("kwargs", ("{}",)),
        ):
            value = parser.get(section, option, fallback=allowed[0])
            if value not in allowed:
                yield f"[{shown(section)[1:-1]}] has {option} {shown(value)}, not one of {', '.join(allowed)}"
