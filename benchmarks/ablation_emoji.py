# SPDX-License-Identifier: Apache-2.0
"""What the ablation measures of a model: for each query, the rank of its right answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from evaluation.emoji import STYLES, load_emoji, split_rows
from evaluation.ranking import target_ranks
from modeling_cocoa.encoding import encode_inputs

from .ablation_report import Measure

MEASURES: dict[str, Measure] = {
    "seen_style": Measure("seen concepts, unseen style: R@1", "seen_style", 1),
    "held_out": Measure("held-out concepts: R@10", "held_out", 10),
    "group": Measure("9 groups: accuracy", "group", 1),
    "subgroup": Measure("98 subgroups: accuracy", "subgroup", 1),
    "german": Measure("German to English name: R@1", "german", 1),
}
"""By name; the same in every arm, set beforehand."""


def rank_answers(model: Any, processor: Any, split: str = "test") -> dict[str, list[list[int]]]:
    """
    Ranks of the right answers, by measure: a list for each way of asking, of one rank an item.

    - `seen_style`: name to Twemoji drawing and back, among the training concepts.
    - `held_out`: name to Noto drawing and back, among the concepts of the split.
    - `group`, `subgroup`: the nearest class name to each drawing, in both styles, of the concepts of the split.
    - `german`: the English name of a German one, among the training concepts' names; training shows German names
      beside pictures only. Names that are the same in both languages are left out.

    Of the training concepts, every other one is asked for with `"validation"` and the rest with `"test"`, so that
    nothing is chosen by what is reported.

    Args:
        model ([`CocoaModelMixin`]), processor ([`CocoaProcessor`]).
        split (`str`, defaults to `"test"`): `"validation"` or `"test"`.
    """
    emoji = load_emoji()
    asked = slice(("validation", "test").index(split), None, 2)

    def embed(inputs: Sequence[Any]) -> np.ndarray:
        return encode_inputs(model, processor, inputs).numpy()

    rows = split_rows(emoji)
    seen, held_out = emoji.select(rows["train"]), emoji.select(rows[split])
    names = embed(seen["name"])
    held_out_names = embed(held_out["name"])
    pictures = {style: embed(held_out[style]) for style in STYLES}
    ranks = {"held_out": both_ways(held_out_names, pictures["noto"], slice(None))}
    ranks["seen_style"] = both_ways(names, embed(seen["twemoji"]), asked)
    for kind in ("group", "subgroup"):
        classes = sorted(set(emoji[kind]))
        vectors, targets = embed(classes), np.array([classes.index(name) for name in held_out[kind]])
        ranks[kind] = [target_ranks(pictures[style] @ vectors.T, targets).tolist() for style in STYLES]
    pairs = zip(seen["name_de"], seen["name"], strict=True)
    translated = [row for row, (german, english) in enumerate(pairs) if german and german.lower() != english.lower()][
        asked
    ]
    german = embed([seen["name_de"][row] for row in translated])
    ranks["german"] = [target_ranks(german @ names.T, np.array(translated)).tolist()]
    return ranks


def both_ways(names: np.ndarray, pictures: np.ndarray, asked: slice) -> list[list[int]]:
    """Ranks of each asked name's picture among all pictures, and of its picture's name among all names."""
    targets = np.arange(len(names))[asked]
    return [
        target_ranks(queries[asked] @ candidates.T, targets).tolist()
        for queries, candidates in ((names, pictures), (pictures, names))
    ]


class EmojiTask:
    """Pictures and names of emoji, and a model from random weights."""

    measures = MEASURES

    def prepare(self) -> None:
        """Nothing: the set and the recipe are all that a run needs."""

    def judge(self, model: Any, processor: Any, split: str = "test") -> dict[str, Any]:
        """`ranks` of the right answers; see [`rank_answers`]."""
        return {"ranks": rank_answers(model, processor, split)}


TASK = EmojiTask()
