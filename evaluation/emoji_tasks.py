# SPDX-License-Identifier: Apache-2.0
"""The emoji set as tasks in the layout of MMEB-V1, so that an evaluation runs on real images without a download."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value
from datasets import Sequence as SequenceFeature
from PIL import Image

from .emoji import load_emoji, split_rows
from .mmeb.tasks import HELD_OUT
from .mmeb.texts import MARKER

FORMAT = 1
"""Counted up when what is written changes."""

CANDIDATES = 100
"""Candidates of a query, the right one among them; fewer where the set has fewer."""

SHEET = 2
"""Emoji on a side of a sheet."""

ENDINGS = {"train": "", "test": HELD_OUT}
"""Ending of a task's name by split of the concepts that it asks for."""

FEATURES = Features(
    {
        "qry_inst": Value("string"),
        "qry_text": Value("string"),
        "qry_img_path": Value("string"),
        "tgt_inst": Value("string"),
        "tgt_text": SequenceFeature(Value("string")),
        "tgt_img_path": SequenceFeature(Value("string")),
    }
)

TARGET = f"{MARKER}\nRepresent the given image."
"""Instruction of candidates that are images."""


def write_emoji_tasks(folder: str | Path, queries: int = 250) -> Path:
    """
    Write the tasks, once: `TASK/test-00000-of-00001.parquet` and images below `images/`.

    A query's candidates are drawn from the concepts of its own split: other names, other images of the style, crops
    of other sheets; all subgroups in classification. In `Emoji-Style`, a Noto image and a request find its Twemoji
    image among others in both styles, its own Noto image among them.

    Args:
        folder (`str` or `Path`): Made anew where it holds another number of queries, or is of an earlier format.
        queries (`int`, defaults to 250): Maximum number of queries per task.

    Returns:
        `Path`: The folder.
    """
    folder = Path(folder)
    about = {"format": FORMAT, "queries": queries}
    made = folder / "emoji_tasks.json"
    if made.is_file() and json.loads(made.read_text()) == about:
        return folder
    if folder.exists() and any(folder.iterdir()) and not made.is_file():
        raise ValueError(f"{folder} holds something else; name an empty folder for the emoji tasks, or none.")
    emoji, partial = load_emoji(), folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    for style in ("noto", "twemoji"):
        for code, image in zip(emoji["codepoint"], emoji[style], strict=True):
            save_image(image, partial / "images" / style / f"{code}.png")
    for split, ending in ENDINGS.items():
        maker = _Maker(emoji.select(split_rows(emoji)[split]), split, partial / "images", queries)
        for name, rows in maker.tasks().items():
            path = partial / (name + ending) / "test-00000-of-00001.parquet"
            path.parent.mkdir(parents=True)
            Dataset.from_list(list(rows), features=FEATURES).to_parquet(str(path))
    (partial / "emoji_tasks.json").write_text(json.dumps(about) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial.rename(folder)
    return folder


def save_image(image: Image.Image, path: Path) -> None:
    """Write an image as PNG, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.convert("RGB").save(path)


class _Maker:
    """Rows of the tasks of one split. Each task goes on with the random numbers after those of the one before."""

    def __init__(self, rows: Dataset, split: str, images: Path, queries: int) -> None:
        self.rows = rows
        self.split = split
        self.images = images
        self.names: list[str] = list(rows["name"])
        self.codes: list[str] = list(rows["codepoint"])
        self.generator = np.random.default_rng([FORMAT, len(rows)])
        self.asked: list[int] = sorted(self.generator.permutation(len(rows))[:queries].tolist())

    def tasks(self) -> dict[str, Iterator[dict[str, Any]]]:
        """The rows of each task, made as they are asked for."""
        return {
            "Emoji-Subgroup": self.subgroups(),
            "Emoji-German": self.german(),
            "Emoji-t2i": self.text_to_image(),
            "Emoji-i2t": self.image_to_text(),
            "Emoji-Style": self.styles(),
            "Emoji-Sheet": self.sheets(),
        }

    def others(self, row: int, count: int = CANDIDATES - 1) -> list[int]:
        """A number of other rows, drawn."""
        drawn = self.generator.permutation(len(self.rows))[: count + 1].tolist()
        return [other for other in drawn if other != row][:count]

    def image(self, row: int, style: str = "noto") -> str:
        """Path of an image."""
        return f"{style}/{self.codes[row]}.png"

    def subgroups(self) -> Iterator[dict[str, Any]]:
        """A Noto image; all subgroups."""
        found = list(self.rows["subgroup"])
        every = sorted(set(load_emoji()["subgroup"]))
        instruction = f"{MARKER}\nRepresent the given image for classification"
        for row in self.asked:
            answers = [found[row], *(other for other in every if other != found[row])]
            yield _row(instruction, "", self.image(row), texts=answers)

    def german(self) -> Iterator[dict[str, Any]]:
        """A Noto image and a question; German names."""
        found = list(self.rows["name_de"])
        instruction = f"{MARKER}\nRepresent the given image with the following question:"
        for row in self.asked:
            if found[row]:
                others = dict.fromkeys(found[other] for other in self.others(row))
                answers = [found[row], *(name for name in others if name and name != found[row])]
                yield _row(instruction, "What is its name in German?", self.image(row), texts=answers)

    def text_to_image(self) -> Iterator[dict[str, Any]]:
        """A name; Noto images."""
        for row in self.asked:
            images = [self.image(other) for other in (row, *self.others(row))]
            yield _row("Find me a drawing that matches the given name.", self.names[row], "", images=images)

    def image_to_text(self) -> Iterator[dict[str, Any]]:
        """A Noto image; names."""
        for row in self.asked:
            names = [self.names[other] for other in (row, *self.others(row))]
            yield _row(f"{MARKER}\nFind the name of the given image.", "", self.image(row), texts=names)

    def styles(self) -> Iterator[dict[str, Any]]:
        """A Noto image and a request; images in both styles."""
        instruction = f"{MARKER}\nGiven an image, find the image that the following request describes:"
        for row in self.asked:
            shown = (row, *self.others(row, CANDIDATES // 2 - 1))
            images = [self.image(other, style) for style in ("twemoji", "noto") for other in shown]
            yield _row(instruction, "in Twemoji style", self.image(row), images=images)

    def sheets(self) -> Iterator[dict[str, Any]]:
        """A sheet of Noto images and the name of one; the crops of this sheet and of others."""
        images = list(self.rows["noto"])
        crops: dict[int, dict[int, str]] = {}  # by sheet, of each emoji in it
        for row in self.asked:
            members = [row, *self.others(row, SHEET * SHEET - 1)]
            order = self.generator.permutation(len(members)).tolist()
            side, name = images[row].width, f"sheets/{self.split}-{self.codes[row]}"
            sheet = Image.new("RGB", (SHEET * side, SHEET * side), "white")
            crops[row] = {}
            for number, member in enumerate(members):
                place = order.index(number)
                sheet.paste(images[member].convert("RGB"), (place % SHEET * side, place // SHEET * side))
                crops[row][member] = f"{name}-{place}.png"
                save_image(images[member], self.images / crops[row][member])  # all are of one size
            save_image(sheet, self.images / f"{name}.png")
        instruction = f"{MARKER}\nSelect the portion of the image that answers the question:"
        for row in self.asked:
            further = self.generator.permutation(self.asked).tolist()
            others = [crop for other in further for shown, crop in crops[other].items() if shown not in crops[row]]
            yield _row(
                instruction,
                self.names[row],
                f"sheets/{self.split}-{self.codes[row]}.png",
                images=[*crops[row].values(), *others[: CANDIDATES - len(crops[row])]],
                target=f"{MARKER}\nRepresent the given cropped image of the object",
            )


def _row(
    instruction: str,
    text: str,
    image: str,
    *,
    texts: list[str] | None = None,
    images: list[str] | None = None,
    target: str = TARGET,
) -> dict[str, Any]:
    """One row of a task whose candidates are texts or images."""
    return {
        "qry_inst": instruction,
        "qry_text": text,
        "qry_img_path": image,
        "tgt_inst": "" if images is None else target,
        "tgt_text": texts or [""] * len(images),
        "tgt_img_path": images or [""] * len(texts),
    }
