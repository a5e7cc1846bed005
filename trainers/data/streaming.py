# SPDX-License-Identifier: Apache-2.0
"""Rows that come from a stream: mixed in a buffer, split over processes and workers, made into batches on the way."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

import torch
from datasets import Dataset, Features, Image, IterableDataset, Sequence, Value, interleave_datasets
from datasets.distributed import split_dataset_by_node

from modeling_cocoa.inputs import CocoaInputError, input_messages

from .collators import Example, ReconstructionCollator
from .datasets import check_weights, warn_unused_columns
from .rows import PAIR_COLUMNS, choose_columns, undecoded

MESSAGES = [
    {
        "role": Value("string"),
        "content": [{"type": Value("string"), "text": Value("string"), "image": Image(decode=False)}],
    }
]
"""A side of a pair as a conversation: the form in which pairs of any kind mix."""


def mix_streams(
    parts: Mapping[str, Dataset | IterableDataset], weights: Mapping[str, float] | None, seed: int
) -> IterableDataset:
    """
    Interleave several datasets as one stream, drawn by weight, or in turn without weights. A pass ends when every
    dataset has been read, the others more than once meanwhile. Columns that rows are not read from are left out.
    """
    check_weights(parts, weights)
    streams = []
    for name, part in parts.items():
        stream = part.to_iterable_dataset() if isinstance(part, Dataset) else part
        columns = used_columns(stream, f"The dataset {name!r}")
        stream = with_image_columns(stream.select_columns(columns))
        if columns == list(PAIR_COLUMNS) and len(parts) > 1:
            stream = undecoded(stream)
            stream = stream.map(as_conversations, features=Features(dict.fromkeys(PAIR_COLUMNS, MESSAGES)))
        streams.append(stream)
    if len(streams) == 1:
        return streams[0]
    shares = None
    if weights is not None:
        total = sum(weights.values())
        shares = [weights[name] / total for name in parts]
    return interleave_datasets(streams, probabilities=shares, seed=seed, stopping_strategy="all_exhausted")


def used_columns(stream: IterableDataset, what: str) -> list[str]:
    """The columns of a stream that rows are read from; others are named in a warning."""
    known = stream.column_names
    if known is None:
        known = list(next(iter(stream.take(1)), {}))
    columns = choose_columns(known, what)
    warn_unused_columns(known, columns, what)
    return columns


def as_conversations(row: Mapping[str, Any]) -> dict[str, Any]:
    """The sides of a pair as conversations; one that cannot be read is empty, and found when it is used."""

    def convert(cell: Any) -> list[dict[str, Any]] | None:
        try:
            messages = input_messages(cell)
        except CocoaInputError:
            return None
        return [
            {**message, "content": [{"text": None, "image": None, **part} for part in message["content"]]}
            for message in messages
        ]

    return {name: convert(row[name]) for name in PAIR_COLUMNS}


def with_image_columns(part: IterableDataset) -> IterableDataset:
    """The same rows, paths of images being images: only then do they mix with those of other datasets."""
    path = Value("string")
    for name, paths, images in (("image", path, Image()), ("images", Sequence(path), Sequence(Image()))):
        if (part.features or {}).get(name) == paths:
            part = part.cast_column(name, images)
    return part


class ReconstructionStream(torch.utils.data.IterableDataset):
    """
    Endless batches of a streamed dataset, which is shuffled anew in every pass.

    `datasets` splits shards over processes where their number divides; otherwise each process reads all rows and keeps
    its own. Workers share the shards of their process; those beyond their number do nothing. The same processes,
    workers and seed give the same batches. A resumed run reads again what it had read before.

    Args:
        dataset ([`~datasets.IterableDataset`]): Rows in any of the forms of [`~rows.parts_of`].
        collator ([`ReconstructionCollator`]).
        seed (`int`): Of the run.
        batch_size (`int`): Rows of a batch.
        batch_num_tokens (`int`, *optional*): Tokens of a batch instead of rows; a longer row comes alone.
        buffer_size (`int`): Rows among which the next is drawn.
        process_index, num_processes (`int`): Of those that train together.

    Raises:
        ValueError: while it is read: a row is bad (or with `on_bad_row="skip"`, all of them).
    """

    def __init__(
        self,
        dataset: IterableDataset,
        collator: ReconstructionCollator,
        seed: int,
        *,
        batch_size: int,
        batch_num_tokens: int | None = None,
        buffer_size: int,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        shuffled = undecoded(dataset).shuffle(seed=seed, buffer_size=buffer_size)
        self.dataset = split_dataset_by_node(shuffled, rank=process_index, world_size=num_processes)
        self.collator = collator
        self.seed = seed
        self.batch_size = batch_size
        self.batch_num_tokens = batch_num_tokens
        self.process_index = process_index

    def __iter__(self) -> Iterator[dict[str, Any]]:
        examples: list[Example] = []
        tokens = skipped = 0
        for example in self.examples():
            if example is None:
                skipped += 1
                continue
            if self.batch_num_tokens is None:
                is_full = len(examples) == self.batch_size
            else:
                is_full = tokens + example.tokens > self.batch_num_tokens
            if examples and is_full:
                yield {**self.collator.collate(examples), "num_skipped": skipped}
                examples, tokens, skipped = [], 0, 0
            examples.append(example)
            tokens += example.tokens

    def examples(self) -> Iterator[Example | None]:
        """The examples of this worker, pass after pass; `None` for a row that is skipped."""
        worker = torch.utils.data.get_worker_info()
        number = 0 if worker is None else worker.id
        if worker is not None and number >= max(1, self.dataset.num_shards):
            return
        place = (self.process_index, number)
        dataset = copy.deepcopy(self.dataset)  # workers would share its epoch, and each is in one of its own
        for epoch in count():
            dataset.set_epoch(epoch)
            found = False
            for index, row in enumerate(dataset):
                name = f"{index} of pass {epoch} in process {place[0]}, worker {place[1]}"
                seed = (self.seed, epoch, *place, index)
                example, _ = self.collator.try_example({**row, "index": name, "seed": seed})
                found = found or example is not None
                yield example
            if not found:
                raise ValueError("No row of the streamed dataset can be used.")
