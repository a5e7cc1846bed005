# SPDX-License-Identifier: Apache-2.0
"""What a teacher says of the inputs of pairs: unit vectors of those that it reads, each computed once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from transformers.utils import logging

from evaluation.digests import digest_content, fingerprint
from evaluation.encoders import takes
from evaluation.vectors import VectorStore, embed_missing
from modeling_cocoa.inputs import CocoaInputError, input_messages, input_parts
from modeling_cocoa.media import load_image

from .content import digest
from .rows import TEACHER_COLUMN, fetch_image, join_texts

logger = logging.get_logger(__name__)

BATCH_SIZE = 32
"""Inputs that the teacher embeds at once."""
STANDS_IN = {"query": "positive", "positive": "query"}
"""The column that a teacher reads where it cannot read one: the other side of the pair."""

Place = tuple[Dataset, int, str]
"""A cell: its dataset, row and column."""


class TeacherVectors:
    """
    A teacher's unit vectors of the cells of datasets, kept in a folder under the teacher's [`fingerprint`].

    A cell is embedded as what its column is, a query or a document (`encode_query`, `encode_document`), with the
    teacher's own prompts. Where a row has a cell `teacher`, this is read in place of both sides of the pair: a
    translation, of what the teacher has no words for. Where the teacher cannot read one side (an image, for a teacher
    of texts), the other side stands in for it; a negative has no stand-in. Videos are never read.

    Args:
        teacher ([`~sentence_transformers.SentenceTransformer`]).
        datasets (`Mapping[str, Dataset]`): By what they are called, with the columns `query`, `positive`,
            `negative_1`, ..., `teacher`. The processes that train together share the work.
        folder (`Path`): Of the vectors; need not exist.
        show_progress_bar (`bool`, defaults to `True`).

    Attributes:
        vectors (`Tensor` of shape `(inputs, teacher's hidden)`): float32, on the CPU.

    Raises:
        ValueError: the teacher can read neither side of any pair; says what it reads.
    """

    def __init__(
        self,
        teacher: SentenceTransformer,
        datasets: Mapping[str, Dataset],
        folder: Path,
        show_progress_bar: bool = True,
    ) -> None:
        self._taken: dict[tuple[str, ...], bool] = {}
        groups: dict[tuple[str, tuple[str, ...]], dict[str, Place]] = {}
        for name, dataset in datasets.items():
            unread = 0
            for number in range(len(dataset)):
                row = dataset[number]
                for kinds in map(kinds_of, row.values()):
                    self._taken.setdefault(kinds, takes(teacher, kinds))
                sources = list(self._sources(row))
                unread += sources[0] is None
                for side, column in filter(None, sources):
                    group = groups.setdefault((side, kinds_of(row[column])), {})
                    group.setdefault(key_of(side, row[column]), (dataset, number, column))
            if unread:
                logger.warning(
                    f"{name}: the teacher reads neither side of {unread} of {len(dataset)} pairs; the contrastive "
                    "loss alone trains on these."
                )
        if not groups:
            raise ValueError(
                f"The teacher reads {teacher.modalities}, and that is neither side of any pair: give another teacher."
            )
        store = VectorStore(folder / fingerprint(teacher)[:16])
        state = PartialState()
        # Then what other processes have not left on this disk.
        for process, processes in dict.fromkeys([(state.process_index, state.num_processes), (0, 1)]):
            for (side, _), places in groups.items():  # of one kind, since some models take no other in one call
                embed_missing(
                    Encode(teacher, side),
                    places,
                    store,
                    title=f"The teacher reads {side} inputs",
                    process_index=process,
                    num_processes=processes,
                    skip=lambda place, reason: None,  # a bad row, of which the collator says what is wrong
                    show_progress_bar=show_progress_bar and state.is_main_process,
                )
            state.wait_for_everyone()
            store.refresh()
        keys = [key for places in groups.values() for key in places if key in store]
        self._positions = {key: position for position, key in enumerate(keys)}
        self.vectors = torch.from_numpy(store[keys])

    def positions(self, row: Mapping[str, Any]) -> list[int]:
        """Where the vectors of a row's columns are in `vectors`; -1 for one that the teacher does not read."""
        return [
            -1 if source is None else self._positions.get(key_of(source[0], row[source[1]]), -1)
            for source in self._sources(row)
        ]

    def _sources(self, row: Mapping[str, Any]) -> Iterator[tuple[str, str] | None]:
        """For each column the side that it is read as, and the column that is read; none where neither can be."""
        readable = {name for name in row if name != "dataset_name" and self._taken.get(kinds_of(row[name]), False)}
        for name in row:
            if name in ("dataset_name", TEACHER_COLUMN):
                continue
            candidates = [TEACHER_COLUMN, name, STANDS_IN[name]] if name in STANDS_IN else [name]
            source = next((candidate for candidate in candidates if candidate in readable), None)
            yield None if source is None else ("query" if name == "query" else "document", source)


class Encode:
    """
    What embeds cells as a teacher embeds a side.

    Args:
        teacher ([`~sentence_transformers.SentenceTransformer`]).
        side (`"query"` or `"document"`).
    """

    def __init__(self, teacher: SentenceTransformer, side: str) -> None:
        self.teacher = teacher
        self.encode = teacher.encode_query if side == "query" else teacher.encode_document

    def __call__(self, places: list[Place]) -> np.ndarray:
        """Unit vectors, `(places, hidden)`; raises [`CocoaInputError`] where an image cannot be read."""
        found = []
        for first in range(0, len(places), BATCH_SIZE):  # no more, since its images are in memory
            inputs = []
            for position, (dataset, row, column) in enumerate(places[first : first + BATCH_SIZE], first):
                try:
                    inputs.append(teacher_input(self.teacher, dataset[row][column]))
                except CocoaInputError as error:
                    raise CocoaInputError(error.reason, position) from error
            options = {"batch_size": BATCH_SIZE, "normalize_embeddings": True, "show_progress_bar": False}
            found.append(self.encode(inputs, **options))
        return np.concatenate(found)


def teacher_input(teacher: SentenceTransformer, cell: Any) -> Any:
    """A cell in a form that the teacher takes: a text, a conversation, or a dict of a text and an image."""
    if not teacher.supports("image"):
        (part,) = join_texts(input_parts(cell))
        return part["text"]
    messages = input_messages(cell)
    parts = [part for message in messages for part in message["content"]]
    for part in parts:
        if part["type"] == "image":
            part["image"] = load_image(fetch_image(part["image"]))
    if teacher.supports("message"):
        return messages
    return {part["type"]: part[part["type"]] for part in join_texts(parts)}


def kinds_of(cell: Any) -> tuple[str, ...]:
    """`"text"` and `"image"` in the order of a cell, neighbouring texts as one; none of a cell that cannot be read."""
    try:
        return tuple(part["type"] for part in join_texts(input_parts(cell)))
    except CocoaInputError:
        return ()


def key_of(side: str, cell: Any) -> str:
    """What decides a cell's vector besides the teacher, as a digest."""
    return digest_content([side, digest(cell)])
