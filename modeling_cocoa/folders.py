# SPDX-License-Identifier: Apache-2.0
"""Folders of images: what is in them, and their vectors although some files cannot be read."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import CocoaInputError
from .media import media_kind

CAPTIONS = ("text", "caption")
"""Columns of a folder's `metadata.csv` that captions are read from where none is named."""
CHUNK = 1024
"""Inputs that are embedded together, which is what an interruption may lose."""


def list_images(folder: str | os.PathLike, *, recursive: bool = True) -> tuple[list[Path], str]:
    """
    The images of a folder, by the endings that Pillow knows (see [`~media.media_kind`]).

    Args:
        folder (`str` or `os.PathLike`): Path of the folder.
        recursive (`bool`, defaults to `True`): Those of folders within it too.

    Returns:
        The images, sorted; and a sentence that counts the other files by their endings, `""` where there are none.

    Raises:
        NotADirectoryError: there is no such folder.
    """
    if not Path(folder).is_dir():
        raise NotADirectoryError(f"There is no folder {folder}; check the path.")
    files = sorted(path for path in Path(folder).glob("**/*" if recursive else "*") if path.is_file())
    images = [path for path in files if media_kind(path) == "image"]
    return images, describe_left_out(path for path in files if media_kind(path) != "image")


def describe_left_out(files: Iterator[Path]) -> str:
    """A sentence that counts files that are no images by their endings; `""` where there are none."""
    endings = Counter(path.suffix.lower() or "no ending" for path in files)
    if not endings:
        return ""
    counted = ", ".join(f"{count} {ending}" for ending, count in endings.most_common())
    return f"Left out, since Pillow does not open them as images: {counted}."


def encode_readable(
    encode: Callable[[list[Any]], np.ndarray], inputs: Sequence[Any]
) -> Iterator[tuple[list[int], np.ndarray, dict[int, str]]]:
    """
    Embed many inputs chunk by chunk, those that cannot be read left out.

    Args:
        encode (`Callable`): Such as [`CocoaTransformer.encode`]; its [`CocoaInputError`] names an input by position.
        inputs (`Sequence`): In any form that `encode` takes.

    Yields:
        For each [`CHUNK`]: the positions of inputs that were embedded, their vectors, and by position why others were
        not.
    """
    for first in range(0, len(inputs), CHUNK):
        left = list(range(first, min(first + CHUNK, len(inputs))))
        positions: list[int] = []
        parts: list[np.ndarray] = []
        unreadable: dict[int, str] = {}
        while left:
            try:
                vectors = encode([inputs[position] for position in left])
                readable, left = left, []
            except CocoaInputError as error:
                if error.position is None:
                    raise
                unreadable[left[error.position]] = error.reason
                readable, left = left[: error.position], left[error.position + 1 :]
                vectors = encode([inputs[position] for position in readable])
            positions += readable
            parts.append(vectors)
        yield positions, np.concatenate(parts), unreadable


def describe_unreadable(reasons: Sequence[str], most: int = 5) -> str:
    """Sentences that count inputs that could not be read and say why the first could not; `""` for none."""
    if not reasons:
        return ""
    more = f" ... and {len(reasons) - most} more." if len(reasons) > most else ""
    return f"Left out, since they cannot be read: {len(reasons)}. {' '.join(reasons[:most])}{more}"
