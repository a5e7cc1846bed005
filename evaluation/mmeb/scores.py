# SPDX-License-Identifier: Apache-2.0
"""Scores in MMEB-V1's form, of a task and of a model, and the file that they are kept in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from modeling_cocoa.files import atomic_write

from .tasks import KINDS, Kind


@dataclass
class TaskScore:
    """
    A model's score on one task. All in percent.

    Args:
        task (`str`), kind (`str`), in_domain (`bool`): Of the task.
        precision_at_1 (`float`): The benchmark's score.
        precision_at_1_ties_against (`float`): What it would be if every tie went against the model.
        ties (`int`): Queries of which another candidate scores the same as the right one.
        recall_at_5, recall_at_10, mrr_at_10, ndcg_at_10 (`float`).
        queries, candidates, inputs (`int`): Scored, of different names, and embedded.
        skipped_rows (`int`): Rows that could not be scored.
        chance (`float`, *optional*): The Precision@1 of vectors drawn at random; None in files of earlier versions.
        interval (`list[float]`, *optional*): The ends of the 95 % bootstrap interval of `precision_at_1`, over
            queries.
    """

    task: str
    kind: Kind
    in_domain: bool
    precision_at_1: float
    precision_at_1_ties_against: float
    ties: int
    recall_at_5: float
    recall_at_10: float
    mrr_at_10: float
    ndcg_at_10: float
    queries: int
    candidates: int
    inputs: int
    skipped_rows: int = 0
    chance: float | None = None
    interval: list[float] | None = None


@dataclass
class Scores:
    """
    A model's scores on a benchmark.

    Args:
        benchmark (`str`), model (`str`): Their names.
        of_tasks (`int`): How many tasks the benchmark has.
        settings (`dict`): What else decides the scores.
        tasks (`list[TaskScore]`).
    """

    benchmark: str
    model: str
    of_tasks: int
    settings: dict[str, Any] = field(default_factory=dict)
    tasks: list[TaskScore] = field(default_factory=list)

    @property
    def is_partial(self) -> bool:
        """Whether tasks or rows are missing, so that the means are no score of the benchmark."""
        return (
            len(self.tasks) < self.of_tasks
            or self.settings.get("limit") is not None
            or any(task.skipped_rows for task in self.tasks)
        )

    def means(self) -> dict[str, float | None]:
        """Plain means over the tasks of each kind, in domain, out of domain, and over all; none of no tasks."""
        groups = {kind: [task for task in self.tasks if task.kind == kind] for kind in KINDS}
        groups["in_domain"] = [task for task in self.tasks if task.in_domain]
        groups["out_of_domain"] = [task for task in self.tasks if not task.in_domain]
        groups["overall"] = self.tasks
        means = {
            name: fmean(task.precision_at_1 for task in group) if group else None for name, group in groups.items()
        }
        against = [task.precision_at_1_ties_against for task in self.tasks]
        return {**means, "overall_ties_against": fmean(against) if against else None}

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {
            "benchmark": self.benchmark,
            "model": self.model,
            "partial": self.is_partial,
            "settings": self.settings,
            "means": self.means(),
            "tasks": [asdict(task) for task in self.tasks],
            "of_tasks": self.of_tasks,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Scores:
        """What [`to_dict`] gave."""
        tasks = [TaskScore(**task) for task in values["tasks"]]
        return cls(values["benchmark"], values["model"], values["of_tasks"], values["settings"], tasks)

    def after(self, earlier: Scores) -> Scores:
        """With the tasks of an earlier call besides these, which take the place of the same ones."""
        tasks = {score.task: score for score in [*earlier.tasks, *self.tasks]}
        layouts = {**earlier.settings.get("layouts", {}), **self.settings.get("layouts", {})}
        return replace(self, settings={**self.settings, "layouts": layouts}, tasks=list(tasks.values()))

    @classmethod
    def read(cls, path: Path) -> Scores:
        """What [`write`] wrote."""
        return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        """Write them as JSON."""
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
