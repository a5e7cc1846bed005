# SPDX-License-Identifier: Apache-2.0
"""The ablation on pretrained weights: which text belongs to another, among pairs that training never saw."""

from __future__ import annotations

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from evaluation.ranking import target_ranks
from modeling_cocoa.encoding import encode_inputs
from modeling_cocoa.files import atomic_write
from modeling_cocoa.saving import save_cocoa

from .ablation_report import Measure
from .smollm2 import as_backbone, as_processor, check_start, load_smollm2

FOLDER = Path("runs") / "ablation_data"
"""Where the data of all tasks is made, and the model that every run starts from."""
MAX_LENGTH = 160
"""Tokens of an input, at most; longer than any text of the sets."""
TEXTS = 64
"""Of a set, by which the start is checked."""
SPREAD = 4000
"""Vectors among which their spread is measured."""


@dataclass(frozen=True)
class PairTask:
    """
    A set of pairs of texts, each of which has to find the other among those of a split.

    Args:
        name (`str`).
        columns (`tuple[str, str]`): Of the two texts.
        titles (`tuple[str, str]`): What they are called in tables.
        sizes (`dict[str, int]`): Held-out rows by split; the rest trains, and a tenth of that is `labelled`.
        read (`Callable`): Given a tokenizer, makes the rows; none of which is nearly another.
    """

    name: str
    columns: tuple[str, str]
    titles: tuple[str, str]
    sizes: dict[str, int]
    read: Callable[[Any], Dataset]

    @cached_property
    def measures(self) -> dict[str, Measure]:
        """By name; the same in every arm, set beforehand."""
        first, second = self.titles
        ways = {self.columns[0]: f"{first} to {second}", self.columns[1]: f"{second} to {first}"}
        return {
            f"{column}_{top}": Measure(f"{way}: R@{top}", column, top)
            for column, way in ways.items()
            for top in (1, 10)
        }

    @property
    def path(self) -> Path:
        """The rows, once they are made."""
        return FOLDER / f"{self.name}.parquet"

    def prepare(self) -> None:
        """
        Write the rows, what is known of them, and the model that every run starts from, once; rows that are there
        already stay.
        """
        facts, start = self.path.with_suffix(".json"), FOLDER / "start"
        if facts.is_file() and (start / "modules.json").is_file():
            return
        FOLDER.mkdir(parents=True, exist_ok=True)
        llama, tokenizer = load_smollm2()
        if not self.path.is_file():
            with atomic_write(self.path) as file:
                split_rows(self.read(tokenizer), self.sizes).to_parquet(str(file))
        rows = Dataset.from_parquet(str(self.path))
        texts = {name: self.texts(rows, name) for name in ("train", "validation")}
        tokens = {name: tokenizer(part, add_special_tokens=False)["input_ids"] for name, part in texts.items()}
        processor = as_processor(tokenizer, MAX_LENGTH)
        backbone = as_backbone(llama, processor)
        known = {
            "rows": dict(Counter(rows["split"])),
            "labelled": sum(rows["labelled"]),
            "tokens": {name: float(np.mean([len(ids) for ids in part])) for name, part in tokens.items()},
            "unigram_nats": unigram_loss(tokens["train"], tokens["validation"], len(tokenizer)),
            "start": check_start(llama, backbone, processor, texts["validation"][:TEXTS]),
        }
        save_cocoa(backbone, processor, start)
        with atomic_write(facts) as file:
            file.write_text(json.dumps(known) + "\n", encoding="utf-8")

    def texts(self, rows: Dataset, split: str) -> list[str]:
        """Both texts of each row of a split together, as stage 1 reads them."""
        rows = choose(rows, split)
        return ["\n".join(pair) for pair in zip(*(rows[column] for column in self.columns), strict=True)]

    def judge(self, model: Any, processor: Any, split: str = "test") -> dict[str, Any]:
        """
        What a model finds, and how its vectors lie.

        Args:
            model ([`CocoaModelMixin`]), processor ([`CocoaProcessor`]).
            split (`str`, defaults to `"test"`): `"validation"` or `"test"`.

        Returns:
            `dict`: `ranks` of the right answers, by column a list of one rank an item; `alignment` of pairs and
            `uniformity` of each column (arXiv 2005.10242; lower is better in both); and the set's `facts`.
        """
        rows = choose(Dataset.from_parquet(str(self.path)), split)
        vectors = {name: encode_inputs(model, processor, list(rows[name])).numpy() for name in self.columns}
        first, second = vectors.values()
        ranks = {
            self.columns[0]: [target_ranks(first @ second.T).tolist()],
            self.columns[1]: [target_ranks(second @ first.T).tolist()],
        }
        return {
            "ranks": ranks,
            "alignment": float(np.square(first - second).sum(axis=1).mean()),
            "uniformity": {name: uniformity(part[:SPREAD]) for name, part in vectors.items()},
            "facts": json.loads(self.path.with_suffix(".json").read_text()),
        }


def choose(rows: Dataset, split: str) -> Dataset:
    """The rows of a split."""
    return rows.select([row for row, name in enumerate(rows["split"]) if name == split])


def split_rows(rows: Dataset, sizes: dict[str, int]) -> Dataset:
    """
    The same in an order drawn once, with `split`, and `labelled`: a tenth of those that train.

    Args:
        rows ([`~datasets.Dataset`]).
        sizes (`dict[str, int]`): Held-out rows by split; the rest is `train`.
    """
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    parts, start = [], 0
    for split, size in {**sizes, "train": len(order) - sum(sizes.values())}.items():
        part = rows.select(order[start : start + size])
        labelled = [split == "train" and row < size // 10 for row in range(size)]
        parts.append(part.add_column("split", [split] * size).add_column("labelled", labelled))
        start += size
    return concatenate_datasets(parts)


def without_near_duplicates(texts: Sequence[str], most: float = 0.5, words: int = 3) -> list[int]:
    """
    The places of texts, each of which shares less than a part of its runs of words with every one before it.

    Args:
        texts (`Sequence[str]`): The earlier one of two that are nearly the same is kept.
        most (`float`, defaults to 0.5): Of the runs that one of the two has, how many both may have (Jaccard).
        words (`int`, defaults to 3): Of a run.
    """
    kept: list[int] = []
    sizes: dict[int, int] = {}
    having: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for place, text in enumerate(texts):
        tokens = re.findall(r"\w+", text.lower())
        runs = {tuple(tokens[start : start + words]) for start in range(max(1, len(tokens) - words + 1))}
        shared = Counter(other for run in runs for other in having.get(run, ()))
        if any(count / (len(runs) + sizes[other] - count) >= most for other, count in shared.items()):
            continue
        kept.append(place)
        sizes[place] = len(runs)
        for run in runs:
            having[run].append(place)
    return kept


def unigram_loss(train: Iterable[Sequence[int]], held_out: Iterable[Sequence[int]], vocabulary: int) -> float:
    """Nats a token of texts, by a model that knows how frequent each token is in others and nothing else."""
    counts = Counter(token for tokens in train for token in tokens)
    total = counts.total() + vocabulary
    losses = [np.log(total / (counts[token] + 1)) for tokens in held_out for token in tokens]
    return float(np.mean(losses))


def uniformity(vectors: np.ndarray) -> float:
    """The log of the mean of `exp(-2 d^2)` over pairs of different vectors, of length 1."""
    squared = 2 - 2 * vectors @ vectors.T
    return float(np.log(np.exp(-2 * squared[np.triu_indices(len(vectors), 1)]).mean()))
