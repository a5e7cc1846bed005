# SPDX-License-Identifier: Apache-2.0
"""`cocoa demo`: a checkpoint loaded as anyone would load it, scored on the emoji set, and asked a few queries."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sentence_transformers import SentenceTransformer

from modeling_cocoa.inputs import CocoaInputError, input_messages

from .assets import asset_path
from .emoji import STYLES, EmojiEmbeddings, compare_pixels, embed_emoji, load_emoji, score_emoji
from .gallery import Hit, render_gallery
from .report import print_scores

CHECKPOINT = "checkpoints/cocoa-tiny"
BRIDGE_CHECKPOINT = "checkpoints/cocoa-tiny-bridge"
"""The same before its last stage, when it still has what rebuilds."""
QUERIES = ("a cat with heart eyes", "red heart", "train", "smiling face", "flag of Japan")
FOUND = 5
SEARCHED_STYLE = "noto"


def load_checkpoint(folder: str | os.PathLike | None = None) -> SentenceTransformer:
    """
    Load a checkpoint from a folder, through sentence-transformers' own classes.

    Args:
        folder (`str` or `os.PathLike`, *optional*): Defaults to the tiny checkpoint that comes with this project.

    Raises:
        FileNotFoundError: there is no such checkpoint; says how to get one.
    """
    folder = asset_path(CHECKPOINT) if folder is None else Path(folder)
    if not (folder / "modules.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no sentence-transformers checkpoint (no modules.json); name the folder that a stage of "
            "`cocoa train` saved its model to."
        )
    return SentenceTransformer(str(folder))


def run_demo(
    model: Any = None,
    output_dir: str | os.PathLike = "demo",
    *,
    queries: Sequence[str] = QUERIES,
    batch_size: int = 64,
    console: Console | None = None,
) -> dict[str, Any]:
    """
    Score a model on the emoji set, answer queries, and write `index.html` and `metrics.json`.

    Args:
        model (`SentenceTransformer`, `str` or `os.PathLike`, *optional*): A model or its folder; the tiny checkpoint
            that comes with this project where none is given.
        output_dir (`str` or `os.PathLike`, defaults to `"demo"`).
        queries (`Sequence[str]`): Texts to search the pictures with.
        batch_size (`int`, defaults to 64).
        console ([`~rich.console.Console`], *optional*): Where to print.

    Returns:
        `dict`: What `metrics.json` holds: `model`, `queries` (the names found, with their cosines) and `scores`.

    Raises:
        FileNotFoundError: the checkpoint or the emoji set is not there.
        ValueError: a query is empty, or ends like an image or video file and is none.
    """
    console = console or Console()
    if empty := [position for position, query in enumerate(queries) if not query.strip()]:
        raise ValueError(f"Query {empty[0]} is empty; type what to search for.")
    for position, query in enumerate(queries):
        try:
            input_messages(query)
        except CocoaInputError as error:  # such as a mistyped path, which would be searched for as words
            raise ValueError(f"Query {position}: {error.reason}") from error
    name = CHECKPOINT if model is None else str(model) if isinstance(model, (str, os.PathLike)) else "A model"
    if model is None or isinstance(model, (str, os.PathLike)):
        with console.status(f"Loading {name}"):
            model = load_checkpoint(model)
    emoji = load_emoji()
    pictures = {style: [image.convert("RGB") for image in emoji[style]] for style in STYLES}
    started = time.perf_counter()
    embeddings = embed_with_progress(model, emoji["name"], pictures, batch_size, console)
    seconds = time.perf_counter() - started
    count = sum(map(len, pictures.values()))
    console.print(f"Embedded {len(emoji):,} names and {count:,} pictures in {seconds:.1f} s.\n")
    with console.status("Scoring, with both baselines and bootstrap intervals"):
        scores = score_emoji(emoji, embeddings, compare_pixels(emoji, pictures))
    print_scores(scores, console)

    found = search(model, queries, embeddings, emoji["name"], emoji["split"], pictures)
    for query, hits in found.items():
        answers = ", ".join(f"{hit.name} {hit.score:.2f}" for hit in hits)
        console.print()
        console.print(query, style="bold", markup=False)
        console.print(f"  {answers}", markup=False, highlight=False)

    result = {
        "model": name,
        "queries": {query: {hit.name: hit.score for hit in hits} for query, hits in found.items()},
        "scores": [score.to_dict() for score in scores],
    }
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    about = f"{name}: words and pictures as unit vectors in one space; {len(emoji):,} emoji, each drawn in two styles."
    page = folder / "index.html"
    page.write_text(render_gallery("CoCoA emoji search", about, scores, found), encoding="utf-8")
    (folder / "metrics.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    console.print(f"\nGallery: {page.resolve()}\nNumbers: {(folder / 'metrics.json').resolve()}", soft_wrap=True)
    return result


def embed_with_progress(
    model: Any, names: Sequence[str], pictures: dict[str, list[Any]], batch_size: int, console: Console
) -> EmojiEmbeddings:
    """[`embed_emoji`] under a progress bar for names and each style."""
    columns = (TextColumn("{task.description:>16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        tasks = {"names": progress.add_task("names", total=len(names), start=False)}
        for style, images in pictures.items():
            tasks[style] = progress.add_task(f"{STYLES[style]} pictures", total=len(images), start=False)

        def advance(kind: str, done: int) -> None:
            progress.start_task(tasks[kind])
            progress.update(tasks[kind], completed=done)

        return embed_emoji(model, names, pictures, batch_size=batch_size, on_progress=advance)


def search(
    model: Any,
    queries: Sequence[str],
    embeddings: EmojiEmbeddings,
    names: Sequence[str],
    splits: Sequence[str],
    pictures: dict[str, list[Any]],
) -> dict[str, list[Hit]]:
    """The pictures of one style nearest to each query, among all emoji, seen or held out."""
    vectors = model.encode_query(list(queries), normalize_embeddings=True, show_progress_bar=False)
    similarity = np.asarray(vectors, dtype=np.float32) @ embeddings.pictures[SEARCHED_STYLE].T
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :FOUND]
    return {
        query: [
            Hit(names[row], float(scores[row]), splits[row] == "train", pictures[SEARCHED_STYLE][row]) for row in rows
        ]
        for query, scores, rows in zip(queries, similarity, nearest.tolist(), strict=True)
    }
