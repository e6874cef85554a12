# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""A network whose process is killed at a moment that is known."""

from __future__ import annotations

import os
import signal

import torch

__all__ = ["DyingConv2d"]


class DyingConv2d(torch.nn.Conv2d):
    """Gets SIGKILL in its second forward pass, on the process with rank 1."""

    passes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        if self.passes == 2 and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)
