# SPDX-License-Identifier: Apache-2.0
"""What the app searches: a set of pictures and texts, and their vectors."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Image, config, load_dataset
from PIL.Image import Image as Picture

from evaluation.demo import QUERIES
from evaluation.emoji import load_emoji
from evaluation.encoders import read_settings
from evaluation.vectors import VectorStore, fingerprint
from modeling_cocoa.folders import describe_left_out, describe_unreadable, encode_readable
from modeling_cocoa.inputs import CocoaInputError, load_image
from modeling_cocoa.sentence_transformer import CocoaTransformer

logger = logging.getLogger(__name__)

# `datasets` would tell its makers of every folder that is read otherwise.
config.HF_UPDATE_DOWNLOAD_COUNTS = False

PICTURES_FOUND, TEXTS_FOUND = 12, 8
EXAMPLES = 4
SHOWN_SIDE = 512
"""Pixels of the longer side of a picture on the page; larger ones are scaled down."""


class Found(NamedTuple):
    """Something near a query: its place in the set, what it is called, and its cosine."""

    place: int
    name: str
    score: float


@dataclass
class PictureSet:
    """
    Pictures to search, and the texts that stand beside them.

    Args:
        title (`str`): What they are, in a few words of Markdown.
        pictures (`list[dict]`): Each with `bytes` or `path`; decoded when it is looked at.
        names (`list[str]`): Of the pictures.
        texts (`list[str]`): Distinct ones; none where the pictures have no texts.
        queries (`Sequence[str]`): Words to try.
        left_out (`str`): What of the folder is not among them, in a sentence; empty where that is nothing.
    """

    title: str
    pictures: list[dict[str, Any]]
    names: list[str]
    texts: list[str]
    queries: Sequence[str]
    left_out: str = ""

    @classmethod
    def load(cls, folder: str | os.PathLike | None = None) -> PictureSet:
        """
        A folder of pictures, as `datasets` reads it: with or without a `metadata.csv` of the columns `file_name` and
        `text`.

        Args:
            folder (`str` or `os.PathLike`, *optional*): The emoji that come with this project where none is given.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: it holds no pictures.
        """
        if folder is None:
            rows = load_emoji().cast_column("noto", Image(decode=False))
            names = list(rows["name"])
            return cls(f"{len(names):,} emoji, drawn by Noto", list(rows["noto"]), names, names, QUERIES)
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"There is no folder of pictures {folder}; check the path.")
        try:
            rows = load_dataset("imagefolder", data_dir=str(folder), split="all", drop_labels=True)
        except (FileNotFoundError, ValueError) as error:  # no file at all, or none that is a picture
            raise ValueError(f"{folder} holds no pictures that can be listed: {error}") from error
        pictures = list(rows.cast_column("image", Image(decode=False))["image"])
        captions = list(rows["text"]) if "text" in rows.column_names else [None] * len(pictures)
        captions = [None if caption is None else str(caption) for caption in captions]  # of a column of numbers, too
        files = [os.path.relpath(picture["path"], folder) for picture in pictures]
        texts = list(dict.fromkeys(caption for caption in captions if caption and caption.strip()))
        used = {Path(picture["path"]).resolve() for picture in pictures}
        others = (path for path in Path(folder).rglob("*") if path.is_file() and not path.name.startswith("metadata."))
        return cls(
            f"{len(pictures):,} pictures of the folder `{Path(folder).resolve().name}`",
            pictures,
            [caption or file for caption, file in zip(captions, files, strict=True)],
            texts,
            texts[:: max(1, len(texts) // EXAMPLES)][:EXAMPLES],
            describe_left_out(path for path in others if path.resolve() not in used),
        )

    def picture(self, place: int) -> Picture:
        """One of the pictures, no larger than the page shows it."""
        picture = load_image(self.pictures[place]).copy()
        picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
        return picture

    def without(self, unreadable: Mapping[int, str]) -> PictureSet:
        """
        The set without pictures that cannot be read, of which a warning is logged.

        Args:
            unreadable (`Mapping[int, str]`): Why, by place.

        Raises:
            ValueError: no picture is left.
        """
        if not unreadable:
            return self
        places = [place for place in range(len(self.pictures)) if place not in unreadable]
        reasons = describe_unreadable(list(unreadable.values()))
        if not places:
            raise ValueError(f"No picture of {self.title} can be read. {reasons}")
        logger.warning("%s", reasons)
        return replace(
            self,
            pictures=[self.pictures[place] for place in places],
            names=[self.names[place] for place in places],
            left_out=f"{len(unreadable):,} cannot be read and are left out. {self.left_out}".strip(),
        )

    def examples(self) -> list[int]:
        """Places of a few pictures to try, from all over the set."""
        step = max(1, len(self.pictures) // EXAMPLES)
        return list(range(step // 2, len(self.pictures), step))[:EXAMPLES]


class SearchIndex:
    """
    The vectors of a set, and what is near to a query among them.

    Args:
        model ([`CocoaTransformer`]).
        rows ([`PictureSet`]): Embedded here, under progress bars; pictures that cannot be read are left out, and a
            warning counts and names them.
        prompts (`dict[str, str]`): Those of [`read_prompts`].
        vectors (`str` or `os.PathLike`, *optional*): Folder in which vectors are kept as they come, by model and
            content, so that only what is new is embedded; nothing is kept where none is given.

    Attributes:
        rows ([`PictureSet`]): Those that were embedded.

    Raises:
        ValueError: none of the pictures can be read.
    """

    def __init__(
        self,
        model: CocoaTransformer,
        rows: PictureSet,
        prompts: dict[str, str],
        vectors: str | os.PathLike | None = None,
    ) -> None:
        self.model = model
        self.query_prompt = prompts.get("query")
        # As values of a dict: a bare text that is the path of a picture would be read as that picture.
        inputs = [{"image": picture} for picture in rows.pictures] + [{"text": text} for text in rows.texts]
        prompt = prompts.get("document")
        # Files are read for their digests only where vectors are kept.
        keys = [str(place) if vectors is None else content_key(item, prompt) for place, item in enumerate(inputs)]
        store = None if vectors is None else VectorStore(Path(vectors) / fingerprint(model)[:16])
        known = {key: store[[key]][0] for key in keys if key in store} if store is not None else {}
        new: dict[str, dict[str, Any]] = {}
        for key, item in zip(keys, inputs, strict=True):
            if key not in known:
                new.setdefault(key, item)
        new_keys, reasons = list(new), {}
        encode = partial(model.encode, prompt=prompt, show_progress_bar=True)
        for positions, found, unreadable in encode_readable(encode, list(new.values())):
            chunk = [new_keys[position] for position in positions]
            if store is not None and chunk:
                store.add(chunk, found)
            known.update(zip(chunk, found, strict=True))
            reasons.update((new_keys[position], reason) for position, reason in unreadable.items())
        self.rows = rows.without(
            {
                place: reasons[key] if inputs[place] is new[key] else why_unreadable(inputs[place]["image"])
                for place, key in enumerate(keys)
                if key in reasons
            }
        )
        found = np.stack([known[key] for key in keys if key in known])
        self.pictures, self.texts = np.split(found, [len(self.rows.pictures)])

    def search(self, query: dict[str, Any]) -> tuple[list[Found], list[Found]]:
        """
        The nearest pictures and the nearest texts, the nearest first.

        Args:
            query (`dict`): `image`, `text` or both, as [`CocoaTransformer.encode`] takes them.

        Raises:
            CocoaInputError: the query cannot be encoded.
        """
        (vector,) = self.model.encode([query], prompt=self.query_prompt)
        return (
            nearest(self.pictures @ vector, self.rows.names, PICTURES_FOUND),
            nearest(self.texts @ vector, self.rows.texts, TEXTS_FOUND),
        )


def content_key(item: dict[str, Any], prompt: str | None) -> str:
    """A digest of what decides an input's vector besides the model: its words or the bytes of its file."""
    picture = item.get("image")
    if picture is None:
        content = b"text " + item["text"].encode("utf-8", "surrogatepass")
    elif picture.get("bytes") is not None:
        content = b"image " + picture["bytes"]
    else:
        try:
            content = b"image " + Path(picture["path"]).read_bytes()
        except OSError:  # said by who embeds it
            content = b"path " + os.fsencode(picture["path"])
    return hashlib.sha256(f"{prompt!r} ".encode() + content).hexdigest()


def why_unreadable(picture: dict[str, Any]) -> str:
    """Why a picture cannot be read, by its own name."""
    try:
        load_image(picture)
    except CocoaInputError as error:
        return error.reason
    return "it could not be read at first."


def nearest(scores: np.ndarray, names: Sequence[str], most: int) -> list[Found]:
    """Those of the highest scores; of equals, the first come first."""
    return [
        Found(int(place), names[place], float(scores[place])) for place in np.argsort(-scores, kind="stable")[:most]
    ]


def read_prompts(model: str | os.PathLike) -> dict[str, str]:
    """
    The instructions that `encode_query` and `encode_document` of a checkpoint put in front of their inputs.

    Args:
        model (`str` or `os.PathLike`): Folder or Hub name.

    Returns:
        `dict[str, str]`: `query` and `document`, as far as there are any.
    """
    prompts = read_settings(model).get("prompts", {})
    return {task: prompts[task] for task in ("query", "document") if prompts.get(task)}
