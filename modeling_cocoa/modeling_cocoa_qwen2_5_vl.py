# SPDX-License-Identifier: Apache-2.0
"""CoCoA over Qwen2.5-VL."""

from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

from .modeling_cocoa import CocoaModelMixin


class CocoaQwen2_5_VLModel(CocoaModelMixin, Qwen2_5_VLModel):
    """Qwen2.5-VL as an embedding model: two-sided attention, EOS pooler. See [`CocoaModelMixin`]."""

    config_class = Qwen2_5_VLConfig


CocoaQwen2_5_VLModel.register_for_auto_class("AutoModel")
