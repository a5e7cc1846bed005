# SPDX-License-Identifier: Apache-2.0
"""What shorter vectors, and vectors of fewer bits, cost in recall."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers.util.quantization import quantize_embeddings

from evaluation.emoji import STYLES, load_emoji, split_rows
from evaluation.ranking import Estimate, recall_at, target_ranks
from modeling_cocoa import CocoaTransformer

from .models import device

CUTOFFS = (1, 10)


@dataclass(frozen=True)
class CompactScore:
    """
    Recall with one form of the vectors.

    Args:
        form (`str`): `"192 float32"`, `"48 float32"`, `"192 int8"`, ...
        size (`int`): Bytes of a vector.
        recall (`dict[int, Estimate]`): By cutoff.
    """

    form: str
    size: int
    recall: dict[int, Estimate]


def score_compact(queries: np.ndarray, candidates: np.ndarray, dims: tuple[int, ...] = ()) -> list[CompactScore]:
    """
    Recall of whole vectors, of their first numbers alone, and of whole and short ones in 8 bits and in one bit each.

    Eight bits hold a number between the largest and its negative (sentence-transformers' `int8`, with one range for
    all dimensions, so that their dot products are in proportion to cosines); one bit holds the sign, and vectors are
    compared by how many signs agree.

    Args:
        queries, candidates (`np.ndarray` of shape `(inputs, hidden)`): Unit vectors; query i's answer is candidate i.
        dims (`tuple[int, ...]`, *optional*): Shorter lengths; by default a half, a quarter and an eighth.
    """
    width = queries.shape[1]
    scores = []
    for dim in (width, *(dims or (width // 2, width // 4, width // 8))):
        short = [
            part[:, :dim] / np.linalg.norm(part[:, :dim], axis=1, keepdims=True) for part in (queries, candidates)
        ]
        largest = np.full(dim, max(np.abs(part).max() for part in short), dtype=np.float32)
        whole, bits = (
            [quantize_embeddings(part, precision, ranges=np.stack([-largest, largest])) for part in short]
            for precision in ("int8", "ubinary")
        )
        signs = [np.unpackbits(part, axis=1)[:, :dim].astype(np.float32) * 2 - 1 for part in bits]
        for form, (left, right), size in (
            ("float32", short, 4 * dim),
            ("int8", [part.astype(np.float32) for part in whole], dim),
            ("binary", signs, -(-dim // 8)),
        ):
            ranks = target_ranks(left @ right.T)
            scores.append(CompactScore(f"{dim} {form}", size, {k: recall_at(ranks, k) for k in CUTOFFS}))
    return scores


def bench_compact(trained: Path) -> dict[str, Any]:
    """
    Measure recall from the names of concepts seen in training to their pictures, with every form of the vectors.

    Returns:
        `dict`: By style and form, bytes of a vector, recall, and its share of what whole float32 vectors have.
    """
    module, emoji = CocoaTransformer(trained).to(device()), load_emoji()
    rows = split_rows(emoji)["train"]
    seen = emoji.select(rows)
    names = module.encode(list(seen["name"]))
    report: dict[str, Any] = {}
    for column, style in STYLES.items():
        scores = score_compact(names, module.encode(list(seen[column])))
        whole = scores[0].recall
        report[f"name to {style}"] = {
            score.form: {
                "bytes": score.size,
                **{f"R@{k}": found.value for k, found in score.recall.items()},
                **{f"share of R@{k}": found.value / whole[k].value for k, found in score.recall.items()},
            }
            for score in scores
        }
    return report
