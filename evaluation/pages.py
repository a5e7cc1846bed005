# SPDX-License-Identifier: Apache-2.0
"""Pages of results: one HTML file each, which needs nothing else."""

from __future__ import annotations

import base64
import io
from html import escape

from PIL import Image

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
table { border-collapse: collapse; width: 100%; min-width: 36rem; font-size: 0.9rem; }
caption { text-align: left; font-weight: 600; padding-bottom: 0.5rem; }
th, td { padding: 0.35rem 0.6rem; text-align: left; white-space: nowrap; }
th { color: var(--soft); font-weight: 500; }
th:nth-child(n+3), td:nth-child(n+3) { text-align: right; font-variant-numeric: tabular-nums; }
tbody tr { color: var(--soft); }
tbody tr.model { color: var(--text); font-weight: 600; }
tr.first td { border-top: 1px solid var(--line); }
"""


def render_page(title: str, about: str, body: str, style: str = "") -> str:
    """A page as one HTML file: a heading, a sentence under it, and a body in HTML, with CSS of its own if any."""
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


def data_url(image: Image.Image) -> str:
    """An image as a PNG inside a URL."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
