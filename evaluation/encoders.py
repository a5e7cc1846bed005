# SPDX-License-Identifier: Apache-2.0
"""Models that are evaluated: CoCoA's own way to many vectors, or any other model of sentence-transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

from modeling_cocoa.inputs import CocoaInputError, load_image
from modeling_cocoa.sentence_transformer import CocoaTransformer

from .mmeb_data import Item
from .mmeb_tasks import IMAGE_SIZES
from .vectors import fingerprint, weights_digest

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
        OSError, ValueError: there is no such checkpoint, or it is no CoCoA checkpoint.
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
        self.name = label(name)
        self.resolution = resolution
        self.batch_size = batch_size
        self.is_cocoa = is_cocoa
        if is_cocoa:
            options = {"revision": revision} if revision else {}
            self.model = CocoaTransformer(name, model_kwargs=options, processor_kwargs=options).eval()
            self.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        else:
            self.model = SentenceTransformer(name, device=None if device is None else str(device), revision=revision)
        self.weights = weights_digest(self.model)
        self.fingerprint = fingerprint(self.model, self.weights)

    def __call__(self, items: Sequence[Item]) -> np.ndarray:
        """
        Unit vectors of some items, `(items, hidden)`, float32. No prompt is put in front of them: the benchmark's
        instructions are in their texts.

        Raises:
            CocoaInputError: an image cannot be read; names its position.
        """
        size = IMAGE_SIZES[self.resolution] if self.resolution else None
        if self.is_cocoa:
            return self.model.encode(_Inputs(items, size), batch_size=self.batch_size)
        inputs = _Inputs(items, size, as_messages=self.model.supports("message"))
        batch_size = self.batch_size or 32
        step = batch_size if size else len(items)  # stretched images are in memory: no more than a batch of them
        try:
            parts = [
                self.model.encode(
                    list(inputs[first : first + step]),
                    prompt="",
                    batch_size=batch_size,
                    normalize_embeddings=True,
                    show_progress_bar=False,
                )
                for first in range(0, len(items), step)
            ]
        except Exception as error:  # of the stock loader, which does not say where
            for position, item in enumerate(items):
                try:
                    check_item(item)
                except CocoaInputError as found:
                    raise CocoaInputError(found.reason, position) from error
            raise
        return np.concatenate(parts).astype(np.float32)


def label(name: str) -> str:
    """What a model is called in reports: its Hub name, or the end of the path of its folder."""
    path = Path(name)
    if not path.is_dir():
        return name
    whole = path.resolve()
    return str(whole.relative_to(Path.cwd())) if whole.is_relative_to(Path.cwd()) else "/".join(whole.parts[-2:])


class _Inputs(Sequence):
    """Items as a model takes them, each made when it is asked for: images are in memory no longer than needed."""

    def __init__(self, items: Sequence[Item], size: tuple[int, int] | None, as_messages: bool = True) -> None:
        self.items = items
        self.size = size
        self.as_messages = as_messages

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return [self[number] for number in range(*position.indices(len(self)))]
        try:
            parts = [
                ("text", text) if image is None else ("image", picture(image, self.size))
                for image, text in self.items[position].places
            ]
        except CocoaInputError as error:
            raise CocoaInputError(error.reason, position) from error
        if self.as_messages:  # in which the order stays, and a text that looks like a path is a text
            return [{"role": "user", "content": [{"type": kind, kind: value} for kind, value in parts]}]
        return dict(parts)


def picture(path: str, size: tuple[int, int] | None) -> Any:
    """
    An image as it is shown to a model: its path, or its pixels where they are stretched.

    Args:
        path (`str`).
        size (`tuple[int, int]`, *optional*): Width and height to stretch it to.

    Raises:
        CocoaInputError: it cannot be read as an image.
    """
    if size is None:
        try:
            with Image.open(path) as image:  # only its head is read
                if min(image.size) >= MIN_SIDE:
                    return path
        except Exception:  # decoders raise what they like; the next line says what is wrong
            pass
        size = ENLARGED
    return load_image(path).resize(size)


def check_item(item: Item) -> None:
    """Raise `CocoaInputError` where an item's image cannot be read."""
    if item.image is not None:
        load_image(item.image)
