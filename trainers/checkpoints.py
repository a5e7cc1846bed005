# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint a run goes on from."""

from __future__ import annotations

import os
import re
from pathlib import Path

from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME


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


def has_optimizer(checkpoint: str | os.PathLike) -> bool:
    """Whether a checkpoint has what a run needs to go on: without `save_only_model`, its schedule is in it."""
    return Path(checkpoint, SCHEDULER_NAME).is_file() or any(Path(checkpoint).glob("global_step*"))  # of DeepSpeed
