# SPDX-License-Identifier: Apache-2.0
"""
How MMEB-V1 builds the texts of queries and targets, to the last newline, and where in them an image stands.

The rules are those of the benchmark's current evaluator (TIGER-AI-Lab/VLM2Vec, `src/data/eval_dataset/image_*.py`),
which it made so that they give the texts of the first one.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from .tasks import Task

MARKER = "<|image_1|>"
"""Stands for the image in a text of the benchmark."""

IMAGE_MARKER = re.compile(r"<\|image_\d+\|>")
"""Where a text says that its image stands."""

Places = list[tuple[str | None, str | None]]
"""An image's path or a text at each place of an input."""


def query_text(task: Task, instruction: str, text: str) -> str:
    """The text of a query from `qry_inst` and `qry_text`, which may be empty where the query has an image."""
    if task.form == "text_to_image":
        return f"{instruction} {text}\n" + "\n" * task.blank_line
    instruction = instruction.replace(MARKER, "")
    if task.form in ("question", "image_to_image"):
        instruction = "\n" + instruction.strip()
    return _shown(f"{instruction} {text}" if text else instruction) + "\n"


def target_texts(task: Task, instruction: str, texts: list[str], images: list[str]) -> list[str]:
    """
    The texts of a query's targets: answers as they are, or what stands beside their images.

    Args:
        task ([`Task`]).
        instruction (`str`): `tgt_inst`, used where targets are images.
        texts (`list[str]`): `tgt_text`: answers or captions. If the first caption is blank, none is used.
        images (`list[str]`): `tgt_img_path`, used where targets are images.
    """
    if not task.finds_images:
        return texts
    instruction = instruction.replace(MARKER, "")
    if any(caption.strip() for caption in texts[:1]):
        return [_shown(f"{instruction} {caption}") + "\n" for caption in texts]
    return [_shown(instruction) + "\n" * (task.form == "text_to_image")] * len(images)


def _shown(text: str) -> str:
    return f"{MARKER} {text}".replace(" \n", "\n")


def target_name(task: Task, text: str, image: str) -> str:
    """What a candidate, its text and the path of its image, is known by: those of one name are encoded once."""
    if task.form == "text_to_image":
        return image
    if task.form == "image_to_image":
        return f"{image}:" + text.strip('"')
    return text


def places_of(text: str | None, image_path: str | None, image_dir: Path) -> Places:
    """
    One side of a pair, in order: an image's path or a text at each place.

    Only the marker goes; the rest of the text stays as published, with the space and the newlines around the image,
    as the benchmark's evaluator shows it to a model. Without a marker in the text the image comes first.

    Args:
        text (`str`, *optional*), image_path (`str`, *optional*): Of the row; either may be empty.
        image_dir (`Path`): The folder that the image path begins in.

    Raises:
        ValueError: the text marks an image that is not there, or several; the path leads out of the folder.
    """
    text = text or ""
    texts = IMAGE_MARKER.split(text)
    if len(texts) > 2:
        raise ValueError(f"the text {text!r} marks {len(texts) - 1} images; each side has one at most.")
    if not image_path:
        if len(texts) > 1:
            raise ValueError(f"the text {text!r} marks an image, and the row names none.")
        return [(None, text)] if text.strip() else []
    path = PurePosixPath(image_path)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"the image path {image_path!r} leads out of the folder of images.")
    image = (str(image_dir / path), None)
    before, after = texts if len(texts) > 1 else ("", text)
    return [place for place in ((None, before), image, (None, after)) if any(place)]
