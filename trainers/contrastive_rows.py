# SPDX-License-Identifier: Apache-2.0
"""The rows of contrastive training: their columns, their prompts, and batches of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from datasets import Dataset, IterableDataset
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from transformers.utils import logging

from modeling_cocoa.inputs import CocoaInputError

from .contrastive_config import CocoaContrastiveConfig
from .datasets import check_rows
from .rows import open_images, without_image_decoding

logger = logging.get_logger(__name__)

COLUMNS = ("query", "positive", "negative", "anchor")
"""First words of columns of pairs, the last as sentence-transformers' examples call the query."""


@dataclass
class ContrastiveCollator(SentenceTransformerDataCollator):
    """
    sentence-transformers' collator, which also says which row is bad, or leaves it out.

    Args:
        on_bad_sample (`"raise"` or `"skip"`): What to do with a row that cannot be read.
        image_size (`tuple[int, int]`, *optional*): Width and height that images are stretched to.

    Raises:
        ValueError: a row cannot be read, or with `"skip"` no row of the batch can.
    """

    on_bad_sample: str = "raise"
    image_size: tuple[int, int] | None = None

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        try:
            return self.check(features)
        except CocoaInputError as error:
            if self.on_bad_sample == "raise":
                raise ValueError(
                    f"A row of this batch cannot be read: {error.reason} Repair it, or set on_bad_sample='skip'."
                ) from error
        readable = [row for row in features if self._can_read(row)]
        if not readable:
            raise ValueError("No row of this batch can be read.")
        # In the batch, since each worker of a data loader has a collator of its own.
        return {**self.check(readable), "num_skipped": len(features) - len(readable)}

    def check(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """
        The batch of some rows, none of which is bad.

        Raises:
            CocoaInputError: one is.
        """
        rows = [
            {
                name: cell if name == "dataset_name" else open_images(cell, self.image_size)
                for name, cell in row.items()
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
    """
    The same rows, their images to be opened by the collator; without bad ones where they were looked for and skipped.

    Raises:
        ValueError: a row is bad, or all are; see [`check_rows`].
    """
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        parts = {key: readable_rows(part, collator, f"{name} ({key})", args, key) for key, part in dataset.items()}
        return type(dataset)(parts)
    dataset = dataset.cast(without_image_decoding(dataset.features))
    if not args.check_data:
        return dataset
    known = {} if key is None else {"dataset_name": key}  # which has prompts of its own
    rows = range(len(dataset))
    good = check_rows(rows, lambda row: collator.check([{**dataset[row], **known}]), name, args.on_bad_sample)
    return dataset if len(good) == len(dataset) else dataset.select(good)


def check_columns(name: str, dataset: Any) -> None:
    """
    See that a dataset, or each of several, has the columns `query`, `positive` and `negative_1` to `negative_n`, in
    this order. Columns of other names may be there, and are not used (see [`used_columns`]).

    Raises:
        ValueError: it has not, has a name that is close to one of these, has no rows, or is no dataset that can be
            indexed.
    """
    if dataset is None:
        return
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            check_columns(f"{name}[{key!r}]", part)
        return
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"{name} is streamed, and contrastive training draws its rows by number: load it without streaming=True "
            "(or take a part of it: Dataset.from_list(list(dataset.take(100_000))))."
        )
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"{name} is a {type(dataset).__name__}; give a Dataset of the library `datasets`, or a dict of them."
        )
    columns = known_columns(dataset.column_names)
    negatives = [column for column in columns if re.fullmatch(r"negative_\d+", column)]
    expected = ["query", "positive", *(f"negative_{number + 1}" for number in range(len(negatives)))]
    if columns != expected:
        raise ValueError(
            f"{name} needs the columns 'query', 'positive' and then 'negative_1', 'negative_2', ... if it has "
            f"negatives, in this order; it has {dataset.column_names}. Use dataset.rename_column(...) and "
            "select_columns(...)."
        )
    if not len(dataset):
        raise ValueError(f"{name} has no rows.")


def known_columns(columns: Sequence[str]) -> list[str]:
    """Those that are read as columns of pairs: by their names, or by ones that are close enough to be meant so."""
    return [name for name in columns if get_close_matches(name.lower().split("_")[0], COLUMNS, cutoff=0.7)]


def used_columns(name: str, dataset: Any) -> Any:
    """A dataset, or several, without the columns that are not used, which are named in a warning."""
    if isinstance(dataset, dict):
        return type(dataset)({key: used_columns(f"{name}[{key!r}]", part) for key, part in dataset.items()})
    if dataset is None:
        return None
    known = known_columns(dataset.column_names)
    if unused := [column for column in dataset.column_names if column not in known]:
        logger.warning(
            f"{name}: columns {unused} are not used; known are 'query', 'positive' and 'negative_1', 'negative_2', ..."
        )
    return dataset.select_columns(known)


def check_contrastive_data(train: Any, evaluation: Any, args: CocoaContrastiveConfig) -> None:
    """
    Raise `ValueError` where settings and rows do not fit: an evaluation set without a row for each process, or
    `evaluate_retrieval` without one; steps in which a pair has nothing to be told apart from.

    Args:
        train, evaluation: A dataset, or several by name, or none.
        args ([`CocoaContrastiveConfig`]).
    """
    for name, part in named_parts(evaluation).items():
        if len(part) < args.world_size:
            raise ValueError(
                f"The evaluation dataset {name!r} has {len(part)} rows for {args.world_size} processes; give each one."
            )
    if args.evaluate_retrieval and evaluation is None:
        raise ValueError("evaluate_retrieval needs an eval_dataset.")
    pairs = args.per_device_train_batch_size * (args.world_size if args.gather_across_devices else 1)
    for name, part in named_parts(train).items():
        negatives = len(part.column_names) - 2 if args.num_hard_negatives is None else args.num_hard_negatives
        if negatives == 0 and (pairs == 1 or len(part) == 1):
            what = "per_device_train_batch_size is 1" if pairs == 1 else f"The dataset {name!r} has 1 row"
            raise ValueError(
                f"{what}, and the pairs have no negatives: a pair alone has a loss and a gradient of 0. Give a larger "
                "batch and more pairs, or columns negative_1, ..."
            )


def named_parts(dataset: Any) -> dict[str, Dataset]:
    """Datasets by name; of one alone, by no name."""
    return dict(dataset) if isinstance(dataset, dict) else {} if dataset is None else {"": dataset}


def with_negatives(dataset: Any, wanted: int | None, name: str, at_most: bool = False) -> Any:
    """
    A dataset, or several, with so many of its columns of negatives.

    Args:
        dataset: One or several.
        wanted (`int`, *optional*): How many; all where it is not given.
        name (`str`): What the dataset is called.
        at_most (`bool`, defaults to `False`): Take all there are where there are fewer.

    Raises:
        ValueError: there are fewer.
    """
    if dataset is None or wanted is None:
        return dataset
    if isinstance(dataset, dict):
        return type(dataset)(
            {key: with_negatives(part, wanted, f"{name}[{key!r}]", at_most) for key, part in dataset.items()}
        )
    found = len(dataset.column_names) - 2
    if found < wanted and at_most:
        wanted = found
    if found < wanted:
        raise ValueError(f"{name} has {found} negatives a row; num_hard_negatives is {wanted}.")
    return dataset.select_columns(dataset.column_names[: 2 + wanted])


def check_equal_rows(dataset: Any, args: CocoaContrastiveConfig, why: str) -> None:
    """
    Raise `ValueError` where processes that wait for one another would have different numbers of rows or columns.

    Args:
        dataset: One or several.
        args ([`CocoaContrastiveConfig`]).
        why (`str`): What they wait for one another in.
    """
    if args.world_size == 1:
        return
    if args.on_bad_sample == "skip" and not args.check_data:
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
    """
    Raise `ValueError` where processes that wait for one another would have different numbers of columns.

    Args:
        dataset, args, why: As in [`check_equal_rows`].
    """
    if args.world_size == 1 or args.task_homogeneous or not isinstance(dataset, dict):
        return
    if len({len(part.column_names) for part in dataset.values()}) > 1:
        raise ValueError(
            f"With {why} and task_homogeneous=False all datasets need the same number of negatives; set "
            "num_hard_negatives."
        )


def prompts_of(prompts: Any, dataset: str | None) -> dict[str, str]:
    """
    The prompts of a dataset by column, of the forms that sentence-transformers takes.

    Args:
        prompts (*optional*): One for all; or by column, by dataset, or by dataset and column.
        dataset (`str`, *optional*): Its name.
    """
    own = prompts.get(dataset, prompts) if isinstance(prompts, dict) else prompts
    if isinstance(own, str):
        return {"query": own, "positive": own}
    return {column: prompt for column, prompt in (own or {}).items() if isinstance(prompt, str)}


def column_prompts(args: CocoaContrastiveConfig, dataset: Any) -> Any:
    """
    `query_prompt` and `target_prompt` as sentence-transformers has prompts: by column, or by dataset and column.

    Raises:
        ValueError: a prompt is for a dataset that does not exist; lists those that do.
    """
    given = (args.query_prompt, args.target_prompt)
    if given == (None, None):
        return args.prompts
    names = list(dataset) if isinstance(dataset, dict) else []
    by_dataset = any(isinstance(prompt, dict) for prompt in given)
    unknown = sorted({key for prompt in given if isinstance(prompt, dict) for key in prompt} - set(names))
    if by_dataset and (unknown or not names):
        raise ValueError(f"query_prompt and target_prompt name the datasets {unknown}; the datasets are {names}.")

    def by_column(columns: list[str], name: str | None) -> dict[str, str]:
        query, target = (prompt.get(name) if isinstance(prompt, dict) else prompt for prompt in given)
        prompts = {column: query if column == "query" else target for column in columns}
        return {column: prompt for column, prompt in prompts.items() if prompt is not None}

    if by_dataset:
        return {name: by_column(part.column_names, name) for name, part in dataset.items()}
    parts = dataset.values() if isinstance(dataset, dict) else [dataset]
    return by_column(sorted({column for part in parts for column in part.column_names}), None)
