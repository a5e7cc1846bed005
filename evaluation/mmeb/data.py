# SPDX-License-Identifier: Apache-2.0
"""The evaluation data of MMEB-V1, in both layouts that it is published in: from files to queries and candidates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from datasets import Dataset, DatasetBuilder, LargeList, Value, concatenate_datasets, load_dataset_builder
from datasets import Sequence as SequenceFeature
from datasets.exceptions import DatasetNotFoundError

from ..digests import digest_files
from .arguments import task_files
from .tasks import Task
from .texts import places_of, query_text, target_name, target_texts

COLUMNS = {
    "qry_text": "a text",
    "qry_img_path": "a text",
    "tgt_text": "a list of texts",
    "tgt_img_path": "a list of texts",
}
"""Columns of `TIGER-Lab/MMEB-eval`: the instruction is inside the texts, the marker where the image stands."""

INSTRUCTIONS = {"qry_inst": "a text", "tgt_inst": "a text"}
"""
Further ones of `ziyjiang/MMEB_Test_Instruct`, which the benchmark's current evaluator reads: instructions apart. One
of them may be missing, as if empty.
"""

FORMATS = {".parquet": Dataset.from_parquet, ".jsonl": Dataset.from_json}


@dataclass(frozen=True)
class BenchmarkData:
    """
    The rows of a benchmark's tasks, whose files and columns were checked.

    Args:
        rows (`dict[Task, Dataset]`): In the order of the tasks.
        source (`str`): Folder with a subfolder of parquet or JSON-lines files for each task, or the name of a dataset
            on the Hub.
        revision (`str`): The commit of a dataset on the Hub, or a digest of a folder's files.
        image_dir (`Path`): The folder that image paths begin in.
    """

    rows: dict[Task, Dataset]
    source: str
    revision: str
    image_dir: Path

    def read(self, task: Task, *, limit: int | None = None, on_bad_row: str = "error") -> TaskData:
        """The queries and candidates of a task; see [`read_task`]."""
        return read_task(task, self.rows[task], self.image_dir, limit=limit, on_bad_row=on_bad_row)


class Item(NamedTuple):
    """
    A query or a candidate as it is encoded.

    Args:
        places (`tuple`): An image's path or a text at each place.
        prompt_name (`str`, *optional*): `"query"` or `"document"`: of the model's own prompts, the one in front of it.
            The benchmark's texts hold their instructions, and have none.
    """

    places: tuple[tuple[str | None, str | None], ...]
    prompt_name: str | None = None

    @property
    def image(self) -> str | None:
        """Path of its image, if it has one."""
        return next((image for image, _ in self.places if image is not None), None)

    @property
    def text(self) -> str:
        """Its texts, as they stand around the image."""
        return "".join(text for _, text in self.places if text is not None)


class BadRowError(ValueError):
    """A row of a task that cannot be scored; names both, and how to go on without it."""

    def __init__(self, task: str, row: int, reason: str) -> None:
        super().__init__(
            f"Row {row} of {task}: {reason} Fix the data, or go on without such rows with --on-bad-row skip, which "
            "marks the score as partial."
        )


@dataclass
class TaskData:
    """
    What a task asks.

    Args:
        task ([`Task`]).
        has_instructions (`bool`): Whether the layout is that of the benchmark's current evaluator.
        on_bad_row (`str`): `"error"`, or `"skip"` to leave rows out that cannot be scored.
        queries (`dict[int, Item]`): By row.
        candidates (`dict[str, Item]`): By name: those of one name are one candidate, as its first row has it.
        lists (`dict[int, list[str]]`): By row, the names of its candidates; the first is right.
        bad_rows (`dict[int, str]`): What is wrong with the rows that are left out.
    """

    task: Task
    has_instructions: bool
    on_bad_row: str
    queries: dict[int, Item] = field(default_factory=dict)
    candidates: dict[str, Item] = field(default_factory=dict)
    lists: dict[int, list[str]] = field(default_factory=dict)
    bad_rows: dict[int, str] = field(default_factory=dict)

    def leave_out(self, row: int, reason: str) -> None:
        """Count a row as bad; its candidates stay. Raises [`BadRowError`] where bad rows are an error."""
        if self.on_bad_row == "error":
            raise BadRowError(self.task.name, row, reason)
        self.queries.pop(row, None)
        self.lists.pop(row, None)
        self.bad_rows[row] = reason

    def leave_out_items(self, reasons: Mapping[Item, str]) -> None:
        """Leave out the rows that need an item that cannot be read."""
        names = {name: reasons[item] for name, item in self.candidates.items() if item in reasons}
        for row, query in list(self.queries.items()):
            reason = reasons.get(query) or next((names[name] for name in self.lists[row] if name in names), None)
            if reason is not None:
                self.leave_out(row, reason)
        self.check_is_left()

    def check_is_left(self) -> None:
        """Raise `ValueError` where no row is left."""
        if not self.queries:
            reason = next(iter(self.bad_rows.values()))
            raise ValueError(f"{self.task.name} has no row that can be scored; the first: {reason}")


def load_tasks(tasks: Sequence[Task], source: str, image_dir: str | Path) -> BenchmarkData:
    """
    Find the rows of tasks, and check all of their files and columns.

    Args:
        tasks (`Sequence[Task]`), source (`str`), image_dir (`str` or `Path`): As in [`BenchmarkData`].

    Raises:
        FileNotFoundError: there are no such data.
        ValueError: a file cannot be read or is empty; a column is missing, or is of another type.
    """
    folder = Path(source)
    if folder.is_dir():
        rows = {task: read_folder(task.name, folder) for task in tasks}
        files = sorted(path for path in folder.glob("*/*") if path.suffix in FORMATS)
        return BenchmarkData(rows, source, digest_files(files, folder), Path(image_dir))
    builders = {task: find_dataset(task.name, source) for task in tasks}
    rows = {}
    for task, builder in builders.items():
        with errors_of(f"{task.name} in {source}"):
            builder.download_and_prepare()
            rows[task] = builder.as_dataset("test")
        check_columns(rows[task], f"{task.name} in {source}")
    return BenchmarkData(rows, source, str(builders[tasks[0]].hash), Path(image_dir))


def read_folder(name: str, folder: Path) -> Dataset:
    """The rows of a task in a folder's files."""
    parts = [part for path in task_files(name, folder) if (part := read_file(name, path)) is not None]
    if not parts:
        raise ValueError(f"{name} in {folder} has no rows; download it again.")
    return concatenate_datasets(parts)


def read_file(name: str, path: Path) -> Dataset | None:
    """The rows of a parquet or JSON-lines file; none where it has none."""
    with errors_of(f"{name} in {path}"):
        is_parquet = path.suffix == ".parquet"
        if not (pq.read_metadata(path).num_rows if is_parquet else path.read_bytes().strip()):
            return None
        # Not by load_dataset, which tells the makers of `datasets` of every file that is read.
        dataset = FORMATS[path.suffix](str(path))
    check_columns(dataset, f"{name} in {path}")
    return dataset


def find_dataset(name: str, source: str) -> DatasetBuilder:
    """A task's part of a dataset on the Hub."""
    try:
        return load_dataset_builder(source, name)
    except ValueError as error:
        raise ValueError(f"{source} has no {name} ({error}).") from error
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{source} is neither a folder nor a dataset that can be had from the Hub ({error}); name the folder with "
            "--data."
        ) from error


@contextmanager
def errors_of(data: str) -> Iterator[None]:
    """Within it, whatever is raised is a `ValueError` that names the data."""
    try:
        yield
    except Exception as error:  # pyarrow and datasets raise errors of any type
        reason = error.__cause__ or error
        raise ValueError(
            f"{data} cannot be read ({type(reason).__name__}: {reason}); fix it, or download it again."
        ) from error


def check_columns(dataset: Dataset, name: str) -> None:
    """Raise `ValueError` where a column is missing, or holds something else than texts."""
    features = dataset.features
    if missing := [column for column in COLUMNS if column not in features]:
        raise ValueError(f"{name} lacks the columns {missing}; it has {dataset.column_names}.")
    for column, kind in {**COLUMNS, **INSTRUCTIONS}.items():
        if column in features and not is_of(features[column], kind):
            raise ValueError(
                f"The column {column} of {name} holds {features[column]}, where each row has {kind}; write it so, "
                "numbers as texts too, and a single candidate as a list of one."
            )


def is_of(feature: Any, kind: str) -> bool:
    """Whether a column is of texts, or of lists of texts; one of which all is missing passes for either."""
    if kind == "a list of texts" and isinstance(feature, (SequenceFeature, LargeList)):
        feature, kind = feature.feature, "a text"
    if not isinstance(feature, Value):
        return False
    return feature.dtype == "null" or (kind == "a text" and feature.dtype in ("string", "large_string", "string_view"))


def read_task(
    task: Task, rows: Dataset, image_dir: Path, *, limit: int | None = None, on_bad_row: str = "error"
) -> TaskData:
    """
    The queries and candidates of a task's rows.

    Args:
        task ([`Task`]).
        rows ([`~datasets.Dataset`]), image_dir (`Path`): As in [`BenchmarkData`].
        limit (`int`, *optional*): How many rows to read, the first ones; by default all.
        on_bad_row (`str`, defaults to `"error"`): `"skip"` leaves rows out that cannot be scored.

    Raises:
        BadRowError: a row has no candidates, the right one is empty, its lists differ in length, or an image is
            marked that is not there.
        ValueError: no row can be scored; `limit` is below 1, `on_bad_row` is neither.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be 1 or more rows of a task; got {limit}.")
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f"on_bad_row must be 'error' or 'skip'; got {on_bad_row!r}.")
    data = TaskData(task, not INSTRUCTIONS.keys().isdisjoint(rows.column_names), on_bad_row)
    for row, values in enumerate(rows if limit is None else rows.take(min(limit, len(rows)))):
        try:
            data.queries[row], data.lists[row] = _read_row(data, values, image_dir)
        except ValueError as error:
            data.leave_out(row, str(error))
    data.check_is_left()
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
        if not task.finds_images:
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
