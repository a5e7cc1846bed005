# SPDX-License-Identifier: Apache-2.0
"""CoCoA over Qwen2-VL."""

from transformers import Qwen2VLConfig, Qwen2VLModel

from .modeling_cocoa import CocoaModelMixin


class CocoaQwen2VLModel(CocoaModelMixin, Qwen2VLModel):
    """Qwen2-VL as an embedding model: two-sided attention, EOS pooler. See [`CocoaModelMixin`]."""

    config_class = Qwen2VLConfig


CocoaQwen2VLModel.register_for_auto_class("AutoModel")
