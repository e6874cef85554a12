# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from custom.console import check_overrides, command, describe_error, require_file
from tests.permissions import read_only

ROOT = Path(__file__).resolve().parent.parent


def raised(function) -> BaseException:
    try:
        function()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def run_program(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )


def test_the_first_cause_is_what_the_user_reads():
    def wrapped():
        try:
            raise ValueError("scan.nii is\n  4-D; give 3-D")
        except ValueError as error:
            raise RuntimeError("applying transform Load") from error

    assert describe_error(raised(wrapped)) == "scan.nii is 4-D; give 3-D"
    assert describe_error(RuntimeError("a bug")) is None
    assert describe_error(raised(Path("no/such/file").read_text)) == "No such file or directory: no/such/file"


def test_a_folder_that_cannot_be_made_is_refused_for_the_reason_that_matters(tmp_path):
    """pathlib tries the last folder first, which is missing only because the others are."""
    with read_only(tmp_path):
        error = raised(lambda: (tmp_path / "a" / "b" / "c").mkdir(parents=True))
    assert describe_error(error) == f"Permission denied: {tmp_path / 'a'}"


def test_a_data_loader_workers_pasted_traceback_is_read():
    pasted = (
        "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
    )
    pasted += (
        "  File 'x'\nValueError: a.nii holds NaN; mend it\n\nThe above ...\nRuntimeError: applying transform"
    )
    assert describe_error(RuntimeError(pasted)) == "a.nii holds NaN; mend it"


def test_command_gives_exit_codes(capsys, monkeypatch):
    monkeypatch.delenv("COVID_CT_DEBUG", raising=False)
    assert command(lambda: None)() == 0
    assert command(lambda: 1)() == 1

    def user_error():
        raise ValueError("what, where")

    assert command(user_error)() == 2
    assert capsys.readouterr().err == "error: what, where\n"
    with pytest.raises(ZeroDivisionError):
        command(lambda: 1 / 0)()
    monkeypatch.setenv("COVID_CT_DEBUG", "1")
    with pytest.raises(ValueError, match="what, where"):
        command(user_error)()

    def interrupted():
        raise KeyboardInterrupt

    assert command(interrupted)() == 130


def test_misspelt_overrides_are_refused_with_a_hint(tmp_path):
    for name, content in (("train.json", {"epochs": 3, "train": {}}), ("more.json", {"+extra": 1})):
        (tmp_path / name).write_text(json.dumps(content))
    files = f"['{tmp_path / 'train.json'}','{tmp_path / 'more.json'}']"
    check_overrides(
        ["run", "--config_file", files, "--epochs", "3", "--train::x=1", "--extra", "2", "--run_id", "a"]
    )
    with pytest.raises(ValueError, match=r"unknown option --epoch: .* did you mean --epochs"):
        check_overrides(["run", "--config_file", files, "--epoch", "3"])
    with pytest.raises(ValueError, match="no config file defines 'zzz'"):
        check_overrides(["run", f"--config_file={tmp_path / 'train.json'}", "--zzz#a", "1"])


def test_a_switch_that_python_would_take_for_a_text_is_refused(tmp_path):
    """--resume false went on from the checkpoint: the text 'false' is true."""
    content = {"resume": True, "flip": {"_target_": "f", "default": False}, "name": "x"}
    (tmp_path / "train.json").write_text(json.dumps(content))

    def check(*words: str) -> None:
        check_overrides(["run", "--config_file", str(tmp_path / "train.json"), *words])

    check("--resume", "False", "--flip", "True", "--name", "false")
    with pytest.raises(ValueError, match=r"--resume false: write False"):
        check("--resume", "false")
    with pytest.raises(ValueError, match=r"--flip true: write True"):
        check("--flip=true")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="it should hold the weights"):
        require_file(tmp_path / "model.pt", "weights")


def test_start_turns_an_uncaught_error_into_one_line_and_code_2():
    program = (
        "import custom; custom.console.start(); raise RuntimeError('outer') from ValueError('inner, do this')"
    )
    done = run_program(program)
    assert done.returncode == 2
    assert done.stderr == "error: inner, do this\n"
    program = "import custom; custom.console.start(); raise RuntimeError('a bug')"
    done = run_program(program)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_an_interrupt_that_python_can_only_drop_comes_again():
    """As in __del__, where a data loader ends its workers."""
    program = (
        "import custom, os, signal, time\n"
        "custom.console.start()\n"
        "class Held:\n"
        "    def __del__(self):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(0.2)\n"
        "held = Held()\n"
        "del held\n"
        "time.sleep(600)\n"
    )
    done = run_program(program)
    assert done.returncode == 130
    assert done.stderr == "\ninterrupted; the same command continues from what is finished\n"


def test_loggers_that_are_made_later_do_not_echo_errors_either():
    program = (
        "import custom, logging, sys\n"
        "custom.console.start()\n"
        "late = logging.getLogger('validation')\n"
        "late.addHandler(logging.StreamHandler(sys.stdout))\n"
        "late.error('Exception: 7', exc_info=ValueError(7))\n"
        "late.error('a line')\n"
        "raise ValueError('7 is odd')\n"
    )
    done = run_program(program)
    assert (done.returncode, done.stdout, done.stderr) == (2, "a line\n", "error: 7 is odd\n")


def test_the_line_is_shown_within_a_process_group_too():
    program = (
        "import custom, torch\n"
        "custom.console.start()\n"
        "store = torch.distributed.HashStore()\n"
        "torch.distributed.init_process_group('gloo', store=store, rank=0, world_size=1)\n"
        "raise ValueError('7 is odd')\n"
    )
    done = run_program(program)
    assert done.returncode == 2 and "error: 7 is odd" in done.stderr.splitlines()
