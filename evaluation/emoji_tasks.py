# SPDX-License-Identifier: Apache-2.0
"""The emoji set as tasks in the file layout of MMEB-V1, so that the whole path runs on real pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value
from datasets import Sequence as SequenceFeature
from PIL import Image

from .emoji import load_emoji, split_rows
from .mmeb_tasks import Form, Kind, Task
from .mmeb_texts import MARKER

FORMAT = 1
"""Counted up when what is written changes."""

CANDIDATES = 100
"""Of a query, the right one among them; fewer where the set has fewer."""

SHEET = 2
"""Emoji on a side of a sheet."""

PARTS: tuple[tuple[str, Kind, Form], ...] = (
    ("Emoji-Subgroup", "classification", "classification"),
    ("Emoji-German", "vqa", "question"),
    ("Emoji-t2i", "retrieval", "text_to_image"),
    ("Emoji-i2t", "retrieval", "image_to_text"),
    ("Emoji-Style", "retrieval", "image_to_image"),
    ("Emoji-Sheet", "grounding", "image_to_image"),
)
"""Names, kinds and forms of the tasks."""

SPLITS = {"train": ("", True), "test": ("-HeldOut", False)}
"""Ending of a task's name by split of the concepts that it asks for, and whether training has seen them."""

EMOJI_TASKS: tuple[Task, ...] = tuple(
    Task(name + ending, kind, form, in_domain) for ending, in_domain in SPLITS.values() for name, kind, form in PARTS
)
"""Each task on concepts that training has seen, and on those held out."""

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


def write_emoji_tasks(folder: str | Path, queries: int = 250) -> Path:
    """
    Write the tasks, once: `TASK/test-00000-of-00001.parquet` and pictures below `images/`.

    A query's candidates are drawn from the concepts of its own split: other names, other pictures of the style, crops
    of other sheets; all subgroups in classification. In `Emoji-Style`, a Noto picture and a request find its Twemoji
    picture among others in both styles, its own Noto picture among them.

    Args:
        folder (`str` or `Path`): Made anew where it holds another number of queries, or is of an earlier format.
        queries (`int`, defaults to 250): Of each task at most.

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
    styles = {"noto": emoji["noto"], "twemoji": emoji["twemoji"]}
    for style, pictures in styles.items():
        for code, picture in zip(emoji["codepoint"], pictures, strict=True):
            save_picture(picture, partial / "images" / style / f"{code}.png")
    for split, (ending, _) in SPLITS.items():
        rows = emoji.select(split_rows(emoji)[split])
        maker = _Maker(rows, split, partial / "images", queries)
        for name, *_ in PARTS:
            table = Dataset.from_list(list(maker.makers[name]()), features=FEATURES)
            (partial / (name + ending)).mkdir(parents=True)
            table.to_parquet(str(partial / (name + ending) / "test-00000-of-00001.parquet"))
    (partial / "emoji_tasks.json").write_text(json.dumps(about) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial.rename(folder)
    return folder


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture as PNG, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.convert("RGB").save(path)


class _Maker:
    """Rows of the tasks of one split."""

    def __init__(self, rows: Dataset, split: str, images: Path, queries: int) -> None:
        self.rows = rows
        self.split = split
        self.images = images
        self.names: list[str] = list(rows["name"])
        self.codes: list[str] = list(rows["codepoint"])
        self.generator = np.random.default_rng([FORMAT, len(rows)])
        self.asked: list[int] = sorted(self.generator.permutation(len(rows))[:queries].tolist())
        self.makers: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
            "Emoji-Subgroup": self.subgroups,
            "Emoji-German": self.german,
            "Emoji-t2i": self.text_to_image,
            "Emoji-i2t": self.image_to_text,
            "Emoji-Style": self.styles,
            "Emoji-Sheet": self.sheets,
        }

    def others(self, row: int, count: int = CANDIDATES - 1) -> list[int]:
        """So many other rows, drawn."""
        drawn = self.generator.permutation(len(self.rows))[: count + 1].tolist()
        return [other for other in drawn if other != row][:count]

    def picture(self, row: int, style: str = "noto") -> str:
        """Path of a picture."""
        return f"{style}/{self.codes[row]}.png"

    @staticmethod
    def row(
        instruction: str,
        text: str,
        image: str,
        texts: Sequence[str],
        images: Sequence[str],
        target_instruction: str = "",
    ) -> dict[str, Any]:
        """One row of a task."""
        return {
            "qry_inst": instruction,
            "qry_text": text,
            "qry_img_path": image,
            "tgt_inst": target_instruction,
            "tgt_text": list(texts) or [""] * len(images),
            "tgt_img_path": list(images) or [""] * len(texts),
        }

    def subgroups(self) -> Iterator[dict[str, Any]]:
        """A Noto picture; all subgroups."""
        found = list(self.rows["subgroup"])
        every = sorted(set(load_emoji()["subgroup"]))
        instruction = f"{MARKER}\nRepresent the given image for classification"
        for row in self.asked:
            answers = [found[row], *(other for other in every if other != found[row])]
            yield self.row(instruction, "", self.picture(row), answers, [])

    def german(self) -> Iterator[dict[str, Any]]:
        """A Noto picture and a question; German names."""
        found = list(self.rows["name_de"])
        instruction = f"{MARKER}\nRepresent the given image with the following question:"
        for row in self.asked:
            if found[row]:
                others = dict.fromkeys(found[other] for other in self.others(row))
                answers = [found[row], *(name for name in others if name and name != found[row])]
                yield self.row(instruction, "What is its name in German?", self.picture(row), answers, [])

    def text_to_image(self) -> Iterator[dict[str, Any]]:
        """A name; Noto pictures."""
        for row in self.asked:
            pictures = [self.picture(other) for other in (row, *self.others(row))]
            instruction = "Find me a drawing that matches the given name."
            yield self.row(instruction, self.names[row], "", [], pictures, f"{MARKER}\nRepresent the given image.")

    def image_to_text(self) -> Iterator[dict[str, Any]]:
        """A Noto picture; names."""
        for row in self.asked:
            names = [self.names[other] for other in (row, *self.others(row))]
            yield self.row(f"{MARKER}\nFind the name of the given image.", "", self.picture(row), names, [])

    def styles(self) -> Iterator[dict[str, Any]]:
        """A Noto picture and a request; pictures in both styles."""
        instruction = f"{MARKER}\nGiven an image, find the image that the following request describes:"
        for row in self.asked:
            others = self.others(row, CANDIDATES // 2 - 1)
            pictures = [self.picture(other, "twemoji") for other in (row, *others)]
            pictures += [self.picture(other) for other in (row, *others)]
            yield self.row(
                instruction,
                "in Twemoji style",
                self.picture(row),
                [],
                pictures,
                f"{MARKER}\nRepresent the given image.",
            )

    def sheets(self) -> Iterator[dict[str, Any]]:
        """A sheet of Noto pictures and the name of one; the crops of this sheet and of others."""
        pictures = list(self.rows["noto"])
        crops: dict[int, dict[int, str]] = {}  # by sheet, of each emoji in it
        for row in self.asked:
            members = [row, *self.others(row, SHEET * SHEET - 1)]
            order = self.generator.permutation(len(members)).tolist()
            side = pictures[row].width
            sheet = Image.new("RGB", (SHEET * side, SHEET * side), "white")
            for place, member in enumerate(order):
                x, y = place % SHEET * side, place // SHEET * side
                sheet.paste(pictures[members[member]].convert("RGB"), (x, y))
            name = f"sheets/{self.split}-{self.codes[row]}"
            save_picture(sheet, self.images / f"{name}.png")
            crops[row] = {}
            for number, member in enumerate(members):
                place = order.index(number)
                x, y = place % SHEET * side, place // SHEET * side
                crop = f"{name}-{place}.png"
                save_picture(sheet.crop((x, y, x + side, y + side)), self.images / crop)
                crops[row][member] = crop
        for row in self.asked:
            further = self.generator.permutation(self.asked).tolist()
            others = [crop for other in further for shown, crop in crops[other].items() if shown not in crops[row]]
            yield self.row(
                f"{MARKER}\nSelect the portion of the image that answers the question:",
                self.names[row],
                f"sheets/{self.split}-{self.codes[row]}.png",
                [],
                [*crops[row].values(), *others[: CANDIDATES - len(crops[row])]],
                f"{MARKER}\nRepresent the given cropped image of the object",
            )
