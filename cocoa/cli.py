# SPDX-License-Identifier: Apache-2.0
"""The command line. A command imports what it runs only then: help and wrong arguments load no library."""

from __future__ import annotations

import os
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from .arguments import (
    check_extra,
    check_port,
    find_checkpoint,
    find_folder,
    find_hub_model,
    find_images,
    find_model,
    find_repo,
    find_vectors,
    recipe_file,
)
from .quiet import hide_bars, hide_lines

LIFE = """The life of a model:

  cocoa demo                            see what the bundled model does with emoji
  cocoa train RECIPE                    train your own in three stages
  cocoa eval folder DIR --model MODEL   measure it on your own images; or cocoa eval mmeb
  cocoa embed DIR --model MODEL --output-dir VECTORS
                                        embed a collection; cocoa search VECTORS WORDS searches it
  cocoa app --model MODEL --images DIR  search with it in a browser; or cocoa serve MODEL
  cocoa push MODEL ORG/NAME             publish it, after checks

cocoa COMMAND --help has examples; cocoa --help lists all commands; cocoa doctor checks this installation."""
"""What `cocoa` alone prints."""


class OneLineErrors(TyperGroup):
    """Commands whose errors are a line instead of a traceback, where a user can fix them."""

    def invoke(self, ctx: typer.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except (OSError, ValueError, ImportError) as error:
            typer.secho(f"{ctx.command_path} {ctx.invoked_subcommand}: {error}", fg="red", err=True)
            raise typer.Exit(1) from error


SETTINGS: dict[str, Any] = {"cls": OneLineErrors, "rich_markup_mode": "markdown"}
app = typer.Typer(name="cocoa", pretty_exceptions_show_locals=False, **SETTINGS)
evaluation_app = typer.Typer(
    help="Score models: on MMEB-V1's 36 tasks, on emoji in the same layout, or on a folder of your own images.",
    no_args_is_help=True,
    **SETTINGS,
)
app.add_typer(evaluation_app, name="eval")


def announce(what: str) -> None:
    """Print a command's first line, after its arguments were checked and before it loads libraries, for seconds."""
    if os.environ.get("RANK", "0") == "0":  # of the processes of `accelerate launch`, the first
        typer.echo(f"{what} (loading libraries takes a few seconds)", err=True)


def begin(what: str, output_dir: Path | None = None) -> None:
    """
    Announce a command that loads models in this process.

    Args:
        what (`str`): What the command begins with.
        output_dir (`Path`, *optional*): Made now, so that a folder that cannot be written is an error before the work.
    """
    if output_dir is not None:
        output_dir.mkdir(parents=True, exist_ok=True)
    announce(what)
    hide_bars()


AGAIN = "may be given several times."
CHECKPOINT: dict[str, Any] = {"parser": find_checkpoint, "metavar": "FOLDER|NAME"}
FOLDER: dict[str, Any] = {"parser": find_images, "metavar": "FOLDER"}
FILE: dict[str, Any] = {"exists": True, "dir_okay": False}

RecipeFile = Annotated[
    Path, typer.Argument(parser=recipe_file, metavar="RECIPE", help="A recipe file, or the name of an installed one.")
]
ModelFolder = Annotated[
    Path, typer.Argument(parser=find_folder, metavar="FOLDER", help="Folder that a trainer or save_cocoa wrote.")
]
Private = Annotated[bool, typer.Option("--private", help="Create it as a private repository.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check and list the files; upload nothing.")]


def show_version(is_asked: bool) -> None:
    """Print the version and stop."""
    if is_asked:
        typer.echo(version("cocoa-embed"))
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def main(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """CoCoA: one-vector embeddings of text, images and video from Qwen2-VL, Qwen2.5-VL and Qwen3-VL."""
    # Threads that wait for work do not spin, which takes many times as long where others use the cores too. It is read
    # when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # `datasets` and `evaluate` would report every file that is read to the Hub.
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    hide_lines()
    if ctx.invoked_subcommand is None:
        typer.echo(LIFE)
        return
    from cocoa import check_packages

    check_packages()


@app.command("embed")
def embed_collection(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of images; a folder, file or glob of parquet, Arrow, Lance, JSON lines, CSV or tar files; "
            "a dataset of the Hub."
        ),
    ],
    model: Annotated[str, typer.Option(help="Folder or Hub name of a CoCoA checkpoint.", **CHECKPOINT)],
    output: Annotated[
        Path,
        typer.Option(
            "--output-dir", "--output", help="Folder for the vectors.", file_okay=False
        ),  # the former name too
    ],
    id: Annotated[str | None, typer.Option(help="Column of ids; by default 'id', or the name of a row.")] = None,
    text: Annotated[str | None, typer.Option(help="Column of texts.")] = None,
    image: Annotated[str | None, typer.Option(help="Column of images: paths, bytes, or both.")] = None,
    video: Annotated[str | None, typer.Option(help="Column of paths of videos.")] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(help=f"Column to copy to the output; by default that of texts or captions; {AGAIN}"),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of a dataset of the Hub; by default train.")] = None,
    prompt_name: Annotated[str, typer.Option(help="The checkpoint's prompt.")] = "document",
    format: Annotated[Literal["parquet", "lance"], typer.Option(help="Of the output.")] = "parquet",
    dtype: Annotated[
        Literal["float32", "float16", "int8", "binary"], typer.Option(help="Of the numbers; see docs/embedding.md.")
    ] = "float32",
    truncate_dim: Annotated[int | None, typer.Option(min=1, help="Keep this many numbers of a vector.")] = None,
    rows_per_shard: Annotated[int | None, typer.Option(min=1, help="Rows of a file; by default 1024.")] = None,
    on_bad_row: Annotated[
        Literal["error", "skip"],
        typer.Option(help="'skip' writes why a row has no vector; 'error' stops at the first."),
    ] = "skip",
    retry_errors: Annotated[bool, typer.Option(help="Try rows again that had an error in an earlier call.")] = True,
    engine: Annotated[Literal["local", "ray"], typer.Option(help="Processes, or actors of Ray.")] = "local",
    workers: Annotated[
        int | None, typer.Option(min=1, help="By default one a GPU, or else one a core, as far as memory suffices.")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster (ray://host:10001); by default one starts on this machine.")
    ] = None,
) -> None:
    """
    Embed a collection into a folder: a million images, on one machine or a Ray cluster.

    Call it again after an interruption, or when the collection has grown: what is done is kept. A row that cannot be
    embedded gets an error in place of its vector, and is named at the end.

    Example: `cocoa embed my_pictures --model checkpoints/cocoa-tiny --output-dir vectors`

    Next: `cocoa search vectors "red heart" --html hits.html`
    """
    options = {name: value for name, value in locals().items() if name not in ("source", "model", "output")}
    if engine == "ray":
        check_extra("ray")
    if format == "lance":
        check_extra("lance")
    announce(f"Embedding {source}")  # models are loaded by the workers
    from .embed.run import embed_dataset

    try:
        summary = embed_dataset(source, model, output, **options)
    except KeyboardInterrupt:
        typer.secho("\nStopped. What is done is kept: run the same command again to go on.", fg="yellow", err=True)
        raise typer.Exit(130) from None
    except RuntimeError as error:
        typer.secho(f"cocoa embed: {error}", fg="red", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"{summary.rows - summary.errors:,} of {summary.rows:,} rows are embedded in {summary.output}.")
    if summary.errors:
        typer.secho(f"{summary.errors:,} have an error instead ({summary.error_file}):", fg="yellow")
        for row, reason in islice(summary.bad_rows(), 10):
            typer.echo(f"  {row}: {reason}")
    if summary.lost:
        typer.secho(f"Shards {summary.lost} are missing, since workers died of them.", fg="red", err=True)
        raise typer.Exit(1)


@app.command("search")
def search_vectors(
    folder: Annotated[Path, typer.Argument(help="What `cocoa embed` wrote.", parser=find_vectors, metavar="FOLDER")],
    query: Annotated[str | None, typer.Argument(help="Words to search for.")] = None,
    image: Annotated[Path | None, typer.Option(help="Image to search for, with or without words.", **FILE)] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Hits to show.")] = 10,
    html: Annotated[Path | None, typer.Option(help="Write a page with the images of the hits.")] = None,
    model: Annotated[str | None, typer.Option(help="Where the model is, if it was moved.", **CHECKPOINT)] = None,
    prompt_name: Annotated[str, typer.Option(help="The checkpoint's prompt of queries.")] = "query",
) -> None:
    """
    Search what `cocoa embed` wrote, by words, an image or both. Every vector is compared.

    Example: `cocoa search vectors "red heart" --html hits.html`

    Next: DuckDB, LanceDB and Qdrant read the same files, see docs/embedding.md.
    """
    query = (query or "").strip() or None
    if query is None and image is None:
        raise typer.BadParameter("give words to search for, or --image.")
    asked = {"text": query, "image": None if image is None else str(image)}
    begin(f"Searching {folder}")
    from .embed.search import VectorFolder

    vectors = VectorFolder(folder, model, prompt_name)
    hits = vectors.search(asked, top_k)
    for hit in hits:
        kept = "  ".join(str(value) for value in hit.columns.values() if isinstance(value, (str, int, float)))
        typer.echo(f"{hit.score:7.3f}  {hit.id}  {kept}".rstrip())
    if html is not None:
        vectors.write_page(html, asked, hits)
        typer.echo(f"The page is {html}")


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="The model to serve.", **CHECKPOINT)],
    host: Annotated[str, typer.Option(help="Address to listen on; by default this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name in requests; by default the folder's.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="By default the checkpoint's.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="By default a GPU, where there is one.")] = None,
    max_items: Annotated[int, typer.Option(min=1, help="Texts that a request may hold.")] = 256,
    max_queue: Annotated[int, typer.Option(min=1, help="Inputs that may wait; beyond, the answer is 429.")] = 1024,
    max_body_mib: Annotated[int, typer.Option(min=1, help="Size of a request.")] = 32,
) -> None:
    """
    Serve a model with OpenAI's embeddings API: POST /v1/embeddings, GET /v1/models, GET /health.

    Requests that arrive together are computed together. With COCOA_API_KEY in the environment, clients must send that
    key. Images come inside requests; no URL is fetched. A stop (Ctrl+C, SIGTERM) answers what was accepted.

    Example: `cocoa serve runs/contrastive/final --port 8000`

    Next: `cocoa check-server http://localhost:8000 --model runs/contrastive/final`
    """
    check_extra("serve")
    check_port(host, port)
    begin(f"Loading {model}")
    from .serve.server import serve as run_server

    run_server(
        model,
        host=host,
        port=port,
        name=name,
        dtype=dtype,
        device=device,
        max_items=max_items,
        max_queue=max_queue,
        max_body_bytes=max_body_mib * 2**20,
    )


@app.command()
def check_server(
    url: Annotated[str, typer.Argument(help="Address of the server, such as http://localhost:8000.")],
    model: Annotated[str, typer.Option(help="The model that it should serve.", **CHECKPOINT)],
    name: Annotated[
        str | None, typer.Option(help="The model's name in requests; by default the first that the server lists.")
    ] = None,
) -> None:
    """
    Check that a running server (vLLM, cocoa serve, ...) gives a model's vectors, and name what it does wrong.

    Sends a few texts, images and pairs, and compares the vectors with the folder's. Exits with 1 where some are wrong.

    Example: `cocoa check-server http://localhost:8000 --model runs/contrastive/final`

    Next: docs/serving.md says how to correct each fault.
    """
    begin(f"Comparing {url} with {model}")
    from .serve.check import check_server as compare

    findings = compare(url, model, name=name)
    for finding in findings:
        cosine = "      " if finding.lowest is None else f"{finding.lowest:6.4f}"
        typer.secho(f"{cosine}  {finding.kind}: {finding.says}", fg=None if finding.is_right else "red")
    if not all(finding.is_right for finding in findings):
        raise typer.Exit(1)


@app.command()
def demo(
    model: Annotated[
        Path | None,
        typer.Option(
            parser=find_folder, metavar="FOLDER", help="Checkpoint folder; by default the bundled cocoa-tiny."
        ),
    ] = None,
    query: Annotated[list[str] | None, typer.Option(help=f"Text to search with; {AGAIN}")] = None,
    output_dir: Annotated[Path, typer.Option(help="Folder for the gallery page, numbers and vectors.")] = Path("demo"),
    write_images: Annotated[
        Path | None,
        typer.Option(
            help="Only write 318 emoji and a metadata.csv of their names into this new folder.", file_okay=False
        ),
    ] = None,
) -> None:
    """
    Search the emoji set: scores beside chance and untrained baselines, a few queries, and a gallery page. Vectors are
    kept in OUTPUT_DIR/vectors, so that other queries are answered without embedding the set again.

    Queries are bare names of emoji, as the bundled model was trained on. `cocoa eval emoji` asks the same of it with
    instructions in the style of MMEB, which that model has never seen, and gets far lower scores.

    With --write-images it searches nothing, and writes a folder of images with captions to try other commands on.

    Example: `cocoa demo --query "a cat with heart eyes"`, or `cocoa demo --write-images my_pictures`

    Next: `cocoa app --images my_pictures` searches your own images in a browser.
    """
    if write_images is not None:
        begin(f"Writing emoji into {write_images}", write_images)
        from evaluation.emoji import write_images as write

        typer.echo(f"{write(write_images)} images and metadata.csv are in {write_images}")
        return
    begin("Searching emoji", output_dir)
    from .demo.demo import QUERIES, run_demo

    run_demo(model, output_dir, queries=query or QUERIES)


@app.command()
def train(
    recipe: RecipeFile,
    output_dir: Annotated[Path | None, typer.Option(help="Train here instead of in the recipe's output_dir.")] = None,
) -> None:
    """
    Train a model as described in a recipe, a YAML file. The last line says where the model is.

    On several GPUs: `accelerate launch -m cocoa train RECIPE`, with one of the configurations for DDP, FSDP2 and
    DeepSpeed in docs/training.md.

    Call it again after an interruption: finished stages are kept, and the interrupted one continues from its last
    checkpoint to the same weights.

    Example: `cocoa train my_images.yaml`, a recipe as in docs/tutorials/finetune.md; `cocoa train tiny` trains the
    bundled model again.

    Next: `cocoa eval` measures the model, `cocoa push` publishes it.
    """
    begin(f"Training by {recipe}")
    from accelerate import PartialState

    from evaluation.assets import find_file
    from trainers.recipes.recipe import Recipe, run_recipe

    settings = Recipe.load(recipe)
    if output_dir is not None:
        settings.output_dir = str(output_dir)
    model = run_recipe(settings, find_file)
    if not PartialState().is_main_process:
        return
    if settings.evaluate == "emoji":
        from .demo.demo import run_demo

        run_demo(model, Path(settings.output_dir) / "demo")
    typer.echo(f"The trained model is in {model}")


@app.command("mine-negatives")
def mine(
    model: Annotated[str, typer.Argument(help="Folder or Hub name of a CoCoA checkpoint.", **CHECKPOINT)],
    recipe: RecipeFile,
    output_dir: Annotated[
        Path,
        typer.Argument(help="Output folder; one parquet file per contrastive entry, with columns negative_1, ..."),
    ],
    num_negatives: Annotated[int, typer.Option(min=1, help="Hard negatives to find for each pair.")] = 2,
    range_min: Annotated[
        int, typer.Option(min=0, help="Skip this many of the closest, which are often unlabelled positives.")
    ] = 0,
    range_max: Annotated[int | None, typer.Option(help="Search no further than this rank.")] = None,
    max_score: Annotated[float | None, typer.Option(help="Skip candidates with a higher cosine.")] = None,
    absolute_margin: Annotated[
        float | None, typer.Option(help="Skip candidates whose cosine is not at least this much below the positive's.")
    ] = None,
    relative_margin: Annotated[
        float | None, typer.Option(help="Same margin, as a fraction of the positive's cosine, such as 0.05.")
    ] = None,
    sampling: Annotated[
        Literal["top", "random"], typer.Option(help="'top' takes the closest of the rest, 'random' any of them.")
    ] = "top",
    batch_size: Annotated[int, typer.Option(min=1, help="Inputs embedded at once.")] = 32,
) -> None:
    """
    Mine hard negatives with a model, for the pairs of a recipe's contrastive entries: what is closest to a query
    besides its positive.

    Prompts and the sizes of inputs are those of the recipe's contrastive stage. The vectors are kept in
    OUTPUT_DIR/vectors, so that a call after an interruption continues. Images that are files are not copied: the
    result names them by absolute paths, and does not load once they are moved.

    Example: `cocoa mine-negatives runs/contrastive/final my_images.yaml negatives`

    Next: train on the result, with the source `{path: parquet, data_files: negatives/NAME.parquet}` in a recipe.
    """
    if range_max is not None and range_max < range_min + num_negatives:
        raise typer.BadParameter(
            f"--range-max {range_max} leaves no room for {num_negatives} negatives beyond --range-min {range_min}."
        )
    begin(f"Mining negatives with {model}", output_dir)
    from evaluation.assets import find_file
    from modeling_cocoa.files import atomic_write
    from trainers.data.contrastive_rows import column_prompts, prompts_of
    from trainers.data.mining import load_encoder, mine_negatives
    from trainers.recipes.recipe import Recipe, prompts_for_variants, stage_arguments
    from trainers.recipes.recipe_data import contrastive_data

    settings = Recipe.load(recipe)
    pairs = contrastive_data(settings.data, find_file, settings.seed)
    args = stage_arguments(settings, "contrastive")
    prompts_for_variants(args, list(pairs))
    prompts = column_prompts(args, pairs)
    encoder = load_encoder(model, processor=args.load_processor(model))
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
        typer.echo(f"{name}: {len(found)} of {len(dataset)} pairs now have {num_negatives} negatives.")


Models = Annotated[
    list[str] | None,
    typer.Option("--model", help=f"Folder or Hub name of a CoCoA checkpoint; {AGAIN}", **CHECKPOINT),
]
Baselines = Annotated[
    list[str] | None,
    typer.Option(
        "--baseline",
        help=f"Any other model that SentenceTransformer loads, for comparison; {AGAIN}",
        parser=find_model,
        metavar="FOLDER|NAME",
    ),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option("--tasks", help=f"Only this task, or all of a kind (such as grounding); {AGAIN}"),
]
Output = Annotated[Path, typer.Option(help="Folder for vectors, scores, report, chart and pages.")]
ImageResolution = Annotated[
    Literal["high", "mid", "low"] | None,
    typer.Option(
        "--image-resolution",
        "--resolution",  # the former name
        help="Resize images to 1344, 672 or 128 pixels a side, as the model was trained.",
    ),
]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Batch size; by default chosen by the memory available.")]


@evaluation_app.command("mmeb")
def evaluate_on_mmeb(
    data: Annotated[
        str, typer.Option(help="Folder with a subfolder for each task, or Hub name (TIGER-Lab/MMEB-eval).")
    ],
    images: Annotated[
        Path, typer.Option(help="Folder with the unpacked images.zip, which image paths are relative to.", **FOLDER)
    ],
    model: Models = None,
    baseline: Baselines = None,
    tasks: Tasks = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only this many rows of a task; a partial score.")] = None,
    on_bad_row: Annotated[
        Literal["error", "skip"], typer.Option(help="'skip' counts rows that cannot be scored; a partial score.")
    ] = "error",
    image_resolution: ImageResolution = None,
    batch_size: BatchSize = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of models from the Hub.")] = None,
    output_dir: Output = Path("mmeb"),
) -> None:
    """
    MMEB-V1's score, by the protocol of the benchmark's own evaluator.

    Both published layouts are read: TIGER-Lab/MMEB-eval and ziyjiang/MMEB_Test_Instruct. Each distinct input is
    embedded once and kept, so that a call after an interruption continues. Several GPUs share the work: `accelerate
    launch -m cocoa eval mmeb ...`

    Example: `cocoa eval mmeb --model runs/contrastive/final --data TIGER-Lab/MMEB-eval --images mmeb_images`

    Next: `cocoa card runs/contrastive/final --scores mmeb/.../scores.json` adds the results to the model's card.
    """
    from evaluation.mmeb.arguments import check_arguments
    from evaluation.mmeb.tasks import MMEB_V1, find_tasks

    chosen = find_tasks(tasks, MMEB_V1)
    check_arguments(model or [], baseline or [], chosen, data, images, revision)
    begin("Evaluating on MMEB-V1", output_dir)
    from evaluation.mmeb.evaluate import run_mmeb

    run_mmeb(
        model or [],
        baseline or [],
        chosen,
        data,
        images,
        output_dir,
        benchmark="MMEB-V1",
        of_tasks=len(MMEB_V1),
        limit=limit,
        on_bad_row=on_bad_row,
        image_resolution=image_resolution,
        batch_size=batch_size,
        revision=revision,
    )


@evaluation_app.command("emoji")
def evaluate_on_emoji(
    model: Models = None,
    baseline: Baselines = None,
    tasks: Tasks = None,
    queries: Annotated[int, typer.Option(min=1, help="Maximum number of queries per task.")] = 250,
    image_resolution: ImageResolution = None,
    batch_size: BatchSize = None,
    output_dir: Output = Path("emoji"),
) -> None:
    """
    The same protocol on emoji, offline: six tasks, each on concepts seen in training (IND) and on held-out ones (OOD).

    The tasks are written to OUTPUT_DIR/data in MMEB-V1's layout, with an instruction in each query. The bundled model
    was trained on bare names and has never seen an instruction, so its scores are far below those of `cocoa demo`;
    the report shows chance beside them. Without --model and --baseline it is that model that is evaluated.

    Example: `cocoa eval emoji --model runs/contrastive/final`

    Next: open OUTPUT_DIR/MODEL-.../pages for hits and misses; `cocoa card --scores` adds the scores to the card.
    """
    from evaluation.mmeb.tasks import EMOJI_BENCHMARK, EMOJI_TASKS, find_tasks

    chosen = find_tasks(tasks, EMOJI_TASKS)
    begin("Evaluating on emoji", output_dir)
    import datasets
    from accelerate import PartialState

    from evaluation.assets import asset_path
    from evaluation.emoji_tasks import write_emoji_tasks
    from evaluation.mmeb.evaluate import run_mmeb

    from .demo.demo import CHECKPOINT

    datasets.disable_progress_bars()  # of files that are written in no time
    with PartialState().main_process_first():
        folder = write_emoji_tasks(output_dir / "data", queries)
    run_mmeb(
        model or ([] if baseline else [str(asset_path(CHECKPOINT))]),
        baseline or [],
        chosen,
        str(folder),
        folder / "images",
        output_dir,
        benchmark=EMOJI_BENCHMARK,
        of_tasks=len(EMOJI_TASKS),
        image_resolution=image_resolution,
        batch_size=batch_size,
    )


@evaluation_app.command("folder")
def evaluate_on_folder(
    folder: Annotated[Path, typer.Argument(help="Images, and a metadata.csv of file_name and text.", **FOLDER)],
    model: Models = None,
    baseline: Baselines = None,
    caption: Annotated[str | None, typer.Option(help="Column of captions; by default text or caption.")] = None,
    queries: Annotated[int, typer.Option(min=1, help="Maximum number of queries in each direction.")] = 1000,
    image_resolution: ImageResolution = None,
    batch_size: BatchSize = None,
    output_dir: Output = Path("results"),
) -> None:
    """
    Your own images and captions: captions search the images, and images the captions.

    Prints recall beside chance, and writes pages of hits and misses. The model's own prompts for queries and documents
    are used. Vectors are kept, so that a call after an interruption continues, and several --model are compared on the
    same inputs. Without --model and --baseline it is the bundled model that is evaluated, which knows only emoji.

    Example: `cocoa eval folder my_pictures --model runs/contrastive/final`

    Next: `cocoa card runs/contrastive/final --scores results/.../scores.json` adds the results to the model's card.
    """
    if not any((folder / f"metadata.{ending}").is_file() for ending in ("csv", "jsonl", "parquet")):
        raise FileNotFoundError(
            f"{folder} has no captions: add a metadata.csv with the columns file_name and text, a line for each image."
        )
    begin(f"Evaluating on {folder}", output_dir)
    import datasets

    from evaluation.assets import asset_path
    from evaluation.folder import run_folder

    from .demo.demo import CHECKPOINT

    datasets.disable_progress_bars()
    run_folder(
        model or ([] if baseline else [str(asset_path(CHECKPOINT))]),
        baseline or [],
        folder,
        output_dir,
        caption=caption,
        queries=queries,
        image_resolution=image_resolution,
        batch_size=batch_size,
    )


@app.command()
def card(
    folder: ModelFolder,
    scores: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, help=f"A scores.json of `cocoa eval` for this model; {AGAIN}"),
    ] = None,
) -> None:
    """
    Write a model's card from what its folder holds: stages, data, results, reconstructions.

    What the folder does not say (license, language, model_name, train_datasets, notes in Markdown, ...) is read from
    its file card.yaml.

    Example: `cocoa card runs/contrastive/final --scores mmeb/final-.../scores.json`

    Next: `cocoa push runs/contrastive/final my-organization/my-model --dry-run`
    """
    begin(f"Writing the card of {folder}")
    from hub_cards.card_data import write_card
    from hub_cards.results import add_result

    for file in scores or []:
        add_result(folder, file)
    typer.echo(f"The card is {write_card(folder)}")


@app.command()
def push(
    folder: ModelFolder,
    repo: Annotated[
        str,
        typer.Argument(parser=find_repo, metavar="REPO", help="ORGANIZATION/NAME; created if it does not exist."),
    ],
    private: Private = False,
    revision: Annotated[str | None, typer.Option(help="Branch; created if it does not exist.")] = None,
    dry_run: DryRun = False,
) -> None:
    """
    Check a model and publish it on the Hub, as one commit.

    Before anything is uploaded, its files are checked (safetensors only, finite weights, a valid card, the package's
    own code, no paths of this machine, no secrets), and it is loaded in a fresh process through both loaders.
    Log in first with `hf auth login`, or set HF_TOKEN.

    Example: `cocoa push runs/contrastive/final my-organization/my-model --dry-run`

    Next: load it anywhere with `SentenceTransformer("my-organization/my-model")`, or publish the app with it:
    `cocoa push-space`.
    """
    begin(f"Checking {folder}")
    from hub_cards.push import push_model

    address = push_model(folder, repo, private=private or None, revision=revision, dry_run=dry_run)
    if address is not None:
        typer.echo(f"Published: {address}")


@app.command("app")
def run_app(
    model: Annotated[
        str | None,
        typer.Option(help="Folder or Hub name of a checkpoint; by default the bundled cocoa-tiny.", **CHECKPOINT),
    ] = None,
    rebuild_model: Annotated[
        str | None,
        typer.Option(
            help="A checkpoint of the bridge stage, to show what it reconstructs from the EOS.", **CHECKPOINT
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option("--images", "--pictures", help="Folder to search instead of emoji; see the README.", **FOLDER),
    ] = None,
    vectors: Annotated[
        Path | None, typer.Option(help="Folder to keep vectors in: the next start embeds only what is new.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="By default the first free one from 7860 on.")
    ] = None,
) -> None:
    """
    Search images and texts by text, image or both in a browser, on this machine only.

    Needs the extra [app] (gradio).

    Example: `cocoa app --images my_pictures --vectors my_vectors`

    Next: `cocoa push-space` publishes it, with the emoji.
    """
    check_extra("app")
    if port is not None:
        check_port("127.0.0.1", port)
    begin("Starting the app")
    from .app.app import serve

    serve(model, rebuild_model=rebuild_model, images=images, vectors=vectors, port=port)


@app.command("push-space")
def push_app(
    repo: Annotated[
        str,
        typer.Argument(
            parser=find_repo, metavar="REPO", help="ORGANIZATION/NAME of the Space; created if it does not exist."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            parser=find_hub_model,
            metavar="NAME",
            help="Hub name of the model to search with; by default the tiny one, which is uploaded too.",
        ),
    ] = None,
    rebuild_model: Annotated[
        str | None,
        typer.Option(
            parser=find_hub_model,
            metavar="NAME",
            help="Hub name of a checkpoint of the bridge stage, for reconstructions.",
        ),
    ] = None,
    private: Private = False,
    dry_run: DryRun = False,
) -> None:
    """
    Publish the app as a Space on the Hub, as one commit.

    Example: `cocoa push-space my-organization/emoji-search --dry-run`

    Next: the Space needs a minute to build; its page shows the log.
    """
    begin("Checking the files of the Space")
    from .app.space import push_space

    address = push_space(repo, model=model, rebuild_model=rebuild_model, private=private or None, dry_run=dry_run)
    if address is not None:
        typer.echo(f"Published: {address}")


@app.command()
def doctor() -> None:
    """
    Show versions, devices, the attention that is used, and what is missing for which extra.

    Example: `cocoa doctor`

    Next: paste its output into a bug report.
    """
    begin("Looking at this installation")
    from .doctor import examine

    for line in examine():
        typer.echo(line)
