# SPDX-License-Identifier: Apache-2.0
"""Evaluation results in a model's folder, which its card shows."""

from __future__ import annotations

import os
import re
from pathlib import Path

from evaluation.digests import weights_digest
from evaluation.folder_report import is_of_folder
from evaluation.mmeb.report import draw_chart
from evaluation.mmeb.scores import Scores
from evaluation.mmeb.tasks import published_on
from modeling_cocoa.files import atomic_write

RESULTS_FOLDER = "evaluation"
"""In a model's folder: a JSON file for each benchmark or folder of images, and the chart of a benchmark."""


def read_results(folder: str | os.PathLike) -> list[Scores]:
    """The results in a model's folder, sorted by file name."""
    return [Scores.read(path) for path in sorted((Path(folder) / RESULTS_FOLDER).glob("*.json"))]


def check_results(folder: str | os.PathLike) -> None:
    """
    Check that the results in a model's folder were measured with the weights in it.

    Raises:
        ValueError: one was measured with other weights; names it.
    """
    results = read_results(folder)
    if not results:
        return
    weights = weights_digest(folder)
    for scores in results:
        if scores.settings.get("weights") != weights:
            raise ValueError(
                f"{Path(folder) / RESULTS_FOLDER / file_name(scores)}.json was measured with other weights than those "
                "in the folder: remove it and its chart, or evaluate this model with `cocoa eval --model` and give "
                "its scores.json to `cocoa card`."
            )


def add_result(folder: str | os.PathLike, scores_file: str | os.PathLike) -> Scores:
    """
    Copy the result of an evaluation into the folder of the evaluated model, and draw the chart of a benchmark's.

    Args:
        folder (`str` or `os.PathLike`): Of the model.
        scores_file (`str` or `os.PathLike`): The `scores.json` that `cocoa eval` wrote for it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no scores, or those of other weights.
    """
    try:
        scores = Scores.read(Path(scores_file))
        measured = scores.settings["weights"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{scores_file} holds no scores of `cocoa eval` ({error!r}).") from error
    if weights_digest(folder) != measured:
        raise ValueError(
            f"{scores_file} was measured with other weights than those in {folder}: evaluate this model, with "
            "`cocoa eval --model`."
        )
    target = Path(folder) / RESULTS_FOLDER
    target.mkdir(exist_ok=True)
    chart = target / f"{file_name(scores)}.png"
    if is_of_folder(scores):
        chart.unlink(missing_ok=True)  # earlier versions drew one, of means over kinds of tasks
    else:
        with atomic_write(chart) as path:
            draw_chart([scores], published_on(scores.benchmark), path)
    scores.write(target / f"{file_name(scores)}.json")
    return scores


def chart_of(folder: Path, scores: Scores) -> str | None:
    """The path of a result's chart relative to the folder, if there is one."""
    name = f"{RESULTS_FOLDER}/{file_name(scores)}.png"
    return name if (folder / name).is_file() else None


def file_name(scores: Scores) -> str:
    """The name of a benchmark's files, without suffix."""
    return re.sub(r"[^a-z0-9]+", "-", scores.benchmark.lower()).strip("-")
