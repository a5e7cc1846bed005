# SPDX-License-Identifier: Apache-2.0
"""Images of a run beside its numbers: in its output folder, and in the trackers that it reports to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageOps
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from transformers import Trainer
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from modeling_cocoa.files import atomic_write
from modeling_cocoa.inputs import CocoaInputError, input_parts
from modeling_cocoa.media import load_image

RETRIEVAL_FOLDER = "retrieval"
"""In a run's output folder: what a few queries found at each evaluation."""
QUERIES, FOUND = 6, 4
CELL, LINE = 112, 16
"""Pixels of a cell's side and of a line of writing."""


def log_image(trainer: Trainer, name: str, image: Image.Image) -> None:
    """Log an image to the run's trackers, at its current step."""
    for writer, log, module in open_trackers(trainer):
        if writer is not None:
            values = np.asarray(image.convert("RGB"))
            writer.add_image(name, values, trainer.state.global_step, dataformats="HWC")
        else:
            log(name, module.Image(image))


def log_table(trainer: Trainer, name: str, rows: Sequence[Mapping[str, str]]) -> None:
    """Log a table, whose rows have the same columns, to the run's trackers, at its current step."""
    table = pd.DataFrame(rows)
    for writer, log, module in open_trackers(trainer):
        if writer is not None:
            lines = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
            lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table.values]
            writer.add_text(name, "\n".join(lines), trainer.state.global_step)
        else:
            log(name, module.Table(dataframe=table))


def open_trackers(trainer: Trainer) -> Iterator[tuple[Any, Callable[[str, Any], None] | None, Any]]:
    """
    The trackers of a run, of its main process and while it trains, since no run is open at other times.

    Yields:
        tensorboard's writer, or none; and of wandb and trackio what logs a value under a name, and the module with the
        classes of values.
    """
    if not trainer.is_in_train or not trainer.is_world_process_zero():
        return
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            yield callback.tb_writer, None, None
        elif isinstance(callback, (WandbCallback, TrackioCallback)):
            module = import_module("wandb" if isinstance(callback, WandbCallback) else "trackio")
            step = {"train/global_step": trainer.state.global_step}
            yield None, lambda name, value, log=module.log, step=step: log({name: value, **step}), module


class SampledRetrieval(InformationRetrievalEvaluator):
    """sentence-transformers' retrieval evaluator, which shows what its first queries found."""

    show: Callable[[str, Image.Image], None] | None = None
    """Called with the dataset's name and an image at each evaluation."""

    def compute_metrics(self, queries_result_list: list[list[dict[str, Any]]]) -> dict[str, dict[int, float]]:
        """The metrics; see [`~InformationRetrievalEvaluator.compute_metrics`]."""
        if self.show is not None:
            corpus = dict(zip(self.corpus_ids, self.corpus, strict=True))
            lines = []
            asked = zip(self.queries_ids, self.queries, queries_result_list, strict=True)
            for query_id, query, hits in islice(asked, QUERIES):
                best = sorted(hits, key=lambda hit: (-hit["score"], hit["corpus_id"]))[:FOUND]
                right = self.relevant_docs[query_id]
                found = [(corpus[hit["corpus_id"]], hit["corpus_id"] in right, hit["score"]) for hit in best]
                lines.append((query, found))
            self.show(self.name, draw_found(lines))
        return super().compute_metrics(queries_result_list)


def draw_found(lines: Sequence[tuple[Any, Sequence[tuple[Any, bool, float]]]]) -> Image.Image:
    """A grid: in each line a query and what it found, the best first; what is right has a green frame."""
    grid = Image.new("RGB", ((FOUND + 1) * (CELL + 12), len(lines) * (CELL + LINE) + LINE), "white")
    draw = ImageDraw.Draw(grid)
    draw.text((4, 2), "query", fill="black")
    draw.text((CELL + 16, 2), "found, the nearest first (right: framed)", fill="black")
    for row, (query, found) in enumerate(lines):
        top = LINE + row * (CELL + LINE)
        grid.paste(draw_cell(query), (4, top))
        for column, (item, is_right, score) in enumerate(found, start=1):
            left = 4 + column * (CELL + 12)
            grid.paste(draw_cell(item), (left, top))
            frame = "#2e9e5b" if is_right else "#d0d4da"
            draw.rectangle((left - 2, top - 2, left + CELL + 1, top + CELL + 1), outline=frame, width=2)
            draw.text((left, top + CELL + 1), f"{score:.3f}", fill="#5b6470")
    return grid


def draw_cell(item: Any) -> Image.Image:
    """An input as a square: its first image, its text below or instead of it."""
    cell = Image.new("RGB", (CELL, CELL), "#f6f7f9")
    text = ""
    try:
        for part in input_parts(item):
            if part["type"] == "image":
                cell = ImageOps.pad(load_image(part["image"]), (CELL, CELL), color="white")
            elif part["type"] == "text":
                text += f" {part['text']}"
    except CocoaInputError as error:
        text = error.reason
    words, rows = text.split(), [""]
    for word in words:
        rows[-1:] = [f"{rows[-1]} {word}".strip()] if len(rows[-1]) + len(word) < 18 else [rows[-1], word]
    draw = ImageDraw.Draw(cell)
    for number, row in enumerate(rows[:6]):
        draw.text((4, 4 + number * 14), row, fill="black", stroke_width=2, stroke_fill="white")
    return cell


def save_image(path: Path, image: Image.Image) -> None:
    """Write an image, whole or not at all, and the folder that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        image.save(partial)
