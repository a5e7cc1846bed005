# SPDX-License-Identifier: Apache-2.0
"""Hard negatives of any kind of input, found by a model itself."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import InputModule
from sentence_transformers.util import mine_hard_negatives
from torch import Tensor

from evaluation.digests import digest_content, fingerprint
from evaluation.vectors import VectorStore, embed_missing
from modeling_cocoa.inputs import CocoaInputError
from modeling_cocoa.sentence_transformer import CocoaTransformer

from .content import digest
from .rows import open_images, undecoded


class Lookup(InputModule):
    """
    A model that knows the vector of each number, given as text: `mine_hard_negatives` compares and sorts its inputs,
    which texts allow and images and dicts do not.
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
        return {**features, "sentence_embedding": self.vectors[features["input_ids"][:, 0]]}

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Never saved."""
        raise NotImplementedError("Lookup lives as long as the vectors it was made of.")


def mine_negatives(
    model: SentenceTransformer,
    dataset: Dataset,
    work_dir: str | os.PathLike,
    *,
    num_negatives: int = 2,
    query_prompt: str | None = None,
    target_prompt: str | None = None,
    image_size: tuple[int, int] | None = None,
    batch_size: int = 32,
    seed: int = 42,
    **options: Any,
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
        num_negatives (`int`, defaults to 2): Hard negatives to find for each pair.
        query_prompt, target_prompt (`str`, *optional*): Instructions.
        image_size (`tuple[int, int]`, *optional*): Width and height that images are stretched to.
        batch_size (`int`, defaults to 32): Inputs embedded at once.
        seed (`int`, defaults to 42): Of `sampling_strategy="random"`.
        options: Further ones of `mine_hard_negatives`: `range_min`, `range_max`, `max_score`, `absolute_margin`,
            `relative_margin`, `sampling_strategy`, ...

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
    numbers: dict[str, list[str]] = {}
    rows: list[int] = []
    vectors: list[np.ndarray] = []
    for name, side in sides.items():
        cells = undecoded(side)[name]
        keys = [digest(cell) for cell in cells]
        firsts: dict[str, int] = {}
        for row, key in enumerate(keys):
            firsts.setdefault(key, row)
        place = {key: len(rows) + number for number, key in enumerate(firsts)}
        numbers[name] = [str(place[key]) for key in keys]
        rows += firsts.values()
        vectors.append(
            embed_cells(
                model,
                {key: cells[row] for key, row in firsts.items()},
                store,
                title=f"Embedding {name} inputs",
                prompt=prompts[name],
                batch_size=batch_size,
                image_size=image_size,
            )
        )
    torch.manual_seed(seed)
    found = mine_hard_negatives(
        Dataset.from_dict(numbers),
        SentenceTransformer(modules=[Lookup(torch.from_numpy(np.concatenate(vectors)))], device="cpu"),
        num_negatives=num_negatives,
        output_format="n-tuple",
        batch_size=8192,
        verbose=False,
        **options,
    )
    if not len(found):
        raise ValueError(
            f"No pair has {num_negatives} negatives under these conditions: ask for fewer, or widen range and margin."
        )
    columns = []
    for name in found.column_names:
        side = "query" if name == "query" else "positive"
        taken = sides[side].select([rows[int(number)] for number in found[name]])
        columns.append(taken.rename_columns({side: name}))
    return concatenate_datasets(columns, axis=1)


def load_encoder(name_or_path: str, **options: Any) -> SentenceTransformer:
    """A CoCoA checkpoint to embed with, on the GPU where there is one; `options` are [`CocoaTransformer`]'s."""
    return SentenceTransformer(modules=[CocoaTransformer(name_or_path, **options)])


def embed_cells(
    model: SentenceTransformer,
    cells: Mapping[str, Any],
    store: VectorStore,
    *,
    title: str,
    prompt: str | None,
    batch_size: int,
    image_size: tuple[int, int] | None = None,
) -> np.ndarray:
    """The unit vectors of inputs by their [`digest`], float32 `(inputs, hidden)`, kept in a store as they come."""

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

    keys = [digest_content([prompt, image_size, key]) for key in cells]
    embed_missing(encode, dict(zip(keys, cells.values(), strict=True)), store, title=title)
    return store[keys]
