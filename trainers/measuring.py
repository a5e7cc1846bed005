# SPDX-License-Identifier: Apache-2.0
"""Looking at a model during a run without changing the run."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Within it, random numbers may be drawn; afterwards the generators of Python, NumPy and torch are as before."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """
    Within it, a model is in evaluation mode (no dropout); afterwards each of its modules has the mode that it had, and
    the random generators are as before.
    """
    modes = {module: module.training for module in model.modules()}
    with random_state_kept():
        try:
            model.eval()
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
