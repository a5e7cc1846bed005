# SPDX-License-Identifier: Apache-2.0
"""The command line. Each command is a few lines that call a room, imported only then: `--help` answers at once."""

from __future__ import annotations

import logging
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

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


@app.command("mine-negatives")
def mine(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of a CoCoA checkpoint.")],
    recipe: Annotated[
        Path, typer.Argument(help="A recipe; negatives are found for the pairs of its contrastive entries.")
    ],
    output_dir: Annotated[Path, typer.Argument(help="Folder for a parquet file an entry, with negative_1, ...")],
    num_negatives: Annotated[int, typer.Option(min=1, help="For each pair.")] = 2,
    range_min: Annotated[int, typer.Option(min=0, help="Leave out so many of the closest, as likely true.")] = 0,
    range_max: Annotated[int | None, typer.Option(help="Look no further than this rank.")] = None,
    max_score: Annotated[float | None, typer.Option(help="Leave out what is closer than this cosine.")] = None,
    absolute_margin: Annotated[
        float | None, typer.Option(help="Leave out what is not this much less close than the positive.")
    ] = None,
    relative_margin: Annotated[
        float | None, typer.Option(help="The same as a part of the positive's cosine, such as 0.05.")
    ] = None,
    sampling: Annotated[
        Literal["top", "random"], typer.Option(help="'top' takes the closest that are left, 'random' any of them.")
    ] = "top",
    batch_size: Annotated[int, typer.Option(min=1, help="Inputs embedded at once.")] = 32,
) -> None:
    """
    Find hard negatives by a model itself: what it puts closest to a query besides the answer.

    Prompts and the sizes of inputs are those of the recipe's contrastive stage. The vectors are kept in
    OUTPUT_DIR/vectors, so that a call after an interruption goes on.

    To train on the result: a source {path: parquet, data_files: OUTPUT_DIR/NAME.parquet}.
    """
    from evaluation.assets import find_file
    from modeling_cocoa.files import written_whole
    from trainers.contrastive_rows import IMAGE_SIZES, column_prompts, prompts_of
    from trainers.mining import load_encoder, mine_negatives
    from trainers.recipe import Recipe, find_recipe, prompts_for_variants, stage_arguments
    from trainers.recipe_data import contrastive_data

    try:
        settings = Recipe.load(find_recipe(recipe))
        pairs = contrastive_data(settings.data, find_file, settings.seed)
        args = stage_arguments(settings, "contrastive")
        prompts_for_variants(args, list(pairs))
        prompts = column_prompts(args, pairs)
        encoder = load_encoder(model, **args.processor_options())
        output_dir.mkdir(parents=True, exist_ok=True)
        for name, dataset in pairs.items():
            own = prompts_of(prompts, name)
            found = mine_negatives(
                encoder,
                dataset,
                output_dir / "vectors",
                num_negatives=num_negatives,
                range_min=range_min,
                range_max=range_max,
                max_score=max_score,
                absolute_margin=absolute_margin,
                relative_margin=relative_margin,
                sampling_strategy=sampling,
                query_prompt=own.get("query"),
                target_prompt=own.get("positive"),
                image_size=IMAGE_SIZES.get(args.image_resolution),
                batch_size=batch_size,
                seed=settings.seed,
            )
            with written_whole(output_dir / f"{name}.parquet") as file:
                found.to_parquet(str(file))
            typer.echo(f"{name}: {len(found)} of {len(dataset)} pairs have {num_negatives} negatives now.")
    except (FileNotFoundError, ValueError) as error:
        typer.secho(f"cocoa mine-negatives: {error}", fg="red", err=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    app()
