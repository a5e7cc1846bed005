# SPDX-License-Identifier: Apache-2.0
"""Images and videos of every form, checked and loaded: one image gives the same pixels in each."""

from __future__ import annotations

import base64
import io
import os
import re
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, ImageOps
from transformers.video_utils import VideoMetadata, load_video

from .errors import CocoaInputError

VIDEO_EXTENSIONS = (".mp4", ".avi", ".mov", ".wmv", ".flv", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".3gp", ".ogv")
"""Endings of video files; those of images are Pillow's, see [`media_kind`]."""
IMAGE_READING = 2
"""Raised whenever [`load_image`] makes other pixels of an image than before: stored vectors are then outdated."""
CHANNELS = (1, 2, 3, 4)
"""Channels of an image given as an array: grey, grey and alpha, RGB, RGBA."""
MIN_IMAGE_SIDE = 4
"""Pixels. Less shows nothing, and an array's three channels could be taken for its side."""
MAX_IMAGE_PIXELS = 89_478_485
"""Pixels of one image before resizing, checked before it is decoded; the limit from which PIL warns of a bomb."""
MAX_ASPECT_RATIO = 200
"""Qwen2-VL's own limit."""
VIDEO_FPS = 2.0
"""Frames a second taken of a video file where the video processor names no other rate; Qwen2-VL's own choice."""
FRAMES_FPS = 24.0
"""Frames a second of which frames are taken that are given without their rate: transformers' own choice."""

_LOADING = threading.Lock()
"""Held while an image that the caller opened is decoded: it may occur several times, and Pillow reads one file."""


@dataclass(frozen=True)
class ResizedImage:
    """
    An image that [`load_image`] stretches once it is loaded.

    Args:
        image: An image of any form that [`load_image`] takes.
        size (`tuple[int, int]`): Width and height.
    """

    image: Any
    size: tuple[int, int]


def media_kind(name: str | os.PathLike) -> str | None:
    """
    The kind of a file by the ending of its name.

    Returns:
        `"image"` where Pillow opens files of this ending (plugins that were registered later count too), `"video"` for
        one of [`VIDEO_EXTENSIONS`], and `None` for any other.
    """
    _, dot, ending = os.fspath(name).rpartition(".")
    ending = dot + ending.lower()  # a word without a dot has none, such as "gif"
    if ending in VIDEO_EXTENSIONS:
        return "video"
    kind = Image.registered_extensions().get(ending)
    if kind == "MPO":  # opened as a JPEG
        return "image"
    opener = Image.OPEN[kind][0] if kind in Image.OPEN else None
    is_stub = isinstance(opener, type) and issubclass(opener, ImageFile.StubImageFile)  # known by name only
    return None if opener is None or is_stub else "image"


def load_image(value: Any, size: tuple[int, int] | None = None) -> Image.Image:
    """
    Load and check one image. Every form of one image gives the same pixels: turned upright by its EXIF orientation,
    transparency on white, 16 bits scaled down to 8 (the upper byte), in RGB. Nothing is downloaded.

    Args:
        value: PIL image, path, bytes of a file, `data:image/...` string, a dict with `bytes` or `path`, or a
            [`ResizedImage`] of one of these; or an array or tensor of shape (height, width), (height, width, channels)
            or (channels, height, width), of uint8, uint16 or bool, with 1 (grey), 2 (grey and alpha), 3 (RGB) or 4
            (RGBA) channels.
        size (`tuple[int, int]`, *optional*): Width and height to stretch it to, whatever its shape.

    Raises:
        CocoaInputError: it is missing, corrupt, too large, of another type, or where it keeps its shape too small or
            too long.
    """
    if isinstance(value, ResizedImage):
        value, size = value.image, value.size
    is_given = isinstance(value, Image.Image)
    name = str(getattr(value, "filename", "") or "the image") if is_given else "the image"
    if isinstance(value, Mapping):
        unknown = [key for key in value if key not in ("bytes", "path")]
        if unknown:
            raise CocoaInputError(f"an image given as a dict has unknown keys {unknown}; known are bytes and path.")
        if value.get("bytes") is not None:
            value, name = value["bytes"], str(value.get("path") or name)
        elif value.get("path") is not None:
            value = value["path"]
        else:
            raise CocoaInputError('an image given as a dict needs "bytes" or "path".')
    if isinstance(value, (str, os.PathLike)):
        value, name = _open_source(os.fspath(value), "image")
    elif isinstance(value, (bytes, bytearray, memoryview)):
        value = io.BytesIO(value)
    elif isinstance(value, (np.ndarray, torch.Tensor)):
        value = _from_array(value)
    if not isinstance(value, (str, io.BytesIO, Image.Image)):
        raise CocoaInputError(
            f"an image cannot be of type {type(value).__name__}; give a PIL image, a path, bytes, a uint8 array, or a "
            "dict with bytes or path."
        )
    try:
        image = value if isinstance(value, Image.Image) else Image.open(value)
        _check_size(*image.size, name, keeps_shape=size is None)
        with _LOADING if is_given else nullcontext():
            image.load()
        image = _to_rgb(image, name)
    except CocoaInputError:
        raise
    except Image.DecompressionBombError as error:  # twice the limit, which Pillow sees first
        raise CocoaInputError(f"{name} is too large ({error}); resize it beforehand.") from error
    except Exception as error:  # decoders raise what they like
        raise CocoaInputError(
            f"{name} cannot be read as an image ({type(error).__name__}: {error}); repair or remove it."
        ) from error
    return image if size is None else image.resize(size)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """A loaded image of any mode in RGB, as [`load_image`] promises; the same object where nothing changes."""
    has_16_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    transparent = image.info.get("transparency")
    if has_16_bits:
        values = np.asarray(image)
        grey = (values >> 8).astype(np.uint8)
        if isinstance(transparent, int):
            grey[values == transparent] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        raise CocoaInputError(f"{name} has 32 bits a pixel, without a known range; convert it to 8 bits.")
    if image.mode == "RGB" and isinstance(transparent, tuple) and max(transparent) > 255:
        image = image.copy()  # of a file of 16 bits, of whose pixels Pillow keeps the upper byte
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    if image.mode in ("La", "RGBa"):  # alpha multiplied in
        image = image.convert(image.mode.upper())
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _from_array(array: np.ndarray | torch.Tensor) -> Image.Image:
    """An image from an array of its pixels, channels first, last or absent."""
    dtype = str(array.dtype).removeprefix("torch.")
    if dtype not in ("uint8", "uint16", "bool"):
        raise CocoaInputError(f"an image given as an array has dtype {dtype}; convert it to uint8 (0 to 255).")
    pixels = array.detach().cpu().numpy() if isinstance(array, torch.Tensor) else array
    if pixels.ndim == 3 and pixels.shape[-1] not in CHANNELS and pixels.shape[0] in CHANNELS:
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[-1] not in CHANNELS):
        raise CocoaInputError(
            f"an image given as an array has shape {tuple(array.shape)}; give (height, width, channels) or "
            "(channels, height, width) with 1, 2, 3 or 4 channels."
        )
    if dtype == "uint16":
        pixels = (pixels >> 8).astype(np.uint8)
    elif dtype == "bool":
        pixels = 255 * pixels.astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels))


def _check_size(width: int, height: int, name: str, keeps_shape: bool = True) -> None:
    """Raise [`CocoaInputError`] where an image or a frame is too large, too small or too long."""
    reason = None
    if width * height > MAX_IMAGE_PIXELS:
        reason = f", more than the limit of {MAX_IMAGE_PIXELS}; resize it beforehand."
    elif keeps_shape and min(width, height) < MIN_IMAGE_SIDE:
        reason = f"; each side must have at least {MIN_IMAGE_SIDE}. Drop it."
    elif keeps_shape and max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        reason = f"; one side may be at most {MAX_ASPECT_RATIO} times the other. Crop it."
    if reason:
        raise CocoaInputError(f"{name} is {width}x{height} pixels{reason}")


def read_video(value: Any, video_processor: Any) -> tuple[np.ndarray, VideoMetadata]:
    """
    Load and check one video.

    Args:
        value: Path of a file, list of frames (each whatever [`load_image`] takes), or uint8 array or tensor of shape
            (frames, height, width, channels) or (frames, channels, height, width), or
            `{"array": frames, "video_metadata": {"fps": 2.0}}` as sentence-transformers has it. Given frames are all
            kept; without their rate they count as [`FRAMES_FPS`] a second. A file is sampled at the rate that the
            video processor names, or else [`VIDEO_FPS`].
        video_processor: Stock video processor.

    Returns:
        Frames of shape `(frames, height, width, 3)`, uint8, and what is known of their timing.

    Raises:
        CocoaInputError: it is missing, corrupt, empty, or of another type; frames differ in size; no decoder is
            installed.
    """
    if isinstance(value, (str, os.PathLike)):
        return _read_video_file(os.fspath(value), video_processor)
    fps = FRAMES_FPS
    if isinstance(value, Mapping) and set(value) == {"array", "video_metadata"}:
        fps = (value["video_metadata"] or {}).get("fps") or FRAMES_FPS
        value = value["array"]
    if not isinstance(value, (list, tuple)) and getattr(value, "ndim", None) != 4:
        raise CocoaInputError(
            f"a video cannot be of type {type(value).__name__}; give a path, a list of frames, or a uint8 array of 4 "
            "dimensions."
        )
    images = [load_image(frame) for frame in value]
    if not images:
        raise CocoaInputError("the video has no frames.")
    sizes = {f"{image.width}x{image.height}" for image in images}
    if len(sizes) > 1:
        raise CocoaInputError(
            f"frames of a video differ in size ({', '.join(sorted(sizes))}); resize them to one size."
        )
    metadata = VideoMetadata(total_num_frames=len(images), fps=fps, frames_indices=list(range(len(images))))
    return np.stack([np.asarray(image) for image in images]), metadata


def _read_video_file(path: str, video_processor: Any) -> tuple[np.ndarray, VideoMetadata]:
    """[`read_video`] of a file."""
    source, name = _open_source(path, "video")
    if not isinstance(source, str):
        raise CocoaInputError("a video cannot be given as a data string; give a path.")
    try:
        frames, metadata = load_video(source, sample_indices_fn=partial(_sample_frames, video_processor))
    except ImportError as error:
        raise CocoaInputError(
            f"{name} needs a video decoder, and PyAV is not installed; run pip install av, or give frames."
        ) from error
    except Exception as error:  # decoders raise what they like
        raise CocoaInputError(
            f"{name} cannot be read as a video ({type(error).__name__}: {error}); repair or remove it."
        ) from error
    _check_size(frames.shape[2], frames.shape[1], name)
    return frames, metadata


def _sample_frames(video_processor: Any, metadata: VideoMetadata, **kwargs: Any) -> np.ndarray:
    """Which frames of a file to read."""
    total = metadata.total_num_frames
    if not total:
        raise ValueError("the file does not say how many frames it has; convert it to mp4, or give its frames")
    if total < video_processor.temporal_patch_size:  # of which the stock sampling would take none
        return np.arange(total)
    fps = getattr(video_processor, "fps", None) or VIDEO_FPS
    return np.asarray(video_processor.sample_frames(metadata=metadata, fps=fps))


def missing_file(source: str, kind: str) -> str:
    """A sentence that says that a path leads to no image (or video) file, and what may be meant."""
    if os.path.isdir(source):
        return f"{source} is a folder; give the path of a file in it."
    return f"there is no {kind} file {source}; check the path (~ and file:// are not expanded)."


def _open_source(source: str, kind: str) -> tuple[str | io.BytesIO, str]:
    """The file's path, or the bytes of a data string; and its name in an error."""
    if re.match(r"https?://", source):
        raise CocoaInputError(
            f"{source} is a link, and nothing is downloaded here; download the {kind} and give its path, or pass "
            '{"text": link} to embed the link as text.'
        )
    if source.startswith("data:"):
        try:
            return io.BytesIO(base64.b64decode(source.split(",", 1)[1], validate=True)), f"the {kind} in a data string"
        except (IndexError, ValueError) as error:
            raise CocoaInputError(f"the data string is not base64 ({error}).") from error
    if not os.path.isfile(source):
        raise CocoaInputError(missing_file(source, kind))
    return source, source


def load_images(images: Any) -> list[Image.Image]:
    """The images of a call of a stock processor: one, a list, or a list for each text; see [`load_image`]."""
    return _load_each(load_image, images, lambda value: not isinstance(value, (list, tuple)), " of the images")


def read_videos(videos: Any, video_processor: Any) -> list[tuple[np.ndarray, VideoMetadata]]:
    """The videos of a call of a stock processor: one, a list, or a list for each text; see [`read_video`]."""

    def is_one(value: Any) -> bool:
        return not isinstance(value, (list, tuple)) or not all(map(is_video_or_list, value))

    def is_video_or_list(value: Any) -> bool:
        is_file = isinstance(value, (str, os.PathLike)) and media_kind(value) == "video"
        return is_file or isinstance(value, (list, tuple)) or getattr(value, "ndim", None) == 4

    return _load_each(partial(read_video, video_processor=video_processor), videos, is_one, " of the videos")


def _load_each(load: Callable[[Any], Any], values: Any, is_one: Callable[[Any], bool], counted: str) -> list[Any]:
    """Load nested images or videos as one list; an error says which."""

    def flatten(value: Any) -> list[Any]:
        return [value] if is_one(value) else [one for part in value for one in flatten(part)]

    loaded = []
    for position, value in enumerate([] if values is None else flatten(values)):
        try:
            loaded.append(load(value))
        except CocoaInputError as error:
            raise CocoaInputError(error.reason, position, counted) from error
    return loaded
