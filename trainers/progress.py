# SPDX-License-Identifier: Apache-2.0
"""What a person sees while a model trains, and the losses by name behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

SHOWN = ("loss", "eval_loss", "learning_rate")


class LossProgressCallback(ProgressCallback):
    """The trainer's progress bar, with the latest losses by name beside it instead of a printed dict a log."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the losses and the learning rate of the latest log."""
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        shown = {
            name: f"{value:.3g}"
            for name, value in logs.items()
            if name in SHOWN or name.startswith(("loss_", "eval_loss_"))
        }
        if shown:
            self.training_bar.set_postfix(shown, refresh=True)


class RunningMeans:
    """
    Means by name of what was added since the last time they were taken, over all devices.

    Tensors stay where they are until then, so that adding does not make the host wait for the device.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor | float, Tensor | float]] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Add `count` values that sum to `total`."""
        totals, counts = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (totals + total, counts + count)

    def take(self) -> dict[str, float]:
        """The means so far, of all processes (each has to call this); starts anew."""
        own = {name: (float(total), float(count)) for name, (total, count) in self._sums.items()}
        self._sums = {}
        parts = gather_object([own])
        means = {}
        for name in sorted({name for part in parts for name in part}):
            pairs = [part[name] for part in parts if name in part]
            if count := sum(pair[1] for pair in pairs):
                means[name] = sum(pair[0] for pair in pairs) / count
        return means


class RowMeans:
    """
    Means by name over the rows of an evaluation set, whatever batches they come in.

    Each row counts once, also where several processes have read it to fill up their last batch.
    """

    def __init__(self) -> None:
        self._batches: list[tuple[list[Any], dict[str, tuple[Tensor, Tensor]]]] = []

    def add(self, rows: list[Any], sums: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """
        Add the values of some rows.

        Args:
            rows (`list`): What they are called.
            sums (`Mapping[str, tuple[Tensor, Tensor]]`): By name, the sum of each row's values and their number, both
                of shape `(rows,)`.
        """
        self._batches.append((rows, dict(sums)))

    def take(self) -> tuple[dict[str, float], int]:
        """The means, and the number of rows, of all processes (each has to call this); starts anew."""
        own: dict[Any, dict[str, tuple[float, float]]] = {}
        for rows, sums in self._batches:
            by_name = {name: torch.stack(pair).double().cpu().T.tolist() for name, pair in sums.items()}
            for place, row in enumerate(rows):
                own[row] = {name: tuple(pairs[place]) for name, pairs in by_name.items()}
        self._batches = []
        found: dict[Any, dict[str, tuple[float, float]]] = {}
        for part in gather_object([own]):
            found.update(part)
        totals: dict[str, list[float]] = {}
        for values in found.values():
            for name, (total, count) in values.items():
                sums_of_name = totals.setdefault(name, [0.0, 0.0])
                sums_of_name[0] += total
                sums_of_name[1] += count
        return {name: total / count for name, (total, count) in sorted(totals.items()) if count}, len(found)
