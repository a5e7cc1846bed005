# SPDX-License-Identifier: Apache-2.0
"""Hard negatives of any kind of input, found by a model itself."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule
from sentence_transformers.util import mine_hard_negatives
from torch import Tensor

from evaluation.vectors import VectorStore, embed_missing, fingerprint
from modeling_cocoa.inputs import CocoaInputError
from modeling_cocoa.sentence_transformer import CocoaTransformer

from .content import digest
from .rows import open_images, without_image_decoding


class Lookup(InputModule):
    """
    A model that knows the vector of each number, written out as text: through it sentence-transformers' tools for
    texts serve inputs of any kind.

    Args:
        vectors (`Tensor` of shape `(inputs, hidden)`).
    """

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.vectors = torch.nn.Buffer(vectors)

    def get_embedding_dimension(self) -> int:
        """Length of a vector."""
        return self.vectors.shape[1]

    def preprocess(self, inputs: Sequence[str], prompt: str | None = None, **kwargs: Any) -> dict[str, Tensor]:
        """The numbers, of shape `(batch, 1)`."""
        return {"input_ids": torch.tensor([[int(text)] for text in inputs])}

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Add the vectors as `sentence_embedding`."""
        features["sentence_embedding"] = self.vectors[features["input_ids"][:, 0]]
        return features

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Not meant to be kept."""
        raise NotImplementedError("Lookup lives as long as the vectors it was made of.")


def mine_negatives(
    model: SentenceTransformer,
    dataset: Dataset,
    work_dir: str | os.PathLike,
    *,
    num_negatives: int = 2,
    range_min: int = 0,
    range_max: int | None = None,
    max_score: float | None = None,
    absolute_margin: float | None = None,
    relative_margin: float | None = None,
    sampling_strategy: str = "top",
    query_prompt: str | None = None,
    target_prompt: str | None = None,
    image_size: tuple[int, int] | None = None,
    batch_size: int = 32,
    seed: int = 42,
) -> Dataset:
    """
    Give each pair the targets of other pairs that the model puts closest to its query
    ([`~sentence_transformers.util.mine_hard_negatives`]).

    Inputs that are the same are embedded once, and count as one: all positives of a query are left out of its
    negatives. Pairs with fewer negatives than wanted are left out.

    Args:
        model ([`~sentence_transformers.SentenceTransformer`]).
        dataset ([`~datasets.Dataset`]): With `query` and `positive`, each a text, an image, a dict or a conversation.
        work_dir (`str` or `os.PathLike`): Folder of the vectors; the same call goes on from those that are there.
        num_negatives (`int`, defaults to 2): For each pair.
        range_min, range_max (`int`, *optional*): Ranks, the closest being 0, that negatives are taken from.
        max_score (`float`, *optional*): Cosine beyond which a target is no negative.
        absolute_margin, relative_margin (`float`, *optional*): A negative's cosine is below the positive's by this, or
            by this part of it.
        sampling_strategy (`str`, defaults to `"top"`): `"top"` takes the closest that are left, `"random"` any.
        query_prompt, target_prompt (`str`, *optional*): Instructions.
        image_size (`tuple[int, int]`, *optional*): Width and height that images are stretched to.
        batch_size (`int`, defaults to 32): Of encoding.
        seed (`int`, defaults to 42): Of `"random"`.

    Returns:
        [`~datasets.Dataset`] with `query`, `positive`, and `negative_1` to `negative_n`.

    Raises:
        ValueError: a column is missing, or no pair has enough negatives.
    """
    if missing := [name for name in ("query", "positive") if name not in dataset.column_names]:
        raise ValueError(
            f"Pairs have the columns 'query' and 'positive'; {missing} are not in {dataset.column_names}."
        )
    store = VectorStore(Path(work_dir) / fingerprint(model)[:16])
    sides = {name: dataset.select_columns([name]) for name in ("query", "positive")}
    prompts = {"query": query_prompt, "positive": target_prompt}
    numbers, rows, vectors, offset = {}, [], [], 0
    for name, side in sides.items():
        cells = side.cast(without_image_decoding(side.features))[name]
        firsts: dict[str, int] = {}
        keys = [digest(cell) for cell in cells]
        for row, key in enumerate(keys):
            firsts.setdefault(key, row)
        place = {key: offset + number for number, key in enumerate(firsts)}
        numbers[name] = [str(place[key]) for key in keys]
        inputs = [cells[row] for row in firsts.values()]
        vectors.append(
            embed_cells(
                model,
                inputs,
                store,
                title=f"Embedding {name} inputs",
                prompt=prompts[name],
                batch_size=batch_size,
                image_size=image_size,
            )
        )
        rows += firsts.values()
        offset += len(firsts)
    torch.manual_seed(seed)
    found = mine_hard_negatives(
        Dataset.from_dict(numbers),
        SentenceTransformer(modules=[Lookup(torch.from_numpy(np.concatenate(vectors)))], device="cpu"),
        num_negatives=num_negatives,
        range_min=range_min,
        range_max=range_max,
        max_score=max_score,
        absolute_margin=absolute_margin,
        relative_margin=relative_margin,
        sampling_strategy=sampling_strategy,
        output_format="n-tuple",
        batch_size=8192,
        verbose=False,
    )
    if not len(found):
        raise ValueError(
            f"No pair has {num_negatives} negatives under these conditions: ask for fewer, or widen range and margin."
        )
    columns = []
    for name in found.column_names:
        side = "query" if name == "query" else "positive"
        taken = sides[side].select([rows[int(number)] for number in found[name]])
        columns.append(taken if name == side else taken.rename_column(side, name))
    return concatenate_datasets(columns, axis=1)


def load_encoder(name_or_path: str, **options: Any) -> SentenceTransformer:
    """A CoCoA checkpoint to embed with, on the GPU where there is one; `options` are [`CocoaTransformer`]'s."""
    return SentenceTransformer(modules=[CocoaTransformer(name_or_path, **options)])


def embed_cells(
    model: SentenceTransformer,
    cells: list[Any],
    store: VectorStore,
    *,
    title: str,
    prompt: str | None,
    batch_size: int,
    image_size: tuple[int, int] | None = None,
) -> np.ndarray:
    """
    The vectors of many inputs, kept in a store as they come.

    Args:
        model ([`~sentence_transformers.SentenceTransformer`]).
        cells (`list`): Inputs, images not decoded.
        store ([`VectorStore`]): Of this model.
        title (`str`): What they are, for the progress bar.
        prompt (`str`, *optional*).
        batch_size (`int`).
        image_size (`tuple[int, int]`, *optional*): Width and height that images are stretched to.

    Returns:
        `np.ndarray` of shape `(inputs, hidden)`, float32: unit vectors.

    Raises:
        CocoaInputError: an input cannot be read.
    """

    def encode(part: list[Any]) -> np.ndarray:
        try:
            return model.encode(
                [open_images(cell, image_size) for cell in part],
                prompt=prompt or "",
                batch_size=batch_size,
                normalize_embeddings=True,
                convert_to_numpy=True,
            )
        except CocoaInputError as error:  # whose position is the one in a batch
            raise CocoaInputError(error.reason) from error

    keys = [hashlib.sha256(json.dumps([prompt, image_size, digest(cell)]).encode()).hexdigest() for cell in cells]
    embed_missing(encode, dict(zip(keys, cells, strict=True)), store, title=title)
    return store[keys]
