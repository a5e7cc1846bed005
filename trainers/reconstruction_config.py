# SPDX-License-Identifier: Apache-2.0
"""Settings of reconstruction pre-training."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from modeling_cocoa.reconstruction import resolve_eos_sees_target

from .base import SharedOptions, check_choices, parsed_json
from .data.collators import DIRECTION_WEIGHTS, DIRECTIONS
from .data.masking import check_ratios


@dataclass
class CocoaReconstructionConfig(SharedOptions, TrainingArguments):
    r"""
    Arguments of [`CocoaReconstructionTrainer`]: those of [`~transformers.TrainingArguments`] and the ones below.

    Defaults are those of the authors' launch scripts: learning rate 2e-5 with linear decay and 3 % warm-up (100 of
    3,000 steps), 20 % of a text and half of an image masked in the warm-up stage, 70 % of the target in the bridge.
    They train DoRA adapters; without a `peft_config` all weights train, for which 2e-5 is a usual rate too. A tiny
    model trained from nothing needs several hundred times the learning rate.

    Raises:
        ValueError: an option is out of range; says which, and the range.
    """

    warmup_steps: float = field(
        default=0.03,
        metadata={"help": "Steps of linear warm-up; below 1, their share of all steps (authors: 100 of 3,000)."},
    )

    per_device_train_batch_num_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of a batch on each device, images counted at their true number: rows are taken until it "
            "is full, instead of per_device_train_batch_size of them."
        },
    )
    per_device_train_batch_tokens: int | None = field(
        default=None, metadata={"help": "Former name of per_device_train_batch_num_tokens, for one release."}
    )
    dataset_weights: dict | str | None = field(
        default=None,
        metadata={
            "help": "Where train_dataset is a dict: how often each of its datasets is drawn from, relative to the "
            "others. By default every row occurs once."
        },
    )
    shuffle_buffer_size: int = field(
        default=1000,
        metadata={"help": "Of a dataset that is streamed, the rows among which the next one is drawn."},
    )
    stage: str = field(
        default="warmup",
        metadata={
            "help": "'warmup' rebuilds masked text and pixels inside one bidirectional sequence; 'bridge' rebuilds a "
            "target from its source through the EOS alone.",
            "choices": ["warmup", "bridge"],
        },
    )
    bridge: str = field(
        default="layerwise",
        metadata={
            "help": "How a bridge target reaches its source: 'layerwise' attends to the EOS in every layer (the "
            "authors'); 'embedding' attends to one token made from the final embedding.",
            "choices": ["layerwise", "embedding"],
        },
    )
    eos_sees_target: bool | None = field(
        default=None,
        metadata={
            "help": "Whether the EOS attends to the target in the bridge. By default it does with 'layerwise', as in "
            "the authors' code; with False a training row has the EOS that inference has."
        },
    )
    text_mask_ratio: float = field(
        default=0.2, metadata={"help": "Share of text tokens masked in the warm-up (authors: 0.2)."}
    )
    image_mask_ratio: float = field(
        default=0.5, metadata={"help": "Share of image units masked in the warm-up (authors' figure and MoCa: 0.5)."}
    )
    image_mask_fill: str = field(
        default="noise",
        metadata={
            "help": "What stands in a masked patch: 'noise' (one vector, as in MoCa) or 'zeros'.",
            "choices": ["noise", "zeros"],
        },
    )
    source_mask_ratio: float = field(
        default=0.0, metadata={"help": "Share of source text masked in the bridge (authors: nothing)."}
    )
    target_mask_ratio: float = field(
        default=0.7, metadata={"help": "Share of target text masked in the bridge (authors: 0.7)."}
    )
    direction_weights: dict | str = field(
        default_factory=lambda: dict(DIRECTION_WEIGHTS),
        metadata={
            "help": "For rows of one side, not for pairs: weight of each bridge direction "
            f"({', '.join(DIRECTIONS)}). A row draws among those it can serve in proportion; those left out weigh 0. "
            "By default those whose target is a text, as the authors rebuild no image there."
        },
    )
    image_loss_weight: float = field(
        default=0.5, metadata={"help": "Weight of the pixel loss against the text loss (authors: 0.5)."}
    )
    normalize_pixels: bool = field(
        default=True, metadata={"help": "Predict each patch at zero mean and unit variance (MAE), not raw values."}
    )

    def __post_init__(self) -> None:
        check_ratios(self)
        check_choices(self, "stage", "bridge", "image_mask_fill")
        eos_sees_target = resolve_eos_sees_target(self.bridge, self.eos_sees_target)
        if self.stage == "bridge":
            self.eos_sees_target = eos_sees_target  # said outright in the record of the run
        for name in ("dataset_weights", "direction_weights"):
            setattr(self, name, parsed_json(name, getattr(self, name)))
            if (weights := getattr(self, name)) is not None:
                try:  # YAML 1.1 reads 5e-1 as text
                    setattr(self, name, {key: float(weight) for key, weight in dict(weights).items()})
                except (TypeError, ValueError) as error:
                    raise ValueError(f"{name} must give a number for each name; got {weights!r}.") from error
        if self.per_device_train_batch_tokens is not None:
            warnings.warn(
                "per_device_train_batch_tokens is now called per_device_train_batch_num_tokens.",
                FutureWarning,
                stacklevel=3,
            )
            self.per_device_train_batch_num_tokens = self.per_device_train_batch_tokens
            self.per_device_train_batch_tokens = None
        if self.per_device_train_batch_num_tokens is not None and self.per_device_train_batch_num_tokens < 1:
            raise ValueError(
                f"per_device_train_batch_num_tokens must be 1 or more; got {self.per_device_train_batch_num_tokens}."
            )
        if self.shuffle_buffer_size < 1:
            raise ValueError(f"shuffle_buffer_size must be 1 or more; got {self.shuffle_buffer_size}.")
        if self.image_loss_weight < 0:
            raise ValueError(f"image_loss_weight must be 0 or more; got {self.image_loss_weight}.")
        # Rows reach the collator through a dataset of ours, so there is no unused column to remove.
        self.remove_unused_columns = False
        super().__post_init__()

    def head_options(self) -> dict[str, Any]:
        """Arguments of [`CocoaForReconstruction`]."""
        names = ("bridge", "eos_sees_target", "image_loss_weight", "normalize_pixels")
        return {name: getattr(self, name) for name in names}
