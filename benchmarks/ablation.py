# SPDX-License-Identifier: Apache-2.0
"""
`python -m benchmarks.ablation`: does rebuilding content from the EOS make better embeddings from the same data?

Every arm is the same recipe with other stages (see ablation.yaml), from the same random weights for each seed. A run
that has ended is kept as a JSON file and never repeated; one that was cut off goes on from its last checkpoint.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from modeling_cocoa.files import written_whole

from . import ablation_emoji, ablation_wordnet
from .ablation_report import markdown, plot, summarise
from .causal import make_causal

SETTINGS = Path(__file__).with_name("ablation.yaml")
RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs")
TASKS = {"emoji": ablation_emoji, "wordnet": ablation_wordnet}
"""What runs are judged by: measures, ranks of the right answers, and what has to be made beforehand."""

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False, help=__doc__)

SettingsFile = Annotated[Path, typer.Option(help="The recipe and the arms.")]
Results = Annotated[
    Path | None,
    typer.Option(help="Folder of the runs' JSON files, the table and the plot; by default named as the settings."),
]
Work = Annotated[
    Path | None,
    typer.Option(help="Folder of checkpoints; a run's are deleted when it has ended. By default in runs/."),
]
Split = Annotated[str, typer.Option(help="Concepts to measure on: 'validation' to choose settings, 'test' once.")]


@dataclass
class Arm:
    """
    One way to train.

    Args:
        title (`str`).
        stages (`list[str]`): Of the recipe's, those that run.
        options (`dict[str, dict]`): By stage, what is changed in its configuration.
        causal (`bool`, defaults to `False`): Leave the attention as the generative model has it.
    """

    title: str
    stages: list[str]
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    causal: bool = False


@dataclass
class Settings:
    """
    What an ablation's file holds.

    Args:
        recipe (`dict`): What all runs have in common; see [`~recipe.Recipe`].
        arms (`dict[str, Arm]`): By name.
        reference (`str`): The arm that the others are compared with.
        task (`str`, defaults to `"emoji"`): One of [`TASKS`].
        layers (`int`, *optional*): Of the pretrained model, where the task has one.
    """

    recipe: dict[str, Any]
    arms: dict[str, Arm]
    reference: str
    task: str = "emoji"
    layers: int | None = None

    @classmethod
    def load(cls, path: Path) -> Settings:
        """Read a file."""
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        return cls(**{**values, "arms": {name: Arm(**arm) for name, arm in values["arms"].items()}})


def check_arms(names: list[str], arms: dict[str, Arm]) -> None:
    """Raise `typer.BadParameter` where an arm does not exist, listing those that do."""
    if unknown := [name for name in names if name not in arms]:
        raise typer.BadParameter(f"there is no arm {unknown[0]!r}; the arms are {', '.join(arms)}.")


def arm_recipe(recipe: dict[str, Any], arm: Arm, seed: int, output_dir: Path) -> Any:
    """The recipe of one run."""
    from trainers.recipe import Recipe

    values = copy.deepcopy(recipe)
    stages = {stage: {**values["stages"][stage], **arm.options.get(stage, {})} for stage in arm.stages}
    return Recipe(**{**values, "stages": stages, "seed": seed, "output_dir": str(output_dir)})


def run_arm(recipe: Any, arm: Arm, task: str, split: str) -> dict[str, Any]:
    """
    Train one arm from one seed, and rank the answers.

    Returns:
        `dict`: `ranks` (see the task's `rank_answers`), and `seconds` of each stage that ran without interruption.
    """
    from evaluation.assets import find_file
    from modeling_cocoa import CocoaTransformer
    from trainers.checkpoints import last_checkpoint
    from trainers.recipe import run_recipe

    whole: dict[str, Any] = {}

    def prepare(stage: str, trainer: Any) -> None:
        if arm.causal:
            make_causal(trainer.model[0].model)
        if last_checkpoint(trainer.args.output_dir) is None:
            whole[stage] = trainer

    module = CocoaTransformer(run_recipe(recipe, find_file, prepare)).eval()
    if arm.causal:
        make_causal(module.model)
    seconds = {
        stage: entry["train_runtime"]
        for stage, trainer in whole.items()
        for entry in trainer.state.log_history
        if "train_runtime" in entry
    }
    return {"ranks": TASKS[task].rank_answers(module.model, module.processor, split), "seconds": seconds}


def result_path(results: Path, arm: str, seed: int) -> Path:
    """Where a run's result lies."""
    return results / arm / f"seed-{seed}.json"


@app.command()
def one(
    arm: Annotated[str, typer.Argument(help="Name of an arm.")],
    seed: Annotated[int, typer.Argument(help="Of the weights, the order of the data and the masks.")],
    settings: SettingsFile = SETTINGS,
    results: Results = None,
    work: Work = None,
    split: Split = "test",
) -> None:
    """Train and measure one arm from one seed."""
    import torch

    values = Settings.load(settings)
    results, work = results or RESULTS / settings.stem, work or RUNS / settings.stem
    check_arms([arm], values.arms)
    folder = work / arm / f"seed-{seed}"
    recipe = arm_recipe(values.recipe, values.arms[arm], seed, folder)
    torch.set_num_threads(recipe.num_threads or torch.get_num_threads())
    TASKS[values.task].prepare(values.layers)
    result = run_arm(recipe, values.arms[arm], values.task, split)
    path = result_path(results, arm, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    stages = {stage: dict(options) for stage, options in recipe.stages.items()}
    content = {"arm": arm, "seed": seed, "split": split, "stages": stages, **result}
    with written_whole(path) as file:
        file.write_text(json.dumps(content) + "\n", encoding="utf-8")
    shutil.rmtree(folder)


@app.command("run")
def run_all(
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each arm.")] = 5,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at once, each on one core.")] = 2,
    only: Annotated[list[str] | None, typer.Option(help="An arm; may be given several times. All otherwise.")] = None,
    settings: SettingsFile = SETTINGS,
    results: Results = None,
    work: Work = None,
    split: Split = "test",
) -> None:
    """Run every arm that has no result yet, two at a time, then write the table and the plot."""
    values = Settings.load(settings)
    results, work = results or RESULTS / settings.stem, work or RUNS / settings.stem
    chosen = only or list(values.arms)
    check_arms(chosen, values.arms)
    TASKS[values.task].prepare(values.layers)
    wanted = [(arm, seed) for seed in range(seeds) for arm in chosen]
    waiting = [run for run in wanted if not result_path(results, *run).exists()]
    running: dict[tuple[str, int], subprocess.Popen] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("starting", total=len(wanted), completed=len(wanted) - len(waiting))
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    running[run] = start_run(*run, settings, results, work, split)
                names = ", ".join(f"{arm} {seed}" for arm, seed in running)
                progress.update(task, description=names)
                time.sleep(1)
                for run, process in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[run]
                    if process.returncode:
                        log = log_path(work, *run)
                        raise SystemExit(f"{run[0]} {run[1]} failed; the end of {log}:\n{log.read_text()[-3000:]}")
                    progress.advance(task)
        finally:
            for process in running.values():
                process.terminate()
    report(settings, results)


def log_path(work: Path, arm: str, seed: int) -> Path:
    """Where a run's output goes."""
    return work / f"{arm}-{seed}.log"


def start_run(arm: str, seed: int, settings: Path, results: Path, work: Path, split: str) -> subprocess.Popen:
    """Start one run in a process of its own, on one core."""
    log = log_path(work, arm, seed)
    log.parent.mkdir(parents=True, exist_ok=True)
    options = ["--settings", settings, "--results", results, "--work", work, "--split", split]
    command = [sys.executable, "-m", "benchmarks.ablation", "one", arm, str(seed), *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with open(log, "w", encoding="utf-8") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)


@app.command()
def report(settings: SettingsFile = SETTINGS, results: Results = None) -> None:
    """Write the table and the plot of the runs that there are."""
    values = Settings.load(settings)
    results = results or RESULTS / settings.stem
    measures = TASKS[values.task].MEASURES
    runs = {}
    for arm in values.arms:
        found = [json.loads(path.read_text()) for path in sorted((results / arm).glob("seed-*.json"))]
        if found:
            runs[arm] = {run["seed"]: run for run in found}
    titles = {name: arm.title for name, arm in values.arms.items()}
    summaries = summarise(runs, values.reference, measures)
    table = markdown(summaries, titles, measures)
    (results / "table.md").write_text(table, encoding="utf-8")
    plot(summaries, titles, values.reference, measures, results / "differences.png")
    Console().print(table)


if __name__ == "__main__":
    app()
