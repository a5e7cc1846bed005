# SPDX-License-Identifier: Apache-2.0
"""`cocoa demo`: a checkpoint loaded as anyone would load it, scored on the emoji set, and asked a few queries."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from rich.console import Console
from sentence_transformers import SentenceTransformer

from evaluation.assets import asset_path
from evaluation.digests import fingerprint
from evaluation.emoji import STYLES, load_emoji
from evaluation.vectors import VectorStore
from modeling_cocoa.inputs import CocoaInputError, input_messages

from .report import Hit, print_scores, render_gallery
from .scores import EmojiEmbeddings, compare_pixels, embed_emoji, score_emoji

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
    Score a model on the emoji set, answer queries, and write `index.html` and `metrics.json`. The vectors of the emoji
    are kept in `vectors/`: the next call with the same model embeds its queries only.

    Args:
        model (`SentenceTransformer`, `str` or `os.PathLike`, *optional*): A model or its folder; the tiny checkpoint
            that comes with this project where none is given.
        output_dir (`str` or `os.PathLike`, defaults to `"demo"`).
        queries (`Sequence[str]`): Texts to search the images with.
        batch_size (`int`, defaults to 64).
        console ([`~rich.console.Console`], *optional*): Where to print.

    Returns:
        `dict`: What `metrics.json` holds: `model`, `queries` (the names found, with their cosines) and `scores`.

    Raises:
        FileNotFoundError: the checkpoint or the emoji set is not there.
        ValueError: a query is empty, or ends like an image or video file and is none.
    """
    console = console or Console()
    for position, query in enumerate(queries):
        if not query.strip():
            raise ValueError(f"Query {position} is empty; type what to search for.")
        try:
            input_messages(query)
        except CocoaInputError as error:  # such as a mistyped path, which would be searched for as words
            raise ValueError(f"Query {position}: {error.reason}") from error
    name = CHECKPOINT if model is None else str(model) if isinstance(model, (str, os.PathLike)) else "A model"
    if model is None or isinstance(model, (str, os.PathLike)):
        with console.status(f"Loading {name}"):
            model = load_checkpoint(model)
    emoji = load_emoji()
    images = {style: [image.convert("RGB") for image in emoji[style]] for style in STYLES}
    count = sum(map(len, images.values()))
    console.print(f"Embedding {len(emoji):,} names and {count:,} images")
    started = time.perf_counter()
    folder = Path(output_dir)
    store = VectorStore(folder / "vectors" / fingerprint(model)[:16])
    embeddings = embed_emoji(model, emoji["name"], images, store, batch_size)
    console.print(f"Embedded in {time.perf_counter() - started:.1f} s.\n")
    with console.status("Scoring, with both baselines and bootstrap intervals"):
        scores = score_emoji(emoji, embeddings, compare_pixels(emoji, images))
    print_scores(scores, console)

    found = search(model, queries, embeddings, emoji, images)
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
    folder.mkdir(parents=True, exist_ok=True)
    about = f"{name}: words and images as unit vectors in one space; {len(emoji):,} emoji, each drawn in two styles."
    page = folder / "index.html"
    page.write_text(render_gallery("CoCoA emoji search", about, scores, found), encoding="utf-8")
    (folder / "metrics.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    console.print(f"\nGallery: {page.resolve()}\nNumbers: {(folder / 'metrics.json').resolve()}", soft_wrap=True)
    return result


def search(
    model: Any,
    queries: Sequence[str],
    embeddings: EmojiEmbeddings,
    emoji: Dataset,
    images: Mapping[str, Sequence[Any]],
) -> dict[str, list[Hit]]:
    """The images of one style nearest to each query, among all emoji, seen or held out."""
    names, splits, searched = list(emoji["name"]), list(emoji["split"]), images[SEARCHED_STYLE]
    vectors = model.encode_query(list(queries), normalize_embeddings=True, show_progress_bar=False)
    similarity = np.asarray(vectors, dtype=np.float32) @ embeddings.images[SEARCHED_STYLE].T
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :FOUND]
    return {
        query: [Hit(names[row], float(scores[row]), splits[row] == "train", searched[row]) for row in rows]
        for query, scores, rows in zip(queries, similarity, nearest.tolist(), strict=True)
    }
