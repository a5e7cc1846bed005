# SPDX-License-Identifier: Apache-2.0
"""CoCoA models: two-sided Qwen-VL backbones with an EOS pooler, their processor, and reconstruction pre-training."""

import warnings
from typing import Any

from .auto import load_backbone
from .configuration_cocoa import CocoaSettings
from .inputs import CocoaInputError
from .modeling_cocoa import CocoaModelOutput
from .modeling_cocoa_qwen2_5_vl import CocoaQwen2_5_VLModel
from .modeling_cocoa_qwen2_vl import CocoaQwen2VLModel
from .modeling_cocoa_qwen3_vl import CocoaQwen3VLModel
from .pooling import EosPooler
from .processing_cocoa import CocoaProcessor
from .reconstruction import CocoaForReconstruction
from .saving import mend_cocoa, repair_cocoa, save_cocoa  # noqa: F401 - the first, a former name
from .sentence_transformer import CocoaTransformer

__all__ = [
    "CocoaForReconstruction",
    "CocoaInputError",
    "CocoaModelOutput",
    "CocoaProcessor",
    "CocoaQwen2VLModel",
    "CocoaQwen2_5_VLModel",
    "CocoaQwen3VLModel",
    "CocoaSettings",
    "CocoaTransformer",
    "EosPooler",
    "load_backbone",
    "repair_cocoa",
    "save_cocoa",
]


def __getattr__(name: str) -> Any:
    if name == "CocoaConfig":  # goes in the next release
        warnings.warn("CocoaConfig is now called CocoaSettings.", FutureWarning, stacklevel=2)
        return CocoaSettings
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
