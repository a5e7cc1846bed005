# SPDX-License-Identifier: Apache-2.0
"""Any number of inputs to vectors, in batches by token budget."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .inputs import CocoaInputError, Conversation
from .modeling_cocoa import CocoaModelMixin
from .processing_cocoa import CocoaProcessor, check_list

logger = logging.getLogger(__name__)

T = TypeVar("T")

INPUTS_AT_ONCE = 1024
"""Inputs from which batches are made up at a time, so that memory does not grow with their number ..."""
IMAGE_BATCHES_AT_ONCE = 4
"""... nor with their size: fewer inputs, where their images alone fill so many batches."""
TOKEN_PIXELS = 28 * 28
"""Pixels of an image that make one token."""

CPU_BATCH_TOKENS = 1024
"""On a CPU: what its caches hold of a layer of a small model. Larger batches measured slower."""
GPU_BATCH_TOKENS = 8192
"""On anything else."""


@dataclass
class Window:
    """
    Some inputs on their way to vectors.

    Args:
        rows (`dict[int, dict]`): Of each distinct input, by its position: what [`CocoaProcessor.encode`] gives.
        images (`dict[int, list[bytes]]`): Of each of these, its images' digests.
        repeated (`dict[int, int]`): Positions of inputs that occurred before, and where.
    """

    rows: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    images: dict[int, list[bytes]] = field(default_factory=dict)
    repeated: dict[int, int] = field(default_factory=dict)

    def length(self, position: int) -> int:
        """Tokens of an input."""
        return len(self.rows[position]["input_ids"])


def encode_inputs(
    model: CocoaModelMixin,
    processor: CocoaProcessor,
    inputs: Sequence[Any],
    *,
    prompt: str | None = None,
    batch_tokens: int | None = None,
    batch_size: int | None = None,
    show_progress_bar: bool = False,
) -> Tensor:
    """
    Embed a list of inputs.

    Batches are filled up to a number of tokens, images counted at their true number, with inputs of similar length
    together; an input that is longer alone makes a batch of its own. Inputs that are the same are computed once, and
    an image that several inputs of a batch share passes the vision tower once. Memory does not grow with the number of
    inputs beyond the vectors themselves. On a GPU, the next inputs are read while it works.

    Args:
        model, processor: What embeds, on the model's device.
        inputs (`Sequence`): As in [`CocoaProcessor.encode`].
        prompt (`str`, *optional*): As in [`CocoaProcessor.encode`].
        batch_tokens (`int`, *optional*): Tokens of a batch; by default 1,024 on a CPU, 8,192 elsewhere. Halved, with a
            warning, where a GPU's memory does not suffice.
        batch_size (`int`, *optional*): At most so many inputs a batch.
        show_progress_bar (`bool`, defaults to `False`): Count inputs.

    Returns:
        `Tensor` of shape `(inputs, hidden)`, float32, on the CPU: unit vectors in the order of the inputs.

    Raises:
        CocoaInputError: an input cannot be encoded; names its position.
        TypeError: `inputs` is one input instead of a list of inputs.
        ValueError: a size is below 1.
    """
    for name, value in (("batch_tokens", batch_tokens), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be 1 or more; got {value}.")
    check_list(inputs)
    on_cpu = model.device.type == "cpu"
    batch_tokens = batch_tokens or (CPU_BATCH_TOKENS if on_cpu else GPU_BATCH_TOKENS)
    vectors = torch.empty(len(inputs), model.config.get_text_config().hidden_size)
    windows = read_windows(processor, inputs, prompt, IMAGE_BATCHES_AT_ONCE * batch_tokens * TOKEN_PIXELS)
    with torch.inference_mode(), tqdm(total=len(inputs), unit="input", disable=not show_progress_bar) as bar:
        for window in windows if on_cpu else read_ahead(windows):
            pending = cut(window, sorted(window.rows, key=window.length), batch_tokens, batch_size)
            while pending:
                batch = pending.pop()
                output = try_embed(model, processor, window, batch)
                if output is None:
                    batch_tokens = max(1, sum(map(window.length, batch)) // 2)
                    logger.warning("The GPU's memory does not suffice; going on with %d tokens a batch.", batch_tokens)
                    rest = [*batch, *(position for later in reversed(pending) for position in later)]
                    pending = cut(window, rest, batch_tokens, batch_size)
                    continue
                vectors[torch.tensor(batch)] = output
                bar.update(len(batch))
            for position, first in window.repeated.items():
                vectors[position] = vectors[first]
            bar.update(len(window.repeated))
            window.rows.clear()  # now, not when the next ones have been read beside them
    return vectors


def read_windows(
    processor: CocoaProcessor, inputs: Sequence[Any], prompt: str | None, pixels_at_once: int
) -> Iterator[Window]:
    """The inputs, read and made into tensors, as many at a time as memory should hold; repeated ones are named."""
    largest = processor.image_processor.size["longest_edge"]
    seen: dict[bytes, int] = {}
    conversations: dict[int, Conversation] = {}
    window, pixels = Window(), 0

    def complete() -> Window:
        positions = list(conversations)
        try:
            rows = processor.encode(list(conversations.values()), prompt=prompt)
        except CocoaInputError as error:
            raise CocoaInputError(error.reason, positions[error.position or 0]) from error
        window.rows = dict(zip(positions, rows, strict=True))
        conversations.clear()
        return window

    for position, conversation in enumerate(processor.read(inputs)):
        first = seen.setdefault(conversation.digest, position)
        if first != position:
            window.repeated[position] = first
        else:
            conversations[position] = conversation
            window.images[position] = conversation.image_digests
            pixels += conversation.pixels(largest)
        if len(conversations) == INPUTS_AT_ONCE or pixels >= pixels_at_once:
            yield complete()
            window, pixels = Window(), 0
    if conversations or window.repeated:
        yield complete()


def read_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, the next of which is made in a thread while one is used."""
    with ThreadPoolExecutor(max_workers=1) as worker:
        future = worker.submit(next, items, None)
        while (item := future.result()) is not None:
            future = worker.submit(next, items, None)
            yield item


def cut(window: Window, order: Sequence[int], batch_tokens: int, batch_size: int | None) -> list[list[int]]:
    """The inputs in the given order, cut where a batch would exceed its tokens or its number; the last batch first."""
    batches: list[list[int]] = []
    tokens = 0
    for position in order:
        length = window.length(position)
        if not batches or tokens + length > batch_tokens or len(batches[-1]) == batch_size:
            batches.append([])
            tokens = 0
        batches[-1].append(position)
        tokens += length
    return batches[::-1]


def try_embed(
    model: CocoaModelMixin, processor: CocoaProcessor, window: Window, batch: Sequence[int]
) -> Tensor | None:
    """The vectors of a batch, or `None` where the GPU's memory does not suffice for several inputs together."""
    try:
        return embed(model, processor, window, batch)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    # Here, not above: the error keeps what it interrupted in memory.
    torch.cuda.empty_cache()
    return None


def embed(model: CocoaModelMixin, processor: CocoaProcessor, window: Window, batch: Sequence[int]) -> Tensor:
    """The vectors of a batch, `(inputs, hidden)`, float32, on the CPU."""
    places: dict[bytes, int] = {}
    pixels, grids, index, slim = [], [], [], []
    for position in batch:
        row = window.rows[position]
        if "pixel_values" in row:
            sizes = row["image_grid_thw"].prod(-1).tolist()
            parts = zip(window.images[position], row["pixel_values"].split(sizes), row["image_grid_thw"], strict=True)
            for digest, values, grid in parts:
                if digest not in places:
                    places[digest] = len(places)
                    pixels.append(values)
                    grids.append(grid)
                index.append(places[digest])
        slim.append({name: value for name, value in row.items() if name not in ("pixel_values", "image_grid_thw")})
    features: Mapping[str, Tensor] = processor.collate(slim)
    features = {name: value for name, value in features.items() if not name.startswith("num_")}
    if pixels:
        features["pixel_values"] = torch.cat(pixels)
        features["image_grid_thw"] = torch.stack(grids)
        features["image_index"] = torch.tensor(index)
    features = {name: value.to(model.device) for name, value in features.items()}
    vectors = model(**features, eos_only=True).pooler_output.float().cpu()
    # Again, since half precision rounds a unit vector to one that is none.
    return nn.functional.normalize(vectors, dim=-1)
