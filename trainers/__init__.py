# SPDX-License-Identifier: Apache-2.0
"""Training code of the three stages; none of it is shipped with a checkpoint."""

from .contrastive_config import CocoaContrastiveConfig
from .contrastive_trainer import CocoaContrastiveTrainer
from .reconstruction_config import CocoaReconstructionConfig
from .reconstruction_trainer import CocoaReconstructionTrainer

__all__ = [
    "CocoaContrastiveConfig",
    "CocoaContrastiveTrainer",
    "CocoaReconstructionConfig",
    "CocoaReconstructionTrainer",
]
