# SPDX-License-Identifier: Apache-2.0
"""`cocoa eval folder`: how well models search a folder of images by their captions, and captions by images."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Image, Value, load_dataset

from modeling_cocoa.folders import CAPTIONS, list_images

from .digests import digest_content
from .folder_report import FOLDER_TASKS, folder_report
from .mmeb.data import BenchmarkData, Item, TaskData
from .mmeb.evaluate import digest_images, run_models
from .mmeb.scores import Scores
from .mmeb.tasks import Task
from .naming import nearest


def run_folder(
    models: Sequence[str],
    baselines: Sequence[str],
    folder: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    caption: str | None = None,
    queries: int = 1000,
    **options: Any,
) -> list[Scores]:
    """
    Score models on a folder of images with captions, and write what [`~mmeb.evaluate.run_mmeb`] writes, without a
    chart. A row without a caption, or whose image is missing, cannot be read, or was named before, is left out and
    counted.

    Args:
        models (`Sequence[str]`): Folders or Hub names of CoCoA checkpoints.
        baselines (`Sequence[str]`): Of any other models of sentence-transformers.
        folder (`str` or `os.PathLike`): Images, and a `metadata.csv` (or `.jsonl`) with the columns `file_name` and
            `text`.
        output_dir (`str` or `os.PathLike`): For the results.
        caption (`str`, *optional*): The column of captions; by default `text` or `caption`.
        queries (`int`, defaults to 1000): Queries of each direction, drawn; candidates are always all.
        options: Further ones of [`~mmeb.evaluate.run_models`].

    Raises:
        ValueError: the folder has no images, or no captions.
    """
    rows = read_images(folder, caption, needs_captions=True)
    pairs, left_out = caption_pairs(rows)
    if not pairs:
        raise ValueError(f"All captions in {folder} are empty.")
    digests = digest_images(path for path, _ in pairs.values())
    revision = digest_content(sorted((digests[path] or "missing", text) for path, text in pairs.values()))
    tasks, image_dir = dict.fromkeys(FOLDER_TASKS, rows), Path(folder).resolve()
    data = FolderData(tasks, str(folder), revision, image_dir, pairs, left_out)
    return run_models(
        models,
        baselines,
        data,
        output_dir,
        folder_report,
        has_chart=False,
        benchmark=f"Images and captions of {Path(folder).resolve().name}",
        of_tasks=len(FOLDER_TASKS),
        limit=queries if queries < len(pairs) else None,
        on_bad_row="skip",
        **options,
    )


def read_images(folder: str | os.PathLike, caption: str | None = None, *, needs_captions: bool = False) -> Dataset:
    """
    The images of a folder, by the `imagefolder` builder of `datasets`.

    Args:
        folder (`str` or `os.PathLike`): With or without a `metadata.csv` (or `.jsonl`) of `file_name` and captions.
        caption (`str`, *optional*): The column of captions; by default `text` or `caption`.
        needs_captions (`bool`, defaults to `False`): Whether a folder without captions is an error.

    Returns:
        [`~datasets.Dataset`] with `image`, not decoded, and `text`, None where there is no caption.

    Raises:
        ValueError: there are no images, or there is no such column; names the nearest.
    """
    try:
        rows = load_dataset("imagefolder", data_dir=str(folder), split="all", drop_labels=True)
    except (FileNotFoundError, ValueError) as error:
        if not list_images(folder)[0]:
            raise ValueError(f"{folder} contains no images (.jpg, .png, ...).") from error
        raise ValueError(f"{folder} cannot be read as a folder of images: {error}") from error
    columns = [name for name in rows.column_names if name != "image"]
    found = caption or next((name for name in CAPTIONS if name in columns), None)
    if caption is not None and caption not in columns:
        raise ValueError(f"{folder} has no column {caption!r}{nearest(caption, columns)}; it has {columns}.")
    if found is None and needs_captions:
        raise ValueError(
            f"{folder} has no captions: add a metadata.csv with the columns file_name and text, or name their column "
            f"with --caption; it has {columns}."
        )
    rows = rows.cast_column("image", Image(decode=False))
    texts: list[str | None] = [None] * len(rows)
    if found is not None:
        texts = [(text or "").strip() or None for text in rows.cast_column(found, Value("string"))[found]]
    return rows.select_columns(["image"]).add_column("text", texts)


def caption_pairs(rows: Dataset) -> tuple[dict[int, tuple[str, str]], dict[int, str]]:
    """
    The rows that can be asked about.

    Args:
        rows ([`~datasets.Dataset`]): As [`read_images`] gives them.

    Returns:
        By row the path of an image and its caption; and by row why others are left out.
    """
    pairs: dict[int, tuple[str, str]] = {}
    left_out: dict[int, str] = {}
    seen = set()
    for row, (image, text) in enumerate(zip(rows["image"], rows["text"], strict=True)):
        if image is None:
            left_out[row] = "it names no image."
        elif text is None:
            left_out[row] = "it has no caption."
        elif image["path"] in seen:
            left_out[row] = "an earlier row names the same image."
        else:
            seen.add(image["path"])
            pairs[row] = image["path"], text
    return pairs, left_out


@dataclass(frozen=True)
class FolderData(BenchmarkData):
    """
    The two tasks of a folder.

    Args:
        pairs (`dict[int, tuple[str, str]]`): By row the path of an image and its caption.
        left_out (`dict[int, str]`): By row why others cannot be asked about.
    """

    pairs: dict[int, tuple[str, str]]
    left_out: dict[int, str]

    def read(self, task: Task, *, limit: int | None = None, on_bad_row: str = "skip") -> TaskData:
        """
        The queries and candidates of a direction. A caption that several images share finds each of them among those
        that do not have it.
        """
        data = FolderTask(task, has_instructions=False, on_bad_row=on_bad_row)
        for row, reason in self.left_out.items():
            data.leave_out(row, reason)
        asked = list(self.pairs)
        if limit is not None:
            drawn = np.random.default_rng(0).permutation(len(asked))[:limit]
            asked = [asked[place] for place in sorted(drawn.tolist())]
        names = {path: os.path.relpath(path, self.image_dir) for path, _ in self.pairs.values()}
        finds_images = task.form == "text_to_image"
        for path, caption in self.pairs.values():
            places = ((path, None),) if finds_images else ((None, caption),)
            data.candidates.setdefault(names[path] if finds_images else caption, Item(places, "document"))
        for row in asked:
            path, caption = self.pairs[row]
            data.queries[row] = Item(((None, caption),) if finds_images else ((path, None),), "query")
            if finds_images:
                wrong = [names[other] for other, text in self.pairs.values() if text != caption]
                data.lists[row] = [names[path], *wrong]
            else:
                data.lists[row] = [caption, *(other for other in data.candidates if other != caption)]
        return data


class FolderTask(TaskData):
    """A task whose queries share their candidates, so that one that cannot be read leaves the others."""

    def leave_out_items(self, reasons: Mapping[Item, str]) -> None:
        """Leave out the rows whose query or right candidate cannot be read, and such candidates of the others."""
        bad = {name: reasons[item] for name, item in self.candidates.items() if item in reasons}
        for row, query in list(self.queries.items()):
            reason = reasons.get(query) or bad.get(self.lists[row][0])
            if reason is not None:
                self.leave_out(row, reason)
            elif bad:
                self.lists[row] = [name for name in self.lists[row] if name not in bad]
        self.check_is_left()
