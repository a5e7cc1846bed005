# SPDX-License-Identifier: Apache-2.0
"""CoCoA models: two-sided Qwen2-VL backbones with an EOS pooler, their processor, and reconstruction pre-training."""

from .auto import load_backbone
from .configuration_cocoa import CocoaConfig
from .inputs import CocoaInputError
from .modeling_cocoa import CocoaModelOutput
from .modeling_cocoa_qwen2_5_vl import CocoaQwen2_5_VLModel
from .modeling_cocoa_qwen2_vl import CocoaQwen2VLModel
from .pooling import EosPooler
from .processing_cocoa import CocoaProcessor
from .reconstruction import CocoaForReconstruction
from .saving import mend_cocoa, repair_cocoa, save_cocoa  # noqa: F401 - the first, a former name
from .sentence_transformer import CocoaTransformer

__all__ = [
    "CocoaConfig",
    "CocoaForReconstruction",
    "CocoaInputError",
    "CocoaModelOutput",
    "CocoaProcessor",
    "CocoaQwen2VLModel",
    "CocoaQwen2_5_VLModel",
    "CocoaTransformer",
    "EosPooler",
    "load_backbone",
    "repair_cocoa",
    "save_cocoa",
]
