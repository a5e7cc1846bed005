# SPDX-License-Identifier: Apache-2.0
"""
`python -m benchmarks.matryoshka`: what short and quantized vectors find, trained for it (Matryoshka) and not.

The contrastive stage of the ablation, on Noto's drawings alone; the names then search Twemoji's, a style that the
model has never seen. Interrupted, the same command goes on.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from evaluation.assets import find_file
from evaluation.emoji import load_emoji, split_rows
from modeling_cocoa import CocoaTransformer
from modeling_cocoa.files import atomic_write

from .ablation import SETTINGS, Settings, arm_recipe
from .compact import CompactScore, score_compact

RESULTS = Path(__file__).parent / "results" / "matryoshka.json"
ARM = "bidirectional"
LENGTHS = (2, 4, 8)
"""Of the whole length, the parts that serve alone: a half, a quarter, an eighth."""


def train_and_score(matryoshka: bool, work: Path, seed: int, max_steps: int | None) -> list[CompactScore]:
    """Train one of the two models, or go on with it, and score every form of its vectors."""
    from trainers.recipes.recipe import run_recipe

    settings = Settings.load(SETTINGS)
    values = copy.deepcopy(settings.recipe)
    width = values["model"]["from_scratch"]["text_config"]["hidden_size"]
    if matryoshka:
        values["stages"]["contrastive"]["matryoshka_dims"] = [width, *(width // part for part in LENGTHS)]
    if max_steps is not None:
        values["stages"]["contrastive"]["max_steps"] = max_steps
    name = f"{'matryoshka' if matryoshka else 'plain'}-seed-{seed}" + (f"-steps-{max_steps}" if max_steps else "")
    module = CocoaTransformer(run_recipe(arm_recipe(values, settings.arms[ARM], seed, work / name), find_file))
    emoji = load_emoji()
    seen = emoji.select(split_rows(emoji)["train"])
    return score_compact(module.encode(list(seen["name"])), module.encode(list(seen["twemoji"])))


def as_markdown(scores: dict[str, list[CompactScore]]) -> str:
    """Recall@1 and @10 of every form in percent, and their share of what the model's whole vectors have."""
    columns = [f"R@{k}, {way}" for way in scores for k in (1, 10)]
    lines = [f"| vector | bytes | {' | '.join(columns)} |", "|" + "---|" * (2 + len(columns))]
    for place, form in enumerate(next(iter(scores.values()))):
        cells = []
        for of_way in scores.values():
            for k in (1, 10):
                found, whole = of_way[place].recall[k].value, of_way[0].recall[k].value
                cells.append(f"{100 * found:.1f} ({100 * found / whole:.0f} %)" if whole else "-")
        lines.append(f"| {form.form} | {form.size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def measure(
    work: Annotated[Path, typer.Option(help="Folder of the two training runs.")] = Path("runs/matryoshka"),
    results: Annotated[Path, typer.Option(help="JSON file for the numbers.")] = RESULTS,
    seed: Annotated[int, typer.Option(help="Of the weights and the order of the data.")] = 0,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Train for fewer steps than the ablation.")] = None,
) -> None:
    """Train twice, with Matryoshka and without, and write what every form of the vectors finds."""
    ways = {"not trained for it": False, "Matryoshka": True}
    scores = {way: train_and_score(matryoshka, work, seed, max_steps) for way, matryoshka in ways.items()}
    content: dict[str, Any] = {
        way: {
            score.form: {"bytes": score.size, **{f"recall@{k}": tuple(found) for k, found in score.recall.items()}}
            for score in of_way
        }
        for way, of_way in scores.items()
    }
    with atomic_write(results) as file:
        file.write_text(json.dumps({"seed": seed, "recall": content}, indent=2) + "\n", encoding="utf-8")
    Console(width=140).print(as_markdown(scores), markup=False)


if __name__ == "__main__":
    typer.run(measure)
