# SPDX-License-Identifier: Apache-2.0
"""
MkDocs hooks: pages that are made from other files, so that nothing is written twice and no link leaves the site.

The changelog and the commands' help become pages. A link to a file outside of `docs/`, such as an example, leads to a
page that shows the file.
"""

from __future__ import annotations

import json
import posixpath
import re
import subprocess
import sys
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()([^)#\s]+)")
"""The target of a Markdown link, without an anchor."""
CROSS_REFERENCE = re.compile(r"\[<code>~?([\w.]+)</code>\]")
"""A name in brackets, as docstrings in the Hugging Face style refer to others."""
IMAGES = (".png", ".svg")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".md": "markdown", ".txt": "text"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made."""
    made = {
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/", "]("),
        "reference/cli.md": command_line_help(),
        "reference/options.md": options_of_stages(),
    }
    for uri, content in made.items():
        files.append(File.generated(config, uri, content=content))
    linked = [
        found for file in files.documentation_pages() for found in outer_links(file.src_uri, file.content_string)
    ]
    for path in sorted(set(linked)):
        if Path(path).suffix in IMAGES:
            files.append(File.generated(config, source_page(path), abs_src_path=str(ROOT / path)))
            continue
        page = File.generated(config, source_page(path), content=show(path))
        page.inclusion = page.inclusion.NOT_IN_NAV
        files.append(page)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Have links to files outside of `docs/` lead to the pages that show them."""
    here = posixpath.dirname(page.file.src_uri)

    def replace(match: re.Match[str]) -> str:
        path = outside(page.file.src_uri, match[1])
        return match[1] if path is None else posixpath.relpath(source_page(path), here or ".")

    return markdown if page.file.src_uri.startswith("source/") else LINK.sub(replace, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Show a name that a docstring refers to without brackets."""
    return CROSS_REFERENCE.sub(lambda match: f"<code>{match[1].rpartition('.')[2]}</code>", html)


def outside(uri: str, target: str) -> str | None:
    """The path of a file that a link on a page leads to, where that is outside of `docs/`; from the root on."""
    if ":" in target:
        return None
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(uri), target))
    is_file = not path.startswith("docs/") and (ROOT / path).is_file()
    return path if is_file else None


def outer_links(uri: str, markdown: str) -> list[str]:
    """The files outside of `docs/` that a page links to."""
    return [path for target in LINK.findall(markdown) if (path := outside(uri, target)) is not None]


def source_page(path: str) -> str:
    """The page that shows a file; an image is its own."""
    return f"source/{path}" if Path(path).suffix in IMAGES else f"source/{path}.md"


def show(path: str) -> str:
    """A page with a file's text."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".ipynb"):
        return f"# {path}\n\n{show_notebook(json.loads(text))}"
    return f"# {path}\n\n`````{LANGUAGES.get(Path(path).suffix, 'text')}\n{text}\n`````\n"


def show_notebook(notebook: dict[str, Any]) -> str:
    """A notebook's cells with what they printed and drew."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"^#", "##", source, flags=re.MULTILINE))
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/jpeg" in data:
                parts.append(f"![Output](data:image/jpeg;base64,{data['image/jpeg'].strip()})")
            else:
                parts.append(f"```text\n{''.join(output.get('text') or data.get('text/plain', ''))}\n```")
    return "\n\n".join(parts)


def command_line_help() -> str:
    """The help of all commands, as Typer writes it in Markdown."""
    command = [
        sys.executable,
        "-m",
        "typer",
        "cocoa.cli",
        "utils",
        "docs",
        "--name",
        "cocoa",
        "--title",
        "Command line",
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def options_of_stages() -> str:
    """A table of each stage's own options, with the help that their fields have."""
    from sentence_transformers import SentenceTransformerTrainingArguments
    from transformers import TrainingArguments

    from trainers import CocoaContrastiveConfig, CocoaReconstructionConfig

    text = (
        "# Options of the stages\n\nOf configurations in Python and of stages in recipes, beside the arguments of "
        "transformers and sentence-transformers; with those whose defaults differ from theirs.\n"
    )
    for config, base in (
        (CocoaReconstructionConfig, TrainingArguments),
        (CocoaContrastiveConfig, SentenceTransformerTrainingArguments),
    ):
        known = {item.name: default_of(item) for item in fields(base)}
        text += f"\n## {config.__name__}\n\n| option | default | |\n|---|---|---|\n"
        for item in fields(config):
            if item.init and (item.name not in known or default_of(item) != known[item.name]):
                about = item.metadata.get("help", "as in transformers").replace("|", "\\|")
                text += f"| `{item.name}` | `{default_of(item)!r}` | {about} |\n"
    return text


def default_of(item: Field) -> Any:
    """The default of a field of a dataclass."""
    return item.default if item.default_factory is MISSING else item.default_factory()
