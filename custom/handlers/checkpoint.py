# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""One atomic checkpoint an epoch, from which a killed training goes on as if nothing had happened."""

from __future__ import annotations

import logging
import os
import random
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.handlers import EarlyStopHandler
from monai.utils import get_dist_device

from custom.bundle.settings import check_settings, settings_file, write_settings
from custom.data.files import atomic_path, file_sha256

__all__ = ["TrainingCheckpoint", "save_atomically"]

logger = logging.getLogger(__name__)


class TrainingCheckpoint:
    """Saves everything a training needs at each epoch's end, and takes it up again at the start.

    Written into ``ckpt_dir``:

    - ``checkpoint_latest.pt`` and ``checkpoint_previous.pt``: network, optimiser, schedulers, early
      stopping, best metric, epoch and random states. A latest checkpoint that cannot be read is
      reported, and the previous one is used; it is kept until there is another that can be read.
    - ``model.pt``: the bare ``state_dict`` of the network, or of ``exported``, at the best validation so
      far; that of the last epoch where there is no validation;
    - ``model.json``: what inference with these weights must share with their training, ``settings``.

    A ``model.pt`` that another training left is kept, with its settings, under a name with its hash.

    All ``.pt`` files hold tensors and plain values, are loaded with ``weights_only=True`` and replaced
    atomically. (ignite's own resume replays the first batches of an epoch, and MONAI's CheckpointSaver
    is neither atomic nor has it the state of early stopping.) Attach it to the trainer *after* the
    handlers that validate and step the scheduler.

    What torch, NumPy and Python draw at random in an epoch is made to depend on the seed and the epoch alone:
    a data loader draws from torch's generator whenever its iterator is made anew, which happens at other
    times in a resumed run, and with other numbers of workers.

    In a distributed run the first process writes and all read. Its random states serve every process.

    Args:
        ckpt_dir: folder of the files.
        network: network being trained; a DistributedDataParallel wrapper is looked through.
        objects: further parts with ``state_dict``/``load_state_dict``: ``optimizer``, ``lr_scheduler``,
            MONAI's ``EarlyStopHandler``.
        evaluator: engine that validates and holds the best metric.
        resume: whether to go on from a checkpoint in ``ckpt_dir``; else one found there is overwritten.
        exported: network whose weights go into ``model.pt`` instead, e.g. the moving average that ignite's
            ``EMAHandler`` keeps; it is saved and restored with the rest.
        settings: what goes into ``model.json``: numbers, switches and lists of numbers; None values are left
            out. See :func:`custom.bundle.trained_with`.

    Raises:
        ValueError: When a setting is of another kind, or cannot be right.
    """

    def __init__(
        self,
        ckpt_dir: str | os.PathLike,
        network: torch.nn.Module,
        objects: Mapping[str, Any] | None = None,
        evaluator: Any | None = None,
        resume: bool = True,
        exported: torch.nn.Module | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = Path(ckpt_dir)
        self.network = (
            network.module if isinstance(network, torch.nn.parallel.DistributedDataParallel) else network
        )
        self.exported = self.network if exported is None else exported
        self.objects = dict(objects or {})
        if exported is not None:
            self.objects["exported"] = exported
        self.evaluator = evaluator
        self.resume = resume
        self.settings = None if settings is None else check_settings(settings)
        self._ours = False  # whether model.pt is one that this training wrote
        self._torn = False  # whether the latest checkpoint cannot be read
        self._seed = 0

    @property
    def latest(self) -> Path:
        return self.folder / "checkpoint_latest.pt"

    @property
    def previous(self) -> Path:
        return self.folder / "checkpoint_previous.pt"

    @property
    def best(self) -> Path:
        return self.folder / "model.pt"

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: the trainer.
        """
        engine.add_event_handler(Events.STARTED, self.load)
        # By then the epoch's iterator has been made.
        engine.add_event_handler(Events.ITERATION_STARTED, self._seed_epoch)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)

    def _seed_epoch(self, engine: Any) -> None:
        if (engine.state.iteration - 1) % engine.state.epoch_length:
            return
        words = np.random.SeedSequence((self._seed, engine.state.epoch)).generate_state(3)
        torch.manual_seed(int(words[0]))
        np.random.seed(int(words[1]))
        random.seed(int(words[2]))

    def save(self, engine: Any) -> None:
        """Write the checkpoint, and ``model.pt`` when this epoch is the best.

        Args:
            engine: the trainer.
        """
        if _rank() != 0:
            return
        best_metric, best_epoch = -1.0, -1
        if self.evaluator is not None:
            best_metric = float(self.evaluator.state.best_metric)
            best_epoch = int(self.evaluator.state.best_metric_epoch)
        # A kill between the two writes repeats this epoch and so writes the same model again.
        if best_epoch in (engine.state.epoch, -1):
            self._save_model()
        content = {
            "epoch": int(engine.state.epoch),
            "iteration": int(engine.state.iteration),
            "stopped": bool(engine.should_terminate),
            "best_metric": best_metric,
            "best_metric_epoch": best_epoch,
            "network": self.network.state_dict(),
            "seed": self._seed,
            "random": _random_state(),
            **{name: _stateful(part).state_dict() for name, part in self.objects.items()},
        }
        scaler = getattr(engine, "scaler", None)
        if scaler is not None:
            content["scaler"] = scaler.state_dict()
        # A torn checkpoint must not take the place of the one before it, which is all that is left then.
        save_atomically(content, self.latest, keep=None if self._torn else self.previous)
        self._torn = False

    def _save_model(self) -> None:
        with atomic_path(self.best) as temporary:
            with open(temporary, "wb") as file:
                torch.save(self.exported.state_dict(), file)
            if not self._ours:
                self._set_aside(temporary)
            write_settings(self.best, self.settings)
        self._ours = True

    def _set_aside(self, new: Path) -> None:
        """Give weights of another training a name that nobody writes to."""
        if not self.best.is_file():
            return
        found = file_sha256(self.best)
        if found == file_sha256(new):  # this training's own, killed before its first checkpoint
            return
        kept = self.best.with_name(f"model_{found[:8]}.pt")
        settings = settings_file(self.best)
        if settings.is_file():  # copied first: killed in between, the old weights still have theirs
            with atomic_path(settings_file(kept)) as temporary:
                shutil.copyfile(settings, temporary)
        os.replace(self.best, kept)
        logger.info(f"{self.best} held weights of another training; they are kept as {kept.name}")

    def load(self, engine: Any) -> None:
        """Continue from the checkpoint, if there is one and ``resume`` is set.

        Args:
            engine: the trainer.

        Raises:
            ValueError: When a checkpoint does not fit the network, optimiser or schedule of this run.
        """
        self._seed = torch.initial_seed()
        if _rank() == 0:
            for left in self.folder.glob(".partial-*"):  # by writers that were killed; they are large
                left.unlink(missing_ok=True)
        if not self.resume:
            return
        content = self._read()
        if content is None:
            return
        try:
            self.network.load_state_dict(content["network"])
            for name, part in self.objects.items():
                _stateful(part).load_state_dict(content[name])
            self._seed = content.get("seed", self._seed)
        except (KeyError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{self.folder} holds a checkpoint of another training ({reason}); "
                "give another ckpt_dir, or --resume False to start afresh"
            ) from error
        scaler = getattr(engine, "scaler", None)
        if scaler is not None and "scaler" in content:
            scaler.load_state_dict(content["scaler"])
        engine.state.epoch = content["epoch"]
        engine.state.iteration = content["iteration"]
        if self.evaluator is not None:
            self.evaluator.state.best_metric = content["best_metric"]
            self.evaluator.state.best_metric_epoch = content["best_metric_epoch"]
        self._ours = True
        _restore_random_state(content["random"])
        if content["stopped"] or content["epoch"] >= engine.state.max_epochs:
            logger.info(
                f"training in {self.folder} had ended after epoch {content['epoch']}; nothing is left to do "
                "(raise the number of epochs, or --resume False to start afresh)"
            )
            engine.state.max_epochs = content["epoch"]
        else:
            logger.info(
                f"continuing after epoch {content['epoch']} of {engine.state.max_epochs} from {self.folder}"
            )

    def _read(self) -> dict[str, Any] | None:
        found = [path for path in (self.latest, self.previous) if path.is_file()]
        for path in found:
            try:
                return _load(path)
            except PermissionError:
                raise  # it may well be whole, and starting afresh would overwrite it
            except Exception as error:  # torn files raise whatever their bytes happen to mean
                self._torn = self._torn or path == self.latest
                others = path != found[-1]
                then = "the one before it is used" if others else "none is left, training starts afresh"
                logger.warning(f"{path} cannot be read ({type(error).__name__}: {error}); {then}")
        return None


def _load(path: Path) -> dict[str, Any]:
    # torch.load compares no checksums: weights with a bit turned over would be taken as they are.
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"the checksum of {damaged} is wrong")
    return dict(torch.load(path, map_location=get_dist_device() or "cpu", weights_only=True))


def save_atomically(content: Any, path: str | os.PathLike, keep: str | os.PathLike | None = None) -> None:
    """``torch.save`` to a temporary file that then takes the place of ``path``.

    Args:
        content: what to save.
        path: file to write.
        keep: where the file goes that is replaced.
    """
    # Given a path, torch.save writes its name into the file, and equal weights would differ in hash.
    with atomic_path(path, keep) as temporary, open(temporary, "wb") as file:
        torch.save(content, file)


def _rank() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if distributed else 0


def _stateful(part: Any) -> Any:
    """What carries the state: MONAI's EarlyStopHandler keeps ignite's EarlyStopping in an attribute."""
    if isinstance(part, EarlyStopHandler):
        if part._handler is None:
            raise ValueError("early stopping has no trainer yet; call its set_trainer() before the run")
        return part._handler
    return part


def _random_state() -> dict[str, Any]:
    """The random states of torch, CUDA, numpy and Python as tensors, so that weights_only can load them."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    version, words, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_position": [int(position), int(has_gauss), float(gauss)],
        "python": torch.tensor(words, dtype=torch.int64),
        "python_rest": [int(version), gauss_next],
    }


def _restore_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    position, has_gauss, gauss = state["numpy_position"]
    np.random.set_state(
        ("MT19937", state["numpy"].cpu().numpy().astype(np.uint32), position, has_gauss, gauss)
    )
    version, gauss_next = state["python_rest"]
    random.setstate((version, tuple(int(word) for word in state["python"]), gauss_next))
