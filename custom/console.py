# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""What a user sees: one clear line and exit code 2 for a mistake, and libraries that do not chatter."""

from __future__ import annotations

import difflib
import functools
import json
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from types import TracebackType
from typing import Any

from custom.interrupts import catch_up, let_one_process_answer

__all__ = [
    "CohortError",
    "DEBUG_VARIABLE",
    "bar_interval",
    "check_overrides",
    "command",
    "describe_error",
    "list_failures",
    "read_switch",
    "require_file",
    "start",
]

DEBUG_VARIABLE = "COVID_CT_DEBUG"
"""Set this environment variable to 1 to see full tracebacks."""

USER_ERRORS = (ValueError, TypeError, OSError)
LISTED = 50  # failures that one line spells out
INTERRUPTED = 130  # what shells report for Ctrl-C

# torch's data loader pastes a worker's traceback into the message; the exceptions in it start a line.
_PASTED_ERROR = re.compile(
    r"^(ValueError|TypeError|\w*(?:FileNotFound|Permission|OS)Error): (.+)$", re.MULTILINE
)


def bar_interval() -> float:
    """Seconds between two updates of a progress bar: often on a terminal, seldom in a log file."""
    return 0.5 if sys.stderr.isatty() else 20.0


class CohortError(ValueError):
    """Studies of a cohort failed: exit code 1 when some did, 2 when all did.

    Args:
        failures: name and reason of each study that failed.
        total: number of studies.
        unit: what they are called.
    """

    def __init__(self, failures: Sequence[Mapping[str, str]], total: int, unit: str = "studies") -> None:
        self.exit_code = 1 if len(failures) < total else 2
        named = list_failures(failures)
        super().__init__(f"{len(failures)} of {total} {unit} failed: {named}" if total > 1 else named)


def list_failures(failures: Sequence[Mapping[str, str]]) -> str:
    """The names and reasons of what failed in one line, of the first few where they are many.

    Args:
        failures: name and reason of each.
    """
    named = [f"{failure['name']}: {failure['reason']}" for failure in failures[:LISTED]]
    more = [f"and {len(failures) - LISTED} more"] if len(failures) > LISTED else []
    return "; ".join(named + more)


def _chain(error: BaseException) -> Iterable[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def describe_error(error: BaseException) -> str | None:
    """The one line to show for an error, or None where it is not the user's to mend.

    MONAI wraps what a transform or a constructor raises, so the chain of causes is followed to its start.

    Args:
        error: what was raised.
    """
    chain = list(_chain(error))
    for current in chain:
        pasted = _PASTED_ERROR.search(str(current)) if "Traceback" in str(current) else None
        if pasted:
            return pasted.group(2).strip()
    # A system's error that names its file says it all. What came before may be that pathlib tried a folder
    # whose parent was not there yet, which is not what the user has to mend.
    plain = next((n for n, e in enumerate(chain) if _names_a_file(e) and e.__cause__ is None), len(chain))
    root = next((e for e in reversed(chain[: plain + 1]) if isinstance(e, USER_ERRORS)), None)
    if root is None:
        return None
    if isinstance(root, OSError) and _names_a_file(root):
        return f"{root.strerror}: {root.filename}"
    return " ".join(str(root).split()) or type(root).__name__


def _names_a_file(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.filename is not None and bool(error.strerror)


def _report(error: BaseException) -> int | None:
    """Print the line for an error; returns the exit code, or None where a traceback is due."""
    if any(isinstance(current, KeyboardInterrupt) for current in _chain(error)):
        # Whatever is there is whole: every file is renamed into its place.
        print("\ninterrupted; the same command continues from what is finished", file=sys.stderr)
        return INTERRUPTED
    line = None if os.environ.get(DEBUG_VARIABLE) == "1" else describe_error(error)
    if line is None:
        return None
    print(f"error: {line}", file=sys.stderr)
    return next((e.exit_code for e in _chain(error) if isinstance(e, CohortError)), 2)


class _EngineErrors(logging.Filter):
    """Drops the engines' own echo of an exception that the hook reports anyway."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return "is terminating due to exception" not in message and not message.startswith("Exception:")


_ENGINE_ERRORS = _EngineErrors()


class _QuietLogger(logging.Logger):
    """A logger without that echo: MONAI's handlers make loggers of their own, late and with own outlets."""

    def __init__(self, name: str, level: int = logging.NOTSET) -> None:
        super().__init__(name, level)
        self.addFilter(_ENGINE_ERRORS)


def _mute_engine_errors() -> None:
    # A logger's filters see only its own records, so each has to have it.
    for logger in [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]:
        if isinstance(logger, logging.Logger):
            logger.addFilter(_ENGINE_ERRORS)
    logging.setLoggerClass(_QuietLogger)


def start(argv: Sequence[str] | None = None) -> None:
    """Make ``python -m monai.bundle run`` behave like our own commands; the bundles' ``initialize`` calls it.

    An uncaught user error ends the process with one line and exit code 2, Ctrl-C with one line and 130;
    processes that are forked from this one leave Ctrl-C to it. A command-line override that no config
    defines, which MONAI accepts in silence, is refused. The notice about a missing GPU decoder, which MONAI
    prints for every loader that is made, is left out.

    Args:
        argv: command line to look for misspelt overrides in, defaults to ``sys.argv[1:]`` when MONAI's
            bundle command is what is running.

    Raises:
        ValueError: When an override names a key that the configs do not have.
    """

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        # Within a process group torch gives this hook a buffer to write to, and loses it when this raises.
        with redirect_stderr(sys.__stderr__):
            code = _report(error)
            if code is None:
                sys.__excepthook__(kind, error, trace)
                code = 1
        if code == INTERRUPTED:
            # A second Ctrl-C, out of impatience, would show a traceback of the interpreter's end.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.stdout.flush()
        # An exception hook cannot set the exit code by returning, and raising SystemExit in it is honoured.
        raise SystemExit(code)

    sys.excepthook = hook
    sys.unraisablehook = catch_up
    let_one_process_answer()
    if os.environ.get("RANK", "0") != "0":  # in a distributed run the first process speaks for all
        logging.getLogger().setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message="NvImgCodecPydicomReader")
    logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").setLevel(logging.ERROR)
    if os.environ.get(DEBUG_VARIABLE) != "1":
        _mute_engine_errors()
    if argv is None:
        running_bundle = Path(sys.argv[0]).parts[-3:-1] == ("monai", "bundle") if sys.argv else False
        argv = sys.argv[1:] if running_bundle else ()
    check_overrides(argv)


def check_overrides(argv: Sequence[str]) -> None:
    """Refuse ``--key value`` pairs of ``monai.bundle run`` that would not do what they say.

    These are keys that no given config file defines, and ``true`` and ``false`` for a switch: MONAI reads
    values as Python does, and either text would be true.

    Args:
        argv: arguments after ``python -m monai.bundle``.

    Raises:
        ValueError: When a key is unknown (the message names the closest known key) or a switch such a text.
    """
    options: dict[str, str] = {}
    for position, word in enumerate(argv):
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            following = argv[position + 1] if position + 1 < len(argv) else ""
            options[name] = value or following
    if "config_file" not in options:
        return
    known = {
        "run_id",
        "init_id",
        "final_id",
        "meta_file",
        "config_file",
        "logging_file",
        "tracking",
        "args_file",
    }
    known |= {"workflow_type", "workflow_name", "properties_path", "runner_id"}
    switches: set[str] = set()
    listed = options["config_file"].strip("[] ").split(",")
    for name in (part.strip(" '\"") for part in listed):
        if not Path(name).is_file():
            return  # MONAI names the missing file itself
        if name.endswith(".json"):
            content = json.loads(Path(name).read_text(encoding="utf-8"))
            known |= {key.lstrip("+") for key in content}
            switches |= {key for key, value in content.items() if _is_switch(value)}
    for name, text in options.items():
        if name in switches and text in ("true", "false"):
            raise ValueError(f"--{name} {text}: write {text.capitalize()}, with a capital letter")
        first = re.split(r"::|#", name)[0]
        if first not in known and first.replace("-", "_") not in known:
            close = difflib.get_close_matches(first, sorted(known), n=1)
            hint = f"did you mean --{close[0]}?" if close else "see the keys of the config files"
            raise ValueError(f"unknown option --{name}: no config file defines '{first}'; {hint}")


def _is_switch(value: Any) -> bool:
    """Whether a config's value is true or false, or taken from the weights with such a default."""
    return isinstance(value.get("default") if isinstance(value, dict) else value, bool)


def require_file(path: str | os.PathLike, what: str) -> None:
    """Say plainly that a file is needed, before anything starts that cannot work without it.

    Args:
        path: the file.
        what: what it is, and how to get it.

    Raises:
        FileNotFoundError: When it is not there.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} not found; it should hold the {what}")


def read_switch(name: str, value: bool | str) -> bool:
    """What a switch says; of the command line ``false`` comes as a text, and any text would pass for yes.

    Args:
        name: of the switch.
        value: true or false.

    Raises:
        ValueError: When it is neither.
    """
    known = {"true": True, "false": False}
    if str(value).lower() not in known:
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return known[str(value).lower()]


def command(function: Callable[..., Any]) -> Callable[..., int]:
    """Turn a script's main function into one that returns an exit code and prints errors as one line.

    Args:
        function: returns None or an exit code; user errors it raises become one line and exit code 2.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> int:
        try:
            return int(function(*args, **kwargs) or 0)
        except (Exception, KeyboardInterrupt) as error:
            code = _report(error)
            if code is None:
                raise
            return code

    return wrapped
