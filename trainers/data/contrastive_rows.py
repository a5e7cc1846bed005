# SPDX-License-Identifier: Apache-2.0
"""The rows of contrastive training: their columns, their prompts, and batches of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from sentence_transformers.base.data_collator import DEFAULT_LABEL_COLUMNS
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch import Tensor
from transformers.utils import logging

from modeling_cocoa.inputs import CocoaInputError

from ..contrastive_config import CocoaContrastiveConfig
from .datasets import check_rows
from .rows import TEACHER_COLUMN, open_images, undecoded
from .teacher import TeacherVectors

logger = logging.get_logger(__name__)

FIRST_WORDS = {"query": "query", "anchor": "query", "positive": "positive", "negative": "negative"}
"""What columns are for whose names begin so."""


@dataclass
class ContrastiveCollator(SentenceTransformerDataCollator):
    """
    sentence-transformers' collator, which opens images, and says which row cannot be read or leaves it out.

    Args:
        on_bad_row (`"error"` or `"skip"`): With `"skip"`, an error only where no row of the batch can be read.
        image_size (`tuple[int, int]`, *optional*): Width and height that images are stretched to.
        teacher ([`TeacherVectors`], *optional*): Whose positions of a row's vectors are its label, `(batch, columns,
            1)`: of a shape that `MatryoshkaLoss` does not take for vectors, and shortens.
    """

    on_bad_row: str = "error"
    image_size: tuple[int, int] | None = None
    teacher: TeacherVectors | None = None

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        try:
            return {**self.check(features), **self._labels(features)}
        except CocoaInputError as error:
            if self.on_bad_row == "error":
                raise ValueError(
                    f"A row of this batch cannot be read: {error.reason} Repair it, or set on_bad_row='skip'."
                ) from error
        readable = [row for row in features if self._can_read(row)]
        if not readable:
            raise ValueError("No row of this batch can be read.")
        # In the batch, since each worker of a data loader has a collator of its own.
        return {**self.check(readable), **self._labels(readable), "num_skipped": len(features) - len(readable)}

    def _labels(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        if self.teacher is None:
            return {}
        return {"label": torch.tensor([self.teacher.positions(row) for row in features]).unsqueeze(-1)}

    def check(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch of some rows; raises [`CocoaInputError`] where one cannot be read."""
        rows = [
            {
                name: cell if name == "dataset_name" else open_images(cell, self.image_size)
                for name, cell in row.items()
                if name != TEACHER_COLUMN
            }
            for row in features
        ]
        return super().__call__(rows)

    def _can_read(self, row: dict[str, Any]) -> bool:
        try:
            self.check([row])
        except CocoaInputError:
            return False
        return True


def readable_rows(
    dataset: Dataset | dict[str, Dataset] | None,
    collator: ContrastiveCollator,
    name: str,
    args: CocoaContrastiveConfig,
    key: str | None = None,
) -> Any:
    """The same rows, whose images the collator opens; without bad ones where these are checked and skipped."""
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        parts = {key: readable_rows(part, collator, f"{name} ({key})", args, key) for key, part in dataset.items()}
        return type(dataset)(parts)
    dataset = undecoded(dataset)
    if not args.check_data:
        return dataset
    known = {} if key is None else {"dataset_name": key}  # which has prompts of its own
    rows = range(len(dataset))
    good = check_rows(rows, lambda row: collator.check([{**dataset[row], **known}]), name, args.on_bad_row)
    return dataset if len(good) == len(dataset) else dataset.select(good)


def prepare_contrastive_data(train: Any, evaluation: Any, args: CocoaContrastiveConfig) -> tuple[Any, Any, Any]:
    """
    Read the columns of datasets as sentence-transformers does, by position: the query, its positive, and negatives.

    Args:
        train, evaluation ([`~datasets.Dataset`] or a dict of them, *optional*): Where there are columns `query` and
            `positive`, those and `negative_1`, ... are read; otherwise all but labels, under any names.
        args ([`CocoaContrastiveConfig`]).

    Returns:
        `train` and `evaluation` with the columns `query`, `positive` and `negative_1` to `negative_n`, and the prompts
        by these names, as sentence-transformers takes them.

    Raises:
        ValueError: a dataset is streamed, is empty, or has too few columns or misplaced ones; an option does not fit.
    """
    given, wanted = {"train_dataset": train, "eval_dataset": evaluation}, args.num_hard_negatives
    read: dict[str, Any] = {}
    for name, dataset in given.items():
        parts = {
            key: read_columns(part, f"{name}[{key!r}]" if key else name, wanted, at_most=name == "eval_dataset")
            for key, part in named_parts(dataset).items()
        }
        read[name] = type(dataset)(parts) if isinstance(dataset, dict) else parts.get("")
    train, evaluation = read.values()
    check_contrastive_data(train, evaluation, args)
    source = "train_dataset" if train is not None else "eval_dataset"
    if args.query_prompt is None and args.target_prompt is None:
        return train, evaluation, rename_prompts(args.prompts, given[source])
    return train, evaluation, column_prompts(args, read[source])


def read_columns(dataset: Any, name: str, num_negatives: int | None, at_most: bool = False) -> Dataset:
    """One dataset under our names, with `num_negatives` columns of negatives (`at_most` takes fewer as well)."""
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"{name} is streamed, and contrastive training draws its rows by number: load it without streaming=True "
            "(or take a part of it: Dataset.from_list(list(dataset.take(100_000))))."
        )
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"{name} is of type {type(dataset).__name__}; give a Dataset of the library `datasets`, or a dict of them."
        )
    roles = column_roles(dataset.column_names)
    misplaced = [column for column, role in roles.items() if FIRST_WORDS.get(column.split("_")[0], role) not in role]
    if len(roles) < 2 or misplaced:
        raise ValueError(
            f"{name} needs the columns 'query', 'positive' and then 'negative_1', 'negative_2', ... if it has "
            f"negatives, under these or other names in this order; it has {dataset.column_names}. Use "
            "dataset.select_columns([...]) to order them, or dataset.rename_column(...)."
        )
    if not len(dataset):
        raise ValueError(f"{name} has no rows.")
    if unused := [column for column in input_columns(dataset) if column not in roles]:
        logger.warning(f"{name}: columns {unused} are not used; used are {list(roles)}.")
    found = len(roles) - 2
    if num_negatives is not None and found < num_negatives and not at_most:
        raise ValueError(f"{name} has {found} negatives a row; num_hard_negatives is {num_negatives}.")
    used = list(roles)[: None if num_negatives is None else 2 + num_negatives]
    renamed = {column: roles[column] for column in used if column != roles[column]}
    kept = [TEACHER_COLUMN] if TEACHER_COLUMN in dataset.column_names else []
    return dataset.select_columns(used + kept).rename_columns(renamed)


def column_roles(columns: Sequence[str]) -> dict[str, str]:
    """What columns are read as, by their names and in their order: `query`, `positive`, `negative_1`, ..."""
    used = [column for column in columns if column not in (*DEFAULT_LABEL_COLUMNS, TEACHER_COLUMN)]
    if {"query", "positive"} <= set(used):
        used = [column for column in used if re.fullmatch(r"query|positive|negative(_\d+)?", column)]
    names = ["query", "positive", *(f"negative_{number + 1}" for number in range(len(used) - 2))]
    return dict(zip(used, names, strict=False))


def input_columns(dataset: Dataset) -> list[str]:
    """The columns of a dataset that the model reads: all but what the teacher alone does."""
    return [column for column in dataset.column_names if column != TEACHER_COLUMN]


def check_contrastive_data(train: Any, evaluation: Any, args: CocoaContrastiveConfig) -> None:
    """
    Raise `ValueError` where an evaluation set has no row for each process, `evaluate_retrieval` has none, or a step
    would give a pair neither a negative nor another pair.
    """
    for name, part in named_parts(evaluation).items():
        if len(part) < args.world_size:
            raise ValueError(
                f"The evaluation dataset {name!r} has {len(part)} rows for {args.world_size} processes; give each one."
            )
    if args.evaluate_retrieval and evaluation is None:
        raise ValueError(
            "evaluate_retrieval needs an eval_dataset: give held-out pairs, or set evaluate_retrieval to False, and "
            "with it eval_strategy to 'no', load_best_model_at_end to False and early_stopping_patience to None."
        )
    pairs = args.per_device_train_batch_size * (args.world_size if args.gather_across_devices else 1)
    for name, part in named_parts(train).items():
        if len(input_columns(part)) == 2 and (pairs == 1 or len(part) == 1):
            what = "per_device_train_batch_size is 1" if pairs == 1 else f"The dataset {name!r} has 1 row"
            raise ValueError(
                f"{what}, and the pairs have no negatives: a pair alone has a loss and a gradient of 0. Give a larger "
                "batch and more pairs, or columns negative_1, ..."
            )


def named_parts(dataset: Any) -> dict[str, Any]:
    """Datasets by name; one alone under an empty name."""
    return dict(dataset) if isinstance(dataset, dict) else {} if dataset is None else {"": dataset}


def check_equal_rows(dataset: Any, args: CocoaContrastiveConfig, why: str) -> None:
    """Raise `ValueError` where processes that wait for one another in `why` would differ in rows or columns."""
    if args.world_size == 1:
        return
    if args.on_bad_row == "skip" and not args.check_data:
        raise ValueError(
            f"With {why} all processes need equally many rows: a bad one cannot be skipped during training. Set "
            "check_data=True, and bad rows are left out before the first step."
        )
    check_equal_columns(dataset, args, why)
    if isinstance(dataset, dict) and not args.task_homogeneous and not args.dataloader_drop_last:
        raise ValueError(
            f"With {why} and task_homogeneous=False all batches need the same size; set dataloader_drop_last=True."
        )


def check_equal_columns(dataset: Any, args: CocoaContrastiveConfig, why: str) -> None:
    """Raise `ValueError` where processes that wait for one another in `why` would differ in columns."""
    if args.world_size == 1 or args.task_homogeneous or not isinstance(dataset, dict):
        return
    if len({len(input_columns(part)) for part in dataset.values()}) > 1:
        raise ValueError(
            f"With {why} and task_homogeneous=False all datasets need the same number of negatives; set "
            "num_hard_negatives."
        )


def prompts_of(prompts: Any, dataset: str | None) -> dict[str, str]:
    """The prompts of a dataset by column, out of sentence-transformers' forms: by column, dataset or both, or one."""
    own = prompts.get(dataset, prompts) if isinstance(prompts, dict) else prompts
    if isinstance(own, str):
        return {"query": own, "positive": own}
    return {column: prompt for column, prompt in (own or {}).items() if isinstance(prompt, str)}


def rename_prompts(prompts: Any, dataset: Any) -> Any:
    """sentence-transformers' `prompts`, of which those by column name the columns as they are in the dataset."""
    if not isinstance(prompts, dict):
        return prompts
    roles = {name: column_roles(part.column_names) for name, part in named_parts(dataset).items()}
    renamed: dict[str, Any] = {}
    for key, prompt in prompts.items():
        if key in roles and isinstance(prompt, dict):
            renamed[key] = {roles[key].get(column, column): text for column, text in prompt.items()}
            continue
        found = {own[key] for own in roles.values() if key in own} if key not in roles else set()
        if len(found) > 1:
            raise ValueError(
                f"prompts: the column {key!r} is {sorted(found)} in different datasets; give it by dataset."
            )
        renamed[found.pop() if found else key] = prompt
    return renamed


def column_prompts(args: CocoaContrastiveConfig, dataset: Any) -> Any:
    """
    `query_prompt` and `target_prompt` as sentence-transformers has prompts: by column, or by dataset and column.

    Raises:
        ValueError: a prompt is for a dataset that does not exist; lists those that do.
    """
    given = (args.query_prompt, args.target_prompt)
    if given == (None, None):
        return args.prompts
    by_dataset = any(isinstance(prompt, dict) for prompt in given)
    names = list(dataset) if isinstance(dataset, dict) else []
    unknown = sorted({key for prompt in given if isinstance(prompt, dict) for key in prompt} - set(names))
    if by_dataset and (unknown or not names):
        raise ValueError(f"query_prompt and target_prompt name the datasets {unknown}; the datasets are {names}.")
    prompts: dict[str, dict[str, str]] = {}
    for name, part in named_parts(dataset).items():
        query, target = (prompt.get(name) if isinstance(prompt, dict) else prompt for prompt in given)
        by_column = {column: query if column == "query" else target for column in input_columns(part)}
        prompts[name] = {column: prompt for column, prompt in by_column.items() if prompt is not None}
    if by_dataset:
        return prompts
    return dict(sorted(item for part in prompts.values() for item in part.items()))
