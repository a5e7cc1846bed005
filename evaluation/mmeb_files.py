# SPDX-License-Identifier: Apache-2.0
"""The files that MMEB-V1's tasks are published in: found, read, and their columns checked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import (
    Dataset,
    DatasetBuilder,
    LargeList,
    Value,
    concatenate_datasets,
    load_dataset_builder,
)
from datasets import Sequence as SequenceFeature
from datasets.exceptions import DatasetNotFoundError

from .mmeb_tasks import Task

COLUMNS = {
    "qry_text": "a text",
    "qry_img_path": "a text",
    "tgt_text": "a list of texts",
    "tgt_img_path": "a list of texts",
}
"""Of `TIGER-Lab/MMEB-eval`: the instruction is inside the texts, the marker where the image stands."""

INSTRUCTIONS = {"qry_inst": "a text", "tgt_inst": "a text"}
"""Further ones of `ziyjiang/MMEB_Test_Instruct`, which the benchmark's current evaluator reads: instructions apart."""

FORMATS = {".parquet": Dataset.from_parquet, ".jsonl": Dataset.from_json}


def has_instructions(columns: Sequence[str]) -> bool:
    """Whether columns are those of the layout with instructions apart; either of them may be missing, as if empty."""
    return not INSTRUCTIONS.keys().isdisjoint(columns)


def check_data(tasks: Sequence[Task], source: str, image_dir: str | Path) -> str:
    """
    Find out at the start of an evaluation that all of its data can be read.

    Args:
        tasks (`Sequence[Task]`), source (`str`), image_dir (`str` or `Path`): As in [`~mmeb_data.read_task`].

    Returns:
        `str`: A name for the state of the data: of a dataset on the Hub its commit, of a folder a digest of its files.

    Raises:
        FileNotFoundError: there are no such data, or there is no folder of images.
        ValueError: as [`load_rows`].
    """
    if not Path(image_dir).is_dir():
        raise FileNotFoundError(f"There is no folder {image_dir} of images; name it with --images.")
    for task in tasks:
        load_rows(task.name, source)
    if not Path(source).is_dir():
        return str(find_dataset(tasks[0].name, source).hash)
    files = sorted(path for path in Path(source).glob("*/*") if path.suffix in FORMATS)
    return digest_files(files, Path(source))


def digest_files(files: Sequence[Path], folder: Path) -> str:
    """A digest of files, and of their names below a folder."""
    summary = hashlib.sha256()
    for path in files:
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        summary.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return summary.hexdigest()


def load_rows(name: str, source: str) -> Dataset:
    """
    The rows of a task, from a folder or the Hub.

    Raises:
        FileNotFoundError: there is no file, or no such dataset.
        ValueError: a file cannot be read or is empty; a column is missing, or is of another type.
    """
    folder = Path(source)
    if not folder.is_dir():
        builder = find_dataset(name, source)
        with errors_of(f"{name} in {source}"):
            builder.download_and_prepare()
            dataset = builder.as_dataset("test")
        return check_columns(dataset, f"{name} in {source}")
    for ending in FORMATS:
        if files := sorted((folder / name).glob(f"*{ending}")):
            parts = [
                check_columns(part, f"{name} in {path}")
                for path in files
                if (part := read_file(name, path)) is not None
            ]
            if not parts:
                raise ValueError(f"{name} in {source} has no rows; download it again.")
            return concatenate_datasets(parts)
    there = sorted(path.name for path in folder.iterdir() if path.is_dir())
    raise FileNotFoundError(
        f"There are no rows of {name} in {source}: no file {name}/*.parquet or {name}/*.jsonl. Its folders are "
        f"{there}."
    )


def find_dataset(name: str, source: str) -> DatasetBuilder:
    """
    A task's part of a dataset on the Hub.

    Raises:
        FileNotFoundError: there is no such dataset.
        ValueError: it has no such part.
    """
    try:
        return load_dataset_builder(source, name)
    except ValueError as error:
        raise ValueError(f"{source} has no {name} ({error}).") from error
    except (DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"{source} is neither a folder nor a dataset that can be had from the Hub ({error}); name the folder with "
            "--data."
        ) from error


def read_file(name: str, path: Path) -> Dataset | None:
    """The rows of a parquet or JSON-lines file; none where it has none."""
    with errors_of(f"{name} in {path}"):
        is_parquet = path.suffix == ".parquet"
        if not (pq.read_metadata(path).num_rows if is_parquet else path.read_bytes().strip()):
            return None
        # Not by load_dataset, which tells the makers of `datasets` of every file that is read.
        return FORMATS[path.suffix](str(path))


@contextmanager
def errors_of(data: str) -> Iterator[None]:
    """Within it, whatever is raised is a `ValueError` that names the data."""
    try:
        yield
    except Exception as error:  # pyarrow and datasets raise what they like
        reason = error.__cause__ or error
        raise ValueError(
            f"{data} cannot be read ({type(reason).__name__}: {reason}); fix it, or download it again."
        ) from error


def check_columns(dataset: Dataset, name: str) -> Dataset:
    """
    The same rows.

    Raises:
        ValueError: a column is missing, or holds something else than texts.
    """
    features = dataset.features
    if missing := [column for column in COLUMNS if column not in features]:
        raise ValueError(f"{name} lacks the columns {missing}; it has {dataset.column_names}.")
    for column, kind in {**COLUMNS, **INSTRUCTIONS}.items():
        if column in features and not is_of(features[column], kind):
            raise ValueError(
                f"The column {column} of {name} holds {features[column]}, where each row has {kind}; write it so, "
                "numbers as texts too, and a single candidate as a list of one."
            )
    return dataset


def is_of(feature: Any, kind: str) -> bool:
    """Whether a column is of texts, or of lists of texts; one of which all is missing passes for either."""
    if kind == "a list of texts" and isinstance(feature, (SequenceFeature, LargeList)):
        feature, kind = feature.feature, "a text"
    if not isinstance(feature, Value):
        return False
    return feature.dtype == "null" or (kind == "a text" and feature.dtype in ("string", "large_string", "string_view"))
