# SPDX-License-Identifier: Apache-2.0
"""Small real models of every backbone, shared by all tests."""

from __future__ import annotations

import os
import shutil
import tempfile

# Before anything imports a library that reads them: no test goes to the network or tells anyone that it ran.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Remote code is copied into this folder; test workers must not rewrite one another's.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="cocoa-test-modules-")

import pytest
import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
)

from modeling_cocoa.modeling_cocoa_qwen2_5_vl import CocoaQwen2_5_VLModel
from modeling_cocoa.modeling_cocoa_qwen2_vl import CocoaQwen2VLModel
from modeling_cocoa.modeling_cocoa_qwen3_vl import CocoaQwen3VLModel

VOCAB, EOS_ID, MASK_ID, PAD_ID = 300, 295, 296, 297
IMAGE_ID, VIDEO_ID, VISION_START_ID, VISION_END_ID = 290, 291, 292, 293
CLASSES = {
    "qwen2_vl": (Qwen2VLConfig, CocoaQwen2VLModel, Qwen2VLModel, Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (
        Qwen2_5_VLConfig,
        CocoaQwen2_5_VLModel,
        Qwen2_5_VLModel,
        Qwen2_5_VLForConditionalGeneration,
    ),
    "qwen3_vl": (Qwen3VLConfig, CocoaQwen3VLModel, Qwen3VLModel, Qwen3VLForConditionalGeneration),
}
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]},
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
}
VISION = {
    "qwen2_vl": {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
    "qwen2_5_vl": {
        "hidden_size": 32,
        "out_hidden_size": 64,
        "intermediate_size": 64,
        "window_size": 32,
        "fullatt_block_indexes": [1],
    },
    "qwen3_vl": {
        "hidden_size": 32,
        "out_hidden_size": 64,
        "intermediate_size": 64,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    },
}
HEAD_DIM = {"qwen3_vl": {"head_dim": 16}}
"""The others divide the hidden size by the heads."""


def tiny_config(model_type: str):
    """A configuration of a few thousand parameters, built from nothing."""
    return CLASSES[model_type][0](
        text_config={**TEXT, **HEAD_DIM.get(model_type, {})},
        vision_config={"depth": 2, "num_heads": 2, "patch_size": 8, **VISION[model_type]},
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
        vision_start_token_id=VISION_START_ID,
        vision_end_token_id=VISION_END_ID,
        tie_word_embeddings=True,
    )


def sharpen(model: torch.nn.Module) -> torch.nn.Module:
    """Weights five times as large: random attention is nearly uniform otherwise, and hides mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return model.eval()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where the tests marked `gpu` run."""
    parser.addoption(
        "--device", choices=["cuda", "cpu"], default="cuda", help="of the gpu tests; cpu runs them in miniature"
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none, unless asked to run it on the CPU."""
    on_cpu = item.config.getoption("device") == "cpu"
    if item.get_closest_marker("gpu") and not on_cpu and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def pytest_sessionfinish() -> None:
    """Remove the copies of remote code."""
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


@pytest.fixture(params=sorted(CLASSES))
def model_type(request) -> str:
    """Each backbone in turn."""
    return request.param


@pytest.fixture
def backbone(model_type):
    """A tiny CoCoA backbone with random weights."""
    torch.manual_seed(0)
    return sharpen(CLASSES[model_type][1](tiny_config(model_type)))
