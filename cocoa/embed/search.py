# SPDX-License-Identifier: Apache-2.0
"""Search a folder of vectors: every vector is compared, a shard at a time."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.pages import data_url, render_page
from modeling_cocoa.files import atomic_write
from modeling_cocoa.media import load_image

from .embedder import CocoaEmbedder
from .output import MANIFEST, Output
from .plan import Plan
from .run import read_manifest
from .source import find_source
from .worker import items

logger = logging.getLogger(__name__)

RESCORED = 8
"""Times as many candidates as hits, which the bits of binary vectors find and whole queries put in order."""
THUMBNAIL = 320
STYLE = """
.card { margin-top: 1.25rem; }
.found { grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); }
figure img { width: 100%; height: 11rem; object-fit: contain; }
figcaption { overflow-wrap: anywhere; }
.query img { max-width: 12rem; max-height: 12rem; border-radius: 12px; display: block; margin-top: 0.5rem; }
"""


@dataclass(frozen=True)
class Hit:
    """
    A row that was found.

    Args:
        id (`str` or `int`), score (`float`): Of the row, and its cosine similarity.
        columns (`dict`): What the output keeps of the source.
        place (`tuple[int, int]`): Its shard, and its row there.
    """

    id: Any
    score: float
    columns: dict[str, Any]
    place: tuple[int, int]


class VectorFolder:
    """
    The vectors that `cocoa embed` wrote, and the model that made them.

    Args:
        folder (`str` or `os.PathLike`): What `cocoa embed` wrote.
        model (`str`, *optional*): Where the model is, if it was moved.
        prompt_name (`str`, defaults to `"query"`): The checkpoint's prompt of queries.

    Raises:
        FileNotFoundError, ValueError: the folder holds no vectors; the model is another.
    """

    def __init__(self, folder: str | os.PathLike, model: str | None = None, prompt_name: str = "query") -> None:
        folder = Path(folder)
        self.manifest = read_manifest(folder)
        if not self.manifest:
            raise FileNotFoundError(f"{folder} has no {MANIFEST}; make it with cocoa embed.")
        self.output = Output(folder, self.manifest["format"])
        self.plan = Plan(folder)
        name = model or self.manifest["model"]
        self.embedder = CocoaEmbedder(name, prompt_name=prompt_name, truncate_dim=self.manifest["dim"])
        found = self.embedder.describe()
        if found["libraries"] != self.manifest["libraries"]:
            logger.warning(
                "The vectors were made with %s; here is %s.", self.manifest["libraries"], found["libraries"]
            )
        elif found["fingerprint"] != self.manifest["fingerprint"]:
            raise ValueError(f"The vectors in {folder} were made by another model than {name}; give it with --model.")

    def search(self, query: dict[str, Any], top_k: int = 10) -> list[Hit]:
        """
        The rows whose vectors are nearest, best first. Binary vectors are first compared bit by bit; the best of them
        are put in order by their product with the whole query.

        Args:
            query (`dict`): `text`, `image` or both, as [`CocoaProcessor`] takes them.
            top_k (`int`, defaults to 10): Hits to give.

        Raises:
            ValueError: the query cannot be embedded.
        """
        vectors, failed = self.embedder.embed([query])
        if failed:
            raise ValueError(f"The query: {failed[0]}")
        places = nearest(self.output, len(self.plan), vectors[0], top_k, self.manifest["dtype"] == "binary")
        return [self.hit(*place) for place in places]

    def hit(self, score: float, shard: int, row: int) -> Hit:
        """A row of the output."""
        columns = ["id", *self.manifest["columns"]["keep"]]
        values = self.output.read(shard, list(dict.fromkeys(columns))).slice(row, 1).to_pylist()[0]
        return Hit(values.pop("id"), score, values, (shard, row))

    def write_page(self, path: str | os.PathLike, query: dict[str, Any], hits: list[Hit]) -> None:
        """Write hits as one HTML file, with the images of the source as far as they are there."""
        try:
            source = find_source(self.manifest["source"], **self.manifest["columns"])
        except (OSError, ValueError) as error:
            logger.warning("The page shows no images: %s", error)
            source = None
        figures = []
        for hit in hits:
            shard, row = hit.place
            found = next(items(source, self.plan, shard, [row])).input if source else {}
            value = {} if isinstance(found, ValueError) else found
            kept = (text for text in hit.columns.values() if isinstance(text, str) and text)
            words = value.get("text") or next(kept, str(hit.id))
            shown = [thumbnail(value["image"], words)] if value.get("image") is not None else []
            shown.append(f'<figcaption>{escape(words)}<span class="score">{hit.score:.3f}</span>')
            title = escape(str(hit.id), quote=True)
            figures.append(f'<li><figure title="{title}">{"".join(shown)}</figcaption></figure></li>\n')
        asked, shown = query.get("text") or "", ""
        if (image := query.get("image")) is not None:
            file_name = os.path.basename(str(image))
            asked = f"{asked}, {file_name}" if asked else file_name
            shown = f'<div class="query">{thumbnail(image, file_name)}</div>\n'
        body = f'<div class="card">{shown}<ol class="found">\n{"".join(figures)}</ol></div>\n'
        name = os.path.basename(self.manifest["source"])
        rows = f"The nearest of {self.manifest['rows']:,} rows of {name}, with their cosine similarities."
        with atomic_write(path) as file:
            file.write_text(render_page(f"Search: {asked}", rows, body, STYLE), encoding="utf-8")


def nearest(
    output: Output, shards: int, vector: np.ndarray, top_k: int, is_binary: bool = False
) -> list[tuple[float, int, int]]:
    """
    Compare a vector with all of an output.

    Args:
        output ([`Output`]), shards (`int`): Where they are, and in how many files.
        vector (`np.ndarray` of shape `(dim,)`): A unit vector in float32.
        top_k (`int`): How many to find.
        is_binary (`bool`, defaults to `False`): They are signs.

    Returns:
        `list[tuple[float, int, int]]`: Score, shard and row of the nearest, best first.
    """
    most = top_k * RESCORED if is_binary else top_k
    best: list[tuple[float, int, int, np.ndarray | None]] = []
    for shard in range(shards):
        if not output.path(shard).exists():
            logger.warning("Shard %d is not there; call cocoa embed again.", shard)
            continue
        column = output.read(shard, ["embedding"])["embedding"].combine_chunks()
        rows = np.flatnonzero(column.is_valid())
        if not len(rows):
            continue
        matrix = column.flatten().to_numpy().reshape(len(rows), -1)
        scores = agreement(matrix, vector) if is_binary else cosines(matrix, vector)
        chosen = np.argpartition(-scores, most)[:most] if most < len(scores) else range(len(scores))
        codes = [matrix[row].copy() if is_binary else None for row in chosen]
        best += [(scores[row], shard, int(rows[row]), code) for row, code in zip(chosen, codes, strict=True)]
        best = best_of(best, most)
    if is_binary and best:
        signs = np.unpackbits(np.stack([code for *_, code in best]), axis=1) * np.float32(2) - 1
        best = [(score, *found[1:]) for score, found in zip(cosines(signs, vector), best, strict=True)]
        best = best_of(best, top_k)
    return [(float(score), shard, row) for score, shard, row, _ in best]


def best_of(found: list[tuple], most: int) -> list[tuple]:
    """The highest scores, the first place first where they are the same."""
    return sorted(found, key=lambda each: (-each[0], *each[1:3]))[:most]


def cosines(matrix: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """Cosine similarities of rows `(rows, dim)` of any type and a unit vector."""
    matrix = matrix.astype(np.float32, copy=False)
    return matrix @ vector / np.linalg.norm(matrix, axis=1)


def agreement(codes: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """How many signs of packed rows `(rows, dim / 8)` agree with those of a vector."""
    return 8 * codes.shape[1] - np.bitwise_count(codes ^ np.packbits(vector > 0)).sum(axis=1, dtype=np.int32)


def thumbnail(value: Any, words: str) -> str:
    """An image, or the first of several, as HTML, described by words; why where it cannot be read."""
    try:
        image = load_image(value[0] if isinstance(value, list) else value)
    except ValueError as error:
        return f"<p class='note'>{escape(str(error))}</p>"
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return f'<img src="{data_url(image)}" alt="{escape(words, quote=True)}">'
