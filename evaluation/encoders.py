# SPDX-License-Identifier: Apache-2.0
"""Models that are evaluated: CoCoA's own way to many vectors, or any other model of sentence-transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

from modeling_cocoa.checkpoint_files import check_is_there
from modeling_cocoa.heads import find_checkpoint_file
from modeling_cocoa.inputs import CocoaInputError, Conversation, load_image
from modeling_cocoa.sentence_transformer import CocoaTransformer

from .mmeb_data import Item
from .mmeb_tasks import IMAGE_SIZES
from .vectors import fingerprint, weights_digest

SETTINGS_FILE = "config_sentence_transformers.json"
MIN_SIDE, ENLARGED = 28, (56, 56)
"""An image with a shorter side is stretched to this size, as the benchmark's evaluator does."""


class Encoder:
    """
    A model to evaluate.

    Args:
        name (`str`): Folder or Hub name.
        device (`str` or [`~torch.device`], *optional*): The GPU, where there is one.
        revision (`str`, *optional*): Of a model on the Hub.
        is_cocoa (`bool`, defaults to `True`): Whether it is a CoCoA checkpoint; otherwise it is any that
            `SentenceTransformer` loads.
        resolution (`str`, *optional*): `"high"`, `"mid"` or `"low"`: what images are stretched to. By default they
            keep their shape, between the processor's least and most pixels.
        batch_size (`int`, *optional*): Inputs of a batch. By default so many tokens for a CoCoA checkpoint, and 32
            inputs for another model.

    Raises:
        OSError, ValueError: there is no such checkpoint; it is no CoCoA checkpoint, or one that shortens its vectors;
            a folder has no revision.
    """

    def __init__(
        self,
        name: str,
        *,
        device: str | torch.device | None = None,
        revision: str | None = None,
        is_cocoa: bool = True,
        resolution: str | None = None,
        batch_size: int | None = None,
    ) -> None:
        if resolution is not None and resolution not in IMAGE_SIZES:
            raise ValueError(f"There is no resolution {resolution!r}; choose of {list(IMAGE_SIZES)}, or none.")
        check_name(name, revision)
        self.name = label(name)
        self.resolution = resolution
        self.batch_size = batch_size
        self.is_cocoa = is_cocoa
        try:
            if is_cocoa:
                options = {"revision": revision} if revision else {}
                check_length(name, options)
                self.model = CocoaTransformer(name, model_kwargs=options, processor_kwargs=options).eval()
                self.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            else:
                self.model = SentenceTransformer(
                    name, device=None if device is None else str(device), revision=revision
                )
        except OSError as error:
            if os.path.isdir(name):
                raise
            raise OSError(f"{name} is neither a folder nor a model that can be had from the Hub: {error}") from error
        self.weights = weights_digest(self.model)
        self.fingerprint = fingerprint(self.model, self.weights)

    def __call__(self, items: Sequence[Item]) -> np.ndarray:
        """
        Unit vectors of some items, `(items, hidden)`, float32. No prompt is put in front of them: the benchmark's
        instructions are in their texts.

        Raises:
            CocoaInputError: an image cannot be read; names its position.
        """
        if self.is_cocoa:
            return self.model.encode(_Inputs(items, self._conversation), batch_size=self.batch_size)
        batch_size, inputs = self.batch_size or 32, _Inputs(items, self._stock_input)
        kinds: dict[Any, list[int]] = {}  # without messages, one call takes inputs of one kind
        for position, item in enumerate(items):
            kinds.setdefault("message" if self.model.supports("message") else kind_of(item), []).append(position)
        vectors: dict[int, np.ndarray] = {}
        for positions in kinds.values():
            for first in range(0, len(positions), batch_size):
                batch = positions[first : first + batch_size]  # no more, since its images are in memory
                found = self.model.encode(
                    [inputs[position] for position in batch],
                    prompt="",
                    batch_size=batch_size,
                    normalize_embeddings=True,
                    show_progress_bar=False,
                )
                vectors.update(zip(batch, found, strict=True))
        return np.stack([vectors[position] for position in range(len(items))]).astype(np.float32)

    def check(self, task: str, items: Iterable[Item]) -> None:
        """
        Find out whether the model takes what a task asks.

        Args:
            task (`str`): Its name.
            items (`Iterable[Item]`): Its queries and candidates.

        Raises:
            ValueError: the model does not take a kind of input, or not the image and the texts of one in their order.
        """
        if self.is_cocoa:
            return
        for kind in dict.fromkeys(map(kind_of, items)):
            parts = (kind,) if isinstance(kind, str) else kind
            if self.model.supports("message"):
                is_taken = all(map(self.model.supports, parts))
            else:
                is_taken = kind in ("text", "image", ("image", "text")) and self.model.supports(kind)
            if not is_taken:
                known = ", ".join(
                    "+".join([name] if isinstance(name, str) else name) for name in self.model.modalities
                )
                raise ValueError(
                    f"{self.name} cannot be scored on {task}, which has inputs of {' then '.join(parts)}: the model "
                    f"takes {known}. Leave out the one or the other."
                )

    def _places(self, item: Item) -> list[tuple[str, Any]]:
        """Kind and value of each place of an item, its image loaded."""
        size = IMAGE_SIZES[self.resolution] if self.resolution else None
        return [("text", text) if image is None else ("image", picture(image, size)) for image, text in item.places]

    def _conversation(self, item: Item) -> Conversation:
        """An item as it is rendered, so that a text may be white space, and an empty candidate no text at all."""
        places = self._places(item)
        content = [{"type": kind, "text": value} if kind == "text" else {"type": kind} for kind, value in places]
        images = [value for kind, value in places if kind == "image"]
        return Conversation([{"role": "user", "content": content}], images)

    def _stock_input(self, item: Item) -> Any:
        """An item for another model, in which a text that looks like a path is a text."""
        places = self._places(item)
        if self.model.supports("message"):
            return [{"role": "user", "content": [{"type": kind, kind: value} for kind, value in places]}]
        return dict(places) if self.model.supports("image") else places[0][1]


def check_name(name: str, revision: str | None) -> None:
    """
    Raises:
        FileNotFoundError: the name is the path of a folder that is not there.
        ValueError: a folder was given a revision.
    """
    if os.path.isdir(name):
        if revision is not None:
            raise ValueError(f"{name} is a folder, and a revision is one of a model on the Hub: leave it out.")
    check_is_there(name)


def check_length(name: str, options: Mapping[str, str]) -> None:
    """
    Raises:
        ValueError: the checkpoint shortens its vectors, and a score of whole ones would not be its own.
    """
    if length := read_settings(name, **options).get("truncate_dim"):
        raise ValueError(
            f"{name} shortens its vectors to {length} numbers: name it with --baseline to score these, or set "
            f"truncate_dim to null in its {SETTINGS_FILE} to score whole ones."
        )


def read_settings(name: str | os.PathLike, **options: str) -> dict[str, Any]:
    """
    What sentence-transformers keeps of a checkpoint beside its modules (prompts, `truncate_dim`, ...); empty where it
    keeps nothing.

    Args:
        name (`str` or `os.PathLike`): Folder or Hub name.
        options: Those of `from_pretrained` that say where the files are, such as `revision`.
    """
    file = find_checkpoint_file(name, SETTINGS_FILE, **options)
    return {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))


def label(name: str) -> str:
    """What a model or a dataset is called in reports: its Hub name, or the end of the path of its folder."""
    path = Path(name)
    if not path.is_dir():
        return name
    whole = path.resolve()
    return str(whole.relative_to(Path.cwd())) if whole.is_relative_to(Path.cwd()) else "/".join(whole.parts[-2:])


def kind_of(item: Item) -> str | tuple[str, ...]:
    """`"text"`, `"image"`, or several of them in the order of the item, as sentence-transformers names modalities."""
    kinds = tuple("text" if image is None else "image" for image, _ in item.places)
    return kinds if len(kinds) > 1 else kinds[0]


class _Inputs(Sequence):
    """Items as a model takes them, each made when it is asked for: images are in memory no longer than needed."""

    def __init__(self, items: Sequence[Item], make: Callable[[Item], Any]) -> None:
        self.items = items
        self.make = make

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, position: Any) -> Any:
        item = self.items[position]
        try:
            return self.make(item)
        except CocoaInputError as error:
            raise CocoaInputError(error.reason, position) from error


def picture(path: str, size: tuple[int, int] | None) -> Image.Image:
    """
    An image as it is shown to any model.

    Args:
        path (`str`).
        size (`tuple[int, int]`, *optional*): Width and height to stretch it to.

    Raises:
        CocoaInputError: it cannot be read as an image.
    """
    if size is None:
        try:
            with Image.open(path) as image:  # only its head is read
                size = ENLARGED if min(image.size) < MIN_SIDE else None
        except Exception:  # decoders raise what they like; the next line says what is wrong
            pass
    return load_image(path, size)


def check_item(item: Item, resolution: str | None) -> None:
    """Raise `CocoaInputError` where an item's image cannot be read."""
    if item.image is not None:
        picture(item.image, IMAGE_SIZES[resolution] if resolution else None)
