# SPDX-License-Identifier: Apache-2.0
"""
The 36 tasks of MMEB-V1 (VLM2Vec, arXiv 2410.05160) as data, and what others have published on them; and the tasks on
emoji in the same layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..naming import nearest

Kind = Literal["classification", "vqa", "retrieval", "grounding"]
"""What the benchmark's means are taken over."""

Form = Literal["classification", "question", "image_to_text", "text_to_image", "image_to_image"]
"""How the texts of a task's queries and targets are built; see `evaluation/mmeb/texts.py`."""

KINDS: dict[Kind, str] = {
    "classification": "Classification",
    "vqa": "VQA",
    "retrieval": "Retrieval",
    "grounding": "Grounding",
}
"""Kinds in the order of the published tables, with the heading of each."""

IMAGE_SIZES = {"high": (1344, 1344), "mid": (672, 672), "low": (128, 128)}
"""Width and height that images are stretched to, by the benchmark's names (VLM2Vec's `image_resolution`)."""


@dataclass(frozen=True)
class Task:
    """
    One task: queries, each with candidates of its own, the first of which is right.

    Args:
        name (`str`): As the benchmark's subsets are called.
        kind (`str`): `"classification"`, `"vqa"`, `"retrieval"` or `"grounding"`.
        form (`str`): `"classification"`, `"question"`, `"image_to_text"`, `"text_to_image"` or `"image_to_image"`.
        in_domain (`bool`): Whether MMEB-train has a subset of the same name.
        blank_line (`bool`, defaults to `False`): Whether one more newline ends the query.
    """

    name: str
    kind: Kind
    form: Form
    in_domain: bool
    blank_line: bool = False

    @property
    def finds_images(self) -> bool:
        """Whether candidates are images, perhaps with captions."""
        return self.form in ("text_to_image", "image_to_image")


def _tasks(kind: Kind, form: Form, in_domain: str, out_of_domain: str = "") -> list[Task]:
    named = [(name, True) for name in in_domain.split()] + [(name, False) for name in out_of_domain.split()]
    return [Task(name, kind, form, known, blank_line=name == "VisDial") for name, known in named]


MMEB_V1: tuple[Task, ...] = (
    *_tasks(
        "classification",
        "classification",
        "ImageNet-1K N24News HatefulMemes VOC2007 SUN397",
        "Place365 ImageNet-A ImageNet-R ObjectNet Country211",
    ),
    *_tasks(
        "vqa",
        "question",
        "OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W",
        "ScienceQA VizWiz GQA TextVQA",
    ),
    *_tasks("retrieval", "text_to_image", "VisDial"),
    *_tasks("retrieval", "image_to_image", "CIRR"),
    *_tasks("retrieval", "text_to_image", "VisualNews_t2i"),
    *_tasks("retrieval", "image_to_text", "VisualNews_i2t"),
    *_tasks("retrieval", "text_to_image", "MSCOCO_t2i"),
    *_tasks("retrieval", "image_to_text", "MSCOCO_i2t"),
    *_tasks("retrieval", "image_to_image", "NIGHTS"),
    *_tasks("retrieval", "text_to_image", "WebQA"),
    *_tasks("retrieval", "image_to_image", "", "OVEN FashionIQ"),
    *_tasks("retrieval", "text_to_image", "", "EDIS Wiki-SS-NQ"),
    *_tasks("grounding", "image_to_image", "MSCOCO", "RefCOCO RefCOCO-Matching Visual7W-Pointing"),
)
"""All tasks, in the order of the published tables."""

HELD_OUT = "-HeldOut"
"""Ends the names of emoji tasks on concepts that training has not seen."""

EMOJI_TASKS: tuple[Task, ...] = tuple(
    Task(name + ending, kind, form, in_domain)
    for ending, in_domain in (("", True), (HELD_OUT, False))
    for name, kind, form in (
        ("Emoji-Subgroup", "classification", "classification"),
        ("Emoji-German", "vqa", "question"),
        ("Emoji-t2i", "retrieval", "text_to_image"),
        ("Emoji-i2t", "retrieval", "image_to_text"),
        ("Emoji-Style", "retrieval", "image_to_image"),
        ("Emoji-Sheet", "grounding", "image_to_image"),
    )
)
"""Each task on concepts that training has seen, and on those held out; `evaluation/emoji_tasks.py` writes them."""

EMOJI_BENCHMARK = "Emoji in MMEB-V1's layout"
NOTES = {
    EMOJI_BENCHMARK: "Queries have an instruction in front, as in MMEB-V1. A model that has never seen one, such as "
    "cocoa-tiny, finds far less than by bare names, which `cocoa demo` searches with."
}
"""What a report says of a benchmark."""


def find_tasks(names: Sequence[str] | None, tasks: Sequence[Task]) -> list[Task]:
    """
    Some of the tasks, in their order.

    Args:
        names (`Sequence[str]`, *optional*): Names of tasks or of kinds; all tasks where none is given.
        tasks (`Sequence[Task]`): All that there are; an unknown name is a `ValueError` that lists them.
    """
    if not names:
        return list(tasks)
    known = {task.name for task in tasks} | {task.kind for task in tasks}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"There is no task {unknown[0]!r}{nearest(unknown[0], known)}; there are "
            f"{', '.join(task.name for task in tasks)}, and for all of a kind "
            f"{', '.join(kind for kind in KINDS if kind in known)}."
        )
    return [task for task in tasks if task.name in names or task.kind in names]


@dataclass(frozen=True)
class Published:
    """
    What a model scored on all 36 tasks, in percent, and who says so.

    Args:
        model (`str`).
        billions (`float`): Of parameters.
        overall, classification, vqa, retrieval, grounding (`float`): Means over tasks.
        source (`str`): Who says so; where there are two, the second for `in_domain` and `out_of_domain`.
        in_domain, out_of_domain (`float`, *optional*): Means over tasks, where they are published.
    """

    model: str
    billions: float
    overall: float
    classification: float
    vqa: float
    retrieval: float
    grounding: float
    source: str
    in_domain: float | None = None
    out_of_domain: float | None = None


PUBLISHED_AS_OF = "November 2026"
"""When the figures below were read off their sources."""

_BOARD, _SELF = "the benchmark's leaderboard", "the benchmark's leaderboard, self-reported"
_COCOA = "result table of GitHub Fmajor77/CoCoA"
_BOTH = f"{_BOARD}; {_COCOA}"

PUBLISHED: tuple[Published, ...] = (
    Published("CoCoA (Qwen2-VL-2B)", 2, 66.0, 63.0, 57.4, 69.6, 85.8, _COCOA, 70.2, 60.7),
    Published("CoCoA (Qwen2.5-VL-3B)", 3, 67.5, 60.9, 63.5, 69.5, 88.2, _COCOA, 72.6, 61.2),
    Published("CoCoA (Qwen2.5-VL-7B)", 7, 70.6, 64.7, 66.5, 72.5, 90.1, _COCOA, 75.7, 64.3),
    Published("MoCa (Qwen2.5-VL-3B)", 3, 67.5, 59.8, 62.9, 70.6, 88.6, _COCOA, 72.3, 61.5),
    Published("MoCa (Qwen2.5-VL-7B)", 7, 71.5, 65.8, 64.7, 75.0, 92.4, _COCOA, 74.7, 67.6),
    Published("UNITE (Qwen2-VL-2B)", 2, 63.3, 63.2, 55.9, 65.4, 75.6, _COCOA, 65.8, 60.1),
    Published("VLM2Vec (Qwen2-VL-2B, LoRA, high resolution)", 2.21, 59.3, 59.0, 49.4, 65.4, 73.4, _BOTH, 66.0, 52.6),
    Published("VLM2Vec (Qwen2.5-VL-3B)", 3, 60.3, 55.3, 57.3, 62.7, 73.2, _COCOA),
    Published("VLM2Vec (Qwen2-VL-7B, LoRA, high resolution)", 8.29, 65.8, 62.6, 57.8, 69.9, 81.7, _BOTH, 72.2, 57.8),
    Published("gme-Qwen2-VL-2B-Instruct", 2.21, 55.8, 56.9, 41.2, 67.8, 53.4, _SELF),
    Published("mmE5-mllama-11b-instruct", 10.6, 69.8, 67.6, 62.6, 71.0, 89.6, f"{_SELF}; {_COCOA}", 72.4, 66.6),
    Published("LLaVE-2B", 1.95, 65.2, 62.1, 60.2, 65.2, 84.9, _SELF),
    Published("LLaVE-7B", 8.03, 70.3, 65.7, 65.4, 70.9, 91.9, _SELF),
    Published("UniME (LLaVA-OneVision-7B, LoRA)", 8.03, 70.7, 66.8, 66.6, 70.5, 90.9, _SELF),
    Published("B3 Qwen2-VL-2B", 2.21, 68.1, 67.0, 61.19, 70.85, 79.88, "model card of Ops-MM-embedding-v1-2B"),
    Published("QQMM-embed", 8.297, 72.175, 70.07, 69.52, 71.175, 87.075, _SELF),
    Published("Ops-MM-embedding-v1-2B", 2.21, 69.03, 68.07, 65.11, 69.17, 80.85, "its model card"),
    Published("Ops-MM-embedding-v1-7B", 8.29, 72.72, 69.65, 69.58, 73.09, 87.15, "its model card"),
    Published("Qwen3-VL-Embedding-2B (image part of MMEB-V2)", 2, 75.0, 70.3, 74.3, 74.8, 88.5, "its README"),
    Published("Qwen3-VL-Embedding-8B (image part of MMEB-V2)", 8, 80.1, 74.2, 81.1, 80.0, 92.2, "its README"),
)


def published_on(benchmark: str) -> tuple[Published, ...]:
    """What others have published on a benchmark, given its name; nothing on any but MMEB-V1."""
    return PUBLISHED if benchmark == "MMEB-V1" else ()
