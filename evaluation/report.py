# SPDX-License-Identifier: Apache-2.0
"""Scores of the emoji set as tables: in the terminal and as HTML rows, from the same lines."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from .emoji import CUTOFFS, SPLITS, STYLES, EmojiScore
from .retrieval import Estimate

SPLIT_TITLES = {"train": "Concepts seen in training", "test": "Held-out concepts"}
BASELINE_LABELS = {"train": "look-up", "test": "ridge"}
LOOK_ALIKES = "Some held-out concepts look almost like seen ones: clock faces, arrows, flags."
INTERVALS = "Recall in percent; in brackets the 95 % bootstrap interval over queries. Ties count against the model."


def score_lines(scores: Sequence[EmojiScore], split: str) -> list[tuple[str, str, list[str]]]:
    """
    One split's table, line by line.

    Returns:
        `list[tuple[str, str, list[str]]]`: What is searched (`"name → Noto"`), by what (`"CoCoA"`, the baseline's
        name or `"chance"`), and Recall@k for each of `CUTOFFS`.
    """
    lines, chosen = [], [score for score in scores if score.split == split]
    for score in chosen:
        style = STYLES[score.style]
        title = f"name → {style}" if score.direction == "name_to_image" else f"{style} → name"
        lines.append((title, "CoCoA", [percent(score.model[k]) for k in CUTOFFS]))
        lines.append((title, BASELINE_LABELS[split], [percent(score.baseline[k]) for k in CUTOFFS]))
    lines.append(("any", "chance", [f"{100 * chosen[0].chance[k]:.2f}" for k in CUTOFFS]))
    return lines


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
        INTERVALS,
        "look-up, untrained: the name's own picture in the other style, then the nearest by 16 x 16 pixels.",
        f"ridge, untrained: {ridge}, fitted on the train split, settings chosen on validation.",
        LOOK_ALIKES,
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
        table.add_column("search", no_wrap=True)
        table.add_column("by", no_wrap=True)
        for k in CUTOFFS:
            table.add_column(f"R@{k}", justify="right", no_wrap=True)
        previous = None  # of the lines of one search, only the first names it
        for search, by, cells in score_lines(scores, split):
            table.add_row("" if search == previous else search, by, *cells, style="bold" if by == "CoCoA" else "dim")
            previous = search
        console.print(table)
        console.print()
    for line in footnotes(scores):
        console.print(line, style="dim")
