# SPDX-License-Identifier: Apache-2.0
"""How many floating-point operations a piece of work needs, and how many the machine does in a second."""

from __future__ import annotations

import time
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from modeling_cocoa.modeling_cocoa import CocoaModelMixin

from .models import device

VISION_RATIO = 4
"""Patches that are merged to one token."""


def matmul_rate(
    seconds: float = 0.3, sizes: tuple[int, int, int] = (1024, 2048, 2048), dtype: torch.dtype = torch.float32
) -> float:
    """
    The machine's rate of matrix multiplication, in floating-point operations a second: the median.

    Args:
        seconds (`float`): For which it is measured.
        sizes (`tuple[int, int, int]`): Rows, inner width and columns.
        dtype (`torch.dtype`).
    """
    on, (rows, inner, columns) = device(), sizes
    left = torch.randn(rows, inner, device=on, dtype=dtype)
    right = torch.randn(inner, columns, device=on, dtype=dtype)
    rates: list[float] = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        if on == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        left @ right
        if on == "cuda":
            torch.cuda.synchronize()
        rates.append(2 * rows * inner * columns / (time.perf_counter() - begin))
    return float(np.median(rates))


def bfloat16_rate() -> float:
    """[`matmul_rate`] in bfloat16, of matrices that fill a GPU."""
    size = 8192 if device() == "cuda" else 256
    return matmul_rate(0.1, (size, size, size), torch.bfloat16)


def weights_of(modules: Iterable[nn.Module]) -> int:
    """Entries of the matrices of some modules."""
    return sum(p.numel() for module in modules for p in module.parameters() if p.dim() == 2)


def text_operations(model: CocoaModelMixin, spans: Iterable[tuple[int, int]]) -> float:
    """
    Operations of the text layers, forward.

    Args:
        model: The backbone.
        spans (`Iterable[tuple[int, int]]`): Stretches of queries, each with the number of keys that it sees.

    Returns:
        `float`: 2 for each weight of the linear layers and real token, and 4 for each query, key and unit of width.
    """
    layers, hidden = model.language_model.layers, model.config.get_text_config().hidden_size
    spans = list(spans)
    tokens, products = sum(q for q, _ in spans), sum(q * k for q, k in spans)
    return len(layers) * (2.0 * tokens * weights_of([layers[0]]) + 4.0 * products * hidden)


def vision_operations(model: CocoaModelMixin, grid_thw: Tensor | None) -> float:
    """
    Operations of the vision tower, forward: counted as those of the text layers, each patch seeing its image, or its
    window in the blocks that have windows.
    """
    if grid_thw is None:
        return 0.0
    visual, sizes = model.visual, grid_thw.prod(-1).double()
    width, blocks = visual.blocks[0].attn.proj.weight.shape[0], len(visual.blocks)
    weights = weights_of(visual.blocks) + visual.patch_embed.proj.weight.numel()
    weights += weights_of([visual.merger, *getattr(visual, "deepstack_merger_list", ())]) / VISION_RATIO
    whole = blocks
    if hasattr(visual, "fullatt_block_indexes"):
        whole = sum(index < blocks for index in visual.fullatt_block_indexes)
    window = (visual.window_size // visual.patch_size) ** 2 if whole < blocks else 1
    products = whole * sizes.square().sum() + (blocks - whole) * (sizes * sizes.clamp(max=window)).sum()
    return float(2 * weights * sizes.sum() + 4 * width * products)


def embedding_operations(
    model: CocoaModelMixin, rows: Iterable[dict[str, Tensor]], with_gradients: bool = False
) -> float:
    """
    What embedding needs of rows as `CocoaProcessor.preprocess` gives them. Without gradients, the last MLP serves the
    EOS tokens alone.
    """
    rows = list(rows)
    lengths = [len(row["input_ids"]) for row in rows]
    images = sum(vision_operations(model, row.get("image_grid_thw")) for row in rows)
    needed = images + text_operations(model, [(length, length) for length in lengths])
    if with_gradients:
        return needed
    return needed - 2.0 * (sum(lengths) - len(lengths)) * weights_of([model.language_model.layers[-1].mlp])
