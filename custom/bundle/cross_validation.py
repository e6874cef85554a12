# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Cross-validation of one or several systems, fold by fold, each a run of the bundles' own configs."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import custom
from custom.bundle.study import Study, System
from custom.console import CohortError, bar_interval
from custom.data.datalist import read_datalist
from custom.data.files import file_sha256, write_json
from custom.metrics import CaseScores
from custom.reporting.scores import read_scores

__all__ = ["CrossValidation"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Run:
    system: System
    fold: int | None  # None: a stage that comes before the folds

    @property
    def name(self) -> str:
        return self.system.name if self.fold is None else f"{self.system.name}, fold {self.fold}"


class CrossValidation:
    """Trains every system on all folds but one and scores it on that one, for each fold.

    Each run has a folder ``runs/<system>/fold_<k>`` with the settings it was made with, its configs, log,
    checkpoints, and in ``scores`` what :class:`custom.handlers.ScoreReport` writes. A finished run is not run
    again, and an interrupted one goes on from its checkpoint, so the same command goes on after whatever
    stopped it. Prepared cases are shared by all runs.

    Args:
        study: the systems.
        dataset_dir: data set with ``datalist.json`` and folds.
        output_dir: folder for the runs.
        folds: which folds to hold out; all of the list where None.
        jobs: runs at the same time; they share the processor cores, and GPUs are dealt out in turn.
        processes: processes of one run, started by torchrun with the bundle's ``multi_gpu`` configs.

    Raises:
        ValueError: When the data list has no such folds, or no fold is left to train on.
    """

    def __init__(
        self,
        study: Study,
        dataset_dir: str | os.PathLike,
        output_dir: str | os.PathLike,
        folds: Sequence[int] | None = None,
        jobs: int = 1,
        processes: int = 1,
    ) -> None:
        self.study = study
        self.dataset_dir = Path(dataset_dir).resolve()
        self.output_dir = Path(output_dir).resolve()
        self.data_list = self.dataset_dir / "datalist.json"
        self.data = read_datalist(self.data_list)
        listed = sorted({entry["fold"] for entry in self.data["training"] if "fold" in entry})
        needed = 3 if study.selection == "inner_fold" else 2
        if len(listed) < needed:
            raise ValueError(
                f"data list {self.data_list} has {len(listed)} folds, at least {needed} are needed with "
                f"selection '{study.selection}'; give its entries a 'fold'"
            )
        if unknown := sorted(set(folds or ()) - set(listed)):
            raise ValueError(f"data list {self.data_list} has no fold {unknown[0]}; it has {listed}")
        if homeless := [stage.name for stage in study.stages if "dataset_dir" not in stage.overrides]:
            raise ValueError(
                f"stage '{homeless[0]}' has no data set of its own; give --set "
                f"{homeless[0]}:dataset_dir=FOLDER"
            )
        if jobs < 1 or processes < 1:
            raise ValueError(f"jobs and processes must be at least 1, got {jobs} and {processes}")
        self.listed = listed
        self.folds = listed if folds is None else sorted(set(folds))
        self.jobs = jobs
        self.processes = processes
        self._running: dict[str, subprocess.Popen] = {}
        self._stop = threading.Event()

    def run(self) -> dict[str, list[CaseScores]]:
        """Run what is not finished yet.

        Returns:
            The scores of each system's cases, each case scored when its fold was held out.

        Raises:
            CohortError: When runs failed; the others were run.
            ValueError: When a run was begun with other settings.
        """
        stages = [_Run(stage, None) for stage in self.study.stages]
        runs = [_Run(system, fold) for fold in self.folds for system in self.study.systems]
        for run in stages + runs:
            self._check_settings(run)
        total = len(stages) + len(runs)
        bar = tqdm(total=total, desc="runs", unit="run", dynamic_ncols=True, mininterval=bar_interval())
        with bar, _termination_raised():
            failures = self._run_all(stages, bar) or self._run_all(runs, bar)
        if failures:
            raise CohortError(failures, total, "runs")
        return {system.name: self._read(system) for system in self.study.systems}

    def folder(self, system: System, fold: int | None) -> Path:
        """Folder of one run."""
        return self.output_dir / "runs" / system.folder / ("stage" if fold is None else f"fold_{fold}")

    def _read(self, system: System) -> list[CaseScores]:
        scores = []
        for fold in self.folds:
            for case in read_scores(self.folder(system, fold) / "scores" / "scores.json"):
                scores.append(CaseScores({**case.row, "fold": fold}, case.slices))
        return scores

    def _run_all(self, runs: Sequence[_Run], bar: tqdm) -> list[dict[str, str]]:
        failures: list[dict[str, str]] = []
        with ThreadPoolExecutor(self.jobs) as pool:
            slots = list(range(self.jobs))
            futures: dict[Future, tuple[_Run, int]] = {}
            todo = list(runs)
            try:
                while todo or futures:
                    while todo and slots:
                        run, slot = todo.pop(0), slots.pop(0)
                        futures[pool.submit(self._run_one, run, slot)] = run, slot
                    bar.set_postfix_str("; ".join(run.name for run, _ in futures.values()))
                    for future in wait(futures, return_when=FIRST_COMPLETED).done:
                        run, slot = futures.pop(future)
                        slots.append(slot)
                        reason = future.result()
                        if reason is not None:
                            failures.append({"name": run.name, "reason": reason})
                        bar.update()
            except BaseException:
                self._stop.set()
                for process in list(self._running.values()):
                    process.terminate()
                raise
        return failures

    def _run_one(self, run: _Run, slot: int) -> str | None:
        """Train and score; returns why it failed, or None."""
        folder = self.folder(run.system, run.fold)
        with _locked(folder / "lock", self._stop) as lock:
            done = folder / ("models/model.pt" if run.fold is None else "scores/scores.json")
            finished = folder / "finished"
            if self._stop.is_set() or (finished.is_file() and done.is_file()):
                return None
            write_json(folder / "settings.json", self._settings(run))
            steps: list[tuple[str, list[str]]] = [("training", [])]
            steps += [] if run.fold is None else [("evaluating", ["evaluate"])]
            for step, configs in steps:
                if self._stop.is_set():
                    return None
                reason = self._run_step(run, step, configs, slot, lock)
                if reason is not None:
                    return reason
            finished.touch()
        return None

    def _run_step(self, run: _Run, step: str, configs: list[str], slot: int, lock: int) -> str | None:
        folder = self.folder(run.system, run.fold)
        overrides = folder / f"{step}.json"
        write_json(overrides, self._overrides(run, step))
        command = [sys.executable, "-m"]
        if self.processes > 1:
            launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={self.processes}", "-m"]
            command += launcher
            configs = [*configs, "multi_gpu_train" if step == "training" else "multi_gpu_evaluate"]
        bundle = run.system.bundle / "configs"
        files = [str(file) for file in [*run.system.configs(*configs), overrides]]
        command += ["monai.bundle", "run", step, "--config_file", str(files)]
        command += [
            "--meta_file",
            str(bundle / "metadata.json"),
            "--logging_file",
            str(bundle / "logging.conf"),
        ]
        threads = max(1, (os.cpu_count() or 1) // (self.jobs * self.processes))
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        gpus = torch.cuda.device_count()
        if gpus and self.processes == 1 and self.jobs > 1:
            environment["CUDA_VISIBLE_DEVICES"] = _visible_devices(gpus)[slot % gpus]
        with open(folder / "log.txt", "a", encoding="utf-8") as log:
            begin = log.tell()
            process = subprocess.Popen(
                command,
                cwd=run.system.bundle,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[lock],  # so that the folder stays taken should only this process be killed
            )
            self._running[run.name] = process
            try:
                code = process.wait()
            finally:
                del self._running[run.name]
        return (
            None
            if code == 0
            else f"{_last_error(folder / 'log.txt', begin, code)} (log: {folder / 'log.txt'})"
        )

    def _overrides(self, run: _Run, step: str) -> dict[str, Any]:
        folder = self.folder(run.system, run.fold)
        content: dict[str, Any] = {
            "bundle_root": str(run.system.bundle),
            "dataset_dir": str(self.dataset_dir),
            "ckpt_dir": str(folder / "models"),
            "output_dir": str(folder / ("training" if step == "training" else "scores")),
            "cache_dir": str(self.output_dir / "cache"),
            **run.system.overrides,
        }
        if run.system.start is not None:
            content["pretrained_weights"] = str(self._start_weights(run))
        if run.fold is None:
            return content
        content["fold"] = run.fold
        if step == "training" and self.study.selection == "last":
            content["val_interval"] = "$@epochs + 1"
        elif step == "training":
            inner = self.inner_fold(run.fold)
            cases = "$custom.data.load_cases(@data_list_file, @dataset_dir, {})"
            content["train#dataset#data"] = cases.format(f"exclude_fold=[{run.fold}, {inner}]")
            content["validate#dataset#data"] = cases.format(f"fold={inner}")
        return content

    def inner_fold(self, fold: int) -> int:
        """The fold that chooses the weights when ``fold`` is held out."""
        return int(self.listed[(self.listed.index(fold) + 1) % len(self.listed)])

    def _start_weights(self, run: _Run) -> Path:
        stage = next(stage for stage in self.study.stages if stage.name == run.system.start)
        return self.folder(stage, None) / "models" / "model.pt"

    def _settings(self, run: _Run) -> dict[str, Any]:
        """What decides the result of a run, wherever its files lie."""
        system = run.system
        return {
            "system": system.name,
            "fold": run.fold,
            "selection": None if run.fold is None else self.study.selection,
            "configs": {file.name: file_sha256(file) for file in system.configs()},
            "overrides": dict(system.overrides),
            "start": system.start,
            "data_list_sha256": file_sha256(
                Path(system.overrides.get("dataset_dir", self.dataset_dir)) / "datalist.json"
            ),
            "processes": self.processes,
            "version": custom.__version__,
        }

    def _check_settings(self, run: _Run) -> None:
        folder = self.folder(run.system, run.fold)
        file = folder / "settings.json"
        if not file.is_file():
            return
        before, now = json.loads(file.read_text(encoding="utf-8")), self._settings(run)
        changed = [key for key in now if now[key] != before.get(key)]
        if changed:
            raise ValueError(
                f"{run.name} in {folder} was begun with other settings ({', '.join(changed)}); give another "
                "output folder, or remove that one to run it again"
            )


@contextmanager
def _termination_raised() -> Iterator[None]:
    """Let SIGTERM, by which schedulers and containers stop a command, end it like Ctrl-C, its runs too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _locked(path: Path, stop: threading.Event) -> Iterator[int]:
    """Hold a file's lock; waits while another command, or what is left of a killed one, holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        waiting = False
        while not stop.is_set():
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if not waiting:
                    logger.warning(f"{path.parent} is in use by another process; waiting for it to end")
                waiting = True
                stop.wait(1)
        yield file.fileno()


def _visible_devices(count: int) -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(number) for number in range(count)]


def _last_error(log: Path, begin: int, code: int) -> str:
    """The line a run ended with, from its own part of the log."""
    lines = log.read_bytes()[begin:].decode(errors="replace").splitlines()
    told = [line for line in lines if line.startswith("error: ")]
    if told:
        return told[-1].removeprefix("error: ")
    return f"it ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}"
