# SPDX-License-Identifier: Apache-2.0
"""How far vectors drift in fewer bits: the trained checkpoint, on names and pictures, against float32."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from evaluation.emoji import load_emoji
from modeling_cocoa import CocoaTransformer

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "cocoa-tiny"


@pytest.fixture(scope="module")
def items():
    rows = load_emoji().select(range(0, 1500, 10))
    return [*rows["name"], *rows["noto"]]


@pytest.fixture(scope="module")
def exact(items):
    return CocoaTransformer(CHECKPOINT).encode(items)


def drift(exact, items, **model_kwargs):
    vectors = CocoaTransformer(CHECKPOINT, model_kwargs=model_kwargs).encode(items)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    return 1 - (exact * vectors).sum(1)


@pytest.mark.parametrize(("dtype", "mean", "most"), [("float16", 1e-5, 1e-3), ("bfloat16", 5e-4, 1e-2)])
def test_half_precision_keeps_the_direction(exact, items, dtype, mean, most):
    """Measured: float16 7e-7 on average, 3e-4 at most; bfloat16 1e-4 and 3e-3."""
    lost = drift(exact, items, dtype=dtype)
    assert lost.mean() < mean and lost.max() < most, (lost.mean(), lost.max())
    assert lost.max() > 1e-7, "nothing was rounded"


def test_weights_of_eight_bits_keep_the_direction(exact, items):
    """Measured: 2e-4 on average, 1e-3 at most; a quarter of the memory of the linear layers."""
    pytest.importorskip("torchao")
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    lost = drift(exact, items, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    assert 1e-6 < lost.max() < 5e-3 and lost.mean() < 1e-3, (lost.mean(), lost.max())
