# SPDX-License-Identifier: Apache-2.0
"""What an evaluation takes beside embedding its distinct inputs."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from evaluation.emoji_tasks import EMOJI_TASKS, write_emoji_tasks
from evaluation.encoders import Encoder
from evaluation.mmeb import evaluate_model
from evaluation.mmeb_data import Item, read_task

from .models import device


def bench_evaluation(folder: Path, queries: int, repeats: int) -> dict[str, Any]:
    """
    Evaluate on the held-out emoji tasks, and embed the same inputs in one call for each task, in turn.

    Returns:
        `dict`: Inputs, seconds of both, and their ratio.
    """
    encoder = Encoder(str(folder), device=device())
    tasks = [task for task in EMOJI_TASKS if not task.in_domain]
    seconds: dict[str, list[float]] = {"bare": [], "evaluation": []}
    count = 0
    with TemporaryDirectory() as scratch:
        data = write_emoji_tasks(Path(scratch) / "data", queries)
        images = data / "images"
        for repeat in range(repeats + 1):  # the first, to warm up, does not count
            begun = time.monotonic()
            scores = evaluate_model(
                encoder, tasks, str(data), images, Path(scratch) / str(repeat), show_progress_bar=False
            )
            seconds["evaluation"].append(time.monotonic() - begun)
            count = sum(score.inputs for score in scores.tasks)
            seconds["bare"].append(0.0)
            for task in tasks:
                rows = read_task(task, str(data), images)
                items: list[Item] = list(dict.fromkeys([*rows.queries.values(), *rows.candidates.values()]))
                begun = time.monotonic()
                encoder(items)
                seconds["bare"][-1] += time.monotonic() - begun
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    return {
        "held-out emoji tasks": {
            "evaluation": {"inputs": count, "seconds": medians["evaluation"]},
            "embedding alone": {"inputs": count, "seconds": medians["bare"]},
            "ratio": {"seconds": medians["evaluation"] / medians["bare"]},
        }
    }
