# SPDX-License-Identifier: Apache-2.0
"""Any number of inputs to vectors, in batches by token budget."""

from __future__ import annotations

import copy
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .cpu_linear import LinearByConvolution
from .inputs import CocoaInputError, Conversation, check_list
from .modeling_cocoa import CocoaModelMixin
from .processing_cocoa import PIXELS_AT_ONCE, CocoaProcessor, malloc_trim
from .threads import map_ahead, read_ahead

logger = logging.getLogger(__name__)

T = TypeVar("T")

INPUTS_AT_ONCE = 1024
"""Inputs from which batches are made up at a time, so that memory does not grow with their number ..."""
IMAGE_BATCHES_AT_ONCE = 2
"""... nor with their size: fewer inputs, where their images alone fill so many batches."""
CPU_PART_TOKENS = 1024
"""Tokens of the images whose pixels, 18 MiB, are held at once; their features take a tenth of that."""
GPU_PART_TOKENS = 4096
"""As few would keep a GPU waiting for its commands."""
CPU_BATCH_TOKENS = 2048
"""On a CPU: a tenth faster than 768, and no slower than 3,072."""
GPU_BATCH_TOKENS = 8192
"""On anything else."""
CPU_READERS = 0
GPU_READERS = 8
"""Threads that load images while the model works: none on a CPU, which both would share ..."""
ENCODERS = 2
"""... and that make tensors of what was read: more would keep the thread that commands the GPU from Python ..."""
PARTS_AHEAD = 4
"""... and how many parts they may be ahead of it: a window of images."""


@dataclass
class Window:
    """
    Inputs that share batches, on their way to vectors; or a part of them, whose images are few enough to be held.

    Args:
        conversations (`dict[int, Conversation]`): Distinct inputs that were read, by position; empty once they are
            rows.
        rows (`dict[int, dict]`): What [`CocoaProcessor.preprocess`] gives for them.
        images (`dict[int, list[bytes]]`): Digests of their images.
        repeated (`dict[int, int]`): Positions of inputs that occurred before, and where.
        is_full (`bool`): Whether no input follows that should share batches with these.
        failed (`dict[int, str]`): Positions of inputs that cannot be read, and why.
        vectors (`list[tuple[list[int], Tensor]]`): Positions of each batch and what the model gave, on its device.
    """

    conversations: dict[int, Conversation] = field(default_factory=dict)
    rows: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    images: dict[int, list[bytes]] = field(default_factory=dict)
    repeated: dict[int, int] = field(default_factory=dict)
    is_full: bool = False
    failed: dict[int, str] = field(default_factory=dict)
    vectors: list[tuple[list[int], Tensor]] = field(default_factory=list)

    def add(self, part: Window) -> None:
        """Take the inputs of a part in."""
        self.rows.update(part.rows)
        self.images.update(part.images)
        self.repeated.update(part.repeated)
        self.failed.update(part.failed)

    def write_to(self, vectors: Tensor) -> None:
        """Put the vectors of these inputs in their places among those of all `(inputs, hidden)`."""
        for positions, found in self.vectors:
            # To unit length again, since half precision rounds a unit vector to one that is none.
            vectors[positions] = nn.functional.normalize(found.float().cpu(), dim=-1)
        for position, first in self.repeated.items():
            vectors[position] = vectors[first]


@dataclass
class Embedder:
    """
    Makes tensors of inputs, and vectors of these.

    Args:
        batch_num_tokens (`float`): Tokens of a batch; halved, with a warning, where a GPU's memory does not suffice.
        features (`dict[bytes, Tensor]`): What the vision tower gave for images, by digest, least recently used first.
        failed (`dict[int | bytes, str]`, *optional*): Takes positions of inputs, and digests of images, that cannot
            be embedded, and why; by default the first one is an error.
    """

    model: CocoaModelMixin
    processor: CocoaProcessor
    batch_num_tokens: float
    prompt: str | None = None
    features: dict[bytes, Tensor] = field(default_factory=dict)
    failed: dict[Any, str] | None = None

    def __post_init__(self) -> None:
        # Of the thread that makes this, in which a GPU's model works.
        device = self.model.device
        self.stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def run(
        self, items: Iterable[T], tokens: Callable[[T], int], most: int | None, work: Callable[[list[T]], None]
    ) -> None:
        """
        Call `work` with batches of at most `most` items and `batch_num_tokens` tokens, as even as the items allow: a
        small last one would be slow. Where memory does not suffice, again with smaller ones. With `failed`, a batch
        that fails is split until the item is found that does.

        Raises:
            torch.OutOfMemoryError: memory does not suffice for one item alone.
        """
        pending = deque(sorted(items, key=tokens))
        left = sum(map(tokens, pending))
        while pending:
            even = left / max(1, math.ceil(left / self.batch_num_tokens))
            batch = [pending.popleft()]
            total = tokens(batch[0])
            while pending and len(batch) != most and total < even:
                if total + tokens(pending[0]) > self.batch_num_tokens:
                    break
                batch.append(pending.popleft())
                total += tokens(batch[-1])
            try:
                work(batch)
                left -= total
                continue
            except torch.OutOfMemoryError as error:
                if len(batch) == 1:
                    self.fail(batch[0], error)
                    left -= total
                    continue
            except Exception as error:
                if len(batch) == 1 or self.failed is None:
                    self.fail(batch[0], error)
                else:
                    self.run(batch, tokens, len(batch) // 2, work)
                left -= total
                continue
            # Not in the handler: the error keeps what it interrupted in memory.
            torch.cuda.empty_cache()
            pending.extendleft(reversed(batch))
            self.batch_num_tokens = max(1, total // 2)
            logger.warning(
                "The GPU's memory does not suffice; going on with %d tokens a batch.", self.batch_num_tokens
            )

    def fail(self, item: Any, error: Exception) -> None:
        """Note that an item cannot be embedded, or raise the error where that is not wanted."""
        if self.failed is None:
            raise error
        self.failed[item] = describe(error)

    def preprocess(self, part: Window) -> Window:
        """Make tensors of the inputs that a part has read, and let go of their images. Threads may do it."""
        try:
            part.rows.update(zip(part.conversations, self.make_tensors(part.conversations), strict=True))
        except Exception:
            if self.failed is None:
                raise
            for position, conversation in part.conversations.items():
                try:
                    (part.rows[position],) = self.make_tensors({position: conversation})
                except Exception as error:
                    part.failed[position] = describe(error)
        part.images.update((position, read.image_digests) for position, read in part.conversations.items())
        decoded = sum(read.pixels() for read in part.conversations.values())
        part.conversations.clear()
        if decoded >= PIXELS_AT_ONCE:
            malloc_trim()(0)
        return part

    def make_tensors(self, conversations: dict[int, Conversation]) -> list[dict[str, Tensor]]:
        """[`CocoaProcessor.make_tensors`], with pixels in the precision in which the vision tower takes them."""
        make_tensors = partial(self.processor.make_tensors, conversations, prompt=self.prompt)
        device, dtype = self.model.device, self.model.visual.dtype
        # In bfloat16, which rounds pixels as much as a GPU's resizing differs.
        if device.type != "cuda" or dtype != torch.bfloat16:
            return make_tensors()
        stream = torch.cuda.Stream(device)  # or pixels would wait for what the model is given to do
        try:
            with torch.cuda.stream(stream):
                rows = make_tensors(device=device)
                for row in rows:
                    for name in row.keys() & {"pixel_values", "pixel_values_videos"}:
                        row[name] = row[name].to(dtype)
                        row[name].record_stream(self.stream)
            stream.synchronize()
            return rows
        except torch.OutOfMemoryError:
            logger.warning("The GPU's memory does not suffice for pixels; the CPU makes them of some images.")
        return make_tensors()

    def encode_images(self, part: Window) -> None:
        """Have the features of a part's images; its rows lose their pixels."""
        images: dict[bytes, tuple[Tensor, Tensor]] = {}
        for position, row in part.rows.items():
            if "pixel_values" in row:
                grids = row["image_grid_thw"]
                pixels = row.pop("pixel_values").split(grids.prod(-1).tolist())
                images.update(zip(part.images[position], zip(pixels, grids, strict=True), strict=True))
        for digest in [digest for digest in images if digest in self.features]:
            self.features[digest] = self.features.pop(digest)  # used last
            del images[digest]
        merge = self.model.visual.spatial_merge_size**2

        def work(batch: list[bytes]) -> None:
            pixels = torch.cat([images[digest][0].to(self.model.device) for digest in batch])
            grids = torch.stack([images[digest][1] for digest in batch]).to(self.model.device)
            self.features.update(zip(batch, self.model.encode_images(pixels, grids), strict=True))

        self.run(images, lambda digest: len(images[digest][0]) // merge, None, work)

    def forget_images(self, most: int) -> None:
        """Keep the features of the last images, of at most `most` tokens in all."""
        tokens = sum(map(len, self.features.values()))
        while tokens > most:
            tokens -= len(self.features.pop(next(iter(self.features))))

    def embed_window(self, window: Window, batch_size: int | None, count: Callable[[int], Any]) -> None:
        """Have the vectors of a window's inputs; `count` is called with the number of those that are done."""

        def work(batch: list[int]) -> None:
            window.vectors.append((batch, self.embed(window, batch)))
            count(len(batch))

        failed = {} if self.failed is None else self.failed
        failed.update(window.failed)
        for position in list(window.rows) if failed else ():
            if reasons := [failed[digest] for digest in window.images[position] if digest in failed]:
                failed[position] = reasons[0]
                del window.rows[position]
        self.run(window.rows, lambda position: len(window.rows[position]["input_ids"]), batch_size, work)
        failed.update((position, failed[first]) for position, first in window.repeated.items() if first in failed)
        count(len(window.repeated))

    def embed(self, window: Window, batch: Sequence[int]) -> Tensor:
        """The vectors of a batch of a window's inputs, `(inputs, hidden)`, on the model's device."""
        batched = self.processor.collate([window.rows[position] for position in batch])
        places = ("input_ids", "attention_mask", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        features = {name: batched[name] for name in places if name in batched}
        # On the CPU, since it goes row by row, and on a GPU each row would wait for it.
        features["position_ids"] = self.model.mrope_positions(**features)
        if "pixel_values_videos" in batched:
            features["pixel_values_videos"] = batched["pixel_values_videos"]
        features = {name: value.to(self.model.device) for name, value in features.items()}
        if digests := [digest for position in batch for digest in window.images[position]]:
            features["image_features"] = torch.cat([self.features[digest] for digest in digests])
        return self.model(**features, eos_only=True).pooler_output


def encode_inputs(
    model: CocoaModelMixin,
    processor: CocoaProcessor,
    inputs: Iterable[Any],
    *,
    prompt: str | None = None,
    batch_num_tokens: int | None = None,
    batch_size: int | None = None,
    show_progress_bar: bool = False,
    failed: dict[int, str] | None = None,
) -> Tensor:
    """
    Embed a list of inputs.

    Batches are filled up to a number of tokens, images counted at their true number, with inputs of similar length
    together; an input that is longer alone makes a batch of its own. Inputs that are the same are computed once, and
    an image that several inputs share passes the vision tower once (again where so many others came between that its
    features were let go). Memory does not grow with the number of inputs beyond the vectors themselves. On a GPU, the
    next inputs are read while it works. The model computes as in evaluation mode; the modes of its modules are left
    alone, so that other threads may use it, in training too.

    Args:
        model, processor: What embeds, on the model's device.
        inputs (`Iterable`): As in [`CocoaProcessor.preprocess`].
        prompt (`str`, *optional*): As in [`CocoaProcessor.preprocess`].
        batch_num_tokens (`int`, *optional*): Tokens of a batch; by default 2,048 on a CPU, 8,192 elsewhere, and any
            number where `batch_size` is given. Halved, with a warning, where a GPU's memory does not suffice.
        batch_size (`int`, *optional*): Inputs of a batch.
        show_progress_bar (`bool`, defaults to `False`): Count inputs.
        failed (`dict[int, str]`, *optional*): Takes the positions of inputs that cannot be embedded, and why; their
            vectors are not numbers (NaN). By default the first one is an error.

    Returns:
        `Tensor` of shape `(inputs, hidden)`, float32, on the CPU: unit vectors in the order of the inputs.

    Raises:
        CocoaInputError: an input cannot be encoded; names its position.
        TypeError: `inputs` is one input instead of a list of inputs.
        ValueError: a size is below 1.
    """
    for name, value in (("batch_num_tokens", batch_num_tokens), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be 1 or more; got {value}.")
    check_list(inputs)
    on_cpu = model.device.type == "cpu"
    default_tokens = CPU_BATCH_TOKENS if on_cpu else GPU_BATCH_TOKENS
    image_tokens = IMAGE_BATCHES_AT_ONCE * (batch_num_tokens or default_tokens)
    if batch_num_tokens is None:
        batch_num_tokens = math.inf if batch_size else default_tokens
    bad: dict[Any, str] | None = None if failed is None else {}
    embedder = Embedder(in_evaluation_mode(model), processor, batch_num_tokens, prompt, failed=bad)
    count = len(inputs) if isinstance(inputs, Sized) else None
    vectors = torch.empty(count or 0, model.config.get_text_config().hidden_size, dtype=torch.float32)
    read = 0
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        if on_cpu:
            stack.enter_context(LinearByConvolution())
        bar = stack.enter_context(tqdm(total=count, unit="input", disable=not show_progress_bar))
        readers = CPU_READERS if on_cpu else GPU_READERS
        part_tokens = CPU_PART_TOKENS if on_cpu else GPU_PART_TOKENS
        read_inputs = partial(read_parts, processor, inputs, image_tokens, part_tokens, keep_errors=bad is not None)
        if not readers:
            parts = map(embedder.preprocess, read_inputs())
        else:
            pools = ThreadPoolExecutor(readers), ThreadPoolExecutor(ENCODERS)
            for pool in pools:
                stack.callback(pool.shutdown, cancel_futures=True)
            parts = map_ahead(pools[1], embedder.preprocess, read_inputs(pools[0]), PARTS_AHEAD)
            parts = stack.enter_context(closing(read_ahead(parts)))
        window, before = Window(), Window()
        for part in parts:
            embedder.encode_images(part)
            window.add(part)
            if not part.is_full:
                continue
            read += len(window.rows) + len(window.repeated) + len(window.failed)
            if read > len(vectors):  # of inputs without a length
                vectors.resize_(2 * read, vectors.shape[1])
            embedder.embed_window(window, batch_size, bar.update)
            # Those of the window before, since a GPU that is waited for stands still afterwards.
            before.write_to(vectors)
            window, before = Window(), window
            embedder.forget_images(image_tokens)
        before.write_to(vectors)
    if bad:
        failed.update((position, reason) for position, reason in bad.items() if isinstance(position, int))
        vectors[list(failed)] = math.nan
    return vectors if len(vectors) == read else vectors[:read].clone()


def read_parts(
    processor: CocoaProcessor,
    inputs: Iterable[Any],
    image_tokens: int,
    part_tokens: int,
    pool: Executor | None = None,
    keep_errors: bool = False,
) -> Iterator[Window]:
    """
    The inputs, read: parts of windows, whose images are few enough to be held at once.

    Args:
        image_tokens, part_tokens (`int`): Tokens of images that a window may hold, and a part.
        pool (`Executor`, *optional*): What reads some inputs ahead.
        keep_errors (`bool`, defaults to `False`): Give inputs that cannot be read as `failed`; by default the first
            one is an error.
    """
    size = processor.image_processor.size
    seen: dict[bytes, int] = {}
    limit = min(CPU_PART_TOKENS, part_tokens)  # so that the model soon has something to do
    part = Window()
    inputs_of_window = tokens_of_window = tokens_of_part = decoded = 0
    for position, conversation in enumerate(processor.read(inputs, pool, keep_errors)):
        if isinstance(conversation, CocoaInputError):
            part.failed[position] = conversation.reason
            continue
        first = seen.setdefault(conversation.digest, position)
        if first != position:
            part.repeated[position] = first
            continue
        part.conversations[position] = conversation
        tokens = conversation.pixels(size["shortest_edge"], size["longest_edge"]) // processor.token_pixels
        decoded += conversation.pixels()
        inputs_of_window += 1
        tokens_of_window += tokens
        tokens_of_part += tokens
        part.is_full = tokens_of_window >= image_tokens or inputs_of_window == INPUTS_AT_ONCE
        if part.is_full or tokens_of_part >= limit or decoded >= PIXELS_AT_ONCE:
            limit = min(2 * limit, part_tokens)
            if part.is_full:
                inputs_of_window = tokens_of_window = 0
            yield part
            part, tokens_of_part, decoded = Window(), 0, 0
    part.is_full = True
    yield part


def describe(error: Exception) -> str:
    """Why an input cannot be embedded."""
    return error.reason if isinstance(error, CocoaInputError) else f"{type(error).__name__}: {error}"


def in_evaluation_mode(model: CocoaModelMixin) -> CocoaModelMixin:
    """
    A model that computes as in evaluation mode: itself where it is in that mode, otherwise a copy over the same
    weights. Setting the mode and setting it back would change what other threads compute meanwhile.
    """
    if not any(module.training for module in model.modules()):
        return model
    shared = {id(weight): weight for weight in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared).eval()
