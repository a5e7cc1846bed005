# SPDX-License-Identifier: Apache-2.0
"""MMEB-V1 of a model: every distinct input of a task embedded once, kept, ranked by the benchmark's protocol."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from accelerate import PartialState

from modeling_cocoa.files import written_whole

from .encoders import check_item
from .metrics.mrr_at_k import mrr_at_k
from .metrics.ndcg_at_k import ndcg_at_k
from .metrics.precision_at_k import precision_at_k
from .metrics.recall_at_k import recall_at_k
from .mmeb_data import BadRowError, Item, TaskData, read_task
from .mmeb_tasks import KINDS, Kind, Task
from .ranking import Ranking, rank
from .vectors import VectorStore, embed_missing

READERS = 8
"""Threads that read images to name them by their content."""


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


@dataclass
class Scores:
    """
    A model's scores on a benchmark.

    Args:
        benchmark (`str`), model (`str`): Their names.
        tasks (`list[TaskScore]`).
        of_tasks (`int`): How many tasks the benchmark has.
        settings (`dict`): What else decides the scores.
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

    def mean(self, keep: Callable[[TaskScore], bool] = lambda task: True, ties_against: bool = False) -> float | None:
        """The plain mean of the score over those tasks that are kept; none where there are none."""
        name = "precision_at_1_ties_against" if ties_against else "precision_at_1"
        chosen = [getattr(task, name) for task in self.tasks if keep(task)]
        return fmean(chosen) if chosen else None

    def means(self) -> dict[str, float | None]:
        """Means over the tasks of each kind, in domain, out of domain, and over all."""
        found: dict[str, float | None] = {kind: self.mean(lambda task, kind=kind: task.kind == kind) for kind in KINDS}
        found["in_domain"] = self.mean(lambda task: task.in_domain)
        found["out_of_domain"] = self.mean(lambda task: not task.in_domain)
        found["overall"] = self.mean()
        found["overall_ties_against"] = self.mean(ties_against=True)
        return found

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


def evaluate_model(
    encoder: Any,
    tasks: Sequence[Task],
    source: str,
    image_dir: str | Path,
    output_dir: str | Path,
    *,
    benchmark: str = "MMEB-V1",
    of_tasks: int | None = None,
    limit: int | None = None,
    on_bad_row: str = "raise",
    on_task: Callable[[TaskScore, TaskData, dict[int, Ranking]], None] = lambda *found: None,
    show_progress_bar: bool = True,
) -> Scores | None:
    """
    Score a model on tasks in MMEB-V1's layout.

    Vectors are kept in `output_dir` as they come, each query's ranking in `queries/TASK.jsonl`, the scores in
    `scores.json`: the same call goes on where it was interrupted, and ends with the same files. Under `accelerate
    launch` or torchrun, processes share the inputs of each task; they need one folder in common.

    Args:
        encoder ([`Encoder`]): Gives the vectors of a list of [`Item`]; `name`, `fingerprint`,
            `weights`, `resolution`.
        tasks (`Sequence[Task]`).
        source (`str`), image_dir (`str` or `Path`), limit (`int`, *optional*), on_bad_row (`str`): As in
            [`read_task`].
        output_dir (`str` or `Path`).
        benchmark (`str`, defaults to `"MMEB-V1"`): Its name.
        of_tasks (`int`, *optional*): How many tasks the benchmark has; by default those given.
        on_task (`Callable`, *optional*): Told each task's score, data and rankings by row.
        show_progress_bar (`bool`, defaults to `True`): One for each task.

    Returns:
        [`Scores`]; none in processes other than the main one.

    Raises:
        FileNotFoundError, ValueError: as [`read_task`]; an image is missing or corrupt; a vector is not all numbers.
    """
    state = PartialState()
    folder = Path(output_dir)
    settings = {
        "fingerprint": encoder.fingerprint,
        "weights": encoder.weights,
        "resolution": encoder.resolution,
        "limit": limit,
    }
    scores = Scores(benchmark, encoder.name, of_tasks or len(tasks), settings)
    for number, task in enumerate(tasks, start=1):
        data = read_task(task, source, image_dir, limit=limit, on_bad_row=on_bad_row)
        store = VectorStore(folder / "vectors" / encoder.fingerprint[:16] / task.name)
        keys = embed_task(
            encoder,
            data,
            store,
            title=f"{task.name} ({number}/{len(tasks)})",
            state=state,
            on_bad_row=on_bad_row,
            show_progress_bar=show_progress_bar,
        )
        if not state.is_main_process:
            continue
        rankings = rank_queries(data, keys, store)
        score = score_task(data, rankings, len(set(keys.values())))
        write_rankings(folder / "queries" / f"{task.name}.jsonl", data, rankings, Path(image_dir))
        scores.settings.setdefault("layouts", {})[task.name] = "instruct" if data.has_instructions else "v1"
        scores.tasks.append(score)
        on_task(score, data, rankings)
    if not state.is_main_process:
        return None
    with written_whole(folder / "scores.json") as path:
        path.write_text(json.dumps(scores.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return scores


def embed_task(
    encoder: Any,
    data: TaskData,
    store: VectorStore,
    *,
    title: str,
    state: PartialState,
    on_bad_row: str = "raise",
    show_progress_bar: bool = True,
) -> dict[Item, str]:
    """
    Have the vectors of a task's queries and candidates in a store.

    Args:
        encoder, data, store: As in [`evaluate_model`]. Rows with an image that cannot be read leave `data`.
        title (`str`): For the progress bar.
        state (`PartialState`): Of the processes that share the work.
        on_bad_row (`str`, defaults to `"raise"`).
        show_progress_bar (`bool`, defaults to `True`).

    Returns:
        `dict[Item, str]`: The key in the store of each query and candidate.

    Raises:
        BadRowError: an image is missing or corrupt.
    """
    items = dict.fromkeys([*data.queries.values(), *data.candidates.values()])
    digests = digest_images({item.image for item in items if item.image is not None})
    bad = {item: f"there is no image file {item.image}." for item in items if item.image and not digests[item.image]}
    leave_out(data, bad, on_bad_row)
    keys = {item: key_of(item, digests, encoder.resolution) for item in items if item not in bad}
    inputs: dict[str, Item] = {}
    for item, key in keys.items():
        inputs.setdefault(key, item)

    def skip(item: Item, reason: str) -> None:
        leave_out(data, {other: reason for other, key in keys.items() if key == keys[item]}, on_bad_row)

    embed = partial(embed_missing, encoder, inputs, store, title=title, skip=skip, readable=check_item)
    embed(
        process_index=state.process_index,
        num_processes=state.num_processes,
        show_progress_bar=show_progress_bar and state.is_main_process,
    )
    if state.num_processes > 1:
        state.wait_for_everyone()
        store.refresh()
        if state.is_main_process:  # finds out here what another could not read
            embed(show_progress_bar=False)
    return {item: key for item, key in keys.items() if key in store}


def leave_out(data: TaskData, bad: dict[Item, str], on_bad_row: str) -> None:
    """Leave out the rows that need an item that cannot be read, or raise [`BadRowError`] for the first."""
    if not bad:
        return
    names = {name: bad[item] for name, item in data.candidates.items() if item in bad}
    for row, query in list(data.queries.items()):
        reason = bad.get(query) or next((names[name] for name in data.lists[row] if name in names), None)
        if reason is None:
            continue
        if on_bad_row != "skip":
            raise BadRowError(data.task.name, row, reason)
        data.leave_out(row, reason)
    if not data.queries:
        raise ValueError(f"No row of {data.task.name} can be scored; the first: {next(iter(data.bad_rows.values()))}")


def digest_images(paths: Iterable[str]) -> dict[str, str | None]:
    """The digest of each image file's bytes; none where there is no such file."""

    def digest(path: str) -> str | None:
        if not os.path.isfile(path):
            return None
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()

    ordered = sorted(paths)
    with ThreadPoolExecutor(READERS) as pool:
        return dict(zip(ordered, pool.map(digest, ordered), strict=True))


def key_of(item: Item, digests: dict[str, str | None], resolution: str | None) -> str:
    """A name for all that decides an item's vector besides the model."""
    places = [digests[image] if image is not None else ["text", text] for image, text in item.places]
    return hashlib.sha256(json.dumps([places, resolution]).encode()).hexdigest()


def rank_queries(data: TaskData, keys: dict[Item, str], store: VectorStore) -> dict[int, Ranking]:
    """The ranking of each row's candidates."""
    needed = dict.fromkeys(name for row in data.queries for name in data.lists[row])
    places = {name: place for place, name in enumerate(needed)}
    matrix = store[[keys[data.candidates[name]] for name in needed]]
    rankings = {}
    for row, query in data.queries.items():
        names = data.lists[row]
        candidates = matrix[np.fromiter((places[name] for name in names), dtype=np.int64, count=len(names))]
        rankings[row] = rank(store[[keys[query]]][0], candidates, names, first_wins=not data.has_instructions)
    return rankings


def score_task(data: TaskData, rankings: dict[int, Ranking], inputs: int) -> TaskScore:
    """What a task's rankings amount to."""
    found = [ranking.found for ranking in rankings.values()]
    right = [[data.lists[row][0]] for row in rankings]
    against = [ranking.rank_ties_against == 1 for ranking in rankings.values()]
    return TaskScore(
        task=data.task.name,
        kind=data.task.kind,
        in_domain=data.task.in_domain,
        precision_at_1=100 * precision_at_k(found, right, 1),
        precision_at_1_ties_against=100 * fmean(against),
        ties=sum(ranking.ties > 0 for ranking in rankings.values()),
        recall_at_5=100 * recall_at_k(found, right, 5),
        recall_at_10=100 * recall_at_k(found, right, 10),
        mrr_at_10=100 * mrr_at_k(found, right, 10),
        ndcg_at_10=100 * ndcg_at_k(found, right, 10),
        queries=len(rankings),
        candidates=len({name for row in rankings for name in data.lists[row]}),
        inputs=inputs,
        skipped_rows=len(data.bad_rows),
    )


def write_rankings(path: Path, data: TaskData, rankings: dict[int, Ranking], image_dir: Path) -> None:
    """One line a row: the query, the right candidate, what was found, and why a row was left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in sorted([*rankings, *data.bad_rows]):
        if row in data.bad_rows:
            lines.append({"row": row, "skipped": data.bad_rows[row].replace(f"{image_dir}{os.sep}", "")})
            continue
        query, ranking = data.queries[row], rankings[row]
        lines.append(
            {
                "row": row,
                "query": query.text,
                "query_image": query.image and os.path.relpath(query.image, image_dir),
                "right": data.lists[row][0],
                "rank": ranking.rank,
                "ties": ranking.ties,
                "right_score": ranking.right_score,
                "found": list(ranking.found),
                "scores": list(ranking.scores),
            }
        )
    with written_whole(path) as partial_path:
        partial_path.write_text(
            "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
        )
