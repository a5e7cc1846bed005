# SPDX-License-Identifier: Apache-2.0
"""What the app searches: images and texts, and their vectors."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from datasets import Dataset, Image
from sentence_transformers.util import dot_score, semantic_search

from evaluation.digests import digest_content, digest_file, fingerprint
from evaluation.emoji import load_emoji
from evaluation.folder import read_images
from evaluation.vectors import VectorStore, embed_missing
from modeling_cocoa.folders import describe_left_out, describe_unreadable
from modeling_cocoa.inputs import CocoaInputError
from modeling_cocoa.media import load_image
from modeling_cocoa.sentence_transformer import CocoaTransformer

logger = logging.getLogger(__name__)

MAX_IMAGES, MAX_TEXTS = 12, 8


def load_images(folder: str | os.PathLike | None = None) -> Dataset:
    """
    Load images with the columns `image` (not decoded), `name`, and `text` (None if there is none).

    Args:
        folder (`str` or `os.PathLike`, *optional*): For the `imagefolder` builder of `datasets`: with or without a
            `metadata.csv` of the columns `file_name` and `text` or `caption`. By default the emoji of this project.

    Raises:
        ValueError: the folder holds no images.
    """
    if folder is None:
        rows = load_emoji().select_columns(["noto", "name"]).rename_column("noto", "image")
        return rows.cast_column("image", Image(decode=False)).add_column("text", list(rows["name"]))
    rows = read_images(folder)
    texts = rows["text"]
    paths = [os.path.relpath(image["path"], folder) for image in rows["image"]]
    names = [text or path for text, path in zip(texts, paths, strict=True)]
    return rows.add_column("name", names)


def describe_other_files(folder: str | os.PathLike, rows: Dataset) -> str:
    """A sentence that counts the files of a folder that [`load_images`] left out; empty if there are none."""
    used = {Path(image["path"]).resolve() for image in rows["image"]}
    files = (path for path in Path(folder).rglob("*") if path.is_file() and not path.name.startswith("metadata."))
    return describe_left_out(path for path in files if path.resolve() not in used)


class SearchIndex:
    """
    Images, their texts, and the vectors of both, in memory.

    Args:
        model ([`CocoaTransformer`]): Embeds the set and the queries.
        rows ([`~datasets.Dataset`]): From [`load_images`]; embedded here, under a progress bar.
        prompts (`dict[str, str]`): Those of the checkpoint; `query` and `document` are used.
        vectors (`str` or `os.PathLike`, *optional*): Folder in which vectors are kept by model and content, so that
            the next index embeds only what is new. By default none are kept.

    Attributes:
        rows ([`~datasets.Dataset`]): Without images that cannot be read, which are logged as a warning.
        texts (`list[str]`): The texts of all images, without duplicates.

    Raises:
        ValueError: none of the images can be read.
    """

    def __init__(
        self,
        model: CocoaTransformer,
        rows: Dataset,
        prompts: dict[str, str],
        vectors: str | os.PathLike | None = None,
    ) -> None:
        self.model = model
        self.query_prompt, prompt = prompts.get("query") or None, prompts.get("document") or None
        self.texts = list(dict.fromkeys(filter(None, rows["text"])))
        # As dicts, since a bare text that is the path of an image would be read as that image.
        inputs = [{"image": image} for image in rows["image"]] + [{"text": text} for text in self.texts]
        keys = [content_key(item, prompt) for item in inputs]
        reasons: dict[str, str] = {}
        with TemporaryDirectory() as scratch:
            store = VectorStore(Path(scratch) if vectors is None else Path(vectors) / fingerprint(model)[:16])
            embed_missing(
                partial(model.encode, prompt=prompt),
                dict(zip(keys, inputs, strict=True)),
                store,
                title="Embedding",
                skip=lambda item, reason: reasons.update({content_key(item, prompt): reason}),
            )
        readable = [index for index in range(len(rows)) if keys[index] not in reasons]
        unreadable = [
            why_unreadable(item, reasons[key]) for item, key in zip(inputs, keys, strict=True) if key in reasons
        ]
        if not readable:
            raise ValueError(f"None of the images can be read. {describe_unreadable(unreadable)}")
        if unreadable:
            logger.warning("%s", describe_unreadable(unreadable))
        self.rows = rows.select(readable)
        found = store[[keys[index] for index in readable] + keys[len(rows) :]]
        self.image_vectors, self.text_vectors = np.split(found, [len(readable)])

    def search(self, query: dict[str, Any]) -> list[list[dict[str, Any]]]:
        """
        The nearest images and the nearest texts, as sentence-transformers' `semantic_search` gives them: each with its
        position (`corpus_id`) and its cosine similarity (`score`).

        Args:
            query (`dict`): `image`, `text` or both, as [`CocoaTransformer.encode`] takes them.

        Raises:
            CocoaInputError: the query cannot be encoded.
        """
        vector = self.model.encode([query], prompt=self.query_prompt)
        return [
            semantic_search(vector, vectors, top_k=top_k, score_function=dot_score)[0]
            for vectors, top_k in ((self.image_vectors, MAX_IMAGES), (self.text_vectors, MAX_TEXTS))
        ]


def why_unreadable(item: dict[str, Any], reason: str) -> str:
    """Why an input cannot be read; `reason` may name another file of the same content."""
    try:
        load_image(item["image"])
    except CocoaInputError as error:
        return error.reason
    return reason


def content_key(item: dict[str, Any], prompt: str | None) -> str:
    """A digest of what decides an input's vector besides the model: the prompt, and the text or the file's bytes."""
    if "text" in item:
        content = ["text", item["text"]]
    elif item["image"].get("bytes") is not None:
        content = ["image", digest_content(item["image"]["bytes"])]
    elif not Path(item["image"]["path"]).is_file():  # the model says so
        content = ["missing", item["image"]["path"]]
    else:
        content = ["image", digest_file(item["image"]["path"])]
    return digest_content([prompt, *content])
