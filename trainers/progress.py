# SPDX-License-Identifier: Apache-2.0
"""What a person sees while a model trains, and the losses by name behind it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

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
    """Means by name of what was added since the last time they were taken."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._counts: dict[str, float] = defaultdict(float)

    def add(self, name: str, total: float, count: float) -> None:
        """Add `count` values that sum to `total`."""
        self._sums[name] += float(total)
        self._counts[name] += float(count)

    def take(self) -> dict[str, float]:
        """The means so far; starts anew."""
        means = {name: self._sums[name] / count for name, count in sorted(self._counts.items()) if count}
        self._sums.clear()
        self._counts.clear()
        return means
