# SPDX-License-Identifier: Apache-2.0
"""The demo's page: queries with the pictures they found, one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image

from .emoji import CUTOFFS, SPLITS, EmojiScore
from .report import footnotes, score_lines, split_title

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --text: #1b1f24; --soft: #5b6470; --line: #e1e5ea;
  --accent: #3358d4; --tint: #e9eefc; }
@media (prefers-color-scheme: dark) { :root { --page: #111418; --card: #1a1f26; --text: #e8ebef; --soft: #9aa4b1;
  --line: #2c333d; --accent: #8fa9ff; --tint: #232c45; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; letter-spacing: -0.02em; margin: 0; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 0.75rem; }
p, footer { color: var(--soft); margin: 0.35rem 0 0; }
.note { font-size: 0.85rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 1.1rem;
  margin: 0 0 1rem; }
.query { font-size: 1.05rem; font-weight: 600; margin: 0 0 0.8rem; overflow-wrap: anywhere; }
.found { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: 0.75rem; list-style: none;
  margin: 0; padding: 0; }
figure { margin: 0; text-align: center; font-size: 0.85rem; line-height: 1.3; }
figure img { width: 96px; height: 96px; padding: 10px; background: #fff; border: 1px solid var(--line);
  border-radius: 12px; }
figcaption { margin-top: 0.45rem; }
.score { display: block; color: var(--soft); font-variant-numeric: tabular-nums; }
.unseen { display: inline-block; margin-top: 0.25rem; padding: 0 0.5rem; border-radius: 99px; background: var(--tint);
  color: var(--accent); font-size: 0.75rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; min-width: 36rem; table-layout: fixed; font-size: 0.9rem; }
caption { text-align: left; font-weight: 600; padding-bottom: 0.5rem; }
th, td { padding: 0.35rem 0.6rem; text-align: left; white-space: nowrap; }
th { color: var(--soft); font-weight: 500; }
th:nth-child(n+3), td:nth-child(n+3) { text-align: right; font-variant-numeric: tabular-nums; }
tbody tr { color: var(--soft); }
tbody tr.model { color: var(--text); font-weight: 600; }
tr.first td { border-top: 1px solid var(--line); }
"""


@dataclass
class Hit:
    """A picture that a query found: its name, its cosine with the query, and whether training had seen it."""

    name: str
    score: float
    seen: bool
    picture: Image.Image


def render_gallery(title: str, about: str, scores: Sequence[EmojiScore], found: dict[str, list[Hit]]) -> str:
    """
    The page as HTML: the scores, then each query with its pictures, inlined.

    Args:
        title (`str`): Heading.
        about (`str`): A sentence under it.
        scores (`Sequence[EmojiScore]`).
        found (`dict[str, list[Hit]]`): By query, the nearest first.
    """
    tables = "".join(render_table(scores, split) for split in SPLITS)
    queries = "".join(render_query(query, hits) for query, hits in found.items())
    notes = "".join(f'<p class="note">{escape(line)}</p>' for line in footnotes(scores))
    return render_page(
        title,
        about,
        f"""<h2>How often the right one comes first, or among the first</h2>
{tables}{notes}
<h2>Queries and the five nearest pictures</h2>
{queries}
<footer class="note">Pictures: Noto emoji, Google, Apache-2.0.</footer>
""",
    )


def render_page(title: str, about: str, body: str, style: str = "") -> str:
    """
    A page as one HTML file.

    Args:
        title (`str`): Heading.
        about (`str`): A sentence under it.
        body (`str`): HTML.
        style (`str`, *optional*): CSS beside the common one.
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}{style}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<p>{escape(about)}</p>
{body}</main>
</body>
</html>
"""


def render_table(scores: Sequence[EmojiScore], split: str) -> str:
    """One split's scores as a table."""
    rows, previous = [], None
    for search, by, cells in score_lines(scores, split):
        marks = ["model"] * (by == "CoCoA") + ["first"] * (search != previous)
        texts = ["" if search == previous else search, by, *cells]
        rows.append(f'<tr class="{" ".join(marks)}">{"".join(f"<td>{escape(text)}</td>" for text in texts)}</tr>')
        previous = search
    head = "".join(f"<th>{text}</th>" for text in ["search", "by", *(f"R@{k}" for k in CUTOFFS)])
    return (
        f'<div class="card table"><table><caption>{escape(split_title(scores, split))}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>\n"
    )


def render_query(query: str, hits: Sequence[Hit]) -> str:
    """A query and its pictures."""
    items = "".join(
        f'<li><figure><img alt="{escape(hit.name)}" src="{data_url(hit.picture)}"><figcaption>{escape(hit.name)}'
        f'<span class="score">{hit.score:.3f}</span>'
        f"{'' if hit.seen else '<span class=unseen>held out</span>'}</figcaption></figure></li>"
        for hit in hits
    )
    return f'<section class="card"><div class="query">{escape(query)}</div><ol class="found">{items}</ol></section>\n'


def data_url(picture: Image.Image) -> str:
    """A picture as a PNG inside a URL."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
