# SPDX-License-Identifier: Apache-2.0
"""The command line. Each command is a few lines that call a room, imported only then: `--help` answers at once."""

from __future__ import annotations

import logging
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

# bitsandbytes, of the extra [qlora], warns at every start that a faster kernel could be installed.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

app = typer.Typer(
    name="cocoa",
    help="CoCoA: one-vector embeddings of text, images and video from Qwen2-VL and Qwen2.5-VL.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def show_version(wanted: bool) -> None:
    """Print the version and stop."""
    if wanted:
        typer.echo(version("cocoa-embed"))
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """CoCoA: one-vector embeddings of text, images and video from Qwen2-VL and Qwen2.5-VL."""


@app.command()
def demo(
    model: Annotated[
        Path | None, typer.Option(help="Folder of a checkpoint; the tiny one that is installed otherwise.")
    ] = None,
    query: Annotated[
        list[str] | None, typer.Option(help="Text to search the pictures with; may be given several times.")
    ] = None,
    output_dir: Annotated[Path, typer.Option(help="Folder for the gallery page and the numbers.")] = Path("demo"),
) -> None:
    """Search the emoji set: scores beside chance and untrained baselines, a few queries, and a gallery page."""
    from evaluation.demo import QUERIES, run_demo

    try:
        run_demo(model, output_dir, queries=query or QUERIES)
    except (FileNotFoundError, ValueError) as error:
        typer.secho(f"cocoa demo: {error}", fg="red", err=True)
        raise typer.Exit(1) from error


@app.command()
def train(
    recipe: Annotated[
        Path, typer.Argument(help="A recipe file, or the name of one that comes with the package, such as 'tiny'.")
    ],
    output_dir: Annotated[Path | None, typer.Option(help="Train here instead of in the recipe's output_dir.")] = None,
) -> None:
    """
    Train a model through the stages of a recipe; its last lines say where the model is.

    On several GPUs: accelerate launch --config_file trainers/accelerate_configs/ddp.yaml -m cocoa train RECIPE (or
    fsdp2.yaml, deepspeed_zero3.yaml).

    Call it again after an interruption: ended stages are kept, and the one that was cut off goes on from its last
    checkpoint to the same weights.
    """
    from accelerate import PartialState

    from evaluation.assets import find_file
    from trainers.recipe import Recipe, find_recipe, run_recipe

    try:
        settings = Recipe.load(find_recipe(recipe))
        if output_dir is not None:
            settings.output_dir = str(output_dir)
        model = run_recipe(settings, find_file)
        if not PartialState().is_main_process:
            return  # of several that trained together, one goes on
        if settings.evaluate == "emoji":
            from evaluation.demo import run_demo

            run_demo(model, Path(settings.output_dir) / "demo")
    except (FileNotFoundError, ValueError) as error:
        typer.secho(f"cocoa train: {error}", fg="red", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"The trained model is in {model}")


if __name__ == "__main__":
    app()
