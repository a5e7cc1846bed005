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

from .ablation_report import markdown, plot, summarise

SETTINGS = Path(__file__).with_name("ablation.yaml")
RESULTS = Path(__file__).parent / "results" / "ablation"
WORK = Path("runs") / "ablation"

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False, help=__doc__)

Settings = Annotated[Path, typer.Option(help="The recipe and the arms.")]
Results = Annotated[Path, typer.Option(help="Folder of the runs' JSON files, the table and the plot.")]
Work = Annotated[Path, typer.Option(help="Folder of checkpoints; a run's are deleted when it has ended.")]
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


def load_settings(path: Path) -> tuple[dict[str, Any], dict[str, Arm], str]:
    """The recipe, the arms by name, and the arm that the others are compared with."""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    return values["recipe"], {name: Arm(**arm) for name, arm in values["arms"].items()}, values["reference"]


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


def make_causal(backbone: Any) -> None:
    """Give a CoCoA backbone the attention of the generative model: each token sees those before it."""
    backbone.set_attn_implementation({"text_config": "eager"})
    backbone.language_model.config.is_causal = True
    for layer in backbone.language_model.layers:
        layer.self_attn.is_causal = True


def run_arm(recipe: Any, arm: Arm, emoji: Any, split: str) -> dict[str, Any]:
    """
    Train one arm from one seed, and rank the answers.

    Returns:
        `dict`: `ranks` (see [`rank_answers`]), and `seconds` of each stage that ran without interruption.
    """
    from evaluation.assets import asset_path
    from modeling_cocoa import CocoaTransformer
    from trainers.checkpoints import last_checkpoint
    from trainers.recipe import run_recipe

    from .ablation_scores import rank_answers

    whole: dict[str, Any] = {}

    def prepare(stage: str, trainer: Any) -> None:
        if arm.causal:
            make_causal(trainer.model[0].model)
        if last_checkpoint(trainer.args.output_dir) is None:
            whole[stage] = trainer

    module = CocoaTransformer(run_recipe(recipe, asset_path, prepare)).eval()
    if arm.causal:
        make_causal(module.model)
    seconds = {
        stage: entry["train_runtime"]
        for stage, trainer in whole.items()
        for entry in trainer.state.log_history
        if "train_runtime" in entry
    }
    return {"ranks": rank_answers(module.model, module.processor, emoji, split), "seconds": seconds}


def result_path(results: Path, arm: str, seed: int) -> Path:
    """Where a run's result lies."""
    return results / arm / f"seed-{seed}.json"


@app.command()
def one(
    arm: Annotated[str, typer.Argument(help="Name of an arm.")],
    seed: Annotated[int, typer.Argument(help="Of the weights, the order of the data and the masks.")],
    settings: Settings = SETTINGS,
    results: Results = RESULTS,
    work: Work = WORK,
    split: Split = "test",
) -> None:
    """Train and measure one arm from one seed."""
    import torch

    from evaluation.emoji import load_emoji

    values, arms, _ = load_settings(settings)
    check_arms([arm], arms)
    folder = work / arm / f"seed-{seed}"
    recipe = arm_recipe(values, arms[arm], seed, folder)
    torch.set_num_threads(recipe.num_threads or torch.get_num_threads())
    result = run_arm(recipe, arms[arm], load_emoji(), split)
    path = result_path(results, arm, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    stages = {stage: dict(options) for stage, options in recipe.stages.items()}
    content = {"arm": arm, "seed": seed, "split": split, "stages": stages, **result}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
    partial.replace(path)
    shutil.rmtree(folder)


@app.command("run")
def run_all(
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each arm.")] = 5,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at once, each on one core.")] = 2,
    only: Annotated[list[str] | None, typer.Option(help="An arm; may be given several times. All otherwise.")] = None,
    settings: Settings = SETTINGS,
    results: Results = RESULTS,
    work: Work = WORK,
    split: Split = "test",
) -> None:
    """Run every arm that has no result yet, two at a time, then write the table and the plot."""
    _, arms, _ = load_settings(settings)
    chosen = only or list(arms)
    check_arms(chosen, arms)
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
def report(settings: Settings = SETTINGS, results: Results = RESULTS) -> None:
    """Write the table and the plot of the runs that there are."""
    _, arms, reference = load_settings(settings)
    runs = {}
    for arm in arms:
        found = [json.loads(path.read_text()) for path in sorted((results / arm).glob("seed-*.json"))]
        if found:
            runs[arm] = {run["seed"]: run for run in found}
    titles = {name: arm.title for name, arm in arms.items()}
    summaries = summarise(runs, reference)
    table = markdown(summaries, titles)
    (results / "table.md").write_text(table, encoding="utf-8")
    plot(summaries, titles, reference, results / "differences.png")
    Console().print(table)


if __name__ == "__main__":
    app()
