# SPDX-License-Identifier: Apache-2.0
"""Losses and accuracies by name: sums of rows, and means over steps, evaluation sets and processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from modeling_cocoa.attention import TARGET
from modeling_cocoa.reconstruction import ReconstructionOutput

from .data.collators import rows_of_units
from .data.masking import IGNORE_INDEX


class RunningMeans:
    """
    Means by name of what was added since the last time they were taken, over all devices.

    Tensors stay where they are until then, so that adding does not make the host wait for the device.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor | float, Tensor | float]] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Add `count` values that sum to `total`."""
        totals, counts = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (totals + total, counts + count)

    def take(self) -> dict[str, float]:
        """The means so far, of all processes (each has to call this); starts anew."""
        own = {name: (float(total), float(count)) for name, (total, count) in self._sums.items()}
        self._sums = {}
        parts = gather_object([own])
        means = {}
        for name in sorted({name for part in parts for name in part}):
            pairs = [part[name] for part in parts if name in part]
            if count := sum(pair[1] for pair in pairs):
                means[name] = sum(pair[0] for pair in pairs) / count
        return means


class RowMeans:
    """
    Means by name over the rows of an evaluation set, whatever batches they come in.

    Each row counts once, also where several processes have read it to fill up their last batch.
    """

    def __init__(self) -> None:
        self._batches: list[tuple[list[Any], dict[str, tuple[Tensor, Tensor]]]] = []

    def add(self, rows: list[Any], sums: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add some rows, each by what it is called: by name, the sums of their values and their numbers, `(rows,)`."""
        self._batches.append((rows, dict(sums)))

    def take(self) -> tuple[dict[str, float], int]:
        """The means, and the number of rows, of all processes (each has to call this); starts anew."""
        own: dict[Any, dict[str, tuple[float, float]]] = {}
        for rows, sums in self._batches:
            by_name = {name: torch.stack(pair).double().cpu().T.tolist() for name, pair in sums.items()}
            for place, row in enumerate(rows):
                own[row] = {name: tuple(pairs[place]) for name, pairs in by_name.items()}
        self._batches = []
        found: dict[Any, dict[str, tuple[float, float]]] = {}
        for part in gather_object([own]):
            found.update(part)
        totals: dict[str, list[float]] = {}
        for values in found.values():
            for name, (total, count) in values.items():
                sums_of_name = totals.setdefault(name, [0.0, 0.0])
                sums_of_name[0] += total
                sums_of_name[1] += count
        return {name: total / count for name, (total, count) in sorted(totals.items()) if count}, len(found)


def sums_of_rows(batch: Mapping[str, Any], output: ReconstructionOutput) -> dict[str, tuple[Tensor, Tensor]]:
    """
    The sums, for each row of a batch, of its losses and their numbers, both of shape `(rows,)`: by name (`loss_...`,
    `token_accuracy`) and by direction (`text_...`, `token_accuracy_...`, `pixel_...`).
    """
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    directions = batch["directions"]

    def add(values: Tensor, rows: Tensor, name: str | None = None, by_direction: str | None = None) -> None:
        values = values.detach().float()
        empty = values.new_zeros(len(directions))
        pair = empty.index_add(0, rows, values), empty.index_add(0, rows, torch.ones_like(values))
        if name:
            sums[name] = pair
        for direction in sorted(set(directions)) if by_direction else ():
            chosen = torch.tensor([own == direction for own in directions], device=values.device)
            sums[f"{by_direction}_{direction}"] = pair[0] * chosen, pair[1] * chosen

    if output.token_losses is not None:
        hidden = batch["labels"] != IGNORE_INDEX
        rows, is_target = hidden.nonzero()[:, 0], batch["segment_ids"][hidden] == TARGET
        add(output.token_losses[~is_target], rows[~is_target], "loss_text_source")
        add(output.token_losses[is_target], rows[is_target], "loss_text_target")
        add(output.token_losses, rows, by_direction="text")
        add(output.token_predictions == batch["labels"][hidden], rows, "token_accuracy", "token_accuracy")
    if output.unit_losses is not None:
        add(output.unit_losses, rows_of_units(batch), "loss_image", "pixel")
    return sums
