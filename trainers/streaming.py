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
from .rows import PAIR_COLUMNS, NoTargetTextError, choose_columns, without_image_decoding

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
    Several datasets as one stream, of which each next row comes from one that is drawn by weight.

    Args:
        parts (`Mapping[str, Dataset or IterableDataset]`): By name. Columns that rows are not read from are left out.
        weights (`Mapping[str, float]`, *optional*): Of each. A pass ends when every dataset has been seen whole, the
            others more than once meanwhile. Without weights datasets take turns.
        seed (`int`): Of the draws.

    Raises:
        ValueError: there are no datasets, names differ from the weights', or a weight is not above 0.
    """
    check_weights(parts, weights)
    streams = []
    for name, part in parts.items():
        stream = part.to_iterable_dataset() if isinstance(part, Dataset) else part
        columns = used_columns(stream, f"The dataset {name!r}")
        stream = with_image_columns(stream.select_columns(columns))
        if columns == list(PAIR_COLUMNS) and len(parts) > 1:
            if stream.features is not None:
                stream = stream.cast(without_image_decoding(stream.features))
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
    """
    The columns of a stream that rows are read from; others are named in a warning.

    Raises:
        ValueError: there are none, or no row.
    """
    known = stream.column_names
    if known is None:  # of a stream, whose rows alone tell
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
    Batches without end of a dataset that is streamed; every pass mixes its rows anew.

    A dataset with as many shards as there are processes (or a multiple) has them shared out; of another, each process
    reads all rows and keeps its own. Workers share the shards of their process; those beyond their number do nothing.
    The same processes, workers and seed give the same batches. A resumed run reads again what it had read before.

    Args:
        dataset ([`~datasets.IterableDataset`]): Rows in any of the forms of [`~rows.parts_of`].
        collator ([`ReconstructionCollator`]).
        seed (`int`): Of the run.
        batch_size (`int`): Rows of a batch.
        batch_tokens (`int`, *optional*): Tokens of a batch, instead of so many rows; a longer row comes alone.
        buffer_size (`int`): Rows among which the next is drawn.
        process_index, num_processes (`int`): Of those that train together.

    Raises:
        ValueError: while it is read: a row is bad (or with `on_bad_sample="skip"`, all of them).
    """

    def __init__(
        self,
        dataset: IterableDataset,
        collator: ReconstructionCollator,
        seed: int,
        *,
        batch_size: int,
        batch_tokens: int | None = None,
        buffer_size: int,
        process_index: int = 0,
        num_processes: int = 1,
    ) -> None:
        if dataset.features is not None:
            dataset = dataset.cast(without_image_decoding(dataset.features))
        shuffled = dataset.shuffle(seed=seed, buffer_size=buffer_size)
        self.dataset = split_dataset_by_node(shuffled, rank=process_index, world_size=num_processes)
        self.collator = collator
        self.seed = seed
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens
        self.process_index = process_index

    def __iter__(self) -> Iterator[dict[str, Any]]:
        examples: list[Example] = []
        tokens = skipped = 0
        for example in self.examples():
            if example is None:
                skipped += 1
                continue
            if self.batch_tokens is None:
                is_full = len(examples) == self.batch_size
            else:
                is_full = tokens + example.tokens > self.batch_tokens
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
                try:
                    example = self.collator.example({**row, "index": name, "seed": (self.seed, epoch, *place, index)})
                except CocoaInputError as error:
                    if self.collator.on_bad_sample == "raise" and not isinstance(error, NoTargetTextError):
                        raise ValueError(
                            f"Cannot train on row {name}: {error.reason} Repair the row, or set on_bad_sample='skip'."
                        ) from error
                    yield None
                    continue
                found = True
                yield example
            if not found:
                raise ValueError("No row of the streamed dataset can be used.")
