# SPDX-License-Identifier: Apache-2.0
"""CoCoA over Qwen2.5-VL."""

from __future__ import annotations

from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLDecoderLayer,
    Qwen2_5_VLMLP,
    Qwen2_5_VLRMSNorm,
    Qwen2_5_VLVisionAttention,
    Qwen2MLP,
)

from .layers import GatedMLP, Linear, PackedDecoderLayer, PackedVisionAttention, PatchConvolution, RMSNorm
from .modeling_cocoa import CocoaModelMixin, check_transformers_version

# Versions 5.3 to 5.17 cut the seconds between frames of a video to whole ones.
check_transformers_version((5, 18))


class CocoaQwen2_5_VLDecoderLayer(PackedDecoderLayer, Qwen2_5_VLDecoderLayer):
    """A decoder layer that takes packed rows. See [`PackedDecoderLayer`]."""


class CocoaQwen2_5_VLVisionAttention(PackedVisionAttention, Qwen2_5_VLVisionAttention):
    """Vision attention over images of equal size at once. See [`PackedVisionAttention`]."""


class CocoaQwen2_5_VLRMSNorm(RMSNorm, Qwen2_5_VLRMSNorm):
    """The text layers' norm. See [`RMSNorm`]."""


class CocoaQwen2_5_VLMLP(GatedMLP, Qwen2MLP):
    """The text layers' MLP. See [`GatedMLP`]."""


class CocoaQwen2_5_VLVisionMLP(GatedMLP, Qwen2_5_VLMLP):
    """The vision layers' MLP. See [`GatedMLP`]."""


class CocoaQwen2_5_VLModel(CocoaModelMixin, Qwen2_5_VLModel):
    """Qwen2.5-VL as an embedding model: two-sided attention, EOS pooler. See [`CocoaModelMixin`]."""

    config_class = Qwen2_5_VLConfig
    packed_layers = {
        Qwen2_5_VLDecoderLayer: CocoaQwen2_5_VLDecoderLayer,
        Qwen2_5_VLVisionAttention: CocoaQwen2_5_VLVisionAttention,
        nn.Conv3d: PatchConvolution,
        nn.Linear: Linear,
        Qwen2MLP: CocoaQwen2_5_VLMLP,
        Qwen2_5_VLRMSNorm: CocoaQwen2_5_VLRMSNorm,
        Qwen2_5_VLMLP: CocoaQwen2_5_VLVisionMLP,
    }


CocoaQwen2_5_VLModel.register_for_auto_class("AutoModel")
