# SPDX-License-Identifier: Apache-2.0
"""Any number of inputs to vectors, in batches by token budget."""

from __future__ import annotations

import logging
import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .inputs import CocoaInputError, Conversation
from .modeling_cocoa import CocoaModelMixin
from .processing_cocoa import PIXELS_AT_ONCE, CocoaProcessor, check_list
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
    Some inputs on their way to vectors.

    Args:
        read (`dict[int, Conversation]`): Distinct inputs that are no tensors yet, by position.
        rows (`dict[int, dict]`): Of each distinct input, by its position: what [`CocoaProcessor.encode`] gives.
        images (`dict[int, list[bytes]]`): Of each of these, its images' digests.
        repeated (`dict[int, int]`): Positions of inputs that occurred before, and where.
        is_part (`bool`): Whether more inputs follow that should share batches with these.
        vectors (`list[tuple[list[int], Tensor]]`): Of batches, positions and what the model gave, on its device.
    """

    read: dict[int, Conversation] = field(default_factory=dict)
    rows: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    images: dict[int, list[bytes]] = field(default_factory=dict)
    repeated: dict[int, int] = field(default_factory=dict)
    is_part: bool = False
    vectors: list[tuple[list[int], Tensor]] = field(default_factory=list)

    def fetch(self, vectors: Tensor) -> None:
        """Put the vectors of these inputs in their places among those of all `(inputs, hidden)`."""
        if self.vectors:
            places = torch.tensor([position for batch, _ in self.vectors for position in batch])
            found = torch.cat([part for _, part in self.vectors]).float().cpu()
            # To unit length again, since half precision rounds a unit vector to one that is none.
            vectors[places] = nn.functional.normalize(found, dim=-1)
        for position, first in self.repeated.items():
            vectors[position] = vectors[first]

    def add(self, part: Window) -> None:
        """Take the inputs of a part in."""
        self.rows.update(part.rows)
        self.images.update(part.images)
        self.repeated.update(part.repeated)

    def length(self, position: int) -> int:
        """Tokens of an input."""
        return len(self.rows[position]["input_ids"])

    def take_images(self) -> dict[bytes, tuple[Tensor, Tensor]]:
        """Pixels and grid of each distinct image, by its digest; the rows lose their pixels."""
        found: dict[bytes, tuple[Tensor, Tensor]] = {}
        for position, row in self.rows.items():
            if "pixel_values" in row:
                grids = row["image_grid_thw"]
                pixels = row.pop("pixel_values").split(grids.prod(-1).tolist())
                found.update(zip(self.images[position], zip(pixels, grids, strict=True), strict=True))
        return found


@dataclass
class Embedder:
    """
    A model, and how many tokens its device can take.

    Args:
        model ([`CocoaModelMixin`]), processor ([`CocoaProcessor`]).
        batch_tokens (`float`): Tokens of a batch; halved, with a warning, where a GPU's memory does not suffice.
        features (`dict[bytes, Tensor]`): Of images, by digest, the least recently used first: what the vision tower
            gave.
        stream (`torch.cuda.Stream`, *optional*): Of the thread that made this, in which a GPU's model works.
    """

    model: CocoaModelMixin
    processor: CocoaProcessor
    batch_tokens: float
    features: dict[bytes, Tensor] = field(default_factory=dict)
    stream: torch.cuda.Stream | None = None

    def __post_init__(self) -> None:
        if self.model.device.type == "cuda":
            self.stream = torch.cuda.current_stream(self.model.device)

    def run(
        self, items: Sequence[T], tokens: Callable[[T], int], most: int | None, work: Callable[[list[T]], None]
    ) -> None:
        """
        Do a work in batches of so many tokens, as even as the items allow: a small last one would be slow.

        Args:
            items (`Sequence`): Those that are like each other together.
            tokens (`Callable`): Of an item.
            most (`int`, *optional*): Items of a batch.
            work (`Callable`): Called with each batch; again with smaller ones where memory does not suffice.

        Raises:
            torch.OutOfMemoryError: memory does not suffice for one item alone.
        """
        pending = deque(items)
        left = sum(map(tokens, pending))
        while pending:
            even = left / max(1, math.ceil(left / self.batch_tokens))
            batch = [pending.popleft()]
            total = tokens(batch[0])
            while pending and len(batch) != most and total < even:
                if total + tokens(pending[0]) > self.batch_tokens:
                    break
                batch.append(pending.popleft())
                total += tokens(batch[-1])
            if succeeds(work, batch):
                left -= total
                continue
            pending.extendleft(reversed(batch))
            self.batch_tokens = max(1, total // 2)
            logger.warning("The GPU's memory does not suffice; going on with %d tokens a batch.", self.batch_tokens)

    def encode(self, part: Window, prompt: str | None) -> Window:
        """
        Make tensors of the inputs that a part has read, and let go of their images. Threads may do it.

        Raises:
            CocoaInputError: an input cannot be encoded; names its position.
        """
        positions = list(part.read)
        try:
            rows = self.make_tensors(list(part.read.values()), prompt)
        except CocoaInputError as error:
            raise CocoaInputError(error.reason, positions[error.position or 0]) from error
        part.rows.update(zip(positions, rows, strict=True))
        part.images.update((position, conversation.image_digests) for position, conversation in part.read.items())
        part.read.clear()
        return part

    def make_tensors(self, inputs: list[Conversation], prompt: str | None) -> list[dict[str, Tensor]]:
        """What [`CocoaProcessor.encode`] gives, pixels in the precision in which the vision tower takes them."""
        device, dtype = self.model.device, self.model.visual.dtype
        # In bfloat16, which rounds pixels as much as a GPU's resizing differs.
        if device.type != "cuda" or dtype != torch.bfloat16:
            return self.processor.encode(inputs, prompt=prompt)
        stream = torch.cuda.Stream(device)  # or pixels would wait for what the model is given to do
        try:
            with torch.cuda.stream(stream):
                rows = self.processor.encode(inputs, prompt=prompt, device=device)
                for row in rows:
                    for name in row.keys() & {"pixel_values", "pixel_values_videos"}:
                        row[name] = row[name].to(dtype)
                        row[name].record_stream(self.stream)
            stream.synchronize()
            return rows
        except torch.OutOfMemoryError:
            logger.warning("The GPU's memory does not suffice for pixels; the CPU makes them of some images.")
        return self.processor.encode(inputs, prompt=prompt)

    def encode_images(self, images: dict[bytes, tuple[Tensor, Tensor]]) -> None:
        """Have the features of some images, by digest, each of which comes as pixels and grid."""
        new = sorted(
            (digest for digest in images if digest not in self.features), key=lambda digest: len(images[digest][0])
        )
        for digest in images:
            if digest in self.features:
                self.features[digest] = self.features.pop(digest)  # used last

        def work(batch: list[bytes]) -> None:
            device = self.model.device
            pixels = torch.cat([images[digest][0].to(device) for digest in batch])
            grids = torch.stack([images[digest][1] for digest in batch]).to(device)
            self.features.update(zip(batch, self.model.encode_images(pixels, grids), strict=True))

        self.run(new, lambda digest: len(images[digest][0]) // self.model.visual.spatial_merge_size**2, None, work)

    def forget_images(self, most: int) -> None:
        """Keep the features of the last images, of so many tokens in all."""
        tokens = sum(map(len, self.features.values()))
        while tokens > most:
            tokens -= len(self.features.pop(next(iter(self.features))))

    def embed(self, window: Window, batch: Sequence[int]) -> Tensor:
        """The vectors of a batch of a window's inputs, `(inputs, hidden)`, on the model's device."""
        features: dict[str, Tensor] = dict(self.processor.collate([window.rows[position] for position in batch]))
        places = ("input_ids", "attention_mask", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        # On the CPU, since it goes row by row, and on a GPU each row would wait for it.
        features["position_ids"] = self.model.mrope_positions(**{n: features[n] for n in places if n in features})
        features = {
            name: value.to(self.model.device) for name, value in features.items() if not name.startswith("num_")
        }
        if "image_grid_thw" in features:
            digests = [digest for position in batch for digest in window.images[position]]
            features["image_features"] = torch.cat([self.features[digest] for digest in digests])
        return self.model(**features, eos_only=True).pooler_output


def succeeds(work: Callable[[list[T]], None], batch: list[T]) -> bool:
    """Whether a GPU's memory suffices for a work on several items together."""
    try:
        work(batch)
        return True
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    # Here, not above: the error keeps what it interrupted in memory.
    torch.cuda.empty_cache()
    return False


def encode_inputs(
    model: CocoaModelMixin,
    processor: CocoaProcessor,
    inputs: Iterable[Any],
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
    an image that several inputs share passes the vision tower once (again where so many others came between that its
    features were let go). Memory does not grow with the number of inputs beyond the vectors themselves. On a GPU, the
    next inputs are read while it works. The model computes as in evaluation mode; the modes of its modules are left
    alone, so that other threads may use it, in training too.

    Args:
        model, processor: What embeds, on the model's device.
        inputs (`Iterable`): As in [`CocoaProcessor.encode`].
        prompt (`str`, *optional*): As in [`CocoaProcessor.encode`].
        batch_tokens (`int`, *optional*): Tokens of a batch; by default 2,048 on a CPU, 8,192 elsewhere, and any number
            where `batch_size` is given. Halved, with a warning, where a GPU's memory does not suffice.
        batch_size (`int`, *optional*): Inputs of a batch.
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
    default_tokens = CPU_BATCH_TOKENS if on_cpu else GPU_BATCH_TOKENS
    image_tokens = IMAGE_BATCHES_AT_ONCE * (batch_tokens or default_tokens)
    if batch_tokens is None:
        batch_tokens = math.inf if batch_size else default_tokens
    embedder = Embedder(in_evaluation_mode(model), processor, batch_tokens)
    count = len(inputs) if isinstance(inputs, Sized) else None
    hidden = model.config.get_text_config().hidden_size
    vectors = torch.empty(count or 0, hidden, dtype=torch.float32)
    read = 0
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        bar = stack.enter_context(tqdm(total=count, unit="input", disable=not show_progress_bar))
        encode = partial(embedder.encode, prompt=prompt)
        readers = CPU_READERS if on_cpu else GPU_READERS
        part_tokens = CPU_PART_TOKENS if on_cpu else GPU_PART_TOKENS
        if not readers:
            parts = map(encode, read_parts(processor, inputs, image_tokens, part_tokens))
        else:
            pools = ThreadPoolExecutor(readers), ThreadPoolExecutor(ENCODERS)
            for pool in pools:
                stack.callback(pool.shutdown, cancel_futures=True)
            parts = read_parts(processor, inputs, image_tokens, part_tokens, pools[0])
            parts = stack.enter_context(closing(read_ahead(map_ahead(pools[1], encode, parts, PARTS_AHEAD))))
        window, unfetched = Window(), Window()
        for part in parts:
            embedder.encode_images(part.take_images())
            window.add(part)
            if part.is_part:
                continue
            read += len(window.rows) + len(window.repeated)
            if read > len(vectors):  # of inputs without a length
                vectors.resize_(2 * read, hidden)

            def work(batch: list[int], window: Window = window) -> None:
                window.vectors.append((batch, embedder.embed(window, batch)))
                bar.update(len(batch))

            embedder.run(sorted(window.rows, key=window.length), window.length, batch_size, work)
            bar.update(len(window.repeated))
            # Those of the window before, since a GPU that is waited for stands still afterwards.
            unfetched.fetch(vectors)
            window, unfetched = Window(), window
            embedder.forget_images(image_tokens)
        unfetched.fetch(vectors)
    return vectors if len(vectors) == read else vectors[:read].clone()


def read_parts(
    processor: CocoaProcessor,
    inputs: Iterable[Any],
    image_tokens: int,
    part_tokens: int,
    pool: Executor | None = None,
) -> Iterator[Window]:
    """
    The inputs, read: parts of windows, whose images are few enough to be held at once.

    Args:
        image_tokens, part_tokens (`int`): Tokens of images that a window may hold, and a part.
        pool (`Executor`, *optional*): What reads some inputs ahead.
    """
    size = processor.image_processor.size
    seen: dict[bytes, int] = {}
    limit = min(CPU_PART_TOKENS, part_tokens)  # so that the model soon has something to do
    part = Window()
    inputs_of_window = tokens_of_window = tokens_of_part = decoded = 0
    for position, conversation in enumerate(processor.read(inputs, pool)):
        first = seen.setdefault(conversation.digest, position)
        if first != position:
            part.repeated[position] = first
            continue
        part.read[position] = conversation
        tokens = conversation.pixels(size["shortest_edge"], size["longest_edge"]) // processor.token_pixels
        decoded += conversation.pixels(0, sys.maxsize)
        inputs_of_window += 1
        tokens_of_window += tokens
        tokens_of_part += tokens
        is_full = tokens_of_window >= image_tokens or inputs_of_window == INPUTS_AT_ONCE
        if is_full or tokens_of_part >= limit or decoded >= PIXELS_AT_ONCE:
            limit = min(2 * limit, part_tokens)
            part.is_part = not is_full
            yield part
            part, tokens_of_part, decoded = Window(), 0, 0
            if is_full:
                inputs_of_window = tokens_of_window = 0
    yield part


def in_evaluation_mode(model: CocoaModelMixin) -> CocoaModelMixin:
    """
    A model that computes as in evaluation mode: itself where it is in that mode, otherwise another tree of modules
    over the same weights. Setting the mode and setting it back would change what other threads compute meanwhile.
    """
    if not any(module.training for module in model.modules()):
        return model
    copies: dict[nn.Module, nn.Module] = {}

    def copy(module: nn.Module) -> nn.Module:
        if module not in copies:
            twin = copies[module] = object.__new__(type(module))
            twin.__dict__ = {name: bind(value, module, twin) for name, value in module.__dict__.items()}
            twin.__dict__["training"] = False
            twin.__dict__["_modules"] = {
                name: None if child is None else copy(child) for name, child in module._modules.items()
            }
        return copies[module]

    return copy(model)


def bind(value: Any, module: nn.Module, twin: nn.Module) -> Any:
    """An attribute of a module, for its copy: accelerate keeps forwards there that are bound to the module."""
    if isinstance(value, MethodType) and value.__self__ is module:
        return MethodType(value.__func__, twin)
    if isinstance(value, partial) and any(argument is module for argument in value.args):
        arguments = (twin if argument is module else argument for argument in value.args)
        return partial(value.func, *arguments, **value.keywords)
    return value
