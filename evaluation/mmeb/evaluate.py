# SPDX-License-Identifier: Apache-2.0
"""`cocoa eval`: every distinct input of a task embedded once, kept, and ranked by the benchmark's protocol."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import datasets
import numpy as np
from accelerate import PartialState
from rich.console import Console
from rich.markdown import Markdown

from modeling_cocoa.files import atomic_write

from ..digests import digest_content, digest_file
from ..encoders import Encoder, label
from ..ranking import Ranking, bootstrap_interval, rank
from ..ranking_metrics import ranking_metrics
from ..vectors import VectorStore, embed_missing
from .arguments import check_arguments
from .data import BenchmarkData, Item, TaskData, load_tasks
from .report import draw_chart, markdown_report, render_task
from .scores import Scores, TaskScore
from .tasks import Task, published_on

READERS = 8
"""Threads that read images to name them by their content."""


def run_mmeb(
    models: Sequence[str],
    baselines: Sequence[str],
    tasks: Sequence[Task],
    source: str,
    image_dir: str | Path,
    output_dir: str | Path,
    *,
    benchmark: str,
    revision: str | None = None,
    **options: Any,
) -> list[Scores]:
    """
    Score models on a benchmark in MMEB-V1's layout, and write `report.md` and `chart.png` of them, and for each model
    a folder with `scores.json`, each query's ranking in `queries/` and a page of hits and misses for each task in
    `pages/`.

    Args:
        models (`Sequence[str]`): Folders or Hub names of CoCoA checkpoints.
        baselines (`Sequence[str]`): Of any other models of sentence-transformers.
        tasks (`Sequence[Task]`): As in [`load_tasks`].
        source (`str`): As in [`load_tasks`].
        image_dir (`str` or `Path`): As in [`load_tasks`].
        output_dir (`str` or `Path`): As in [`evaluate_model`].
        benchmark (`str`): As in [`evaluate_model`].
        revision (`str`, *optional*): As in [`Encoder`].
        options: Further ones of [`run_models`].

    Returns:
        `list[Scores]`: One a model, in the main process; none in others.

    Raises:
        FileNotFoundError, OSError, ValueError: as [`check_arguments`], [`load_tasks`],
            [`Encoder`] and [`evaluate_model`].
    """
    check_arguments(models, baselines, tasks, source, image_dir, revision)
    datasets.disable_progress_bars()
    data = load_tasks(tasks, source, image_dir)
    return run_models(
        models,
        baselines,
        data,
        output_dir,
        lambda found: markdown_report(found, published_on(benchmark)),
        benchmark=benchmark,
        revision=revision,
        **options,
    )


def run_models(
    models: Sequence[str],
    baselines: Sequence[str],
    data: BenchmarkData,
    output_dir: str | Path,
    write_report: Callable[[list[Scores]], str],
    *,
    benchmark: str,
    of_tasks: int,
    limit: int | None = None,
    on_bad_row: str = "error",
    image_resolution: str | None = None,
    batch_size: int | None = None,
    revision: str | None = None,
    has_chart: bool = True,
    console: Console | None = None,
) -> list[Scores]:
    """
    Score models one after the other, and write what [`run_mmeb`] writes.

    Args:
        data ([`BenchmarkData`]): Of the tasks.
        write_report (`Callable`): From scores to the report, in Markdown.
        models, baselines, output_dir: As in [`run_mmeb`].
        benchmark, of_tasks, limit, on_bad_row: As in [`evaluate_model`].
        image_resolution, batch_size, revision: As in [`Encoder`].
        has_chart (`bool`, defaults to `True`): Draw the means by kind of task.
        console ([`~rich.console.Console`], *optional*): Where to print.
    """
    state, console, folder = PartialState(), console or Console(), Path(output_dir)
    found = []
    for name, is_cocoa in [*((name, True) for name in models), *((name, False) for name in baselines)]:
        encoder = Encoder(
            name,
            device=state.device,
            revision=revision,
            is_cocoa=is_cocoa,
            image_resolution=image_resolution,
            batch_size=batch_size,
        )
        scores = evaluate_model(
            encoder,
            data,
            folder,
            benchmark=benchmark,
            of_tasks=of_tasks,
            limit=limit,
            on_bad_row=on_bad_row,
            write_pages=True,
        )
        del encoder  # or the next model would be loaded beside it
        if scores is not None:
            found.append(scores)
    if not state.is_main_process:
        return []
    report = write_report(found)
    write_text(folder / "report.md", report)
    console.print(Markdown(report))
    if has_chart:
        try:
            with atomic_write(folder / "chart.png") as path:
                draw_chart(found, published_on(benchmark), path)
        except ImportError:
            console.print("No chart: matplotlib is not installed; run pip install 'cocoa-embed[bench]'.")
    console.print(f"Report, scores and pages: {folder.resolve()}", soft_wrap=True)
    return found


def evaluate_model(
    encoder: Any,
    data: BenchmarkData,
    output_dir: str | Path,
    *,
    benchmark: str = "MMEB-V1",
    of_tasks: int | None = None,
    limit: int | None = None,
    on_bad_row: str = "error",
    write_pages: bool = False,
    show_progress_bar: bool = True,
) -> Scores | None:
    """
    Score a model on the tasks of a benchmark.

    Vectors are kept in `output_dir/vectors` as they come; each query's ranking in `queries/TASK.jsonl` and the scores
    in `scores.json` of a folder beside it, which has its name by all that decides them (see [`results_folder`]). The
    same call goes on where it was interrupted, and ends with the same files; one for other tasks adds their scores to
    those that are there. Under `accelerate launch` or torchrun, processes share the inputs of each task; they need one
    folder in common.

    Args:
        encoder ([`Encoder`]): Gives the vectors of a list of [`Item`]; `check`, `name`, `fingerprint`, `weights`,
            `image_resolution`.
        data ([`BenchmarkData`]): As from [`load_tasks`].
        output_dir (`str` or `Path`).
        benchmark (`str`, defaults to `"MMEB-V1"`): Its name.
        of_tasks (`int`, *optional*): How many tasks the benchmark has; by default those in `data`.
        limit (`int`, *optional*), on_bad_row (`str`): As in [`read_task`].
        write_pages (`bool`, defaults to `False`): Write a page of hits and misses for each task, too.
        show_progress_bar (`bool`, defaults to `True`): One for each task.

    Returns:
        [`Scores`], those of earlier calls among them; none in processes other than the main one.

    Raises:
        BadRowError: a row cannot be scored, or its image cannot be read.
        ValueError: as [`read_task`]; the model does not take such inputs; a vector is not all numbers.
    """
    state = PartialState()
    settings = {
        "fingerprint": encoder.fingerprint,
        "weights": encoder.weights,
        "resolution": encoder.image_resolution,
        "limit": limit,
        "data": {"source": label(data.source), "revision": data.revision},
    }
    folder = results_folder(Path(output_dir), encoder.name, settings)
    scores = Scores(benchmark, encoder.name, of_tasks or len(data.rows), {**settings, "layouts": {}})
    for number, task in enumerate(data.rows, start=1):
        task_data = data.read(task, limit=limit, on_bad_row=on_bad_row)
        store = VectorStore(Path(output_dir) / "vectors" / encoder.fingerprint[:16] / task.name)
        title = f"{task.name} ({number}/{len(data.rows)})"
        keys = embed_task(encoder, task_data, store, title, state, show_progress_bar)
        if not state.is_main_process:
            continue
        rankings = rank_queries(task_data, keys, store)
        score = score_task(task_data, rankings, len(set(keys.values())))
        scores.settings["layouts"][task.name] = "instruct" if task_data.has_instructions else "v1"
        scores.tasks.append(score)
        lines = ranking_lines(task_data, rankings, data.image_dir)
        write_text(folder / "queries" / f"{task.name}.jsonl", "".join(lines))
        if write_pages:
            page = render_task(encoder.name, score, task_data, rankings)
            write_text(folder / "pages" / f"{task.name}.html", page)
    if not state.is_main_process:
        return None
    if (path := folder / "scores.json").is_file():
        scores = scores.after(Scores.read(path))
    scores.write(path)
    return scores


def results_folder(output_dir: Path, model: str, settings: Mapping[str, Any]) -> Path:
    """Where results are kept; the name has the model, its fingerprint, the data's revision and unusual settings."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-.") or "model"
    parts = [name, settings["fingerprint"][:8], settings["data"]["revision"][:8]]
    parts += [settings["resolution"]] if settings["resolution"] else []
    parts += [f"first-{settings['limit']}"] if settings["limit"] else []
    return output_dir / "-".join(parts)


def embed_task(
    encoder: Any, data: TaskData, store: VectorStore, title: str, state: PartialState, show_progress_bar: bool
) -> dict[Item, str]:
    """
    Have the vectors of a task's queries and candidates in a store; rows whose images cannot be read leave `data`.

    Returns:
        `dict[Item, str]`: The key in the store of each query and candidate.
    """
    items = dict.fromkeys([*data.queries.values(), *data.candidates.values()])
    encoder.check(data.task.name, items)
    digests = digest_images({item.image for item in items if item.image is not None})
    missing = {item for item in items if item.image is not None and digests[item.image] is None}
    if missing:
        data.leave_out_items({item: f"there is no image file {item.image}." for item in missing})
    keys = {item: key_of(item, digests, encoder.image_resolution) for item in items if item not in missing}
    inputs: dict[str, Item] = {}
    for item, key in keys.items():
        inputs.setdefault(key, item)

    def skip(item: Item, reason: str) -> None:
        data.leave_out_items({other: reason for other, key in keys.items() if key == keys[item]})

    embed = partial(embed_missing, encoder, inputs, store, title=title, skip=skip)
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


def digest_images(paths: Iterable[str]) -> dict[str, str | None]:
    """The digest of each image file; none where there is no such file."""
    ordered = sorted(paths)
    with ThreadPoolExecutor(READERS) as pool:
        digests = pool.map(lambda path: digest_file(path) if os.path.isfile(path) else None, ordered)
        return dict(zip(ordered, digests, strict=True))


def key_of(item: Item, digests: Mapping[str, str | None], image_resolution: str | None) -> str:
    """A name for all that decides an item's vector besides the model."""
    places = [digests[image] if image is not None else ["text", text] for image, text in item.places]
    return digest_content([places, image_resolution, *([item.prompt_name] if item.prompt_name else [])])


def rank_queries(data: TaskData, keys: Mapping[Item, str], store: VectorStore) -> dict[int, Ranking]:
    """The ranking of each row's candidates."""
    needed = dict.fromkeys(name for names in data.lists.values() for name in names)
    places = {name: place for place, name in enumerate(needed)}
    matrix = store[[keys[data.candidates[name]] for name in needed]]
    rankings = {}
    for row, query in data.queries.items():
        names = data.lists[row]
        candidates = matrix[np.fromiter((places[name] for name in names), dtype=np.int64, count=len(names))]
        rankings[row] = rank(store[[keys[query]]][0], candidates, names, first_wins=not data.has_instructions)
    return rankings


def score_task(data: TaskData, rankings: Mapping[int, Ranking], inputs: int) -> TaskScore:
    """What a task's rankings amount to."""
    found = [ranking.found for ranking in rankings.values()]
    right = [[data.lists[row][0]] for row in rankings]
    at_1, at_5, at_10 = (ranking_metrics(found, right, k) for k in (1, 5, 10))
    return TaskScore(
        task=data.task.name,
        kind=data.task.kind,
        in_domain=data.task.in_domain,
        precision_at_1=100 * at_1["precision_at_k"],
        precision_at_1_ties_against=100 * fmean(ranking.rank_ties_against == 1 for ranking in rankings.values()),
        ties=sum(ranking.ties > 0 for ranking in rankings.values()),
        recall_at_5=100 * at_5["recall_at_k"],
        recall_at_10=100 * at_10["recall_at_k"],
        mrr_at_10=100 * at_10["mrr_at_k"],
        ndcg_at_10=100 * at_10["ndcg_at_k"],
        queries=len(rankings),
        candidates=len({name for row in rankings for name in data.lists[row]}),
        inputs=inputs,
        skipped_rows=len(data.bad_rows),
        chance=100 * fmean(1 / len(set(data.lists[row])) for row in rankings),
        interval=[100 * end for end in bootstrap_interval([ranking.rank == 1 for ranking in rankings.values()])],
    )


def ranking_lines(data: TaskData, rankings: Mapping[int, Ranking], image_dir: Path) -> list[str]:
    """For each row a line of JSON: the query, the right candidate, what was found, or why it was left out."""
    lines: dict[int, dict[str, Any]] = {
        row: {"row": row, "skipped": reason.replace(f"{image_dir}{os.sep}", "")}
        for row, reason in data.bad_rows.items()
    }
    for row, ranking in rankings.items():
        query = data.queries[row]
        lines[row] = {
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
    return [json.dumps(lines[row], ensure_ascii=False) + "\n" for row in sorted(lines)]


def write_text(path: Path, text: str) -> None:
    """Write a file, and the folder that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial_path:
        partial_path.write_text(text, encoding="utf-8")
