# SPDX-License-Identifier: Apache-2.0
"""
`python -m benchmarks.ablation`: does rebuilding content from the EOS make better embeddings from the same data?

Every arm is the same recipe with other stages (see ablation*.yaml), from the same weights. A run that has ended is
kept as a JSON file and never repeated; one that was cut off goes on from its last checkpoint. Arms that begin with the
same stage 1 share it.
"""

from __future__ import annotations

import copy
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from modeling_cocoa.files import atomic_write

from . import ablation_debian, ablation_emoji, ablation_wordnet
from .ablation_report import markdown, plot, summarise
from .causal import make_causal

SETTINGS = Path(__file__).with_name("ablation.yaml")
RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs")
TASKS = {"emoji": ablation_emoji.TASK, "wordnet": ablation_wordnet.TASK, "debian": ablation_debian.TASK}
"""What runs are judged by: measures, ranks of the right answers, and what has to be made beforehand."""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Memory goes back to the system at the end, or every large tensor is a row of page faults.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**28),
}
LOG = "log.json"
"""File of a stage's folder with what its trainer logged so far."""

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
        warmup_loss (`float`, *optional*): What the loss of stage 1 on held-out rows has to be below, or a run stops.
    """

    recipe: dict[str, Any]
    arms: dict[str, Arm]
    reference: str
    task: str = "emoji"
    warmup_loss: float | None = None

    @classmethod
    def load(cls, path: Path) -> Settings:
        """Read a file."""
        values = read_settings(path)
        return cls(**{**values, "arms": {name: Arm(**arm) for name, arm in values["arms"].items()}})


def read_settings(path: Path) -> dict[str, Any]:
    """The content of a settings file; that of its `base`, in the same folder, with what it changes."""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    base = values.pop("base", None)
    return values if base is None else changed(read_settings(path.with_name(base)), values)


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A dict with other values, in the dicts within it too."""
    made = dict(values)
    for name, value in changes.items():
        both = isinstance(value, dict) and isinstance(made.get(name), dict)
        made[name] = changed(made[name], value) if both else value
    return made


def check_arms(names: list[str], arms: dict[str, Arm]) -> None:
    """Raise `typer.BadParameter` where an arm does not exist, listing those that do."""
    if unknown := [name for name in names if name not in arms]:
        raise typer.BadParameter(f"there is no arm {unknown[0]!r}; the arms are {', '.join(arms)}.")


def arm_recipe(recipe: dict[str, Any], arm: Arm, seed: int, output_dir: Path) -> Any:
    """The recipe of one run."""
    from trainers.recipes.recipe import Recipe

    values = copy.deepcopy(recipe)
    stages = {stage: {**values["stages"][stage], **arm.options.get(stage, {})} for stage in arm.stages}
    return Recipe(**{**values, "stages": stages, "seed": seed, "output_dir": str(output_dir)})


@contextmanager
def on_device(recipe: Any) -> Iterator[None]:
    """Within it a recipe runs on what this machine has; its stages are changed for that."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.set_num_threads(recipe.num_threads or torch.get_num_threads())
    kernel: Any = nullcontext()
    if torch.cuda.is_available():
        options = {"save_strategy": "no"}  # a stage takes less time than some checkpoints
    else:
        options = {"use_cpu": True}  # or transformers refuses bf16
        kernel = sdpa_kernel(SDPBackend.MATH)  # the backward pass of the other one is slow for short texts
    recipe.stages = {stage: {**given, **options} for stage, given in recipe.stages.items()}
    with kernel:
        yield


def train_arm(recipe: Any, arm: Arm, settings: Settings) -> str:
    """
    Train the stages of one run, as far as they have not ended.

    Returns:
        `str`: The folder of the last stage's model.

    Raises:
        SystemExit: stage 1 did not get below [`Settings`]' `warmup_loss`.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import TrainerCallback

    from evaluation.assets import find_file
    from trainers.recipes.recipe import run_recipe

    class WriteLog(TrainerCallback):
        """Keeps what a stage logs, through interruptions and beyond the stage."""

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            with atomic_write(Path(args.output_dir) / LOG) as file:
                file.write_text(json.dumps(state.log_history), encoding="utf-8")

    def prepare(stage: str, trainer: Any) -> None:
        if arm.causal:
            make_causal(trainer.backbone)
        for module in trainer.backbone.modules():
            if isinstance(module, BaseTunerLayer):
                module.cast_input_dtype_enabled = False  # to float32, which autocast undoes
        trainer.add_callback(WriteLog())

    def train(part: Any) -> str:
        return run_recipe(part, find_file, prepare)

    if "warmup" in recipe.stages:
        share_warmup(recipe, train)
        loss = read_log(recipe, "warmup")[-1].get("eval_loss")
        if settings.warmup_loss is not None and not loss < settings.warmup_loss:
            raise SystemExit(f"The loss of stage 1 is {loss}, not below {settings.warmup_loss}: make it longer.")
    return train(recipe)


def run_arm(recipe: Any, arm: Arm, settings: Settings, split: str) -> dict[str, Any]:
    """
    Train one arm from one seed (see [`train_arm`]), and judge it.

    Returns:
        `dict`: What the task says of the model (see its `judge`), `logs` of each stage, and `seconds` of each that ran
            without interruption.
    """
    import torch

    from modeling_cocoa import CocoaTransformer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = CocoaTransformer(train_arm(recipe, arm, settings)).to(device).eval()
    if arm.causal:
        make_causal(module.model)
    logs = {stage: read_log(recipe, stage) for stage in recipe.stages}
    seconds = {
        stage: entry["train_runtime"] for stage, log in logs.items() for entry in log if "train_runtime" in entry
    }
    with torch.autocast(device, torch.bfloat16, bool(recipe.stages["contrastive"].get("bf16"))):
        found = TASKS[settings.task].judge(module.model, module.processor, split)
    return {**found, "seconds": seconds, "logs": logs}


def share_warmup(recipe: Any, train: Callable[[Any], str]) -> None:
    """
    Train stage 1 in a folder of all arms that begin with it, and have it stand in the run's own.

    Args:
        recipe ([`~recipe.Recipe`]): Of the run; its `output_dir` is `work/arm/seed`.
        train (`Callable`): Trains a recipe.
    """
    folder = Path(recipe.output_dir)
    only = replace(recipe, stages={"warmup": recipe.stages["warmup"]}, output_dir="")
    key = hashlib.sha256(json.dumps(vars(only), sort_keys=True).encode()).hexdigest()[:12]
    shared = folder.parent.parent / f"warmup-{recipe.seed}-{key}"
    with locked(shared):
        train(replace(only, output_dir=str(shared)))
    for checkpoint in (shared / "warmup").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "warmup").exists():
        (folder / "warmup").symlink_to((shared / "warmup").resolve())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within it no other process is within it, for the same folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def read_log(recipe: Any, stage: str) -> list[dict[str, Any]]:
    """What a stage logged, numbers to four places."""
    entries = json.loads((Path(recipe.output_dir) / stage / LOG).read_text())
    return [
        {
            name: round(value, 4) if isinstance(value, float) and name != "learning_rate" else value
            for name, value in entry.items()
        }
        for entry in entries
    ]


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
    values = Settings.load(settings)
    results, work = results or RESULTS / settings.stem, work or RUNS / settings.stem
    check_arms([arm], values.arms)
    folder = work / arm / f"seed-{seed}"
    recipe = arm_recipe(values.recipe, values.arms[arm], seed, folder)
    TASKS[values.task].prepare()
    with on_device(recipe):
        result = run_arm(recipe, values.arms[arm], values, split)
    path = result_path(results, arm, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    stages = {stage: dict(options) for stage, options in recipe.stages.items()}
    content = {"arm": arm, "seed": seed, "split": split, "stages": stages, **result}
    with atomic_write(path) as file:
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
    minutes: Annotated[float | None, typer.Option(help="Then runs are stopped; the next call goes on.")] = None,
) -> None:
    """
    Run every arm that has no result yet, some at a time, then write the table and the plot. A run that fails is named
    at the end, and the others go on.
    """
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    values = Settings.load(settings)
    results, work = results or RESULTS / settings.stem, work or RUNS / settings.stem
    chosen = only or list(values.arms)
    check_arms(chosen, values.arms)
    TASKS[values.task].prepare()
    wanted = [(arm, seed) for seed in range(seeds) for arm in chosen]
    waiting = [run for run in wanted if not result_path(results, *run).exists()]
    running: dict[tuple[str, int], subprocess.Popen] = {}
    failed: list[tuple[str, int]] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("starting", total=len(wanted), completed=len(wanted) - len(waiting))
        try:
            while (waiting or running) and (deadline is None or time.monotonic() < deadline):
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
                        failed.append(run)
                    progress.advance(task)
        finally:
            for process in running.values():
                process.terminate()
                process.wait()
    if any(result_path(results, *run).exists() for run in wanted):
        report(settings, results)
    if failed:
        logs = {f"{arm} {seed}": log_path(work, arm, seed) for arm, seed in failed}
        ends = (f"{run} failed; the end of {log}:\n{log.read_text()[-3000:]}" for run, log in logs.items())
        raise SystemExit("\n".join(ends))


def log_path(work: Path, arm: str, seed: int) -> Path:
    """Where a run's output goes."""
    return work / f"{arm}-{seed}.log"


def start_run(arm: str, seed: int, settings: Path, results: Path, work: Path, split: str) -> subprocess.Popen:
    """Start one run in a process of its own, on one core."""
    log = log_path(work, arm, seed)
    log.parent.mkdir(parents=True, exist_ok=True)
    options = ["--settings", settings, "--results", results, "--work", work, "--split", split]
    command = [sys.executable, "-m", "benchmarks.ablation", "one", arm, str(seed), *map(str, options)]
    environment = {**os.environ, **ENVIRONMENT}
    with open(log, "w", encoding="utf-8") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)


@app.command()
def report(settings: SettingsFile = SETTINGS, results: Results = None) -> None:
    """Write the table and the plot of the runs that there are."""
    values = Settings.load(settings)
    results = results or RESULTS / settings.stem
    measures = TASKS[values.task].measures
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
