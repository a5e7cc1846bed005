# SPDX-License-Identifier: Apache-2.0
"""The progress bar of training."""

from __future__ import annotations

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
