# SPDX-License-Identifier: Apache-2.0
"""
MMEB-train as published (`TIGER-Lab/MMEB-train`; VLM2Vec, arXiv 2410.05160), and with the hard negatives of mmE5 (arXiv
2502.08468) and MoCa (arXiv 2506.23115): pairs of texts and images in a folder.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, IterableDataset, Value

from evaluation.mmeb.texts import places_of

PAIR_COLUMNS = ("qry", "qry_image_path", "pos_text", "pos_image_path")
NEGATIVE_COLUMNS = ("neg_text", "neg_image_path")
CONVERSATION = [
    {"role": Value("string"), "content": [{"type": Value("string"), "text": Value("string"), "image": Image()}]}
]


def mmeb_pairs(dataset: Dataset | IterableDataset, image_dir: str | Path) -> Dataset | IterableDataset:
    """
    MMEB-train as the pairs of every stage, without those that have an empty side, as the benchmark's own reader.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): With [`PAIR_COLUMNS`], and perhaps
            [`NEGATIVE_COLUMNS`]: a text and a path each, or lists of them, also written out as text, as in mmE5's and
            MoCa's files.
        image_dir (`str` or `Path`): The folder that the image paths begin in.

    Returns:
        The same kind of dataset with `query`, `positive` and `negative_1` to `negative_n`, as many as any row has:
        texts, or conversations in columns with images. A row with fewer negatives repeats its own (as mmE5 does), one
        with none is given positives of other rows. Of a stream, whose rows are not known beforehand, all columns are
        conversations, and there are no negatives.

    Raises:
        ValueError: a column is missing, or there is no such folder. While rows are read: a text marks an image that
            the row does not have, or several; a path leads out of the folder; a row's lists of negatives differ in
            length.
    """
    folder = check_layout(dataset, image_dir)
    if isinstance(dataset, IterableDataset):
        return convert_pairs(dataset, folder, {"query": True, "positive": True}, [])
    has_negatives = set(NEGATIVE_COLUMNS) <= set(dataset.column_names)
    cells = [dataset[name] for name in NEGATIVE_COLUMNS] if has_negatives else []
    all_negatives = [negatives_of(*cell) for cell in zip(*cells, strict=True)]
    width = max(map(len, all_negatives), default=0)
    if not all(all_negatives) and width:
        others = next_positives(list(zip(*(dataset[name] for name in PAIR_COLUMNS[2:]), strict=True)), width)
        all_negatives = [own or other for own, other in zip(all_negatives, others, strict=True)]
    images = {side: any(dataset[path]) for side, path in (("query", PAIR_COLUMNS[1]), ("positive", PAIR_COLUMNS[3]))}
    negatives_show = any(path for negatives in all_negatives for _, path in negatives)
    images.update({f"negative_{number + 1}": negatives_show for number in range(width)})
    return convert_pairs(dataset, folder, images, all_negatives)


def convert_pairs(
    dataset: Dataset | IterableDataset, folder: Path, images: Mapping[str, bool], all_negatives: list[Any]
) -> Dataset | IterableDataset:
    """The columns that `images` names, each with images or without, out of those of the benchmark."""
    width = len(images) - 2

    def convert(rows: Mapping[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        made: dict[str, list[Any]] = {name: [] for name in images}
        for place, index in enumerate(indices):
            try:
                query, positive = (
                    places_of(rows[text][place], rows[path][place], folder)
                    for text, path in (PAIR_COLUMNS[:2], PAIR_COLUMNS[2:])
                )
                negatives = []
                if width:
                    negatives = [places_of(text, path, folder) for text, path in all_negatives[index]]
            except ValueError as error:
                raise ValueError(f"Row {index} of MMEB-train (the first is row 0): {error}") from error
            if not query or not positive:
                continue
            filled = [negatives[number % len(negatives)] if negatives else None for number in range(width)]
            for name, places in zip(images, [query, positive, *filled], strict=True):
                made[name].append(as_input(places, images[name]))
        return made

    features = Features({name: CONVERSATION if shows else Value("string") for name, shows in images.items()})
    described = {"desc": "Reading pairs"} if isinstance(dataset, Dataset) else {}
    return dataset.map(
        convert,
        with_indices=True,
        batched=True,
        remove_columns=dataset.column_names,
        features=features,
        **described,
    )


def check_layout(dataset: Dataset | IterableDataset, image_dir: str | Path) -> Path:
    """The folder of images; `ValueError` where it or a column does not exist."""
    columns = dataset.column_names or []
    if missing := [name for name in PAIR_COLUMNS if name not in columns]:
        raise ValueError(f"MMEB-train's layout has the columns {list(PAIR_COLUMNS)}; {missing} are not in {columns}.")
    folder = Path(image_dir)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder} of images; give image_dir, where MMEB-train's images lie.")
    return folder


def as_input(places: list[tuple[str | None, str | None]] | None, has_images: bool) -> Any:
    """One side of a pair as a cell: a conversation where its column has images, or its text."""
    if places is None:
        return None
    if not has_images:
        return places[0][1]
    content = [{"type": "text" if image is None else "image", "text": text, "image": image} for image, text in places]
    return [{"role": "user", "content": content}]


def negatives_of(texts: Any, paths: Any) -> list[tuple[str, str]]:
    """The negatives of a row, each a text and an image's path, of which one may be empty."""
    texts, paths = as_list(texts), as_list(paths)
    texts, paths = texts or [""] * len(paths), paths or [""] * len(texts)
    if len(texts) != len(paths):
        raise ValueError(f"it has {len(texts)} texts of negatives and {len(paths)} images of them.")
    return [(text or "", path or "") for text, path in zip(texts, paths, strict=True) if (text or "").strip() or path]


def next_positives(positives: list[tuple[Any, Any]], wanted: int) -> Iterator[list[tuple[str, str]]]:
    """For each row, the `wanted` different positives that come after its own, or all others where there are fewer."""
    cells = [((text or "").strip() and text or "", path or "") for text, path in positives]
    different = [cell for cell in dict.fromkeys(cells) if any(cell)]
    places = {cell: place for place, cell in enumerate(different)}
    count = min(wanted, len(different) - 1)
    for cell in cells:
        place = places.get(cell, -1)
        yield [different[(place + 1 + step) % len(different)] for step in range(count)]


def as_list(cell: Any) -> list[Any]:
    """A cell as a list: of one, of none where it is empty, or of what it holds, also where that is written as text."""
    if isinstance(cell, str) and cell.startswith("["):
        try:
            written = ast.literal_eval(cell)
        except (SyntaxError, ValueError):  # a text in brackets
            return [cell]
        return written if all(isinstance(part, str) for part in written) else [cell]
    return list(cell) if isinstance(cell, (list, tuple)) else [cell] if cell else []
