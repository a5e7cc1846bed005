# SPDX-License-Identifier: Apache-2.0
"""`cocoa eval`: models scored on a benchmark in MMEB-V1's layout, and the files that come of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import datasets
from accelerate import PartialState
from rich.console import Console
from rich.markdown import Markdown

from modeling_cocoa.files import atomic_write

from .encoders import Encoder, check_name
from .mmeb import evaluate_model
from .mmeb_data import TaskData
from .mmeb_files import check_data
from .mmeb_report import draw_chart, markdown_report, render_task
from .mmeb_scores import Scores, TaskScore
from .mmeb_tasks import Published, Task
from .ranking import Ranking


def run_mmeb(
    models: Sequence[str],
    baselines: Sequence[str],
    tasks: Sequence[Task],
    source: str,
    image_dir: str | Path,
    output_dir: str | Path,
    *,
    benchmark: str,
    of_tasks: int,
    published: Sequence[Published] = (),
    limit: int | None = None,
    on_bad_row: str = "raise",
    resolution: str | None = None,
    batch_size: int | None = None,
    revision: str | None = None,
    console: Console | None = None,
) -> list[Scores]:
    """
    Score models, and write `report.md` and `chart.png` of them, and for each model a folder with `scores.json`, each
    query's ranking in `queries/` and a page of hits and misses for each task in `pages/`.

    Args:
        models (`Sequence[str]`): Folders or Hub names of CoCoA checkpoints.
        baselines (`Sequence[str]`): Of any other models of sentence-transformers.
        tasks (`Sequence[Task]`), source (`str`), image_dir (`str` or `Path`), limit (`int`, *optional*),
            on_bad_row (`str`): As in [`~mmeb.evaluate_model`].
        output_dir (`str` or `Path`).
        benchmark (`str`), of_tasks (`int`): Its name, and how many tasks it has.
        published (`Sequence[Published]`): Figures to stand beside.
        resolution, batch_size, revision (*optional*): As in [`Encoder`].
        console ([`~rich.console.Console`], *optional*): Where to print.

    Returns:
        `list[Scores]`: One a model, in the main process; none in others.

    Raises:
        FileNotFoundError, OSError, ValueError: as [`Encoder`] and [`~mmeb.evaluate_model`].
    """
    if not models and not baselines:
        raise ValueError("Name a model with --model, or --baseline.")
    datasets.disable_progress_bars()
    for name in [*models, *baselines]:
        check_name(name, revision)
    check_data(tasks, source, image_dir)
    state, console, folder = PartialState(), console or Console(), Path(output_dir)
    found = []
    for name, is_cocoa in [*((name, True) for name in models), *((name, False) for name in baselines)]:
        encoder = Encoder(
            name,
            device=state.device,
            revision=revision,
            is_cocoa=is_cocoa,
            resolution=resolution,
            batch_size=batch_size,
        )
        scores = evaluate_model(
            encoder,
            tasks,
            source,
            image_dir,
            folder,
            benchmark=benchmark,
            of_tasks=of_tasks,
            limit=limit,
            on_bad_row=on_bad_row,
            on_task=partial(write_page, encoder.name),
        )
        if scores is not None:
            found.append(scores)
    if not state.is_main_process:
        return []
    report = markdown_report(found, published)
    with atomic_write(folder / "report.md") as path:
        path.write_text(report, encoding="utf-8")
    console.print(Markdown(report))
    try:
        with atomic_write(folder / "chart.png") as path:
            draw_chart(found, published, path)
    except ImportError:
        console.print("No chart: matplotlib is not installed; run pip install 'cocoa-embed[bench]'.")
    console.print(f"Report, chart, scores and pages: {folder.resolve()}", soft_wrap=True)
    return found


def write_page(model: str, folder: Path, score: TaskScore, data: TaskData, rankings: dict[int, Ranking]) -> None:
    """Write a task's page of hits and misses."""
    (folder / "pages").mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "pages" / f"{score.task}.html") as path:
        path.write_text(render_task(model, score, data, rankings), encoding="utf-8")
