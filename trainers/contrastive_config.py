# SPDX-License-Identifier: Apache-2.0
"""Settings of contrastive training."""

from __future__ import annotations

from dataclasses import dataclass, field

from sentence_transformers import SentenceTransformerTrainingArguments

from .base import SharedOptions


@dataclass
class CocoaContrastiveConfig(SharedOptions, SentenceTransformerTrainingArguments):
    r"""
    Arguments of [`CocoaContrastiveTrainer`]: those of
    [`~sentence_transformers.SentenceTransformerTrainingArguments`] and the ones below.

    Defaults are the method's: learning rate 2e-5 with linear decay and 5 % warm-up, gradients clipped at 5, 24 pairs a
    device, temperature 0.03.

    Raises:
        ValueError: an option is out of range; says which, and the range.
    """

    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate of AdamW."})
    warmup_steps: float = field(
        default=0.05, metadata={"help": "Steps of linear warm-up; below 1, their share of all steps."}
    )
    max_grad_norm: float = field(default=5.0, metadata={"help": "Largest gradient norm; larger ones are scaled down."})
    per_device_train_batch_size: int = field(default=24, metadata={"help": "Pairs a device and step."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two logs."})

    temperature: float = field(default=0.03, metadata={"help": "Cosines are divided by this before the softmax."})
    symmetric: bool = field(
        default=False, metadata={"help": "Also ask each positive for its query (both directions, averaged)."}
    )
    mini_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Compute a step's embeddings this many at a time (GradCache): same gradients, less memory. By "
            "default all at once."
        },
    )
    gather_across_devices: bool = field(
        default=False, metadata={"help": "Negatives from all devices, not only from a pair's own."}
    )

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0; got {self.temperature}.")
        if self.mini_batch_size is not None and self.mini_batch_size < 1:
            raise ValueError(f"mini_batch_size must be 1 or more; got {self.mini_batch_size}.")
        super().__post_init__()
