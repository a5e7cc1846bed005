# SPDX-License-Identifier: Apache-2.0
"""What an evaluation takes beside embedding its distinct inputs."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from evaluation.emoji_tasks import write_emoji_tasks
from evaluation.encoders import Encoder
from evaluation.mmeb.data import Item, load_tasks, read_task
from evaluation.mmeb.evaluate import evaluate_model
from evaluation.mmeb.tasks import EMOJI_TASKS

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
        written = write_emoji_tasks(Path(scratch) / "data", queries)
        data = load_tasks(tasks, str(written), written / "images")
        for repeat in range(repeats + 1):  # the first, to warm up, does not count
            begun = time.monotonic()
            scores = evaluate_model(encoder, data, Path(scratch) / str(repeat), show_progress_bar=False)
            seconds["evaluation"].append(time.monotonic() - begun)
            count = sum(score.inputs for score in scores.tasks)
            seconds["bare"].append(0.0)
            for task, rows in data.rows.items():
                read = read_task(task, rows, data.image_dir)
                items: list[Item] = list(dict.fromkeys([*read.queries.values(), *read.candidates.values()]))
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
