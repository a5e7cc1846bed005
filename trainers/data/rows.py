# SPDX-License-Identifier: Apache-2.0
"""The forms that rows of pre-training data come in: pairs of a query and its positive, or texts and images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from datasets import Dataset, Image, IterableDataset, LargeList
from datasets import Sequence as SequenceFeature
from datasets.utils.file_utils import is_local_path, xopen

from modeling_cocoa.inputs import CocoaInputError, input_messages, input_parts
from modeling_cocoa.media import ResizedImage

PAIR_COLUMNS = ("query", "positive")
TEACHER_COLUMN = "teacher"
"""A column that the teacher of contrastive training alone reads, in place of both sides of the pair."""
ROW_COLUMNS = ("image", "images", "text", "texts", "messages")
"""Columns of a row of one side."""

Part = dict[str, Any]
"""`{"type": "text", "text"}` or `{"type": "image", "image"}`."""


class NoTargetTextError(CocoaInputError):
    """A pair without a text that the EOS-bridged stage could rebuild: always skipped and counted."""


def choose_columns(columns: Sequence[str], what: str) -> list[str]:
    """
    The columns that rows are read from: those of a pair where both are there, otherwise those of [`ROW_COLUMNS`].

    Raises:
        ValueError: there are none of these; lists the columns.
    """
    if set(PAIR_COLUMNS) <= set(columns):
        return list(PAIR_COLUMNS)
    chosen = [name for name in ROW_COLUMNS if name in columns]
    if not chosen:
        raise ValueError(
            f"{what} needs the columns {list(PAIR_COLUMNS)}, or one of {list(ROW_COLUMNS)}; it has {list(columns)}. "
            "Rename yours with dataset.rename_column(...)."
        )
    return chosen


def is_pair(row: Mapping[str, Any]) -> bool:
    """Whether a row is a pair."""
    return any(row.get(name) is not None for name in PAIR_COLUMNS)


def pair_parts(row: Mapping[str, Any]) -> tuple[list[Part], list[Part]]:
    """The texts and images of the two sides of a pair; [`CocoaInputError`] where one cannot be read."""
    sides = []
    for name in PAIR_COLUMNS:
        try:
            parts = input_parts(row.get(name))
        except CocoaInputError as error:
            raise CocoaInputError(f"its {name}: {error.reason}") from error
        if any(part["type"] == "video" for part in parts):
            raise CocoaInputError(f"its {name} holds a video; pre-training takes text and images.")
        sides.append(parts)
    return sides[0], sides[1]


def source_and_target(row: Mapping[str, Any]) -> tuple[Any, str]:
    """
    What the EOS-bridged stage reads of a pair, and the text that it rebuilds: its query and the text of its positive,
    or the other way round where only the positive holds an image.

    The authors take the text of a positive that holds an image as well. In MMEB-train that is a constant instruction
    ("Represent the given image."), from which there is nothing to learn.

    Returns:
        The source in the form that it has in the row, and the target's text.

    Raises:
        NoTargetTextError: both hold images.
        CocoaInputError: as in [`pair_parts`].
    """
    query, positive = pair_parts(row)
    source, target = row["query"], positive
    if has_image(positive):
        if has_image(query):
            raise NoTargetTextError("its query and its positive both hold an image, so neither is a text to rebuild.")
        source, target = row["positive"], query
    return source, join_texts(target)[0]["text"]


def has_image(parts: Iterable[Part]) -> bool:
    """Whether one of some parts is an image."""
    return any(part["type"] == "image" for part in parts)


def parts_of(row: Mapping[str, Any]) -> list[Part]:
    """
    The texts and images of a row, in their order; neighbouring texts joined by a newline.

    A row has one of four forms; what is None or blank is left out:

    - `query` and `positive`: the two after one another.
    - `image` or `images`, and `text`: the images come first.
    - `images` and `texts`, lists of equal length in which each place has one of the two: an interleaved document.
    - `messages`: a conversation, whose turns follow one another as one input. Content is a str, or a list of parts;
      an image part without an image of its own takes the next of `images`, as in TRL.

    Raises:
        CocoaInputError: the row has neither text nor image, or its columns do not fit together.
    """
    if is_pair(row):
        query, positive = pair_parts(row)
        return join_texts(part for part in query + positive if part["type"] != "text" or part["text"].strip())
    images = [row["image"]] if row.get("image") is not None else []
    images += row.get("images") or []
    if row.get("messages"):
        if row.get("text") or row.get("texts"):
            raise CocoaInputError("it has both messages and a text; keep one of the two columns.")
        parts = list(parts_of_messages(row["messages"], [image for image in images if image is not None]))
    elif row.get("texts"):
        if row.get("text"):
            raise CocoaInputError("it has both texts and a text; keep one of the two columns.")
        parts = list(parts_of_document(row["texts"], images))
    else:
        parts = [{"type": "image", "image": image} for image in images if image is not None]
        parts += text_parts(row.get("text"))
    if not parts:
        raise CocoaInputError("it has neither an image nor a text.")
    return join_texts(parts)


def without_image_decoding(feature: Any) -> Any:
    """A dataset's features with every image left as the bytes or the path that it is."""
    if isinstance(feature, Image):
        return Image(decode=False)
    if isinstance(feature, dict):
        return type(feature)({name: without_image_decoding(part) for name, part in feature.items()})
    if isinstance(feature, (SequenceFeature, LargeList)):
        return type(feature)(without_image_decoding(feature.feature))
    return feature


def undecoded(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """A dataset whose images are left as bytes or paths; a stream of unknown features is as it is."""
    return dataset if dataset.features is None else dataset.cast(without_image_decoding(dataset.features))


def open_images(item: Any, size: tuple[int, int] | None = None) -> Any:
    """
    An input as [`CocoaProcessor.preprocess`] takes it, which opens images one at a time; remote ones are fetched.

    Args:
        item: As in [`CocoaProcessor.preprocess`], or a cell of [`undecoded`].
        size (`tuple[int, int]`, *optional*): Width and height, in pixels, to which every image is to be stretched.

    Returns:
        The input; with a `size`, or where an image had to be fetched, as a conversation.

    Raises:
        CocoaInputError: it is of no known form; a bare str ends like an image or a video file and is none; a remote
            image cannot be fetched; there is a size, and the input has a video.
    """
    messages = input_messages(item)
    parts = [part for message in messages for part in message["content"]]
    if size is not None and any(part["type"] == "video" for part in parts):
        raise CocoaInputError("it has a video; image_resolution is for images.")
    is_changed = size is not None
    for part in parts:
        if part["type"] == "image":
            image = fetch_image(part["image"])
            is_changed = is_changed or image is not part["image"]
            part["image"] = image if size is None else ResizedImage(image, size)
    return messages if is_changed else item


def fetch_image(image: Any) -> Any:
    """The same image; one that a streamed dataset names by an address or by its place in an archive as bytes."""
    if not isinstance(image, Mapping) or image.get("bytes") is not None or image.get("path") is None:
        return image
    path = str(image["path"])
    if is_local_path(path):
        return image
    try:
        with xopen(path, "rb") as file:
            return {"bytes": file.read(), "path": path}
    except Exception as error:  # of whatever reads that kind of address
        raise CocoaInputError(f"its image {path} cannot be fetched ({type(error).__name__}: {error}).") from error


def text_parts(text: Any) -> list[Part]:
    """A text as a part; none where it is None or blank."""
    if text is not None and not isinstance(text, str):
        raise CocoaInputError(f"its text is of type {type(text).__name__}; a text must be a str.")
    return [{"type": "text", "text": text}] if text and text.strip() else []


def parts_of_document(texts: Sequence[Any], images: Sequence[Any]) -> Iterable[Part]:
    """The parts of an interleaved document."""
    if images and len(images) != len(texts):
        raise CocoaInputError(
            f"it has {len(images)} images and {len(texts)} texts; an interleaved document has lists of equal length, "
            "with None where the other has something."
        )
    for place, text in enumerate(texts):
        image = images[place] if images else None
        if image is not None:
            if text:
                raise CocoaInputError(f"place {place} of its texts and images holds both; each place holds one.")
            yield {"type": "image", "image": image}
        yield from text_parts(text)


def parts_of_messages(messages: Sequence[Any], images: Sequence[Any]) -> Iterable[Part]:
    """The parts of a conversation; image parts without an image of their own take `images` in turn, all of them."""
    waiting = list(images)
    for message in messages:
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, str):
            yield from text_parts(content)
            continue
        if not isinstance(content, (list, tuple)):
            raise CocoaInputError("a message has no content; give a str or a list of parts.")
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind == "text":
                yield from text_parts(part.get("text"))
            elif kind == "image":
                own = next((part[key] for key in ("image", "path") if part.get(key) is not None), None)
                if own is None and not waiting:
                    raise CocoaInputError("its messages have more image parts than it has images.")
                yield {"type": "image", "image": own if own is not None else waiting.pop(0)}
            else:
                raise CocoaInputError(f"a content part is of type {kind!r}; pre-training takes text and image.")
    if waiting:
        raise CocoaInputError(f"{len(waiting)} of its images have no image part in its messages.")


def join_texts(parts: Iterable[Part]) -> list[Part]:
    """The same parts, neighbouring texts as one."""
    joined: list[Part] = []
    for part in parts:
        if joined and part["type"] == joined[-1]["type"] == "text":
            joined[-1] = {"type": "text", "text": f"{joined[-1]['text']}\n{part['text']}"}
        else:
            joined.append(part)
    return joined
