# SPDX-License-Identifier: Apache-2.0
"""Batches by their number of tokens instead of rows."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image
from torch.utils.data import Sampler
from tqdm.auto import tqdm

from modeling_cocoa.inputs import CocoaInputError
from modeling_cocoa.processing_cocoa import CocoaProcessor

from .collators import choose_parts
from .datasets import ROWS_AT_ONCE, EpochSampler
from .rows import is_pair, parts_of, undecoded


class TokenBatchSampler(Sampler[list[int]]):
    """
    Batches of at most `batch_num_tokens` tokens; a longer row makes a batch of its own.

    Every epoch has as many batches as the first, the same number for each process: one that would have more leaves out
    its last ones, and one that would have fewer splits its largest.

    Args:
        rows ([`EpochSampler`]): The order of the rows.
        tokens (`Callable[[int], int]`): The tokens of a row, by its index in `rows`.
        batch_num_tokens (`int`): Tokens of a batch.
        processes (`int`, defaults to 1): Processes that share the batches, in turn.

    Raises:
        ValueError: there are fewer rows than processes.
    """

    def __init__(
        self, rows: EpochSampler, tokens: Callable[[int], int], batch_num_tokens: int, processes: int = 1
    ) -> None:
        if len(rows) < processes:
            raise ValueError(f"{len(rows)} rows do not suffice for {processes} processes.")
        self.rows = rows
        self.tokens = tokens
        self.batch_num_tokens = batch_num_tokens
        found = len(self.pack(rows.order(0)))
        self.length = max(1, found // processes) * processes

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[list[int]]:
        batches = self.pack(list(self.rows))[: self.length]
        while len(batches) < self.length:
            place = max(range(len(batches)), key=lambda index: len(batches[index]))
            middle = len(batches[place]) // 2
            batches[place : place + 1] = [batches[place][:middle], batches[place][middle:]]
        yield from batches

    def pack(self, rows: list[int]) -> list[list[int]]:
        """Rows, in their order, as batches."""
        batches: list[list[int]] = []
        total = 0
        for row in rows:
            tokens = self.tokens(row)
            if not batches or total + tokens > self.batch_num_tokens:
                batches.append([])
                total = 0
            batches[-1].append(row)
            total += tokens
        return batches


def count_row_tokens(dataset: Dataset, processor: CocoaProcessor, size: tuple[int, int] | None = None) -> np.ndarray:
    """
    Count the tokens of each row's images, with the two around each, and of its texts, without decoding images. The
    texts of a pair count as one, which in the bridge, where they are apart, is a line break too many.

    Args:
        dataset ([`~datasets.Dataset`]): Rows in any of the forms of [`~rows.parts_of`].
        processor ([`CocoaProcessor`]).
        size (`tuple[int, int]`, *optional*): Width and height to which every image is stretched.

    Returns:
        `np.ndarray` of shape `(rows, 3)`: image tokens, text tokens, and 1 for a pair. What cannot be read counts
        nothing; it is reported when it is used.
    """
    settings = processor.image_processor
    dataset = undecoded(dataset)
    counts = np.zeros((len(dataset), 3), dtype=np.int64)
    with tqdm(total=len(dataset), desc="Counting tokens", unit="row", leave=False) as bar:
        for start in range(0, len(dataset), ROWS_AT_ONCE):
            texts: list[tuple[int, str]] = []
            rows = dataset.select(range(start, min(start + ROWS_AT_ONCE, len(dataset))))
            for place, row in enumerate(rows, start):
                counts[place, 2] = is_pair(row)
                try:
                    parts = parts_of(row)
                except CocoaInputError:
                    continue
                texts += [(place, part["text"]) for part in choose_parts(parts, ("text",))]
                for image in (part["image"] for part in parts if part["type"] == "image"):
                    if (seen := image_size(image)) is not None:
                        width, height = seen if size is None else size
                        patches = settings.get_number_of_image_patches(height, width)
                        counts[place, 0] += patches // settings.merge_size**2 + 2
            if texts:
                encoded = processor.tokenizer([text for _, text in texts], add_special_tokens=False, verbose=False)
                for (place, _), ids in zip(texts, encoded["input_ids"], strict=True):
                    counts[place, 1] = len(ids)
            bar.update(len(rows))
    return counts


def image_size(value: Any) -> tuple[int, int] | None:
    """Width and height of an image (PIL, path, or a dict of bytes or path), as its file says; `None` without one."""
    if value is None:
        return None
    if isinstance(value, Image.Image):
        return value.size
    source = value
    if isinstance(value, Mapping):
        source = value.get("path") if value.get("bytes") is None else io.BytesIO(value["bytes"])
    try:
        with Image.open(source) as image:
            return image.size
    except Exception:  # decoders raise what they like
        return None
