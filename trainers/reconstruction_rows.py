# SPDX-License-Identifier: Apache-2.0
"""From the datasets that a trainer of stages 1 and 2 is given to the rows that it reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset, IterableDataset

from .data.collators import ReconstructionCollator
from .data.datasets import ReconstructionDataset, drop_pairs_without_text
from .data.streaming import ReconstructionStream, mix_streams, used_columns
from .reconstruction_config import CocoaReconstructionConfig


def read_rows(
    dataset: Any, name: str, collator: ReconstructionCollator, args: CocoaReconstructionConfig
) -> ReconstructionDataset | ReconstructionStream | None:
    """
    The rows of one or several datasets; pairs without a text to rebuild are left out, and bad rows as `args` say.

    Args:
        dataset: A dataset, or several by name.
        name (`str`): What it is for, "training" or "evaluation".
        collator ([`ReconstructionCollator`]).
        args ([`CocoaReconstructionConfig`]).

    Raises:
        ValueError: it is no dataset, has other columns, has a bad row, or is a stream that cannot be used.
    """
    if dataset is None:
        return None
    weights = args.dataset_weights if name == "training" else None
    is_mapping = isinstance(dataset, Mapping)
    if any(isinstance(part, IterableDataset) for part in (dataset.values() if is_mapping else [dataset])):
        if name == "evaluation":
            raise ValueError("eval_dataset cannot be streamed: the same rows are read at every evaluation.")
        if is_mapping:
            dataset = mix_streams(dataset, weights, args.seed)
        else:
            used_columns(dataset, "The streamed dataset")
        if args.max_steps < 1:
            raise ValueError("A dataset that is streamed has no end; give max_steps.")
        return ReconstructionStream(
            dataset,
            collator,
            args.seed,
            batch_size=args.per_device_train_batch_size,
            batch_num_tokens=args.per_device_train_batch_num_tokens,
            buffer_size=args.shuffle_buffer_size,
            process_index=args.process_index,
            num_processes=args.world_size,
        )
    if not isinstance(dataset, (Dataset, Mapping)):
        raise ValueError(
            f"The {name} data is of type {type(dataset).__name__}; give a Dataset of the library `datasets`, or a "
            "dict of them."
        )
    rows = ReconstructionDataset(dataset, args.seed, weights)
    if args.stage == "bridge":
        drop_pairs_without_text(rows, name)
    if args.check_data:
        rows.check(collator.check, name, args.on_bad_row)
    return rows
