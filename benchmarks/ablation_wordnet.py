# SPDX-License-Identifier: Apache-2.0
"""Words and their definitions, of WordNet."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

from datasets import Dataset

from .ablation_pairs import PairTask

WORDNET = "/usr/share/wordnet"
"""Where Debian's wordnet-base puts it; elsewhere the environment variable `WNSEARCHDIR`, WordNet's own."""


def read_synsets(tokenizer: Any = None) -> Dataset:
    """
    `lemma` and `gloss` of every synset whose first word has this one meaning only, and whose gloss no earlier one
    has; examples of use are left out.

    Raises:
        SystemExit: there is no WordNet; says how to get it.
    """
    folder = Path(os.environ.get("WNSEARCHDIR", WORDNET))
    synsets, meanings = {}, Counter()
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
            gloss = gloss.split('; "')[0].strip()
            synsets.setdefault(gloss.lower(), {"lemma": lemmas[0], "gloss": gloss})
    return Dataset.from_list(
        [synset for synset in synsets.values() if meanings[synset["lemma"].lower()] == 1 and synset["gloss"]]
    )


TASK = PairTask(
    name="wordnet",
    columns=("lemma", "gloss"),
    titles=("word", "definition"),
    sizes={"validation": 2000, "test": 10_000},
    read=read_synsets,
)
