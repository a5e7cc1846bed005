# SPDX-License-Identifier: Apache-2.0
"""Results of evaluations in a model's folder, where its card finds them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from evaluation.mmeb_report import draw_chart
from evaluation.mmeb_scores import Scores
from evaluation.mmeb_tasks import published_on
from evaluation.vectors import weights_digest
from modeling_cocoa.files import atomic_write
from modeling_cocoa.sentence_transformer import CocoaTransformer

RESULTS_FOLDER = "evaluation"
"""In a model's folder: a JSON file and a chart for each benchmark."""


def read_results(folder: str | os.PathLike) -> list[Scores]:
    """
    The results in a model's folder, by the names of their benchmarks.

    Args:
        folder (`str` or `os.PathLike`): Of the model.
    """
    paths = sorted((Path(folder) / RESULTS_FOLDER).glob("*.json"))
    return [Scores.from_dict(json.loads(path.read_text(encoding="utf-8"))) for path in paths]


def check_results(folder: str | os.PathLike) -> None:
    """
    Find out whether the results in a model's folder are those of the weights that are there now.

    Args:
        folder (`str` or `os.PathLike`): Of the model.

    Raises:
        ValueError: one was measured with other weights; names it.
    """
    results = read_results(folder)
    if not results:
        return
    weights = weights_digest(CocoaTransformer(folder))
    for scores in results:
        if scores.settings.get("weights") != weights:
            raise ValueError(
                f"{Path(folder) / RESULTS_FOLDER / file_name(scores)}.json was measured with other weights than those "
                "in the folder: remove it and its chart, or evaluate this model with `cocoa eval --model` and give "
                "its scores.json to `cocoa card`."
            )


def add_result(folder: str | os.PathLike, scores_file: str | os.PathLike) -> Scores:
    """
    Put the result of an evaluation into the folder of the model that it is of.

    Args:
        folder (`str` or `os.PathLike`): Of the model.
        scores_file (`str` or `os.PathLike`): The `scores.json` that `cocoa eval` wrote for it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no scores, or those of other weights.
    """
    path = Path(scores_file)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}: give the scores.json that `cocoa eval` wrote.")
    try:
        scores = Scores.from_dict(json.loads(path.read_text(encoding="utf-8")))
        measured = scores.settings["weights"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no scores of `cocoa eval` ({error!r}).") from error
    if weights_digest(CocoaTransformer(folder)) != measured:
        raise ValueError(
            f"{path} was measured with other weights than those in {folder}: evaluate this model, with `cocoa eval "
            "--model`."
        )
    target = Path(folder) / RESULTS_FOLDER
    target.mkdir(exist_ok=True)
    with atomic_write(target / f"{file_name(scores)}.png") as chart:
        draw_chart([scores], published_on(scores.benchmark), chart)
    with atomic_write(target / f"{file_name(scores)}.json") as written:
        written.write_text(json.dumps(scores.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return scores


def chart_of(folder: Path, scores: Scores) -> str | None:
    """The chart of a result, as a path in the folder; none where there is none."""
    name = f"{RESULTS_FOLDER}/{file_name(scores)}.png"
    return name if (folder / name).is_file() else None


def file_name(scores: Scores) -> str:
    """What a benchmark's files are called."""
    return re.sub(r"[^a-z0-9]+", "-", scores.benchmark.lower()).strip("-")
