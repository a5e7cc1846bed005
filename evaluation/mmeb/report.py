# SPDX-License-Identifier: Apache-2.0
"""Scores in MMEB-V1's form: tables in Markdown beside published figures, a bar chart, a page of hits and misses."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from modeling_cocoa.inputs import CocoaInputError
from modeling_cocoa.media import load_image

from ..pages import data_url, render_page
from ..ranking import Ranking
from .data import Item, TaskData
from .scores import Scores, TaskScore
from .tasks import KINDS, NOTES, PUBLISHED_AS_OF, Published

MEANS = {**KINDS, "in_domain": "IND", "out_of_domain": "OOD", "overall": "Overall"}
"""Columns of the table of means."""

SHOWN = 12
"""Queries of each kind, hits and misses, on a page ..."""
FOUND = 4
"""... and candidates of each."""
THUMBNAIL = (144, 144)

OURS, OTHERS = "#3358d4", "#b9c0c9"
"""Colors of bars: of what was measured, and of what others have published."""

PAGE_STYLE = """
.asked { display: flex; gap: 1rem; align-items: center; margin: 0 0 0.8rem; }
.asked img { max-width: 144px; border-radius: 10px; border: 1px solid var(--line); }
.asked p { margin: 0; white-space: pre-line; overflow-wrap: anywhere; color: var(--text); }
figure img { width: auto; max-width: 144px; height: auto; max-height: 144px; padding: 4px; }
figure.right { outline: 2px solid #2e9e5b; border-radius: 12px; padding: 6px; }
figcaption { overflow-wrap: anywhere; }
"""


def markdown_report(scores: Sequence[Scores], published: Sequence[Published] = (), heading: str = "#") -> str:
    """
    Tables of means and of tasks.

    Args:
        scores (`Sequence[Scores]`): One a model.
        published (`Sequence[Published]`): Others' figures, for comparison.
        heading (`str`, defaults to `"#"`): Of the title; headings below it have one `#` more.
    """
    lines = [f"{heading} {scores[0].benchmark}", "", "Precision@1 in percent; means are plain means over tasks.", ""]
    lines += [f"| Model | {' | '.join(MEANS.values())} | Source |", "|---|" + "---:|" * len(MEANS) + "---|"]
    for of_model in scores:
        means = of_model.means()
        cells = ["–" if means[name] is None else f"**{means[name]:.1f}**" for name in MEANS]
        note = f"measured; {len(of_model.tasks)} of {of_model.of_tasks} tasks"
        lines.append(f"| {of_model.model} | {' | '.join(cells)} | {note}{', partial' * of_model.is_partial} |")
    for other in published:
        values = [getattr(other, name) for name in MEANS]
        cells = ["–" if value is None else f"{value:.1f}" for value in values]
        lines.append(f"| {other.model} ({other.billions:g}B) | {' | '.join(cells)} | {other.source} |")
    if published:
        lines += ["", f"Published figures as of {PUBLISHED_AS_OF}."]
    if any(of_model.is_partial for of_model in scores):
        lines += ["", "**Partial**: tasks or rows are missing, so these means are no score of the benchmark."]
    lines += ["", f"{heading}# By task", ""]
    names = " | ".join(of_model.model for of_model in scores)
    lines += [f"| Task | Kind | | {names} | chance |", "|---|---|---|" + "---:|" * (len(scores) + 1)]
    by_task = [{task.task: task for task in of_model.tasks} for of_model in scores]
    for name, task in {name: task for found in by_task for name, task in found.items()}.items():
        cells = [task_cell(found[name]) if name in found else "–" for found in by_task]
        domain = "IND" if task.in_domain else "OOD"
        chance = "–" if task.chance is None else f"{task.chance:.1f}"
        lines.append(f"| {name} | {KINDS[task.kind]} | {domain} | {' | '.join(cells)} | {chance} |")
    if note := NOTES.get(scores[0].benchmark):
        lines += ["", note]
    lines += ["", "Chance: what vectors drawn at random would score, given the number of candidates."]
    if any(map(is_shown_with_ties, (task for of_model in scores for task in of_model.tasks))):
        lines += ["", "In brackets: the score if every tie went against the model."]
    return "\n".join(lines) + "\n"


def task_cell(task: TaskScore) -> str:
    """A task's score, the score if ties went against the model, and how many rows were skipped."""
    text = f"{task.precision_at_1:.1f}"
    if is_shown_with_ties(task):
        text += f" ({task.precision_at_1_ties_against:.1f})"
    if task.skipped_rows:
        text += f", {task.skipped_rows} row{'s' * (task.skipped_rows > 1)} skipped"
    return text


def is_shown_with_ties(task: TaskScore) -> bool:
    """Whether ties change a task's score, as it is printed."""
    return f"{task.precision_at_1:.1f}" != f"{task.precision_at_1_ties_against:.1f}"


def draw_chart(scores: Sequence[Scores], published: Sequence[Published], path: Path) -> None:
    """Draw a bar chart of the means by kind and over all, as a PNG file. Needs matplotlib."""
    from matplotlib.figure import Figure

    names = [name for name in [*KINDS, "overall"] if any(of_model.means()[name] is not None for of_model in scores)]
    rows = [(of_model.model, of_model.means(), OURS) for of_model in scores]
    rows += [(other.model, {name: getattr(other, name) for name in names}, OTHERS) for other in published]
    rows.sort(key=lambda row: row[1]["overall"] or 0.0)
    figure = Figure(figsize=(3.2 + 1.7 * len(names), 1.1 + 0.28 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for name, axes in zip(names, panels, strict=True):
        values = [means[name] or 0.0 for _, means, _ in rows]
        axes.barh(range(len(rows)), values, 0.75, color=[color for *_, color in rows])
        for place, value in enumerate(values):
            axes.text(value + 1.5, place, f"{value:.1f}", va="center", fontsize=7)
        axes.set_title(MEANS[name], fontsize=9)
        axes.set_xlim(0, 118)
        axes.set_xticks([])
        axes.tick_params(left=False)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    panels[0].set_yticks(range(len(rows)), [label for label, *_ in rows], fontsize=8)
    for tick, (*_, color) in zip(panels[0].get_yticklabels(), rows, strict=True):
        tick.set_fontweight("bold" if color == OURS else "normal")
    partial = " (partial)" if any(of_model.is_partial for of_model in scores) else ""
    figure.suptitle(f"{scores[0].benchmark}{partial}, Precision@1 in percent", fontsize=10)
    figure.savefig(path, dpi=150)


def render_task(model: str, score: TaskScore, data: TaskData, rankings: dict[int, Ranking]) -> str:
    """One HTML file of a model's hits and misses on a task, with images inside."""
    parts = []
    for title, is_hit in (("Misses", False), ("Hits", True)):
        rows = [row for row, ranking in rankings.items() if (ranking.rank == 1) == is_hit]
        chosen = rows[:: max(1, len(rows) // SHOWN)][:SHOWN]
        parts.append(f"<h2>{title}: {len(chosen)} of {len(rows):,}</h2>")
        parts += [render_ranking(data, row, rankings[row]) for row in chosen]
    title = f"{score.task}: {score.precision_at_1:.1f} %"
    left_out = f", {score.skipped_rows} rows left out" if score.skipped_rows else ""
    chance = "" if score.chance is None else f" (chance {score.chance:.1f} %)"
    about = (
        f"{model}. Precision@1{chance} of {score.queries:,} queries{left_out}; Recall@10 {score.recall_at_10:.1f} %. "
        "The right candidate is framed."
    )
    return render_page(title, about, "".join(parts), PAGE_STYLE)


def render_ranking(data: TaskData, row: int, ranking: Ranking) -> str:
    """A query, the best candidates, and the right one if it is not among them."""
    query, right = data.queries[row], data.lists[row][0]
    shown = list(zip(ranking.found[:FOUND], ranking.scores, range(1, FOUND + 1), strict=False))
    if right not in ranking.found[:FOUND]:
        shown.append((right, ranking.right_score, ranking.rank))
    figures = "".join(
        f'<li><figure class="{"right" if name == right else ""}">{render_image(data.candidates[name])}'
        f"<figcaption>{escape(data.candidates[name].text.strip()[:200])}"
        f'<span class="score">{place}. {score:.3f}</span></figcaption></figure></li>'
        for name, score, place in shown
    )
    asked = f'<div class="asked">{render_image(query)}<p>{escape(query.text.strip()[:600])}</p></div>'
    return f'<section class="card">{asked}<ol class="found">{figures}</ol></section>\n'


def render_image(item: Item) -> str:
    """An item's image, small; nothing where it has none."""
    if item.image is None:
        return ""
    try:
        image = load_image(item.image)
    except CocoaInputError:  # of a shape that the model was shown stretched
        image = load_image(item.image, THUMBNAIL)
    image.thumbnail(THUMBNAIL, Image.Resampling.LANCZOS)
    return f'<img alt="{escape(os.path.basename(item.image))}" src="{data_url(image)}">'
