# SPDX-License-Identifier: Apache-2.0
"""What the demo shows: scores in the terminal, and a page of them and of queries with the images that they found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table

from evaluation.emoji import CUTOFFS, STYLES
from evaluation.pages import data_url, render_page
from evaluation.ranking import Estimate

from .scores import SPLITS, EmojiScore

SPLIT_TITLES = {"train": "Concepts seen in training", "test": "Held-out concepts"}
BASELINE_LABELS = {"train": "look-up", "test": "ridge"}
HEADINGS = ("search", "by", *(f"R@{k}" for k in CUTOFFS))


@dataclass
class Hit:
    """An image that a query found: its name, its cosine with the query, and whether training had seen it."""

    name: str
    score: float
    seen: bool
    image: Image.Image


def score_lines(scores: Sequence[EmojiScore], split: str) -> Iterator[tuple[str, str, list[str]]]:
    """
    One split's table, line by line: what is searched (`"name → Noto"`, empty where it is that of the line before), by
    what (`"CoCoA"`, the baseline's name or `"chance"`), and Recall@k for each of `CUTOFFS`.
    """
    chosen = [score for score in scores if score.split == split]
    for score in chosen:
        style = STYLES[score.style]
        title = f"name → {style}" if score.direction == "name_to_image" else f"{style} → name"
        yield title, "CoCoA", [percent(score.model[k]) for k in CUTOFFS]
        yield "", BASELINE_LABELS[split], [percent(score.baseline[k]) for k in CUTOFFS]
    yield "any", "chance", [f"{100 * chosen[0].chance[k]:.2f}" for k in CUTOFFS]


def percent(estimate: Estimate) -> str:
    """An estimate in percent, with its interval: `45.2 (42.8-47.6)`."""
    value, low, high = (100 * part for part in estimate)
    return f"{value:.1f} ({low:.1f}–{high:.1f})"


def split_title(scores: Sequence[EmojiScore], split: str) -> str:
    """A table's heading, with the number of candidates."""
    candidates = next(score.candidates for score in scores if score.split == split)
    return f"{SPLIT_TITLES[split]}: {candidates:,} candidates"


def footnotes(scores: Sequence[EmojiScore]) -> list[str]:
    """What a reader of the tables must know: intervals, the baselines, and what held out means."""
    ridge = next(score.baseline_name for score in scores if score.split == "test")
    return [
        "Recall in percent; in brackets the 95 % bootstrap interval over queries. Ties count against the model.",
        "look-up, untrained: the name's own image in the other style, then the nearest by 16 x 16 pixels.",
        f"ridge, untrained: {ridge}, fitted on the train split, strength chosen on validation.",
        "Some held-out concepts look almost like seen ones: clock faces, arrows, flags.",
    ]


def print_scores(scores: Sequence[EmojiScore], console: Console) -> None:
    """Print one table a split, and the footnotes."""
    for split in SPLITS:
        table = Table(
            title=split_title(scores, split),
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            show_edge=False,
        )
        for heading in HEADINGS:
            table.add_column(heading, justify="right" if heading.startswith("R@") else "left", no_wrap=True)
        for search, by, cells in score_lines(scores, split):
            table.add_row(search, by, *cells, style="bold" if by == "CoCoA" else "dim")
        console.print(table)
        console.print()
    for line in footnotes(scores):
        console.print(line, style="dim")


def render_gallery(title: str, about: str, scores: Sequence[EmojiScore], found: Mapping[str, Sequence[Hit]]) -> str:
    """The page as HTML, under a heading and a sentence: the scores, then each query with the nearest images."""
    tables = "".join(render_table(scores, split) for split in SPLITS)
    queries = "".join(render_query(query, hits) for query, hits in found.items())
    notes = "".join(f'<p class="note">{escape(line)}</p>' for line in footnotes(scores))
    return render_page(
        title,
        about,
        f"""<h2>How often the right one comes first, or among the first</h2>
{tables}{notes}
<h2>Queries and the five nearest images</h2>
{queries}
<footer class="note">Images: Noto emoji, Google, Apache-2.0.</footer>
""",
    )


def render_table(scores: Sequence[EmojiScore], split: str) -> str:
    """One split's scores as a table."""
    rows = ""
    for search, by, cells in score_lines(scores, split):
        marks = ["model"] * (by == "CoCoA") + ["first"] * bool(search)
        texts = "".join(f"<td>{escape(text)}</td>" for text in (search, by, *cells))
        rows += f'<tr class="{" ".join(marks)}">{texts}</tr>'
    head = "".join(f"<th>{heading}</th>" for heading in HEADINGS)
    return (
        f'<div class="card table"><table><caption>{escape(split_title(scores, split))}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>\n"
    )


def render_query(query: str, hits: Sequence[Hit]) -> str:
    """A query and its images."""
    items = "".join(
        f'<li><figure><img alt="{escape(hit.name)}" src="{data_url(hit.image)}"><figcaption>{escape(hit.name)}'
        f'<span class="score">{hit.score:.3f}</span>'
        f"{'' if hit.seen else '<span class=unseen>held out</span>'}</figcaption></figure></li>"
        for hit in hits
    )
    return f'<section class="card"><div class="query">{escape(query)}</div><ol class="found">{items}</ol></section>\n'
