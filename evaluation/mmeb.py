# SPDX-License-Identifier: Apache-2.0
"""MMEB-V1 of a model: every distinct input of a task embedded once, kept, ranked by the benchmark's protocol."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from accelerate import PartialState

from modeling_cocoa.files import atomic_write

from .encoders import check_item, label
from .metrics.mrr_at_k import mrr_at_k
from .metrics.ndcg_at_k import ndcg_at_k
from .metrics.precision_at_k import precision_at_k
from .metrics.recall_at_k import recall_at_k
from .mmeb_data import BadRowError, Item, TaskData, read_task
from .mmeb_files import check_data
from .mmeb_scores import Scores, TaskScore
from .mmeb_tasks import Task
from .ranking import Ranking, rank
from .vectors import VectorStore, embed_missing

READERS = 8
"""Threads that read images to name them by their content."""


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
    on_task: Callable[[Path, TaskScore, TaskData, dict[int, Ranking]], None] = lambda *found: None,
    show_progress_bar: bool = True,
) -> Scores | None:
    """
    Score a model on tasks in MMEB-V1's layout.

    Vectors are kept in `output_dir/vectors` as they come; each query's ranking in `queries/TASK.jsonl` and the scores
    in `scores.json` of a folder beside it, which has its name by all that decides them (see [`results_folder`]). The
    same call goes on where it was interrupted, and ends with the same files; one for other tasks adds their scores to
    those that are there. Under `accelerate launch` or torchrun, processes share the inputs of each task; they need one
    folder in common.

    Args:
        encoder ([`Encoder`]): Gives the vectors of a list of [`Item`]; `check`, `name`, `fingerprint`, `weights`,
            `resolution`.
        tasks (`Sequence[Task]`).
        source (`str`), image_dir (`str` or `Path`), limit (`int`, *optional*), on_bad_row (`str`): As in
            [`read_task`].
        output_dir (`str` or `Path`).
        benchmark (`str`, defaults to `"MMEB-V1"`): Its name.
        of_tasks (`int`, *optional*): How many tasks the benchmark has; by default those given.
        on_task (`Callable`, *optional*): Told the folder of the results, and each task's score, data and rankings by
            row.
        show_progress_bar (`bool`, defaults to `True`): One for each task.

    Returns:
        [`Scores`], those of earlier calls among them; none in processes other than the main one.

    Raises:
        FileNotFoundError, ValueError: as [`check_data`], before anything is embedded, and [`read_task`]; an image is
            missing or corrupt; the model does not take such inputs; a vector is not all numbers.
    """
    state = PartialState()
    data_state = {"source": label(source), "revision": check_data(tasks, source, image_dir)}
    settings = {
        "fingerprint": encoder.fingerprint,
        "weights": encoder.weights,
        "resolution": encoder.resolution,
        "limit": limit,
        "data": data_state,
    }
    vectors = Path(output_dir) / "vectors" / encoder.fingerprint[:16]
    folder = results_folder(output_dir, encoder.name, settings)
    scores = Scores(benchmark, encoder.name, of_tasks or len(tasks), settings)
    for number, task in enumerate(tasks, start=1):
        data = read_task(task, source, image_dir, limit=limit, on_bad_row=on_bad_row)
        store = VectorStore(vectors / task.name)
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
        on_task(folder, score, data, rankings)
    if not state.is_main_process:
        return None
    if (path := folder / "scores.json").is_file():
        scores = scores.after(Scores.read(path))
    scores.write(path)
    return scores


def results_folder(output_dir: str | Path, model: str, settings: Mapping[str, Any]) -> Path:
    """
    Where the results of a model are kept, apart from those with other settings: its name tells the model, its
    fingerprint, the state of the data, and what is not as usual.

    Args:
        output_dir (`str` or `Path`), model (`str`), settings (`Mapping`): As in [`evaluate_model`] and [`Scores`].
    """
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-.") or "model"
    parts = [name, settings["fingerprint"][:8], settings["data"]["revision"][:8]]
    parts += [settings["resolution"]] if settings["resolution"] else []
    parts += [f"first-{settings['limit']}"] if settings["limit"] else []
    return Path(output_dir) / "-".join(parts)


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
        ValueError: the model does not take such inputs.
    """
    items = dict.fromkeys([*data.queries.values(), *data.candidates.values()])
    encoder.check(data.task.name, items)
    digests = digest_images({item.image for item in items if item.image is not None})
    bad = {item: f"there is no image file {item.image}." for item in items if item.image and not digests[item.image]}
    leave_out(data, bad, on_bad_row)
    keys = {item: key_of(item, digests, encoder.resolution) for item in items if item not in bad}
    inputs: dict[str, Item] = {}
    for item, key in keys.items():
        inputs.setdefault(key, item)

    def skip(item: Item, reason: str) -> None:
        leave_out(data, {other: reason for other, key in keys.items() if key == keys[item]}, on_bad_row)

    readable = partial(check_item, resolution=encoder.resolution)
    embed = partial(embed_missing, encoder, inputs, store, title=title, skip=skip, readable=readable)
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
    with atomic_write(path) as partial_path:
        partial_path.write_text(
            "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
        )
