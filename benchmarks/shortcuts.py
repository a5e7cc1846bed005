# SPDX-License-Identifier: Apache-2.0
"""What each thing brings that `encode` does otherwise than stock layers on a CPU."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from modeling_cocoa import CocoaTransformer, encoding, modeling_cocoa

from .measure import alternate
from .models import make_texts, make_workloads
from .shapes import PUBLISHED, build_backbone, shared_processor

SHORTCUTS = {
    "linear layers by oneDNN": (encoding, "LinearByConvolution"),
    "EOS alone in the last layer's MLP": (modeling_cocoa, "compute_rows"),
}
"""Where each is looked up: contexts, which can be left out."""


def bench_shortcuts(folder: Path, count: int, repeats: int) -> dict[str, Any]:
    """
    Measure `encode` with all shortcuts, and without each: of a 118M-parameter model, and of a 2B one on a few texts.

    Returns:
        `dict`: By workload and what is left out, inputs a second, and the speed against that with all.
    """
    small = CocoaTransformer(folder)
    report = {
        f"118M, {workload}": without_each(small, items, repeats) for workload, items in make_workloads(count).items()
    }
    large = build_backbone(PUBLISHED.shapes["Qwen2-VL-2B"], torch.float32)
    module = CocoaTransformer(large, shared_processor("qwen2_vl"))
    report["2B, texts"] = without_each(module, make_texts(max(1, count // 12)), min(repeats, 3))
    return report


def without_each(module: CocoaTransformer, items: list[Any], repeats: int) -> dict[str, dict[str, float]]:
    """`encode` with all shortcuts, without each, and without any, in turn."""

    def encode(*left_out: str) -> None:
        with ExitStack() as stack:
            for name in left_out:
                stack.enter_context(patch.object(*SHORTCUTS[name], lambda *args: nullcontext()))
            module.encode(items)

    ways = {"all": encode, **{f"without {name}": partial(encode, name) for name in SHORTCUTS}}
    ways["without any"] = partial(encode, *SHORTCUTS)
    results, _ = alternate(ways, repeats)
    return {
        name: {
            "items a second": len(items) / result.median,
            "against all": results["all"].median / result.median,
        }
        for name, result in results.items()
    }
