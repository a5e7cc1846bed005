# SPDX-License-Identifier: Apache-2.0
"""CoCoA over Qwen2-VL."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from transformers import Qwen2VLConfig, Qwen2VLModel
from transformers.activations import QuickGELUActivation
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    Qwen2MLP,
    Qwen2VLDecoderLayer,
    Qwen2VLRMSNorm,
    VisionAttention,
)

from .layers import GatedMLP, Linear, PackedDecoderLayer, PackedVisionAttention, PatchConvolution, QuickGELU, RMSNorm
from .modeling_cocoa import CocoaModelMixin

if TYPE_CHECKING:
    # What these two import: transformers before 5.10 copies no file of the folder that this one does not name.
    from .attention import FLEX_ATTENTION  # noqa: F401
    from .checkpoint_files import KEY_MAPPING  # noqa: F401
    from .configuration_cocoa import CocoaConfig  # noqa: F401
    from .packing import Packing  # noqa: F401
    from .pooling import EosPooler  # noqa: F401


class CocoaQwen2VLDecoderLayer(PackedDecoderLayer, Qwen2VLDecoderLayer):
    """A decoder layer that takes packed rows. See [`PackedDecoderLayer`]."""


class CocoaQwen2VLVisionAttention(PackedVisionAttention, VisionAttention):
    """Vision attention over images of equal size at once. See [`PackedVisionAttention`]."""


class CocoaQwen2VLRMSNorm(RMSNorm, Qwen2VLRMSNorm):
    """The text layers' norm. See [`RMSNorm`]."""


class CocoaQwen2VLMLP(GatedMLP, Qwen2MLP):
    """The text layers' MLP. See [`GatedMLP`]."""


class CocoaQuickGELU(QuickGELU, QuickGELUActivation):
    """The vision layers' activation. See [`QuickGELU`]."""


class CocoaQwen2VLModel(CocoaModelMixin, Qwen2VLModel):
    """Qwen2-VL as an embedding model: two-sided attention, EOS pooler. See [`CocoaModelMixin`]."""

    config_class = Qwen2VLConfig
    packed_layers = {
        Qwen2VLDecoderLayer: CocoaQwen2VLDecoderLayer,
        VisionAttention: CocoaQwen2VLVisionAttention,
        nn.Conv3d: PatchConvolution,
        nn.Linear: Linear,
        Qwen2MLP: CocoaQwen2VLMLP,
        Qwen2VLRMSNorm: CocoaQwen2VLRMSNorm,
        QuickGELUActivation: CocoaQuickGELU,
    }


CocoaQwen2VLModel.register_for_auto_class("AutoModel")
