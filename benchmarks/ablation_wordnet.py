# SPDX-License-Identifier: Apache-2.0
"""
The ablation's task on pretrained weights: which definition belongs to a word, among synsets of WordNet that training
never saw.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from evaluation.retrieval import target_ranks
from modeling_cocoa.encoding import encode_inputs
from modeling_cocoa.files import written_whole
from modeling_cocoa.saving import save_cocoa

from .ablation_report import Measure
from .smollm2 import as_backbone, as_processor, load_smollm2

MEASURES: dict[str, Measure] = {
    "lemma": Measure("word to definition: R@1", "lemma", 1),
    "lemma_10": Measure("word to definition: R@10", "lemma", 10),
    "gloss": Measure("definition to word: R@1", "gloss", 1),
    "gloss_10": Measure("definition to word: R@10", "gloss", 10),
}
"""By name; the same in every arm, set beforehand."""

WORDNET = "/usr/share/wordnet"
"""Where Debian's wordnet-base puts it; elsewhere the environment variable `WNSEARCHDIR`, WordNet's own."""
SIZES = {"validation": 1000, "test": 2000}
"""Held-out synsets; the rest trains."""
FOLDER = Path("runs") / "ablation_pretrained"
MAX_LENGTH = 64


def read_synsets(folder: Path) -> Dataset:
    """
    `lemma` and `gloss` of every synset whose first word has this one meaning only; examples of use are left out.

    Args:
        folder (`Path`): With WordNet's `data.noun`, `data.verb`, `data.adj` and `data.adv`.

    Raises:
        SystemExit: there is no WordNet; says how to get it.
    """
    synsets, meanings = [], Counter()
    for kind in ("noun", "verb", "adj", "adv"):
        path = folder / f"data.{kind}"
        if not path.is_file():
            raise SystemExit(f"There is no {path}: apt install wordnet-base, or set WNSEARCHDIR to WordNet's folder.")
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):  # the licence
                continue
            fields, gloss = line.split(" | ", 1)
            words = fields.split(" ")
            count = int(words[3], 16)
            lemmas = [words[4 + 2 * place].split("(")[0].replace("_", " ") for place in range(count)]
            meanings.update(lemma.lower() for lemma in set(lemmas))
            synsets.append({"lemma": lemmas[0], "gloss": gloss.split('; "')[0].strip()})
    return Dataset.from_list(
        [synset for synset in synsets if meanings[synset["lemma"].lower()] == 1 and synset["gloss"]]
    )


def split_synsets(synsets: Dataset) -> Dataset:
    """The same in an order drawn once, with `split`."""
    order = list(range(len(synsets)))
    random.Random(0).shuffle(order)
    parts, start = [], 0
    sizes = {**SIZES, "train": len(order) - sum(SIZES.values())}
    for split, size in sizes.items():
        rows = synsets.select(order[start : start + size])
        parts.append(rows.add_column("split", [split] * size))
        start += size
    return concatenate_datasets(parts)


def prepare(layers: int | None) -> None:
    """Write the synsets and the model that every run starts from, once."""
    path = FOLDER / "wordnet.parquet"
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        rows = split_synsets(read_synsets(Path(os.environ.get("WNSEARCHDIR", WORDNET))))
        with written_whole(path) as file:
            rows.to_parquet(str(file))
    start = FOLDER / "start"
    if not (start / "modules.json").is_file():
        llama, tokenizer = load_smollm2()
        processor = as_processor(tokenizer, MAX_LENGTH)
        save_cocoa(as_backbone(llama, processor, layers), processor, start)


def rank_answers(model: Any, processor: Any, split: str = "test") -> dict[str, list[list[int]]]:
    """
    Ranks of the right answers among the synsets of a split, a list of one rank an item for each direction.

    Args:
        model ([`CocoaModelMixin`]), processor ([`CocoaProcessor`]).
        split (`str`, defaults to `"test"`): `"validation"` or `"test"`.
    """
    rows = Dataset.from_parquet(str(FOLDER / "wordnet.parquet"))
    rows = rows.select([row for row, name in enumerate(rows["split"]) if name == split])
    lemmas, glosses = (encode_inputs(model, processor, list(rows[name])).numpy() for name in ("lemma", "gloss"))
    targets = np.arange(len(rows))
    return {
        "lemma": [target_ranks(lemmas @ glosses.T, targets).tolist()],
        "gloss": [target_ranks(glosses @ lemmas.T, targets).tolist()],
    }
