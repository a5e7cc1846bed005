# SPDX-License-Identifier: Apache-2.0
"""A small processor, saved once and loaded anew for each test, and a few inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image
from transformers import Qwen2Tokenizer

from benchmarks.qwen2_tokenizer import build_qwen2_tokenizer
from modeling_cocoa.processing_cocoa import CocoaProcessor
from tests.hub_fixtures import api, hub  # noqa: F401
from trainers.recipes.tiny_processor import build_tiny_processor

# A busy machine is no reason to fail.
settings.register_profile("cocoa", deadline=None, max_examples=50)
settings.load_profile("cocoa")

TEXTS = ["a nerd face with glasses", "a grinning cat face", "a red apple on a table", "une pomme rouge", "りんご"] * 4


@pytest.fixture(scope="session")
def processor_folder(tmp_path_factory) -> Path:
    """What `save_pretrained` writes: of 8-pixel patches, images of 16 x 16 to 64 x 64 pixels, 96 tokens."""
    folder = tmp_path_factory.mktemp("processor")
    build_tiny_processor(TEXTS, vocab_size=400, max_length=96).save_pretrained(folder)
    return folder


@pytest.fixture
def processor(processor_folder) -> CocoaProcessor:
    """Loaded for one test, which may change it."""
    return CocoaProcessor.from_pretrained(processor_folder)


@pytest.fixture(scope="session")
def image() -> Image.Image:
    """48 pixels wide and 32 high, so 3 x 2 image tokens; coloured noise."""
    return make_image(48, 32)


def make_image(width: int, height: int, channels: int = 3, seed: int = 0) -> Image.Image:
    """An image of random pixels."""
    shape = (height, width) if channels == 1 else (height, width, channels)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


@pytest.fixture(scope="session")
def qwen2_tokenizer() -> Qwen2Tokenizer:
    """The real one; takes seconds to rebuild. Copy it before changing it."""
    return build_qwen2_tokenizer()
