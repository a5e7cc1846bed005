# SPDX-License-Identifier: Apache-2.0
"""What a user may pass as one input, checked and brought into one form: a conversation and its loaded media."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.video_utils import VideoMetadata

from .errors import CocoaInputError
from .media import ResizedImage, load_image, media_kind, missing_file, read_video

ROLES = ("system", "user", "assistant", "query", "document")
ITEM_KEYS = ("text", "image", "images", "video")
PART_KEYS = {"text": ("text",), "image": ("image", "path", "url"), "video": ("video", "path", "url")}
"""The keys that may hold the value of a content part, by its type."""
EMPTY_TEXT = "the text is empty; remove it, or leave the key out."


@dataclass
class Conversation:
    """
    One input in the form that is rendered.

    Args:
        messages (`list[dict]`): `{"role", "content"}` with a list of `{"type": "text", "text"}`, `{"type": "image"}`
            and `{"type": "video"}` as content.
        images (`list[PIL.Image.Image]`): In the order of the messages.
        videos (`list[tuple[np.ndarray, VideoMetadata]]`): What [`~media.read_video`] gives.
        missing_file (`str`): Why the input is a text, where it is a bare str that ends like an image or a video file;
            otherwise empty.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    videos: list[tuple[np.ndarray, VideoMetadata]] = field(default_factory=list)
    missing_file: str = ""

    @cached_property
    def image_digests(self) -> list[bytes]:
        """A digest of each image: the same for images that are the same pixel by pixel."""
        return [hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest() for image in self.images]

    @cached_property
    def digest(self) -> bytes:
        """The same for conversations that are the same in every word, pixel and frame."""
        summary = hashlib.sha256(json.dumps(self.messages).encode())
        for image in self.image_digests:
            summary.update(image)
        for frames, metadata in self.videos:
            summary.update(f"{frames.shape}{metadata}".encode())
            summary.update(np.ascontiguousarray(frames))
        return summary.digest()

    def pixels(self, smallest: int = 0, largest: int = sys.maxsize) -> int:
        """Pixels of all images and frames, once each is scaled to be no smaller and no larger."""
        sizes = [(1, image.width * image.height) for image in self.images]
        sizes += [(len(frames), frames.shape[1] * frames.shape[2]) for frames, _ in self.videos]
        return sum(count * min(max(size, smallest), largest) for count, size in sizes)


def check_list(inputs: Any) -> None:
    """
    Raise `TypeError` where one input (or a table, whose columns Python would go through) was given instead of several:
    a list, or anything else that can be gone through, such as a Series, an array of objects or a generator.
    """
    one_input = (str, bytes, bytearray, memoryview, Mapping, os.PathLike, Image.Image, ResizedImage, torch.Tensor)
    is_one = isinstance(inputs, one_input) or hasattr(inputs, "columns") or not isinstance(inputs, Iterable)
    if isinstance(inputs, np.ndarray):
        is_one = inputs.ndim != 1 or inputs.dtype.kind not in "OUS"
    if is_one:
        raise TypeError(f"inputs must be a list of inputs; got one {type(inputs).__name__}. Put it in a list.")


def read_input(item: Any, video_processor: Any) -> Conversation:
    """
    Check one input and load its media.

    Args:
        item: A text, an image (PIL, path, bytes or array), a dict with any of `text`, `image`, `images` and `video`,
            one message or a list of messages; or a [`Conversation`]. Keys that are None count as absent.
        video_processor: Stock video processor, whose frame sampling is used on video files.

    Raises:
        CocoaInputError: the item cannot be encoded; without a position.
    """
    if isinstance(item, Conversation):
        return item
    messages, reason = _messages_of(item)
    conversation = Conversation(messages, missing_file=reason)
    for part in (part for message in messages for part in message["content"]):
        if part["type"] == "image":
            conversation.images.append(load_image(part.pop("image")))
        elif part["type"] == "video":
            conversation.videos.append(read_video(part.pop("video"), video_processor))
    return conversation


def input_messages(item: Any) -> list[dict[str, Any]]:
    """
    One input of any form as a conversation with its images and videos in place, as they were given: nothing is opened.

    Args:
        item: As in [`read_input`]. A bare str that ends like an image or a video file and is none is an error here,
            where [`read_input`] takes it for a text: these are rows to train on, and queries of a command line.

    Returns:
        `list[dict]`: `{"role", "content"}`, with `{"type": "text", "text"}`, `{"type": "image", "image"}` and
        `{"type": "video", "video"}` as content.

    Raises:
        CocoaInputError: the item has none of the known forms, or names a file that does not exist; without a position.
    """
    messages, reason = _messages_of(item)
    if reason:
        raise CocoaInputError(f'{reason} If it is meant as text, pass {{"text": ...}}, which is never read as a path.')
    return messages


def input_parts(item: Any) -> list[dict[str, Any]]:
    """
    Content of all messages of an input, in the order in which the chat template places it; see [`input_messages`].

    Raises:
        CocoaInputError: the item has none of the known forms; without a position.
    """
    parts: list[dict[str, Any]] = []
    for message in input_messages(item):
        content = message["content"]
        if sum(part["type"] == "text" for part in content) == 1:  # the template's rule, see build_chat_template
            content = sorted(content, key=lambda part: part["type"] == "text")
        parts += content
    return parts


def _messages_of(item: Any) -> tuple[list[dict[str, Any]], str]:
    """As in [`input_messages`]; and [`Conversation`]'s `missing_file`."""
    if isinstance(item, Mapping) and ("role" in item or "content" in item):
        item = [item]
    if isinstance(item, (list, tuple)):
        if not item:
            raise CocoaInputError("it is an empty list; a conversation needs at least one message.")
        return [_message(message) for message in item], ""
    reason = ""
    if item is None:
        raise CocoaInputError("it is None; leave it out, or give a text, an image or a dict.")
    if isinstance(item, Mapping) and item and set(item) <= {"bytes", "path"}:  # a cell of datasets.Image
        content = [_part("image", item)]
    elif isinstance(item, Mapping):
        content = _parts_of_dict(item)
    else:
        kind = input_kind(item)
        content = [_part(kind, item)]
        if kind == "text" and (missing := media_kind(item)) and not re.search(r"\s|^https?://", item):
            reason = missing_file(item, missing)
    return [{"role": "user", "content": content}], reason


def _message(message: Any) -> dict[str, Any]:
    """One message of a conversation, checked."""
    if not isinstance(message, Mapping) or not ("role" in message or "content" in message):
        raise CocoaInputError(
            f"a list is read as a conversation, but holds a {type(message).__name__}; give a list of "
            '{"role", "content"} messages, or a dict with text, image, images or video.'
        )
    message = _known_values(message, ("role", "content"), "a message")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise CocoaInputError(f"unknown role {role!r} in a conversation; use one of {list(ROLES)}.")
    if isinstance(content, str):
        parts = [_part("text", content)]
    elif isinstance(content, (list, tuple)):
        parts = [part for part in map(_content_part, content) if part is not None]
    else:
        raise CocoaInputError(
            f"content of the {role} message is {type(content).__name__}; give a str or a list of parts."
        )
    if not parts:
        raise CocoaInputError(f"the {role} message has no content.")
    if all(part["type"] == "text" and not part["text"].strip() for part in parts):
        raise CocoaInputError(EMPTY_TEXT)
    return {"role": role, "content": parts}


def _content_part(part: Any) -> dict[str, Any] | None:
    """One content part of a message; `None` where its value is None, as Arrow tables have it."""
    if not isinstance(part, Mapping):
        raise CocoaInputError(
            f"a content part is of type {type(part).__name__}; give a dict such as "
            '{"type": "text", "text": ...} or {"type": "image", "image": ...}.'
        )
    kind = part.get("type")
    if kind not in PART_KEYS:
        raise CocoaInputError(f"unknown type {kind!r} of a content part; use text, image or video.")
    values = _known_values(part, ("type", *PART_KEYS[kind]), f"a part of type {kind}")
    del values["type"]
    if len(values) > 1:
        raise CocoaInputError(
            f"a part of type {kind} names its {kind} {len(values)} times; keep one of {PART_KEYS[kind]}."
        )
    # White space alone counts as a text beside other parts, such as a newline between them.
    return next((_part(kind, value, may_be_space=True) for value in values.values()), None)


def _parts_of_dict(item: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Content of an item that is a dict of texts, images and videos."""
    values = _known_values(item, ITEM_KEYS, "it")
    if not values:
        raise CocoaInputError(f"the dict holds nothing; give at least one of {list(ITEM_KEYS)}.")
    content = []
    for key, value in values.items():
        kind = "image" if key == "images" else key
        is_list = kind == "image" and isinstance(value, (list, tuple))
        if is_list and not value:
            raise CocoaInputError(f"{key} is an empty list; give at least one image, or None.")
        content += [_part(kind, part) for part in (value if is_list else [value])]
    return content


def _part(kind: str, value: Any, may_be_space: bool = False) -> dict[str, Any]:
    """A content part; a text is checked here, images and videos when they are loaded."""
    if kind != "text":
        return {"type": kind, kind: value}
    if not isinstance(value, str):
        raise CocoaInputError(f"a text cannot be of type {type(value).__name__}; give a str.")
    if not (value if may_be_space else value.strip()):
        raise CocoaInputError(EMPTY_TEXT)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CocoaInputError(f"the text is not valid Unicode ({error}); repair or remove it.") from error
    return {"type": "text", "text": str(value)}


def input_kind(item: Any) -> str:
    """
    Whether a bare item is a text, an image or a video; the rule of sentence-transformers, for more kinds of files.

    Raises:
        CocoaInputError: it is none of them; without a position.
    """
    if isinstance(item, str):
        if item.startswith(("data:image/", "data:video/")):
            return item[5:10]
        is_link = re.fullmatch(r"https?://\S+", item)
        kind = media_kind(re.split(r"[?#]", item)[0] if is_link else item)
        return kind if kind and (is_link or os.path.isfile(item)) else "text"
    if isinstance(item, os.PathLike):
        return media_kind(item) or "image"
    if isinstance(item, (Image.Image, ResizedImage, bytes, bytearray, memoryview)):
        return "image"
    if isinstance(item, (np.ndarray, torch.Tensor)):
        if item.ndim not in (2, 3, 4):
            raise CocoaInputError(
                f"an array of shape {tuple(item.shape)} is neither an image (2 or 3 dimensions) nor a video (4)."
            )
        return "video" if item.ndim == 4 else "image"
    raise CocoaInputError(
        f"it is of type {type(item).__name__}; give a text, an image (PIL, path, bytes or array), a dict, or a "
        "conversation."
    )


def _known_values(values: Mapping[str, Any], known: Sequence[str], name: str) -> dict[str, Any]:
    """What is not None; keys that are not known are an error, unless their value is None."""
    values = {key: value for key, value in values.items() if value is not None}
    if unknown := [key for key in values if key not in known]:
        raise CocoaInputError(f"{name} has unknown keys {unknown}; known are {list(known)}.")
    return values
