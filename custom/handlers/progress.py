# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""One bar over a whole run, with the time that is left."""

from __future__ import annotations

from typing import Any

import torch
from ignite.engine import Engine, Events
from tqdm import tqdm

from custom.console import bar_interval

__all__ = ["ProgressBar"]


class ProgressBar:
    """Shows how far a run is and when it will end: all iterations of all epochs in one bar.

    (ignite's own bar starts anew at each epoch, so it never says when training will be over.)

    Args:
        desc: what the bar is called.
        unit: what one iteration is.
        evaluator: engine whose key metric is shown beside the loss.
    """

    def __init__(self, desc: str = "training", unit: str = "step", evaluator: Any | None = None) -> None:
        self.desc = desc
        self.unit = unit
        self.evaluator = evaluator
        self._bar: tqdm | None = None
        self._cohort: Any = None

    def attach(self, engine: Engine) -> None:
        """
        Args:
            engine: trainer or evaluator; attach after a handler that restores the epoch.
        """
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._step)
        engine.add_event_handler(Events.COMPLETED, self._close)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._fail)

    def _start(self, engine: Engine) -> None:
        length, epochs = engine.state.epoch_length, engine.state.max_epochs
        self._cohort = getattr(engine, "data_loader", None)
        total = length * epochs if length and epochs else getattr(self._cohort, "total", None)
        main = getattr(engine.state, "rank", 0) == 0
        self._bar = tqdm(
            total=total,
            initial=engine.state.iteration,
            desc=self.desc,
            unit=self.unit,
            dynamic_ncols=True,
            mininterval=bar_interval(),
            disable=not main,
        )

    def _step(self, engine: Engine) -> None:
        if self._bar is None:
            return
        shown: dict[str, Any] = {}
        if engine.state.max_epochs and engine.state.max_epochs > 1:
            shown["epoch"] = f"{engine.state.epoch}/{engine.state.max_epochs}"
        output = engine.state.output
        first = output[0] if isinstance(output, list) and output else output
        if isinstance(first, dict) and isinstance(first.get("loss"), (float, torch.Tensor)):
            shown["loss"] = f"{float(torch.as_tensor(first['loss']).detach()):.4f}"
        if self.evaluator is not None and self.evaluator.state.best_metric_epoch > 0:
            shown["best"] = f"{self.evaluator.state.best_metric:.4f}"
        self._bar.set_postfix(shown, refresh=False)
        # Studies that were passed over are no iterations, but they are done with.
        self._bar.update(getattr(self._cohort, "position", self._bar.n + 1) - self._bar.n)

    def _close(self, engine: Engine) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _fail(self, engine: Engine, error: BaseException) -> None:
        self._close(engine)
        raise error
