# SPDX-License-Identifier: Apache-2.0
"""Scores of `cocoa eval folder` as tables in Markdown: recall by direction, with its interval, beside chance."""

from __future__ import annotations

from collections.abc import Sequence

from .mmeb.report import is_shown_with_ties
from .mmeb.scores import Scores
from .mmeb.tasks import Task

FOLDER_TASKS = (
    Task("Caption-to-image", "retrieval", "text_to_image", in_domain=False),
    Task("Image-to-caption", "retrieval", "image_to_text", in_domain=False),
)
FEW_QUERIES = 50
"""Fewer say little: the interval of a recall of 50 % is then wider than 27 points."""


def is_of_folder(scores: Scores) -> bool:
    """Whether scores are those of a folder of images and captions, and not of a benchmark."""
    names = {task.name for task in FOLDER_TASKS}
    return any(score.task in names for score in scores.tasks)


def folder_tables(scores: Sequence[Scores], heading: str = "#") -> str:
    """
    A table of recall for each direction, with the number of queries, and chance.

    Args:
        scores (`Sequence[Scores]`): One a model, of the same folder.
        heading (`str`, defaults to `"#"`): Of the title; headings below it have one `#` more.
    """
    lines = [f"{heading} {scores[0].benchmark}", ""]
    lines.append("Recall (R) and MRR in percent; brackets hold the 95 % interval of R@1, over the choice of queries.")
    for task in FOLDER_TASKS:
        found = [(of_model.model, score) for of_model in scores for score in of_model.tasks if score.task == task.name]
        first = found[0][1]
        title = f"{task.name.replace('-', ' ')}: {first.queries:,} queries, {first.candidates:,} candidates"
        has_ties = any(is_shown_with_ties(score) for _, score in found)
        has_left_out = any(score.skipped_rows for _, score in found)
        columns = ["R@1", "R@5", "R@10", "MRR@10"]
        columns += ["R@1 if ties lose"] * has_ties + ["rows left out"] * has_left_out
        lines += ["", f"{heading}# {title}", "", f"| model | {' | '.join(columns)} |"]
        lines.append("|---|" + "---:|" * len(columns))
        for model, score in found:
            low, high = score.interval
            values = (score.recall_at_5, score.recall_at_10, score.mrr_at_10)
            cells = [f"{score.precision_at_1:.1f} ({low:.0f}–{high:.0f})", *(f"{value:.1f}" for value in values)]
            cells += [f"{score.precision_at_1_ties_against:.1f}"] * has_ties
            cells += [f"{score.skipped_rows:,}"] * has_left_out
            lines.append(f"| {model} | {' | '.join(cells)} |")
        chance = [f"{100 * min(1.0, k / first.candidates):.1f}" for k in (1, 5, 10)]
        lines.append(f"| chance | {' | '.join(chance)} |{' |' * (len(columns) - len(chance))}")
    few = min(score.queries for of_model in scores for score in of_model.tasks)
    if few < FEW_QUERIES:
        lines += ["", f"**{few} queries are few**: mind the intervals before you compare models."]
    return "\n".join(lines) + "\n"


def folder_report(scores: Sequence[Scores]) -> str:
    """The report of `cocoa eval folder`: the tables, and where the details are."""
    tables = folder_tables(scores)
    if any(score.skipped_rows for of_model in scores for score in of_model.tasks):
        tables += "\nRows left out: `queries/` in each model's folder says why.\n"
    return f"{tables}\n`pages/` in each model's folder shows hits and misses.\n"
