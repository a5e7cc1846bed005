# SPDX-License-Identifier: Apache-2.0
"""The command line. Each command is a few lines that call a room, imported only then: `--help` answers at once."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import typer

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
    # Threads that wait for work do not spin, which on cores that others use too takes many times as long. It is read
    # when torch is imported, which commands do later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # `datasets` and `evaluate` would tell their makers of every file that is read.
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    # bitsandbytes, of the extra [qlora], warns at every start that a faster kernel could be installed.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from cocoa import check_packages

    with errors_in_one_line("cocoa"):
        check_packages()


@contextmanager
def errors_in_one_line(command: str) -> Iterator[None]:
    """Within it, an error that a user can fix is said in a line, and ends the command."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:  # the last of an extra that is not installed, or what hides us
        typer.secho(f"{command}: {error}", fg="red", err=True)
        raise typer.Exit(1) from error


def require_checkpoints(*names: str | os.PathLike | None, has_owner: bool = True) -> None:
    """
    Raise `FileNotFoundError` where a checkpoint's folder is not there, before anything else is loaded or asked for.

    Args:
        names (`str` or `os.PathLike`, *optional*): Folders, or names on the Hub.
        has_owner (`bool`, defaults to `True`): As in [`~checkpoint_files.check_is_there`].
    """
    from modeling_cocoa.checkpoint_files import check_is_there

    for name in names:
        if name is not None:
            check_is_there(os.fspath(name), has_owner=has_owner)


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

    with errors_in_one_line("cocoa demo"):
        run_demo(model, output_dir, queries=query or QUERIES)


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

    with errors_in_one_line("cocoa train"):
        settings = Recipe.load(find_recipe(recipe))
        if output_dir is not None:
            settings.output_dir = str(output_dir)
        model = run_recipe(settings, find_file)
        if not PartialState().is_main_process:
            return  # of several that trained together, one goes on
        if settings.evaluate == "emoji":
            from evaluation.demo import run_demo

            run_demo(model, Path(settings.output_dir) / "demo")
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
    from modeling_cocoa.files import atomic_write
    from trainers.contrastive_rows import column_prompts, prompts_of
    from trainers.mining import load_encoder, mine_negatives
    from trainers.recipe import Recipe, find_recipe, prompts_for_variants, stage_arguments
    from trainers.recipe_data import contrastive_data

    with errors_in_one_line("cocoa mine-negatives"):
        require_checkpoints(model)
        settings = Recipe.load(find_recipe(recipe))
        pairs = contrastive_data(settings.data, find_file, settings.seed)
        args = stage_arguments(settings, "contrastive")
        prompts_for_variants(args, list(pairs))
        prompts = column_prompts(args, pairs)
        encoder = load_encoder(model, processor=args.load_processor(model))
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
                image_size=args.image_size,
                batch_size=batch_size,
                seed=settings.seed,
            )
            with atomic_write(output_dir / f"{name}.parquet") as file:
                found.to_parquet(str(file))
            typer.echo(f"{name}: {len(found)} of {len(dataset)} pairs have {num_negatives} negatives now.")


evaluation_app = typer.Typer(
    help="Score models on MMEB-V1's 36 tasks, or on emoji in the same layout.", no_args_is_help=True
)
app.add_typer(evaluation_app, name="eval")

Models = Annotated[
    list[str] | None, typer.Option("--model", help="Folder or Hub name of a CoCoA checkpoint; may be repeated.")
]
Baselines = Annotated[
    list[str] | None,
    typer.Option(
        "--baseline", help="Any other model that SentenceTransformer loads, for comparison; may be repeated."
    ),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option("--tasks", help="Only this task, or all of this kind (such as grounding); may be repeated."),
]
Output = Annotated[Path, typer.Option(help="Folder for vectors, scores, report, chart and pages.")]
Resolution = Annotated[
    Literal["high", "mid", "low"] | None,
    typer.Option(help="Stretch images to 1344, 672 or 128 pixels a side, as the model was trained."),
]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Inputs at once; by default as many as memory suits.")]


@evaluation_app.command("mmeb")
def evaluate_on_mmeb(
    data: Annotated[
        str, typer.Option(help="Folder with a subfolder for each task, or Hub name (TIGER-Lab/MMEB-eval).")
    ],
    images: Annotated[Path, typer.Option(help="Folder that the image paths begin in: images.zip, unpacked.")],
    model: Models = None,
    baseline: Baselines = None,
    tasks: Tasks = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many rows of each task; a partial score.")] = None,
    on_bad_row: Annotated[
        Literal["raise", "skip"], typer.Option(help="'skip' counts rows that cannot be scored; a partial score.")
    ] = "raise",
    resolution: Resolution = None,
    batch_size: BatchSize = None,
    revision: Annotated[str | None, typer.Option(help="Of the models on the Hub.")] = None,
    output_dir: Output = Path("mmeb"),
) -> None:
    """
    MMEB-V1's score, by the protocol of the benchmark's own evaluator.

    Both published layouts are read: TIGER-Lab/MMEB-eval and ziyjiang/MMEB_Test_Instruct. Each distinct input is
    embedded once and kept, so that a call after an interruption goes on. Several GPUs share the work: accelerate
    launch -m cocoa eval mmeb ...
    """
    from evaluation.mmeb_tasks import MMEB_V1, PUBLISHED, find_tasks
    from evaluation.run_mmeb import run_mmeb

    with errors_in_one_line("cocoa eval mmeb"):
        require_checkpoints(*(model or []))
        require_checkpoints(*(baseline or []), has_owner=False)
        run_mmeb(
            model or [],
            baseline or [],
            find_tasks(tasks, MMEB_V1),
            data,
            images,
            output_dir,
            benchmark="MMEB-V1",
            of_tasks=len(MMEB_V1),
            published=PUBLISHED,
            limit=limit,
            on_bad_row=on_bad_row,
            resolution=resolution,
            batch_size=batch_size,
            revision=revision,
        )


@evaluation_app.command("emoji")
def evaluate_on_emoji(
    model: Models = None,
    baseline: Baselines = None,
    tasks: Tasks = None,
    queries: Annotated[int, typer.Option(min=1, help="Of each task at most.")] = 250,
    resolution: Resolution = None,
    batch_size: BatchSize = None,
    output_dir: Output = Path("emoji"),
) -> None:
    """
    The same on emoji, with no download: six tasks, on concepts seen in training (IND) and on held-out ones (OOD).

    The tasks are written to OUTPUT_DIR/data in MMEB-V1's layout. Without --model and --baseline: the tiny checkpoint.
    """
    from accelerate import PartialState

    from evaluation.assets import asset_path
    from evaluation.demo import CHECKPOINT
    from evaluation.emoji_tasks import EMOJI_TASKS, write_emoji_tasks
    from evaluation.mmeb_tasks import find_tasks
    from evaluation.run_mmeb import run_mmeb

    with errors_in_one_line("cocoa eval emoji"):
        require_checkpoints(*(model or []))
        require_checkpoints(*(baseline or []), has_owner=False)
        chosen = find_tasks(tasks, EMOJI_TASKS)
        with PartialState().main_process_first():  # one of several processes writes
            folder = write_emoji_tasks(output_dir / "data", queries)
        run_mmeb(
            model or ([] if baseline else [str(asset_path(CHECKPOINT))]),
            baseline or [],
            chosen,
            str(folder),
            folder / "images",
            output_dir,
            benchmark="Emoji in MMEB-V1's layout",
            of_tasks=len(EMOJI_TASKS),
            resolution=resolution,
            batch_size=batch_size,
        )


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(help="Of a model that a trainer or save_cocoa wrote.")],
    scores: Annotated[
        list[Path] | None, typer.Option(help="A scores.json that `cocoa eval` wrote for this model; may be repeated.")
    ] = None,
) -> None:
    """
    Write a model's card from what its folder holds: stages, data, results, pictures.

    What it cannot know (license, language, model_name, train_datasets, notes in Markdown, ...) is read from the file
    card.yaml in the folder.
    """
    from hub_cards.card_data import write_card
    from hub_cards.results import add_result

    with errors_in_one_line("cocoa card"):
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no folder {folder}.")
        for file in scores or []:
            add_result(folder, file)
        typer.echo(f"The card is {write_card(folder)}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Of a model that a trainer or save_cocoa wrote.")],
    repo: Annotated[str, typer.Argument(help="ORGANIZATION/NAME on the Hub; created if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Create it for those with access only.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; created if there is none.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list; upload nothing.")] = False,
) -> None:
    """
    Check a model and publish it on the Hub, as one commit.

    Before anything is uploaded, its files are checked (safetensors only, weights that are numbers, a valid card, the
    package's own code, no paths of this machine, no secrets), and it is loaded in a fresh process in both ways.
    Log in first with `hf auth login`, or set HF_TOKEN.
    """
    from hub_cards.push import push_model

    with errors_in_one_line("cocoa push"):
        address = push_model(folder, repo, private=private or None, revision=revision, dry_run=dry_run)
    if address is not None:
        typer.echo(f"Published: {address}")


@app.command("app")
def run_app(
    model: Annotated[
        str | None, typer.Option(help="Folder or Hub name of a checkpoint; the tiny one that is installed otherwise.")
    ] = None,
    rebuild_model: Annotated[
        str | None,
        typer.Option(
            help="One that the bridge stage saved, to see what it rebuilds from the EOS; without it and without "
            "--model, the tiny one's."
        ),
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(help="A folder to search, with or without a metadata.csv of file_name and text; else emoji."),
    ] = None,
    vectors: Annotated[
        Path | None,
        typer.Option(
            help="Folder to keep vectors in: the next start embeds only what is new. Without it nothing is kept."
        ),
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="By default the first that is free from 7860 on.")
    ] = None,
) -> None:
    """
    Search pictures and texts by words or pictures in a browser, on this machine alone.

    Needs the extra "app" (gradio).
    """
    with errors_in_one_line("cocoa app"):
        require_checkpoints(model, rebuild_model)
        os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
        from hub_cards.space.app import serve

        serve(model, rebuild_model=rebuild_model, pictures=pictures, vectors=vectors, port=port)


@app.command("push-space")
def push_app(
    repo: Annotated[str, typer.Argument(help="ORGANIZATION/NAME of the Space; created if there is none.")],
    model: Annotated[
        str | None,
        typer.Option(help="Hub name of the model to search with; by default the tiny one, which it carries."),
    ] = None,
    rebuild_model: Annotated[
        str | None, typer.Option(help="Hub name of one that the bridge stage saved, to rebuild with.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Create it for those with access only.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be uploaded; upload nothing.")] = False,
) -> None:
    """Publish the app as a Space on the Hub, as one commit."""
    from hub_cards.push import push_space

    with errors_in_one_line("cocoa push-space"):
        address = push_space(repo, model=model, rebuild_model=rebuild_model, private=private or None, dry_run=dry_run)
    if address is not None:
        typer.echo(f"Published: {address}")
