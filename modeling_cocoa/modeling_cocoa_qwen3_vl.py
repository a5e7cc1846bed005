# SPDX-License-Identifier: Apache-2.0
"""CoCoA over Qwen3-VL."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLModel, Qwen3VLVideoProcessor

from .modeling_cocoa import CocoaModelMixin


class CocoaQwen3VLModel(CocoaModelMixin, Qwen3VLModel):
    """Qwen3-VL as an embedding model: two-sided attention, EOS pooler. See [`CocoaModelMixin`]."""

    config_class = Qwen3VLConfig
    hub_prefixes: ClassVar[dict[str, str]] = {"language_model.": "model.language_model.", "visual.": "model.visual."}
    video_processor_class = Qwen3VLVideoProcessor
    has_timestamps = True

    def vision_features(self, pixel_values: Tensor, grid_thw: Tensor) -> list[Tensor]:
        """Features of the last vision layer, and beside them those that deepstack adds after the first text layers."""
        output = self.get_image_features(pixel_values, grid_thw, return_dict=True)
        return [
            torch.cat(parts, dim=-1) for parts in zip(output.pooler_output, *output.deepstack_features, strict=True)
        ]


CocoaQwen3VLModel.register_for_auto_class("AutoModel")
