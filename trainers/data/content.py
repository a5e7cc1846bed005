# SPDX-License-Identifier: Apache-2.0
"""Keys of what the cells of pairs hold, whatever form they have: the same text, the same pixels."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from modeling_cocoa.inputs import CocoaInputError, input_parts
from modeling_cocoa.media import load_image

from .rows import undecoded

ROWS_OF_A_PROCESS = 1000
"""Fewer rows are not worth another process."""
MOST_PROCESSES = 8


def content_key(cell: Any) -> str:
    """
    A digest of what an input holds: the same for the same texts and images in the same order, in whatever form and
    under whatever file name an image comes. An input that cannot be read has that of its own form.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        for part in input_parts(cell):
            if part["type"] == "image":
                image = load_image(part["image"]).convert("RGB")
                digest.update(f"image {image.size}:".encode() + image.tobytes())
            else:
                kind = part["type"]
                digest.update(f"{kind}:{part[kind]}\0".encode(errors="replace"))
    except CocoaInputError:
        digest.update(f"unread:{cell!r}".encode(errors="replace"))
    return digest.hexdigest()


def content_keys(dataset: Dataset) -> Dataset:
    """The [`content_key`] of every cell of a dataset, in a column for each; every image is read once."""
    # Without the transform by which sentence-transformers adds the name of its dataset to every row.
    dataset = undecoded(dataset.with_format(None))
    processes = min(MOST_PROCESSES, (os.cpu_count() or 1) - 1, len(dataset) // ROWS_OF_A_PROCESS)
    return dataset.map(
        row_keys,
        remove_columns=dataset.column_names,
        num_proc=processes if processes > 1 else None,
        load_from_cache_file=False,  # a file may have changed
        desc="Looking for equal values",
    )


def row_keys(row: Mapping[str, Any]) -> dict[str, str]:
    """The keys of a row, under new names, since a column of images takes no texts."""
    return {f"{name}_key": content_key(cell) for name, cell in row.items()}


def digest(cell: Any) -> str:
    """A digest of a cell that opens no image: the same for the same text, and the same bytes or file of an image."""
    return hashlib.sha256(repr(dated(cell)).encode()).hexdigest()


def dated(cell: Any) -> Any:
    """A cell in which images that are files are joined by the size and time of their file."""
    if isinstance(cell, list):
        return [dated(part) for part in cell]
    if not isinstance(cell, Mapping):
        return cell
    if set(cell) == {"bytes", "path"} and cell["bytes"] is not None:
        return cell["bytes"]
    if set(cell) == {"bytes", "path"} and os.path.isfile(cell["path"]):
        status = os.stat(cell["path"])
        return cell["path"], status.st_size, status.st_mtime_ns
    return {name: dated(part) for name, part in cell.items()}
