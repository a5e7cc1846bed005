# SPDX-License-Identifier: Apache-2.0
"""A stand-in for a model: a random vector for each input, the same for the same input."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from PIL import Image

DIMENSIONS = 24


class StubModel:
    """`encode_query` and `encode_document` as sentence-transformers has them; the same input, the same vector."""

    def __init__(self):
        self.encoded = {"query": 0, "document": 0}

    def encode_query(self, inputs, **options):
        return self._encode("query", inputs, **options)

    def encode_document(self, inputs, **options):
        return self._encode("document", inputs, **options)

    def _encode(self, task, inputs, *, normalize_embeddings, show_progress_bar, batch_size=32):
        assert normalize_embeddings and not show_progress_bar
        self.encoded[task] += len(inputs)
        return np.stack([self.vector(item) for item in inputs])

    @staticmethod
    def vector(item):
        data = item.tobytes() if isinstance(item, Image.Image) else item.encode()
        seed = int.from_bytes(hashlib.sha256(data).digest()[:8], "little")
        vector = np.random.default_rng(seed).normal(size=DIMENSIONS)
        return (vector / np.linalg.norm(vector)).astype(np.float32)


@pytest.fixture(scope="session")
def stub_class():
    return StubModel


@pytest.fixture
def stub():
    return StubModel()
