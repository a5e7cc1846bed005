# SPDX-License-Identifier: Apache-2.0
"""The evaluation data of MMEB-V1 in both layouts that it is published in, as queries and candidates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .mmeb_files import has_instructions, load_rows
from .mmeb_tasks import Task
from .mmeb_texts import places_of, query_text, target_name, target_texts


class Item(NamedTuple):
    """
    A query or a candidate as it is encoded.

    Args:
        places (`tuple`): An image's path or a text at each place.
    """

    places: tuple[tuple[str | None, str | None], ...]

    @property
    def image(self) -> str | None:
        """Path of its image, if it has one."""
        return next((image for image, _ in self.places if image is not None), None)

    @property
    def text(self) -> str:
        """Its texts, as they stand around the image."""
        return "".join(text for _, text in self.places if text is not None)


@dataclass
class TaskData:
    """
    What a task asks.

    Args:
        task ([`Task`]).
        queries (`dict[int, Item]`): By row.
        candidates (`dict[str, Item]`): By name: those of one name are one candidate, as its first row has it.
        lists (`dict[int, list[str]]`): By row, the names of its candidates; the first is right.
        has_instructions (`bool`): Whether the layout is that of the benchmark's current evaluator.
        bad_rows (`dict[int, str]`): What is wrong with the rows that are left out.
    """

    task: Task
    has_instructions: bool
    queries: dict[int, Item] = field(default_factory=dict)
    candidates: dict[str, Item] = field(default_factory=dict)
    lists: dict[int, list[str]] = field(default_factory=dict)
    bad_rows: dict[int, str] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """All rows that were read, those left out among them."""
        return len(self.queries) + len(self.bad_rows)

    def leave_out(self, row: int, reason: str) -> None:
        """Count a row as bad; its candidates stay."""
        del self.queries[row], self.lists[row]
        self.bad_rows[row] = reason


class BadRowError(ValueError):
    """A row of a task that cannot be scored; names both, and how to go on without it."""

    def __init__(self, task: str, row: int, reason: str) -> None:
        super().__init__(
            f"Row {row} of {task}: {reason} Mend the data, or go on without such rows with --on-bad-row skip, which "
            "marks the score as partial."
        )


def read_task(
    task: Task,
    source: str,
    image_dir: str | Path,
    *,
    limit: int | None = None,
    on_bad_row: str = "raise",
) -> TaskData:
    """
    Read a task's rows.

    Args:
        task ([`Task`]).
        source (`str`): Folder with a subfolder of parquet or JSON-lines files for each task, or the name of a dataset
            on the Hub.
        image_dir (`str` or `Path`): The folder that image paths begin in.
        limit (`int`, *optional*): Only so many rows, the first ones.
        on_bad_row (`str`, defaults to `"raise"`): `"skip"` leaves rows out that cannot be scored.

    Raises:
        FileNotFoundError, ValueError: as [`~mmeb_files.load_rows`]; `limit` is below 1, `on_bad_row` is neither.
        BadRowError: a row has no candidates, the right one is empty, its lists differ in length, or an image is
            marked that is not there.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be 1 or more rows of a task; got {limit}.")
    if on_bad_row not in ("raise", "skip"):
        raise ValueError(f"on_bad_row must be 'raise' or 'skip'; got {on_bad_row!r}.")
    dataset = load_rows(task.name, source)
    folder = Path(image_dir)
    if limit is not None:
        dataset = dataset.select(range(min(limit, len(dataset))))
    data = TaskData(task, has_instructions(dataset.column_names))
    for row, values in enumerate(dataset):
        try:
            query, names = _read_row(data, values, folder)
        except ValueError as error:
            if on_bad_row != "skip":
                raise BadRowError(task.name, row, str(error)) from error
            data.bad_rows[row] = str(error)
            continue
        data.queries[row] = query
        data.lists[row] = names
    if not data.queries:
        reason = next(iter(data.bad_rows.values()))
        raise ValueError(f"{task.name} in {source} has no row that can be scored; the first: {reason}")
    return data


def _read_row(data: TaskData, row: Mapping[str, Any], folder: Path) -> tuple[Item, list[str]]:
    """A row's query and the names of its candidates; those of a new name are added to the task's."""
    task = data.task
    query, image = row["qry_text"] or "", row["qry_img_path"] or ""
    texts = [text or "" for text in row["tgt_text"] or []]
    images = [path or "" for path in row["tgt_img_path"] or []]
    if data.has_instructions:
        query = query_text(task, row.get("qry_inst") or "", query)
        shown = target_texts(task, row.get("tgt_inst") or "", texts, images)
        if task.form not in ("text_to_image", "image_to_image"):
            images = [""] * len(texts)
        elif len(shown) != len(texts):
            texts = [""] * len(shown)  # one blank caption stands for all
        names = [target_name(task, *pair) for pair in zip(texts, images, strict=False)]  # compared below
    else:
        shown, names = texts, [f"{path}\n{text}" for text, path in zip(texts, images, strict=False)]
    if not shown or not images:
        raise ValueError("it has no candidates, and so not the right one either.")
    if len(shown) != len(images):
        raise ValueError(f"it has {len(shown)} texts of candidates and {len(images)} images of them.")
    asked = places_of(query, image, folder)
    if not asked:
        raise ValueError("its query is empty.")
    if not places_of(shown[0], images[0], folder):
        raise ValueError("the right candidate, its first, is empty.")
    new: dict[str, Item] = {}
    for position, name in enumerate(names):
        if name not in data.candidates and name not in new:
            places = places_of(shown[position], images[position], folder)
            new[name] = Item(tuple(places or [(None, shown[position])]))  # one that is wrong may be empty
    data.candidates.update(new)
    return Item(tuple(asked)), names
