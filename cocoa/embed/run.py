# SPDX-License-Identifier: Apache-2.0
"""A source to a folder of vectors: the manifest, and shards to workers until all are done."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .formats import import_lance
from .output import LANCE, MANIFEST, TYPES, Output, schema_of
from .plan import PLAN, Plan, make_plan
from .source import find_source
from .worker import Job, shard_digest

logger = logging.getLogger(__name__)

ROWS_PER_SHARD = 1024
"""As many as share batches; see `INPUTS_AT_ONCE` of the fast path."""
ATTEMPTS = 3
"""Workers that may die of one shard."""
ERRORS = "errors.jsonl"


@dataclass(frozen=True)
class Summary:
    """
    How a run ended.

    Args:
        output (`Path`), rows, errors (`int`): The folder, its rows, and how many of them have no vector.
        lost (`list[int]`): Shards that killed three workers, and are not there.
    """

    output: Path
    rows: int
    errors: int
    lost: list[int]

    @property
    def error_file(self) -> Path:
        """Ids of rows without a vector, and why, as JSON lines."""
        return self.output / ERRORS

    def bad_rows(self) -> Iterator[tuple[Any, str]]:
        """What the error file holds."""
        with open(self.error_file, encoding="utf-8") as file:
            for row in map(json.loads, file):
                yield row["id"], row["error"]


def embed_dataset(
    source: str,
    model: str,
    output: str | os.PathLike,
    *,
    id: str | None = None,
    text: str | None = None,
    image: str | None = None,
    video: str | None = None,
    keep: Iterable[str] | None = None,
    split: str | None = None,
    prompt_name: str = "document",
    format: str = "parquet",
    dtype: str = "float32",
    truncate_dim: int | None = None,
    rows_per_shard: int | None = None,
    on_bad_row: str = "skip",
    retry_errors: bool = True,
    engine: str = "local",
    workers: int | None = None,
    address: str | None = None,
    show_progress_bar: bool = True,
) -> Summary:
    """
    Embed a collection into a folder, of any size. Called again after an interruption, or when the collection has
    grown, it embeds what is missing.

    Processes are started with `spawn`: a script calls this under `if __name__ == "__main__":`.

    Args:
        source (`str`): What to embed; see [`find_source`].
        model (`str`): Folder or Hub name of a CoCoA checkpoint.
        output (`str` or `os.PathLike`): Folder for the vectors. A table a shard with the columns `id`, `embedding`,
            `error` (None, or why there is no vector) and those kept.
        id (`str`, *optional*): Column of ids; by default `"id"`, or the name of a row.
        text (`str`, *optional*): Column of texts.
        image (`str`, *optional*): Column of images: paths, bytes, or both.
        video (`str`, *optional*): Column of paths of videos.
        keep (`Iterable[str]`, *optional*): Columns to copy to the output; by default those of an earlier call for the
            same output, or that of texts or captions; see [`find_source`].
        split (`str`, *optional*): Of a dataset of the Hub; by default train.
        prompt_name (`str`, defaults to `"document"`): The checkpoint's prompt.
        format (`str`, defaults to `"parquet"`): Or `"lance"`, a dataset of Lance, and a table of LanceDB.
        dtype (`str`, defaults to `"float32"`): Type of the numbers; see [`CocoaEmbedder`].
        truncate_dim (`int`, *optional*): Keep this many numbers of a vector; see [`CocoaEmbedder`].
        rows_per_shard (`int`, defaults to 1024): What a worker embeds at once, and an interruption loses.
        on_bad_row (`str`, defaults to `"skip"`): A row that cannot be embedded has no vector, and an `error`; with
            `"error"` the first one ends the run.
        retry_errors (`bool`, defaults to `True`): Try rows with an `error` again, in a folder that has such.
        engine (`str`, defaults to `"local"`): Processes of this machine, or actors of `"ray"`.
        workers (`int`, *optional*): By default one a GPU, or else one a core, as far as memory suffices.
        address (`str`, *optional*): Of a Ray cluster; by default one is started on this machine.
        show_progress_bar (`bool`, defaults to `True`): Count rows.

    Returns:
        [`Summary`]: Rows, errors, and where they are.

    Raises:
        FileNotFoundError, ValueError: a wrong argument; the folder holds vectors of something else.
        OSError: the disk is full, or the folder cannot be written to; what is done stays.
    """
    folder = Path(output).expanduser().absolute()
    old = read_manifest(folder)
    if folder.is_relative_to(Path(source).expanduser().absolute()):
        raise ValueError(f"--output-dir: {folder} is in the source, {source}; give a folder elsewhere.")
    found = find_source(source, split=split, id=id, text=text, image=image, video=video, keep=keep)
    if keep is None and old.get("source") == found.label and {*old["columns"]["keep"]} <= {*found.schema.names}:
        found = replace(found, keep=tuple(old["columns"]["keep"]))
    rows_per_shard = rows_per_shard or old.get("rows_per_shard") or ROWS_PER_SHARD
    settings = {
        "source": found.label,
        "columns": {**found.columns, "keep": list(found.keep), "split": split},
        "format": format,
        "dtype": dtype,
        "rows_per_shard": rows_per_shard,
    }
    check_arguments(folder, old, settings, on_bad_row=on_bad_row, engine=engine, workers=workers, address=address)
    out = Output(folder, format)
    job = Job(found, out, model, prompt_name, dtype, truncate_dim, on_bad_row)
    out.prepare()
    if not old:
        (folder / PLAN).unlink(missing_ok=True)  # of a run that ended before it embedded anything
    threads = old.get("threads") if workers is None else None
    if engine == "ray":
        from .ray_engine import RayEngine

        pool = RayEngine(job, workers, threads, address)
    else:
        from .local import LocalEngine

        pool = LocalEngine(job, workers, threads)
    try:
        pool.start()  # it loads the model while files are listed
        plan = make_plan(found, folder, rows_per_shard)
        worker, description = load_first(pool)
        if old:
            check_same(folder, old, description)
        named = str(Path(model).absolute()) if Path(model).is_dir() else model
        settings |= {"model": named, **description, "threads": old.get("threads", pool.threads)}
        write_manifest(folder, {**settings, "rows": sum(plan.rows), "source_digest": plan.digest})
        shards = list(unfinished(job, plan, description, retry_errors))
        done = sum(plan.rows) - sum(plan.rows[shard] for shard in shards)
        options = {"desc": "Embedding", "unit": "row", "disable": not show_progress_bar}
        with tqdm(total=sum(plan.rows), initial=done, **options) as bar:
            lost = run_shards(plan, pool, worker, description, shards, bar)
        schema = schema_of(found, dtype, description["dim"])
        out.finish([shard for shard in range(len(plan)) if shard not in lost], schema)
    finally:
        pool.close()
    return finish(job, plan, lost)


def read_manifest(folder: Path) -> dict[str, Any]:
    """
    What an output folder holds; empty where it holds nothing.

    Raises:
        ValueError: it holds shards without a manifest.
    """
    if (folder / MANIFEST).is_file():
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if any(folder.glob("shard-*")) or (folder / LANCE).exists():
        raise ValueError(f"{folder} holds shards without a {MANIFEST}; give another --output-dir.")
    return {}


def check_arguments(
    folder: Path,
    old: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    on_bad_row: str,
    engine: str,
    workers: int | None,
    address: str | None,
) -> None:
    """Raise `ValueError` where an argument is wrong by itself, or does not fit what the folder holds."""
    choices = {
        "format": (settings["format"], ("parquet", "lance")),
        "dtype": (settings["dtype"], tuple(TYPES)),
        "on_bad_row": (on_bad_row, ("skip", "error")),
        "engine": (engine, ("local", "ray")),
    }
    for name, (value, known) in choices.items():
        if value not in known:
            raise ValueError(f"{name} must be one of {list(known)}; got {value!r}.")
    for name, value in (("rows_per_shard", settings["rows_per_shard"]), ("workers", workers)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be 1 or more; got {value}.")
    if address is not None and engine != "ray":
        raise ValueError("--address is that of a Ray cluster; give --engine ray too.")
    if settings["format"] == "lance":
        import_lance()
    if old:
        check_same(folder, old, settings)


def check_same(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise `ValueError` where a folder holds vectors that were made otherwise; says what differs."""
    for name, value in new.items():
        if old.get(name) == value:
            continue
        if name == "libraries":
            changed = [f"{key} {old[name][key]} (now {value[key]})" for key in value if old[name][key] != value[key]]
            was = f"with {', '.join(changed)}"
        elif name == "fingerprint":
            was = f"by another model ({old['model']}), or its weights, configuration or processor were changed"
        else:
            was = f"with {name} {old.get(name)!r}, and not {value!r}"
        raise ValueError(f"{folder} holds vectors that were made {was}. Give the same again, or another --output-dir.")


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, whole or not at all."""
    from modeling_cocoa.files import atomic_write

    with atomic_write(folder / MANIFEST) as path:
        path.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def load_first(pool: Any) -> tuple[Any, dict[str, Any]]:
    """
    Wait until the worker that was started has loaded the model.

    Returns:
        The worker, and what [`CocoaEmbedder.describe`] gives.

    Raises:
        Exception: what the worker says.
        RuntimeError: [`ATTEMPTS`] workers died.
    """
    deaths = 0
    while True:
        for worker, kind, value in pool.wait():
            if kind == "error":
                raise value
            if kind == "ready":
                return worker, value
            deaths += 1
            if deaths == ATTEMPTS:
                raise RuntimeError(f"Workers die while they load the model ({value}); is there enough memory?")
            pool.start()


def unfinished(job: Job, plan: Plan, description: dict[str, Any], retry_errors: bool) -> Iterator[int]:
    """Shards whose file is not there, is of something else, or has rows to try again."""
    for shard in range(len(plan)):
        about = job.output.about(shard)
        if about.get("digest") != shard_digest(plan, shard, description) or (retry_errors and about["errors"]):
            yield shard


def run_shards(
    plan: Plan, pool: Any, worker: Any, description: dict[str, Any], shards: list[int], bar: tqdm
) -> list[int]:
    """
    Have workers embed shards.

    Args:
        pool (`LocalEngine` or `RayEngine`).
        worker: The one that is there.
        description (`dict`): What it says of its model; others must say the same.
        shards (`list[int]`).
        bar (`tqdm`): Counts rows.

    Returns:
        `list[int]`: Shards that killed [`ATTEMPTS`] workers.

    Raises:
        Exception: what a worker says, since another would say the same: a full disk, a source that vanished.
    """
    pending, idle, lost = deque(shards), [worker], []
    busy: dict[Any, int | None] = {pool.start(): None for _ in range(min(pool.workers, len(shards)) - 1)}
    deaths: Counter[int | None] = Counter()
    while pending or busy:
        while pending and idle:
            busy[idle[-1]] = pending.popleft()
            pool.send(idle[-1], busy[idle.pop()])
        for worker, kind, value in pool.wait():
            shard = busy.pop(worker)
            if kind == "error":
                raise value
            if kind == "died":
                deaths[shard] += 1
                if shard is None and deaths[None] == ATTEMPTS:
                    raise RuntimeError(f"Workers die while they load the model ({value}); is there enough memory?")
                if shard is not None and deaths[shard] == ATTEMPTS:
                    logger.error("Shard %d is left out: %d workers died of it (%s).", shard, ATTEMPTS, value)
                    lost.append(shard)
                elif shard is not None:
                    logger.warning("A worker died (%s); shard %d is embedded again.", value, shard)
                    pending.appendleft(shard)
                if pending:
                    busy[pool.start()] = None
                continue
            if kind == "ready" and value != description:
                raise ValueError(f"A worker has another model or other libraries: {value}, and not {description}.")
            if kind == "done":
                bar.update(value)
            idle.append(worker)
    return sorted(lost)


def finish(job: Job, plan: Plan, lost: list[int]) -> Summary:
    """Make the folder complete, and count and name its rows with errors."""
    from modeling_cocoa.files import atomic_write

    there = [shard for shard in range(len(plan)) if shard not in lost]
    counts = [job.output.about(shard)["errors"] for shard in there]
    with atomic_write(job.output.folder / ERRORS) as path, open(path, "w", encoding="utf-8") as file:
        for shard, count in zip(there, counts, strict=True):
            rows = job.output.read(shard, ["id", "error"]).to_pylist() if count else ()
            file.writelines(json.dumps(row) + "\n" for row in rows if row["error"] is not None)
    return Summary(job.output.folder, sum(plan.rows[shard] for shard in there), sum(counts), lost)
