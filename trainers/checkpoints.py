# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint a run goes on from, and whether it may."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.utils import logging

from .run_folder import LENGTHS, differences, read_run, write_run

logger = logging.get_logger(__name__)


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """
    The last complete checkpoint of a run, or `None`.

    A checkpoint is complete once it has its trainer state, which is written last: one that a kill cut off is passed
    over.
    """
    steps = {}
    for path in Path(output_dir).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and (path / TRAINER_STATE_NAME).is_file():
            steps[int(match[1])] = str(path)
    return steps[max(steps)] if steps else None


def read_state(checkpoint: str | os.PathLike) -> TrainerState:
    """How far the run of a checkpoint had come."""
    return TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))


def has_optimizer(checkpoint: str | os.PathLike) -> bool:
    """Whether a checkpoint has what a run needs to go on: without `save_only_model`, its schedule is in it."""
    return Path(checkpoint, SCHEDULER_NAME).is_file() or any(Path(checkpoint).glob("global_step*"))  # of DeepSpeed


def is_complete(state: TrainerState, args: TrainingArguments) -> bool:
    """Whether a run with these arguments has nothing left to do in this state."""
    patience = getattr(args, "early_stopping_patience", None)
    stoppers = state.stateful_callbacks.get("EarlyStoppingCallback", [])
    for stopper in stoppers if isinstance(stoppers, list) else [stoppers]:
        if patience is not None and stopper["attributes"]["early_stopping_patience_counter"] >= patience:
            return True
    if args.max_steps > 0:
        return state.global_step >= args.max_steps
    return state.epoch is not None and state.epoch >= args.num_train_epochs


def begin_run(checkpoint: str | None, args: TrainingArguments, facts: Mapping[str, Any]) -> None:
    """
    Write into the output folder of a run what it is started with (`facts`); raise `ValueError` where it does not fit
    what is there, or the checkpoint that it goes on from.
    """
    folder = Path(args.output_dir)
    existing = last_checkpoint(folder)
    if existing is not None and (checkpoint is None or Path(checkpoint).resolve().parent != folder.resolve()):
        raise ValueError(
            f"{folder} holds checkpoints of an earlier run ({Path(existing).name}), from which a later call would "
            "go on. To go on from them now: trainer.train(resume_from_checkpoint=True). To train anew: choose "
            f"another output_dir, or delete {folder}."
        )
    if checkpoint is None:
        write_run(folder, facts)
        return
    state = read_state(checkpoint)
    ended = is_complete(state, args)
    before = read_run(Path(checkpoint).parent)
    if before is None:
        logger.warning(f"{Path(checkpoint).parent} does not say what its run was started with: not compared.")
    changed = [] if before is None else differences(before, facts, ignore=() if ended else LENGTHS)
    if changed and ended:
        raise ValueError(
            f"{folder} had ended at step {state.global_step} of a run with other settings: {'; '.join(changed)}. "
            f"Nothing was trained. Choose another output_dir, or delete {folder}."
        )
    if changed:
        raise ValueError(
            f"{checkpoint} is of a run with other settings: {'; '.join(changed)}. Go on with those of then; or "
            f"choose another output_dir, or delete {folder}, to train anew."
        )
    if ended:
        return
    if not has_optimizer(checkpoint):
        raise ValueError(
            f"{checkpoint} has no state of the optimizer and the learning rate (save_only_model=True), without "
            "which the run cannot go on. To train its weights further, give it as the model of a run in another "
            "output_dir."
        )
    write_run(folder, facts)
