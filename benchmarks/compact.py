# SPDX-License-Identifier: Apache-2.0
"""What shorter vectors and vectors of fewer bits cost the trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evaluation.compact import score_compact
from evaluation.emoji import STYLES, load_emoji, split_rows
from modeling_cocoa import CocoaTransformer

from .models import device


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
