# SPDX-License-Identifier: Apache-2.0
"""
MMEB-train as published (`TIGER-Lab/MMEB-train`; VLM2Vec, arXiv 2410.05160): pairs of texts and images in a folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from datasets import Dataset, Features, Image, IterableDataset, Sequence, Value

PAIR_COLUMNS = ("qry", "qry_image_path", "pos_text", "pos_image_path")
"""Columns of a query and its positive; those of negatives may be there as well."""

IMAGE_MARKER = re.compile(r"\s*<\|image_\d+\|>\s*")
"""Where a text says that its image stands, with the space around it."""

DOCUMENT = Features({"images": Sequence(Image()), "texts": Sequence(Value("string"))})


def pairs_as_documents(dataset: Dataset | IterableDataset, image_dir: str | Path) -> Dataset | IterableDataset:
    """
    Pairs as rows to pre-train on: the query and then its positive, as one interleaved document each.

    So the bridge rebuilds an answer from the picture of its question, a caption from its picture, one picture from
    the other. Instructions stay in the texts that they begin; pairs with an empty side are dropped, as the
    benchmark's own reader does.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): With the columns [`PAIR_COLUMNS`].
        image_dir (`str` or `Path`): The folder that the image paths begin in.

    Returns:
        The same kind of dataset, with `images` and `texts`, lists of equal length in which each place has one
        of the two.

    Raises:
        ValueError: a column is missing, or there is no such folder. While rows are read: a text marks an image that
            the row does not have, or several; a path leads out of the folder.
    """
    columns = dataset.column_names or []
    if missing := [name for name in PAIR_COLUMNS if name not in columns]:
        raise ValueError(f"MMEB-train's layout has the columns {list(PAIR_COLUMNS)}; {missing} are not in {columns}.")
    folder = Path(image_dir)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder} of images; give image_dir, where MMEB-train's images lie.")

    def convert(rows: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        documents = []
        for index, *cells in zip(indices, *(rows[name] for name in PAIR_COLUMNS), strict=True):
            try:
                query, positive = (places_of(cells[side], cells[side + 1], folder) for side in (0, 2))
            except ValueError as error:
                raise ValueError(f"Row {index} of MMEB-train: {error}") from error
            if query and positive:
                documents.append(query + positive)
        return {
            "images": [[image for image, _ in places] for places in documents],
            "texts": [[text for _, text in places] for places in documents],
        }

    options: dict[str, Any] = {"with_indices": True, "batched": True, "remove_columns": columns, "features": DOCUMENT}
    if isinstance(dataset, Dataset):
        options["desc"] = "Reading pairs"
    return dataset.map(convert, **options)


def places_of(text: str | None, image_path: str | None, image_dir: Path) -> list[tuple[str | None, str | None]]:
    """
    One side of a pair, in order: an image's path or a text at each place.

    Without a marker in the text the image comes first. The space around the marker goes, the rest of the text stays
    as published.

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
    return [place for place in ((None, before), image, (None, after)) if place[0] or (place[1] or "").strip()]
