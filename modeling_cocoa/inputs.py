# SPDX-License-Identifier: Apache-2.0
"""What a user may pass as one input, checked and brought into one form: a conversation and its loaded media."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, ImageOps
from transformers.video_utils import VideoMetadata, load_video

VIDEO_EXTENSIONS = (".mp4", ".avi", ".mov", ".wmv", ".flv", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".3gp", ".ogv")
"""Endings of video files; those of images are Pillow's, see [`media_kind`]."""
ROLES = ("system", "user", "assistant", "query", "document")
ITEM_KEYS = ("text", "image", "images", "video")
MEDIA_SOURCES = ("path", "url")

EMPTY_TEXT = "the text is empty; drop it, or leave the key out."

IMAGE_READING = 2
"""Raised whenever [`load_image`] makes other pixels of an image than before: vectors that were kept are then old."""
CHANNELS = (1, 2, 3, 4)
"""Of an image given as an array: grey, grey and alpha, RGB, RGBA."""
MIN_IMAGE_SIDE = 4
"""Pixels. Less shows nothing, and an array's three channels could be taken for its side."""
MAX_IMAGE_PIXELS = 89_478_485
"""Pixels of one image before resizing, checked before it is decoded; the limit from which PIL warns of a bomb."""
MAX_ASPECT_RATIO = 200
"""Qwen2-VL's own limit."""
VIDEO_FPS = 2.0
"""Frames a second taken of a video file where the video processor names no other rate; Qwen2-VL's own choice."""


_LOADING = threading.Lock()
"""Held while an image that the caller opened is decoded: it may occur several times, and Pillow reads one file."""


class CocoaInputError(ValueError):
    """
    An input that cannot be encoded.

    Args:
        message (`str`): What is wrong, and how to fix it.
        position (`int`, *optional*): Index of the item in the list that was passed; named in front of the message.
        counted (`str`, defaults to `""`): What the position counts, where that is not the caller's own list.

    Attributes:
        reason (`str`): The message without the position.
        position (`int` or `None`)
        counted (`str`)
    """

    def __init__(self, message: str, position: int | None = None, counted: str = "") -> None:
        super().__init__(message if position is None else f"Item {position}{counted}: {message}")
        self.reason = message
        self.position = position
        self.counted = counted

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reason, self.position, self.counted)


@dataclass
class Conversation:
    """
    One input in the form that is rendered.

    Args:
        messages (`list[dict]`): `{"role", "content"}` with a list of `{"type": "text", "text"}`, `{"type": "image"}`
            and `{"type": "video"}` as content.
        images (`list[PIL.Image.Image]`): In the order of the messages.
        videos (`list[np.ndarray]`): Each of shape `(frames, height, width, 3)`, uint8.
        video_metadata (`list[VideoMetadata]`): One a video.
        missing_file (`str`): Why the input is a text, where it is a bare str that ends like an image or a video file;
            otherwise empty.
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)
    videos: list[np.ndarray] = field(default_factory=list)
    video_metadata: list[VideoMetadata] = field(default_factory=list)
    missing_file: str = ""

    @cached_property
    def image_digests(self) -> list[bytes]:
        """Of each image, 32 bytes: the same for images that are the same pixel by pixel."""
        return [digest_image(image) for image in self.images]

    @cached_property
    def digest(self) -> bytes:
        """32 bytes: the same for conversations that are the same in every word, pixel and frame."""
        summary = hashlib.sha256(json.dumps(self.messages).encode())
        for image in self.image_digests:
            summary.update(image)
        for video, metadata in zip(self.videos, self.video_metadata, strict=True):
            summary.update(f"{video.shape}{metadata}".encode())
            summary.update(np.ascontiguousarray(video))
        return summary.digest()

    def pixels(self, smallest: int, largest: int) -> int:
        """Pixels of all images and frames, once each is scaled to be no smaller and no larger."""
        sizes = [(1, image.width * image.height) for image in self.images]
        sizes += [(video.shape[0], video.shape[1] * video.shape[2]) for video in self.videos]
        return sum(frames * min(max(size, smallest), largest) for frames, size in sizes)


def digest_image(image: Image.Image) -> bytes:
    """32 bytes: the same for RGB images that are the same pixel by pixel."""
    summary = hashlib.sha256(repr(image.size).encode())
    summary.update(image.tobytes())
    return summary.digest()


@dataclass(frozen=True)
class ResizedImage:
    """
    An image of any form that [`load_image`] takes, to be stretched once it is loaded.

    Args:
        image: The image.
        size (`tuple[int, int]`): Width and height.
    """

    image: Any
    size: tuple[int, int]


def media_kind(name: str | os.PathLike) -> str | None:
    """
    What a file is by the ending of its name.

    Returns:
        `"image"` where Pillow opens files of this ending (plugins that were registered later count too), `"video"` for
        one of [`VIDEO_EXTENSIONS`], and `None` for any other.
    """
    ending = "." + os.fspath(name).rpartition(".")[2].lower()
    if ending in VIDEO_EXTENSIONS:
        return "video"
    kind = Image.registered_extensions().get(ending)
    if kind == "MPO":  # opened as a JPEG
        return "image"
    opener = Image.OPEN[kind][0] if kind in Image.OPEN else None
    if opener is None or (isinstance(opener, type) and issubclass(opener, ImageFile.StubImageFile)):
        return None  # saved only, or known by name only
    return "image"


def read_input(item: Any, video_processor: Any) -> Conversation:
    """
    Check one input and load its media.

    Args:
        item: A text, an image (PIL, path, bytes or array), a dict with any of `text`, `image`, `images` and `video`,
            one message or a list of messages; or what this function gave. Keys that are None count as absent.
        video_processor: Stock video processor, whose frame sampling is used on video files.

    Raises:
        CocoaInputError: the item cannot be encoded; without a position.
    """
    if isinstance(item, Conversation):
        return item
    return _Reader(load_image, partial(read_video, video_processor=video_processor)).read(item)


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
        CocoaInputError: the item is of no form that there is, or names a file that does not exist; without a position.
    """
    conversation = _Reader(lambda image: image, lambda video: (video, None)).read(item)
    if conversation.missing_file:
        raise CocoaInputError(
            f'{conversation.missing_file} If it is meant as text, pass {{"text": ...}}, which is never read as a path.'
        )
    media = {"image": iter(conversation.images), "video": iter(conversation.videos)}
    for message in conversation.messages:
        for part in message["content"]:
            if part["type"] != "text":
                part[part["type"]] = next(media[part["type"]])
    return conversation.messages


def input_parts(item: Any) -> list[dict[str, Any]]:
    """
    Content of all messages of an input, in the order in which the chat template places it; see [`input_messages`].

    Raises:
        CocoaInputError: the item is of no form that there is; without a position.
    """
    parts: list[dict[str, Any]] = []
    for message in input_messages(item):
        content = message["content"]
        if sum(part["type"] == "text" for part in content) == 1:  # the template's rule, see build_chat_template
            content = sorted(content, key=lambda part: part["type"] == "text")
        parts += content
    return parts


class _Reader:
    """Builds one [`Conversation`]; media are loaded in the order in which the template places them."""

    def __init__(self, load_image: Callable[[Any], Any], load_video: Callable[[Any], tuple[Any, Any]]) -> None:
        self.load_image = load_image
        self.load_video = load_video
        self.conversation = Conversation()

    def read(self, item: Any) -> Conversation:
        """The conversation that an item of any form is."""
        if isinstance(item, Mapping) and ("role" in item or "content" in item):
            item = [item]
        if isinstance(item, (list, tuple)):
            self.read_messages(item)
        else:
            self.add_message("user", self.content_of(item))
        return self.conversation

    def read_messages(self, messages: Sequence[Any]) -> None:
        if not messages:
            raise CocoaInputError("it is an empty list; a conversation needs at least one message.")
        for message in messages:
            if not isinstance(message, Mapping) or not ("role" in message or "content" in message):
                raise CocoaInputError(
                    f"a list is read as a conversation, but holds a {type(message).__name__}; give a list of "
                    '{"role", "content"} messages, or a dict with text, image, images or video.'
                )
            message = _without_none(message)
            _check_keys(message, ("role", "content"), "a message")
            role = message.get("role")
            if role not in ROLES:
                raise CocoaInputError(f"unknown role {role!r} in a conversation; use one of {list(ROLES)}.")
            content = message.get("content")
            if isinstance(content, str):
                parts = [_text_part(content)]
            elif isinstance(content, (list, tuple)):
                parts = [part for part in map(self.read_part, content) if part is not None]
            else:
                raise CocoaInputError(
                    f"content of the {role} message is {type(content).__name__}; give a str or a list of parts."
                )
            if not parts:
                raise CocoaInputError(f"the {role} message has no content.")
            if all(part["type"] == "text" and not part["text"].strip() for part in parts):
                raise CocoaInputError(EMPTY_TEXT)
            self.add_message(role, parts)

    def read_part(self, part: Any) -> dict[str, Any] | None:
        """One content part of a message; `None` where its value is None, as Arrow tables have it."""
        if not isinstance(part, Mapping):
            raise CocoaInputError(
                f"a content part is a {type(part).__name__}; give a dict such as "
                '{"type": "text", "text": ...} or {"type": "image", "image": ...}.'
            )
        kind, part = part.get("type"), _without_none(part)
        if kind not in ("text", "image", "video"):
            raise CocoaInputError(f"unknown type {kind!r} of a content part; use text, image or video.")
        sources = (kind,) if kind == "text" else (kind, *MEDIA_SOURCES)
        _check_keys(part, ("type", *sources), f"a {kind} part")
        values = [part[source] for source in sources if source in part]
        if len(values) > 1:
            raise CocoaInputError(f"{_one(kind)} part names its {kind} {len(values)} times; keep one of {sources}.")
        if kind == "text" and values:
            return _text_part(values[0], may_be_space=True)
        return self.read_value(kind, values[0]) if values else None

    def content_of(self, item: Any) -> list[dict[str, Any]]:
        """Content parts of an item that is no conversation."""
        if item is None:
            raise CocoaInputError("it is None; drop it, or give a text, an image or a dict.")
        if isinstance(item, Mapping) and item and set(item) <= {"bytes", "path"}:  # a cell of datasets.Image
            return [self.read_value("image", item)]
        if isinstance(item, Mapping):
            values = _without_none(item)
            _check_keys(values, ITEM_KEYS, "it")
            if not values:
                raise CocoaInputError(f"the dict holds nothing; give at least one of {list(ITEM_KEYS)}.")
            content = []
            for key, value in values.items():
                if key in ("image", "images") and isinstance(value, (list, tuple)):
                    if not value:
                        raise CocoaInputError(f"{key} is an empty list; give at least one image, or None.")
                    content += [self.read_value("image", image) for image in value]
                else:
                    content.append(self.read_value("image" if key == "images" else key, value))
            return content
        kind, self.conversation.missing_file = _kind(item)
        return [self.read_value(kind, item)]

    def read_value(self, kind: str, value: Any) -> dict[str, Any]:
        if kind == "text":
            return _text_part(value)
        if kind == "image":
            self.conversation.images.append(self.load_image(value))
        else:
            frames, metadata = self.load_video(value)
            self.conversation.videos.append(frames)
            self.conversation.video_metadata.append(metadata)
        return {"type": kind}

    def add_message(self, role: str, content: list[dict[str, Any]]) -> None:
        self.conversation.messages.append({"role": role, "content": content})


def load_image(value: Any, size: tuple[int, int] | None = None) -> Image.Image:
    """
    Load and check one image. Every form of one image gives the same pixels: turned upright by its EXIF orientation,
    what is transparent on white, 16 bits scaled down to 8 (the upper byte), in RGB.

    Args:
        value: PIL image, path, bytes of a file, `data:image/...` string, a dict with `bytes` or `path`, or a
            [`ResizedImage`] one of these; or an array or tensor of shape (height, width), (height, width, channels) or
            (channels, height, width), of uint8, uint16 or bool, with 1 (grey), 2 (grey and alpha), 3 (RGB) or 4 (RGBA)
            channels.
        size (`tuple[int, int]`, *optional*): Width and height to stretch it to, whatever its shape.

    Raises:
        CocoaInputError: it is missing, corrupt, too large, of another type, or where it keeps its shape too small or
            too long.
    """
    if isinstance(value, ResizedImage):
        value, size = value.image, value.size
    is_given = isinstance(value, Image.Image)
    name = "the image"
    if isinstance(value, Mapping):
        content, path = value.get("bytes"), value.get("path")
        _check_keys(value, ("bytes", "path"), "an image given as a dict")
        if content is None and path is None:
            raise CocoaInputError('an image given as a dict needs "bytes" or "path".')
        value, name = (path, name) if content is None else (content, str(path or name))
    if isinstance(value, (np.ndarray, torch.Tensor)):
        value = _from_array(value)
    if isinstance(value, (str, os.PathLike)):
        value, name = _open_source(os.fspath(value), "image")
    elif isinstance(value, (bytes, bytearray, memoryview)):
        value = io.BytesIO(value)
    if isinstance(value, (str, io.BytesIO)):
        try:
            value = Image.open(value)
        except Exception as error:  # decoders raise what they like
            raise CocoaInputError(
                f"{name} cannot be read as an image ({_reason(error)}); repair or drop it."
            ) from error
    if not isinstance(value, Image.Image):
        raise CocoaInputError(
            f"an image cannot be a {type(value).__name__}; give a PIL image, a path, bytes, a uint8 array, or a dict "
            "with bytes or path."
        )
    _check_size(value, name, keeps_shape=size is None)
    try:
        with _LOADING if is_given else nullcontext():
            value.load()
        image = _to_rgb(value)
    except CocoaInputError as error:
        raise CocoaInputError(f"{name} {error.reason}") from error
    except Exception as error:  # decoders raise what they like
        raise CocoaInputError(f"{name} is corrupt ({_reason(error)}); repair or drop it.") from error
    return image if size is None else image.resize(size)


def _to_rgb(image: Image.Image) -> Image.Image:
    """A loaded image of any mode as [`load_image`] promises; one that is so already is returned as it is."""
    deep_format = image.format in ("PNG", "PPM")  # whose mode "I" holds 16 bits
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    transparent = image.info.get("transparency")
    if image.mode.startswith("I;16") or (image.mode == "I" and deep_format):
        values = np.asarray(image)
        grey = (values >> 8).astype(np.uint8)
        if isinstance(transparent, int):
            grey[values == transparent] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        raise CocoaInputError("has 32 bits a pixel, without a known range; convert it to 8 bits.")
    if image.mode == "RGB" and isinstance(transparent, tuple) and max(transparent) > 255:
        image = image.copy()  # of 16 bits, of which Pillow keeps the upper byte
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    if image.mode in ("La", "RGBa"):  # alpha multiplied in
        image = image.convert(image.mode.upper())
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def read_video(value: Any, video_processor: Any) -> tuple[np.ndarray, VideoMetadata]:
    """
    Load and check one video.

    Args:
        value: Path of a file, list of frames (each whatever [`load_image`] takes), or uint8 array or tensor of shape
            (frames, height, width, channels) or (frames, channels, height, width). Given frames are all kept; a file
            is sampled at the rate that the video processor names, or else [`VIDEO_FPS`].
        video_processor: Stock video processor.

    Returns:
        Frames of shape `(frames, height, width, 3)`, uint8, and what is known of their timing.

    Raises:
        CocoaInputError: it is missing, corrupt, empty, or of another type; frames differ in size; no decoder is
            installed.
    """
    metadata = None
    if isinstance(value, (str, os.PathLike)):
        source, name = _open_source(os.fspath(value), "video")
        if not isinstance(source, str):
            raise CocoaInputError("a video cannot be given as a data string; give a path.")
        fps = getattr(video_processor, "fps", None) or VIDEO_FPS
        try:
            frames, metadata = load_video(source, sample_indices_fn=partial(_sample, video_processor, fps))
        except ImportError as error:
            raise CocoaInputError(
                f"{name} needs a video decoder, and PyAV is not installed; run pip install av, or give frames."
            ) from error
        except Exception as error:  # decoders raise what they like
            raise CocoaInputError(
                f"{name} cannot be read as a video ({_reason(error)}); repair or drop it."
            ) from error
        _check_size(Image.fromarray(frames[0]), name)
    elif isinstance(value, (list, tuple)) or (isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim == 4):
        images = [np.asarray(load_image(frame)) for frame in value]
        if not images:
            raise CocoaInputError("the video has no frames.")
        if len({image.shape for image in images}) > 1:
            sizes = sorted({f"{image.shape[1]}x{image.shape[0]}" for image in images})
            raise CocoaInputError(f"frames of a video differ in size ({', '.join(sizes)}); resize them to one size.")
        frames = np.stack(images)
    else:
        raise CocoaInputError(
            f"a video cannot be a {type(value).__name__}; give a path, a list of frames, or a uint8 array of 4 "
            "dimensions."
        )
    if metadata is None:
        metadata = VideoMetadata(total_num_frames=len(frames), frames_indices=list(range(len(frames))))
    return frames, metadata


def _sample(video_processor: Any, fps: float, metadata: VideoMetadata, **kwargs: Any) -> np.ndarray:
    total = metadata.total_num_frames
    if not total:
        raise ValueError("the file does not say how many frames it has; convert it to mp4, or give its frames")
    if total < video_processor.temporal_patch_size:  # of which the stock sampling would take none
        return np.arange(total)
    return np.asarray(video_processor.sample_frames(metadata=metadata, fps=fps))


def _kind(item: Any) -> tuple[str, str]:
    """
    Whether a bare item is a text, an image or a video; the rule of sentence-transformers, for more kinds of files.

    Returns:
        The kind; and for a text that ends like the name of a file and is none, what is missing, otherwise `""`.
    """
    if isinstance(item, str):
        if item.startswith(("data:image/", "data:video/")):
            return item[5:10], ""
        if re.fullmatch(r"https?://\S+", item):
            return media_kind(re.split(r"[?#]", item)[0]) or "text", ""
        kind = media_kind(item)
        if kind and os.path.isfile(item):
            return kind, ""
        return "text", _no_file(item, kind) if kind and not re.search(r"\s", item) else ""
    if isinstance(item, os.PathLike):
        return "video" if media_kind(item) == "video" else "image", ""
    if isinstance(item, (Image.Image, ResizedImage, bytes, bytearray, memoryview)):
        return "image", ""
    if isinstance(item, (np.ndarray, torch.Tensor)) and item.ndim in (2, 3, 4):
        return "video" if item.ndim == 4 else "image", ""
    if isinstance(item, (np.ndarray, torch.Tensor)):
        raise CocoaInputError(
            f"an array of shape {tuple(item.shape)} is neither an image (2 or 3 dimensions) nor a video (4)."
        )
    raise CocoaInputError(
        f"it is a {type(item).__name__}; give a text, an image (PIL, path, bytes or array), a dict, or a conversation."
    )


def _no_file(source: str, kind: str) -> str:
    """That a path leads to no file, and what may be meant."""
    if os.path.isdir(source):
        return f"{source} is a folder, not {_one(kind)} file; give the path of a file in it."
    advice = "check the path."
    if source.startswith("~"):
        advice = "~ is not expanded here, use os.path.expanduser."
    elif source.startswith("file:"):
        advice = "give a path, without file://."
    return f"there is no {kind} file {source}; {advice}"


def _open_source(source: str, kind: str) -> tuple[str | io.BytesIO, str]:
    """The file's path, or the bytes of a data string, and how to call it in an error."""
    if re.match(r"https?://", source):
        raise CocoaInputError(
            f"{source} is a link, and nothing is downloaded here; download the {kind} and give its path, or pass "
            '{"text": link} to embed the link as text.'
        )
    if source.startswith("data:"):
        try:
            return io.BytesIO(base64.b64decode(source.split(",", 1)[1], validate=True)), f"the {kind} in a data string"
        except (IndexError, ValueError) as error:
            raise CocoaInputError(f"the data string is not base64 ({_reason(error)}).") from error
    if not os.path.isfile(source):
        raise CocoaInputError(_no_file(source, kind))
    return source, source


def _from_array(array: np.ndarray | torch.Tensor) -> Image.Image:
    """An image from an array of its pixels, channels first, last or absent."""
    kind = str(array.dtype).removeprefix("torch.")
    if kind not in ("uint8", "uint16", "bool"):
        raise CocoaInputError(f"an image given as an array has dtype {kind}; convert it to uint8 (0 to 255).")
    pixels = array.detach().cpu().numpy() if isinstance(array, torch.Tensor) else array
    if pixels.ndim == 3 and pixels.shape[-1] not in CHANNELS and pixels.shape[0] in CHANNELS:
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[-1] not in CHANNELS):
        raise CocoaInputError(
            f"an image given as an array has shape {tuple(array.shape)}; give (height, width, channels) or "
            "(channels, height, width) with 1, 2, 3 or 4 channels."
        )
    if kind == "uint16":
        pixels = (pixels >> 8).astype(np.uint8)
    elif kind == "bool":
        pixels = 255 * pixels.astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels))


def _check_size(image: Image.Image, name: str, keeps_shape: bool = True) -> None:
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS:
        raise CocoaInputError(
            f"{name} is {width}x{height} pixels, more than the limit of {MAX_IMAGE_PIXELS}; resize it beforehand."
        )
    if not keeps_shape:
        return
    if min(width, height) < MIN_IMAGE_SIDE:
        raise CocoaInputError(
            f"{name} is {width}x{height} pixels; each side must have at least {MIN_IMAGE_SIDE}. Drop it."
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise CocoaInputError(
            f"{name} is {width}x{height} pixels; one side may be at most {MAX_ASPECT_RATIO} times the other. Crop it."
        )


def _text_part(text: Any, may_be_space: bool = False) -> dict[str, Any]:
    """A text as a part; white space alone counts as one beside other parts of a message, such as a newline there."""
    if not isinstance(text, str):
        raise CocoaInputError(f"a text cannot be a {type(text).__name__}; give a str.")
    if not (text if may_be_space else text.strip()):
        raise CocoaInputError(EMPTY_TEXT)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CocoaInputError(f"the text is not valid Unicode ({_reason(error)}); repair or drop it.") from error
    return {"type": "text", "text": str(text)}


def _check_keys(values: Mapping[str, Any], known: Sequence[str], name: str) -> None:
    unknown = [key for key in values if key not in known]
    if unknown:
        raise CocoaInputError(f"{name} has unknown keys {unknown}; known are {list(known)}.")


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _one(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
