# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest
import torch
from ignite.engine import Events
from ignite.handlers import EMAHandler
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import (
    EarlyStopHandler,
    LrScheduleHandler,
    MeanSquaredError,
    ValidationHandler,
    from_engine,
)
from torch import nn

from custom.bundle.settings import read_settings, write_settings
from custom.data import EpochSampler
from custom.handlers import ProgressBar, TrainingCheckpoint, checkpoint


class Keyed(torch.utils.data.Dataset):
    """Samples that depend on epoch and index, as SliceDataset's do."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, key):
        epoch, index = key
        generator = torch.Generator().manual_seed(100 * epoch + index)
        x = torch.randn(1, 4, generator=generator)
        return {"image": x, "label": x.sum(dim=1, keepdim=True)}


def build(
    folder: Path,
    epochs: int,
    patience: int = 50,
    resume: bool = True,
    average: bool = False,
    num_workers: int = 0,
    settings: dict | None = None,
) -> SupervisedTrainer:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    held_out = [{"image": torch.ones(1, 4), "label": torch.full((1, 1), 4.0)}]
    output = from_engine(["pred", "label"])
    early_stop = EarlyStopHandler(patience=patience, score_function=lambda e: -e.state.metrics["mse"])
    evaluator = SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(held_out), batch_size=1),
        network=network,
        key_val_metric={"mse": MeanSquaredError(output_transform=output)},
        metric_cmp_fn=lambda new, old: new < old,
        val_handlers=[early_stop],
    )
    ema = EMAHandler(network, momentum=0.1) if average else None
    checkpoint = TrainingCheckpoint(
        folder,
        network,
        {"optimizer": optimizer, "lr_scheduler": scheduler, "early_stop": early_stop},
        evaluator,
        resume=resume,
        exported=None if ema is None else ema.ema_model,
        settings=settings,
    )
    data = Keyed()
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=DataLoader(
            data,
            batch_size=2,
            sampler=EpochSampler(data),
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
        ),
        network=network,
        optimizer=optimizer,
        loss_function=nn.MSELoss(),
        decollate=False,
        train_handlers=[
            *([] if ema is None else [ema]),
            LrScheduleHandler(scheduler, print_lr=False),
            ValidationHandler(interval=1, validator=evaluator),
            checkpoint,
            ProgressBar(evaluator=evaluator),
        ],
    )
    early_stop.set_trainer(trainer)
    trainer.checkpoint = checkpoint
    return trainer


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def same(first, second) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


@pytest.fixture
def uninterrupted(tmp_path) -> dict:
    build(tmp_path / "whole", 5).run()
    return load(tmp_path / "whole" / "checkpoint_latest.pt")


@pytest.mark.parametrize("done", [1, 3])
def test_a_resumed_training_equals_an_uninterrupted_one_in_everything(tmp_path, uninterrupted, done):
    folder = tmp_path / "resumed"
    build(folder, done).run()
    torch.rand(13)  # the new process has another random state
    build(folder, 5).run()
    resumed = load(folder / "checkpoint_latest.pt")
    assert same(resumed, uninterrupted)
    assert (folder / "model.pt").read_bytes() == (tmp_path / "whole" / "model.pt").read_bytes()


def test_a_kill_within_an_epoch_repeats_that_epoch(tmp_path, uninterrupted):
    folder = tmp_path / "killed"
    trainer = build(folder, 5)

    class Killed(BaseException):
        pass

    @trainer.on(Events.ITERATION_COMPLETED(once=8))
    def kill(engine):
        raise Killed

    with pytest.raises(Killed):
        trainer.run()
    assert load(folder / "checkpoint_latest.pt")["epoch"] == 2
    build(folder, 5).run()
    assert same(load(folder / "checkpoint_latest.pt"), uninterrupted)


def tear(path: Path, damage: bytes | str) -> None:
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[2000:]
    elif damage == "bit":  # in the midst of the numbers
        content[content.index(b"PK\x01\x02") // 2] ^= 0x10
    else:
        content = damage
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [b"", b"torn", "cut", "bit"])
def test_a_torn_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path, uninterrupted, damage, caplog):
    folder = tmp_path / "torn"
    build(folder, 3).run()
    latest = folder / "checkpoint_latest.pt"
    tear(latest, damage)
    build(folder, 5).run()
    assert "checkpoint_latest.pt cannot be read" in caplog.text
    assert "the one before it is used" in caplog.text
    assert same(load(latest), uninterrupted)


def test_a_torn_checkpoint_does_not_take_the_place_of_the_one_before(tmp_path, monkeypatch, uninterrupted):
    """Killed again, in the first write after the fall-back, the training still has its checkpoint."""
    folder = tmp_path / "torn"
    build(folder, 3).run()
    tear(folder / "checkpoint_latest.pt", "cut")
    kept = (folder / "checkpoint_previous.pt").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build(folder, 5).run()
    assert (folder / "checkpoint_previous.pt").read_bytes() == kept
    build(folder, 5).run()
    assert same(load(folder / "checkpoint_latest.pt"), uninterrupted)
    assert load(folder / "checkpoint_previous.pt")["epoch"] == 4


def test_what_killed_writers_left_is_removed(tmp_path):
    build(tmp_path, 1).run()
    (tmp_path / ".partial-1234.pt").write_bytes(b"half a checkpoint")
    build(tmp_path, 2).run()
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "checkpoint_latest.pt",
        "checkpoint_previous.pt",
        "model.pt",
    ]


def test_where_no_checkpoint_can_be_read_training_starts_afresh_and_says_so(tmp_path, uninterrupted, caplog):
    build(tmp_path, 3).run()
    for name in ("latest", "previous"):
        tear(tmp_path / f"checkpoint_{name}.pt", "cut")
    build(tmp_path, 5).run()
    assert "none is left, training starts afresh" in caplog.text
    assert same(load(tmp_path / "checkpoint_latest.pt"), uninterrupted)


def test_a_full_disk_takes_nothing_away(tmp_path, monkeypatch):
    build(tmp_path, 3).run()
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(content, file):
        file.write(b"a little")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match=r"No space left on device: .*\.pt"):
            build(tmp_path, 5).run()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_finished_or_stopped_training_stays_as_it_is(tmp_path):
    build(tmp_path, 2).run()
    before = load(tmp_path / "checkpoint_latest.pt")
    trainer = build(tmp_path, 2)
    trainer.run()
    assert trainer.state.iteration == 6
    assert same(load(tmp_path / "checkpoint_latest.pt"), before)
    stopped = build(tmp_path / "early", 50, patience=1)
    stopped.run()
    ended = stopped.state.epoch
    assert ended < 50 and load(tmp_path / "early" / "checkpoint_latest.pt")["stopped"]
    again = build(tmp_path / "early", 50, patience=1)
    again.run()
    assert again.state.epoch == ended


def test_model_holds_the_best_epoch_as_a_bare_state_dict(tmp_path):
    build(tmp_path, 5).run()
    checkpoint = load(tmp_path / "checkpoint_latest.pt")
    best = checkpoint["best_metric_epoch"]
    build(tmp_path / "until_best", best).run()
    model = load(tmp_path / "model.pt")
    assert same(model, load(tmp_path / "until_best" / "checkpoint_latest.pt")["network"])
    assert all(isinstance(value, torch.Tensor) for value in model.values())


def test_workers_change_nothing_and_neither_does_a_resume_with_them(tmp_path, uninterrupted):
    """What dropout draws must not depend on when a data loader draws the seeds of its workers."""
    build(tmp_path / "workers", 5, num_workers=1).run()
    build(tmp_path / "resumed", 2, num_workers=1).run()
    build(tmp_path / "resumed", 5, num_workers=1).run()
    for run in ("workers", "resumed"):
        assert same(load(tmp_path / run / "checkpoint_latest.pt"), uninterrupted), run


def test_a_moving_average_is_exported_and_resumed(tmp_path):
    build(tmp_path / "whole", 4, average=True).run()
    build(tmp_path / "resumed", 2, average=True).run()
    build(tmp_path / "resumed", 4, average=True).run()
    whole, resumed = (load(tmp_path / run / "checkpoint_latest.pt") for run in ("whole", "resumed"))
    assert same(whole, resumed)
    assert not torch.equal(whole["exported"]["0.weight"], whole["network"]["0.weight"])
    build(tmp_path / "best", whole["best_metric_epoch"], average=True).run()
    best = load(tmp_path / "best" / "checkpoint_latest.pt")["exported"]
    assert same(load(tmp_path / "whole" / "model.pt"), best)
    # By hand, from the weights after each step: average = 0.9 average + 0.1 weights.
    trainer = build(tmp_path / "steps", 2, average=True)
    network = trainer.checkpoint.network
    expected = network[0].weight.detach().clone()

    @trainer.on(Events.ITERATION_COMPLETED)
    def follow(engine):
        expected.mul_(0.9).add_(network[0].weight.detach(), alpha=0.1)

    trainer.run()
    assert torch.allclose(load(tmp_path / "steps" / "checkpoint_latest.pt")["exported"]["0.weight"], expected)


def test_a_checkpoint_of_another_training_is_refused_and_can_be_overridden(tmp_path):
    build(tmp_path, 1).run()
    content = load(tmp_path / "checkpoint_latest.pt")
    content["network"].pop("0.weight")
    torch.save(content, tmp_path / "checkpoint_latest.pt")
    with pytest.raises(ValueError, match="--resume False to start afresh"):
        build(tmp_path, 2).run()
    build(tmp_path, 2, resume=False).run()
    assert load(tmp_path / "checkpoint_latest.pt")["epoch"] == 2


def test_a_hostile_checkpoint_is_not_run(tmp_path):
    import pickle

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    build(tmp_path, 1).run()
    torch.save({"network": Bomb()}, tmp_path / "checkpoint_latest.pt", pickle_module=pickle)
    build(tmp_path, 2).run()
    assert not (tmp_path / "exploded").exists()


SETTINGS = {"hu_window": [-1100, 300], "image_size": [8, 8]}


def test_settings_are_written_before_the_weights_that_need_them(tmp_path, monkeypatch):
    build(tmp_path, 1, settings={**SETTINGS, "channels": None}).run()
    assert read_settings(tmp_path / "model.pt") == SETTINGS
    seen = []
    replace = os.replace

    def watch(old, new):
        if Path(new).name in ("model.pt", "model.json"):
            seen.append(Path(new).name)
        replace(old, new)

    monkeypatch.setattr(os, "replace", watch)
    build(tmp_path / "again", 1, settings=SETTINGS).run()
    assert seen == ["model.json", "model.pt"]
    with pytest.raises(ValueError, match="hu_window is 5"):
        build(tmp_path, 1, settings={"hu_window": 5})


def shipped(folder: Path) -> tuple[bytes, str]:
    folder.mkdir(exist_ok=True)
    torch.save({"weight": torch.arange(5.0)}, folder / "model.pt")
    write_settings(folder / "model.pt", {"hu_window": [-1000, 400]})
    content = (folder / "model.pt").read_bytes()
    return content, f"model_{hashlib.sha256(content).hexdigest()[:8]}"


@pytest.mark.parametrize("settings", [SETTINGS, None])
def test_weights_of_another_training_are_kept_with_their_settings(tmp_path, settings, caplog):
    caplog.set_level("INFO")
    content, kept = shipped(tmp_path)
    build(tmp_path, 3, settings=settings).run()
    assert (tmp_path / f"{kept}.pt").read_bytes() == content
    assert read_settings(tmp_path / f"{kept}.pt") == {"hu_window": [-1000, 400]}
    assert (tmp_path / "model.pt").read_bytes() != content
    assert read_settings(tmp_path / "model.pt") == (settings or {}), "not those of the other weights"
    assert caplog.text.count(f"kept as {kept}.pt") == 1
    before = sorted(tmp_path.iterdir())
    build(tmp_path, 5, settings=settings).run()
    assert sorted(tmp_path.iterdir()) == before, "a resumed training has only its own to replace"
    build(tmp_path, 1, resume=False, settings=settings).run()
    assert len(list(tmp_path.glob("model_*.pt"))) == 2, "a training that starts afresh is another one"


def test_a_kill_between_the_weights_and_the_first_checkpoint_leaves_no_second_copy(tmp_path, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path, 2).run()
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt"]
    build(tmp_path, 2).run()
    assert not list(tmp_path.glob("model_*"))


def test_a_full_disk_leaves_weights_of_another_training_where_they_are(tmp_path, monkeypatch):
    content, _ = shipped(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left on device"):
        build(tmp_path, 1, settings=SETTINGS).run()
    assert (tmp_path / "model.pt").read_bytes() == content
    assert read_settings(tmp_path / "model.pt") == {"hu_window": [-1000, 400]}
