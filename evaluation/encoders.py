# SPDX-License-Identifier: Apache-2.0
"""Models that are evaluated: CoCoA's own way to many vectors, or any other model of sentence-transformers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

from modeling_cocoa.checkpoint_files import find_checkpoint_file
from modeling_cocoa.inputs import CocoaInputError, Conversation
from modeling_cocoa.media import ResizedImage, load_image
from modeling_cocoa.model_folder import SETTINGS_FILE
from modeling_cocoa.sentence_transformer import CocoaTransformer, read_settings

from .digests import fingerprint, weights_digest
from .mmeb.data import Item
from .mmeb.tasks import IMAGE_SIZES

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
        image_resolution (`str`, *optional*): `"high"`, `"mid"` or `"low"`: what images are stretched to. By default
            they keep their shape, between the processor's least and most pixels.
        batch_size (`int`, *optional*): Inputs of a batch. By default as many as a number of tokens allows for a CoCoA
            checkpoint, and 32 for another model.

    Attributes:
        fingerprint (`str`), weights (`str`, *optional*): Names for all that decides its vectors, and for the weights
            of a CoCoA checkpoint.

    Raises:
        OSError, ValueError: there is no such checkpoint; it is no CoCoA checkpoint, or one that shortens its vectors.
    """

    def __init__(
        self,
        name: str,
        *,
        device: str | torch.device | None = None,
        revision: str | None = None,
        is_cocoa: bool = True,
        image_resolution: str | None = None,
        batch_size: int | None = None,
    ) -> None:
        if image_resolution is not None and image_resolution not in IMAGE_SIZES:
            raise ValueError(
                f"There is no image_resolution {image_resolution!r}; choose of {list(IMAGE_SIZES)}, or none."
            )
        self.name = label(name)
        self.image_resolution = image_resolution
        self.batch_size = batch_size
        self.is_cocoa = is_cocoa
        options = {"revision": revision} if revision else {}
        try:
            if is_cocoa:
                if length := read_settings(name, **options).get("truncate_dim"):
                    raise ValueError(
                        f"{name} shortens its vectors to {length} numbers: name it with --baseline to score these, or "
                        f"set truncate_dim to null in its {SETTINGS_FILE} to score full ones."
                    )
                self.model = CocoaTransformer(name, model_kwargs=options, processor_kwargs=options).eval()
                self.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
            else:
                self.model = SentenceTransformer(name, device=None if device is None else str(device), **options)
        except OSError as error:
            if os.path.isdir(name):
                raise
            raise OSError(f"{name} is neither a folder nor a model that can be had from the Hub: {error}") from error
        self.prompts: dict[str, str] = self.model.prompts
        # All files of a CoCoA checkpoint lie in one folder, also in the cache of the Hub.
        self.weights = (
            weights_digest(Path(find_checkpoint_file(name, "config.json", **options)).parent) if is_cocoa else None
        )
        self.fingerprint = fingerprint(self.model, self.weights)

    def __call__(self, items: Sequence[Item]) -> np.ndarray:
        """
        Unit vectors of some items, `(items, hidden)`, float32, with the model's prompt for those that name one.

        Raises:
            CocoaInputError: an image cannot be read; names its position.
        """
        by_prompt: dict[str | None, list[int]] = {}
        for position, item in enumerate(items):
            by_prompt.setdefault(item.prompt_name, []).append(position)
        vectors: dict[int, np.ndarray] = {}
        for name, positions in by_prompt.items():
            prompt = self.prompts.get(name) if name else None
            try:
                found = self._encode([items[position] for position in positions], prompt or None)
            except CocoaInputError as error:
                position = None if error.position is None else positions[error.position]
                raise CocoaInputError(error.reason, position) from error
            vectors.update(zip(positions, found, strict=True))
        return np.stack([vectors[position] for position in range(len(items))])

    def _encode(self, items: Sequence[Item], prompt: str | None) -> np.ndarray:
        """Unit vectors of items with one prompt."""
        if self.is_cocoa:
            return self.model.encode([self._input(item) for item in items], batch_size=self.batch_size, prompt=prompt)
        batch_size, has_messages = self.batch_size or 32, self.model.supports("message")
        kinds: dict[Any, list[int]] = {}  # without messages, one call takes inputs of one kind
        for position, item in enumerate(items):
            kinds.setdefault("message" if has_messages else kind_of(item), []).append(position)
        vectors: dict[int, np.ndarray] = {}
        for positions in kinds.values():
            for first in range(0, len(positions), batch_size):
                batch = positions[first : first + batch_size]  # no more, since its images are in memory
                found = self.model.encode(
                    [self._stock_input(items[position], position, has_messages) for position in batch],
                    prompt=prompt or "",
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
            if not takes(self.model, parts):
                known = ["+".join([name] if isinstance(name, str) else name) for name in self.model.modalities]
                raise ValueError(
                    f"{self.name} cannot be scored on {task}, which has inputs of {' then '.join(parts)}: the model "
                    f"takes {', '.join(known)}. Leave out the one or the other."
                )

    def _image(self, path: str) -> str | ResizedImage:
        """An image as every model is shown it, for [`load_image`]."""
        size = IMAGE_SIZES[self.image_resolution] if self.image_resolution else None
        if size is None:
            try:
                with Image.open(path) as image:  # only its head is read
                    size = ENLARGED if min(image.size) < MIN_SIDE else None
            except Exception:  # of any type; whatever decodes the image says what is wrong
                pass
        return path if size is None else ResizedImage(path, size)

    def _message(self, item: Item, load: Callable[[Any], Any] = lambda image: image) -> dict[str, Any]:
        """An item as a message, its images as `load` makes them."""
        content = [
            {"type": "text", "text": text} if image is None else {"type": "image", "image": load(self._image(image))}
            for image, text in item.places
        ]
        return {"role": "user", "content": content}

    def _input(self, item: Item) -> Conversation | dict[str, Any]:
        """An item for a CoCoA model. A text is taken as it is rendered: it may be empty."""
        return Conversation([self._message(item)]) if item.image is None else self._message(item)

    def _stock_input(self, item: Item, position: int, as_message: bool) -> Any:
        """An item for another model, in which a text that looks like a path is a text."""
        try:
            message = self._message(item, load_image)
        except CocoaInputError as error:
            raise CocoaInputError(error.reason, position) from error
        if as_message:
            return [message]
        values = {part["type"]: part[part["type"]] for part in message["content"]}
        return values if self.model.supports("image") else values["text"]


def label(name: str) -> str:
    """What a model or a dataset is called in reports: its Hub name, or the end of the path of its folder."""
    path = Path(name)
    if not path.is_dir():
        return name
    full = path.resolve()
    return str(full.relative_to(Path.cwd())) if full.is_relative_to(Path.cwd()) else "/".join(full.parts[-2:])


def kind_of(item: Item) -> str | tuple[str, ...]:
    """`"text"`, `"image"`, or several of them in the order of the item, as sentence-transformers names modalities."""
    kinds = tuple("text" if image is None else "image" for image, _ in item.places)
    return kinds if len(kinds) > 1 else kinds[0]


def takes(model: SentenceTransformer, kinds: tuple[str, ...]) -> bool:
    """Whether a model takes an input of these `"text"` and `"image"` parts, in their order."""
    if not kinds or not set(kinds) <= {"text", "image"}:
        return False
    if model.supports("message") or len(kinds) == 1:
        return all(map(model.supports, kinds))
    return kinds == ("image", "text") and model.supports(kinds)
