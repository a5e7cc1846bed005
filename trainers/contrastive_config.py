# SPDX-License-Identifier: Apache-2.0
"""Settings of contrastive training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from sentence_transformers import SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import BatchSamplers, MultiDatasetBatchSamplers

from modeling_cocoa.checkpoint_files import find_checkpoint_file

from .base import SharedOptions

SMALLEST_TEMPERATURE = 0.01
"""The least that a learned one becomes; as in CLIP (arXiv 2103.00020, section 2.5)."""


MINI_BATCH_SIZE = 8
"""Inputs at a time, where a step is not bounded by tokens."""

DISTILLATION_WEIGHT = 0.5
"""Default weight of the distillation loss."""


@dataclass
class CocoaContrastiveConfig(SharedOptions, SentenceTransformerTrainingArguments):
    r"""
    Arguments of [`CocoaContrastiveTrainer`]: those of
    [`~sentence_transformers.SentenceTransformerTrainingArguments`] and the ones below.

    Defaults are those of the authors' launch script: learning rate 2e-5 with linear decay and 10 % warm-up (200 of
    2,000 steps), 128 pairs a device, computed 8 at a time (GradCache), temperature 0.02. They train DoRA adapters;
    without a `peft_config` all weights train, for which 2e-5 is a usual rate too.

    Raises:
        ValueError: an option is out of range; says which, and the range.
    """

    warmup_steps: float = field(
        default=0.1,
        metadata={"help": "Steps of linear warm-up; below 1, their share of all steps (authors: 200 of 2,000)."},
    )
    per_device_train_batch_size: int = field(
        default=128, metadata={"help": "Pairs a device and step (authors: 128 on each of eight)."}
    )

    temperature: float = field(
        default=0.02, metadata={"help": "Cosines are divided by this before the softmax (authors: 0.02)."}
    )
    learnable_temperature: bool = field(
        default=False,
        metadata={
            "help": "Learn the temperature with the model, from `temperature` on; at 1e-3, or what "
            "`learning_rate_mapping` has for 'log_scale'."
        },
    )
    symmetric: bool = field(
        default=False, metadata={"help": "Also ask each positive for its query (both directions, averaged)."}
    )
    matryoshka_dims: list[int] | None = field(
        default=None,
        metadata={
            "help": "Train these first numbers of the vectors to serve alone (Matryoshka), the full size among them."
        },
    )
    matryoshka_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of the loss at each of `matryoshka_dims`; 1 by default."}
    )

    teacher: str | None = field(
        default=None,
        metadata={
            "help": "Name or folder of a model of sentence-transformers, whose similarities within a batch the model "
            "learns beside the contrastive loss (distillation). It may read texts alone."
        },
    )
    distillation_weight: float = field(
        default=DISTILLATION_WEIGHT,
        metadata={"help": "What the distillation loss is multiplied by before it is added to the contrastive one."},
    )
    distillation_temperature: float | None = field(
        default=None,
        metadata={
            "help": "Temperature of both similarities in the distillation loss; `temperature` by default. Above it, "
            "the model also learns how the teacher ranks what is not close."
        },
    )

    mini_batch_size: int | None = field(
        default=MINI_BATCH_SIZE,
        metadata={
            "help": "Compute a step's embeddings this many at a time (GradCache; authors: 8): same gradients, less "
            "memory, a third more time. None computes all at once. Left out where mini_batch_num_tokens is given."
        },
    )
    mini_batch_num_tokens: int | None = field(
        default=None,
        metadata={
            "help": "The same by tokens: as many inputs at a time as have no more together, one at least. Images of "
            "any size then need the same memory."
        },
    )
    gather_across_devices: bool = field(
        default=False, metadata={"help": "Negatives from all devices, not only from a pair's own."}
    )

    num_hard_negatives: int | None = field(
        default=None, metadata={"help": "Use this many of the columns `negative_1`, ...; all of them by default."}
    )
    no_duplicates: bool = field(
        default=False,
        metadata={
            "help": "No text and no image twice among the rows of a step: it would be a false negative. Images are "
            "compared pixel by pixel, whatever their files are called; each is read once before the first step."
        },
    )
    false_negative_margin: float | None = field(
        default=None,
        metadata={
            "help": "Drop negatives that are as close to the query as its positive, less this margin in cosine. "
            "Negative values drop only what is closer by so much. One more forward pass a step."
        },
    )

    task_homogeneous: bool = field(
        default=True,
        metadata={"help": "All devices' rows of a step come from one dataset; otherwise each device's from its own."},
    )
    sampling_alpha: float = field(
        default=1.0,
        metadata={
            "help": "Datasets are drawn in proportion to their rows to this power: 1 uses every row once, 0 all alike."
        },
    )
    query_prompt: str | None | dict[str, str] = field(
        default=None,
        metadata={
            "help": "Instruction before queries (a system message): one, which `encode_query` of the saved model "
            "uses too, or by dataset."
        },
    )
    target_prompt: str | None | dict[str, str] = field(
        default=None,
        metadata={
            "help": "Instruction before positives and negatives: one, which `encode_document` uses too, or by dataset."
        },
    )
    evaluate_retrieval: bool = field(
        default=False,
        metadata={
            "help": "At each evaluation, find the positives of each evaluation dataset by its queries: Recall@1, @5, "
            "@10, MRR@10, nDCG@10, and as `eval_sequential_score` the mean nDCG@10."
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after this many evaluations without a better `metric_for_best_model`."},
    )

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0; got {self.temperature}.")
        if self.learnable_temperature and self.temperature < SMALLEST_TEMPERATURE:
            raise ValueError(
                f"A learned temperature is never below {SMALLEST_TEMPERATURE}, where it would begin; got "
                f"{self.temperature}."
            )
        if not 0 < self.distillation_weight < math.inf:
            raise ValueError(f"distillation_weight must be above 0; got {self.distillation_weight}.")
        if self.distillation_temperature is not None and not self.distillation_temperature > 0:
            raise ValueError(f"distillation_temperature must be above 0; got {self.distillation_temperature}.")
        for name in ("mini_batch_size", "mini_batch_num_tokens", "early_stopping_patience"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more; got {getattr(self, name)}.")
        if self.num_hard_negatives is not None and self.num_hard_negatives < 0:
            raise ValueError(f"num_hard_negatives must be 0 or more; got {self.num_hard_negatives}.")
        if self.mini_batch_num_tokens is not None and self.mini_batch_size == MINI_BATCH_SIZE:
            self.mini_batch_size = None
        if self.mini_batch_size is not None and self.mini_batch_num_tokens is not None:
            raise ValueError("Set either mini_batch_size or mini_batch_num_tokens, not both.")
        self._check_matryoshka()
        for name in ("symmetric", "learnable_temperature"):
            if self.false_negative_margin is not None and getattr(self, name):
                raise ValueError(f"false_negative_margin cannot go with {name}=True.")
        if self.sampling_alpha < 0:
            raise ValueError(f"sampling_alpha must be 0 or more; got {self.sampling_alpha}.")
        if (self.query_prompt is not None or self.target_prompt is not None) and self.prompts:
            raise ValueError("Set either prompts or query_prompt and target_prompt, not both.")
        if self.learnable_temperature:
            self.learning_rate_mapping = {"log_scale": 1e-3, **(self.learning_rate_mapping or {})}
        if self.no_duplicates:
            if self.batch_sampler not in (BatchSamplers.BATCH_SAMPLER, BatchSamplers.NO_DUPLICATES_HASHED):
                raise ValueError("no_duplicates=True has a batch_sampler of its own; give one of them.")
            self.batch_sampler = BatchSamplers.NO_DUPLICATES_HASHED
        super().__post_init__()
        if self.multi_dataset_batch_sampler == MultiDatasetBatchSamplers.ROUND_ROBIN:
            raise ValueError(
                "Datasets are drawn as sampling_alpha says; leave multi_dataset_batch_sampler as it is, or give a "
                "callable that makes another sampler."
            )
        if self.early_stopping_patience is not None:
            if not self.load_best_model_at_end:
                raise ValueError("early_stopping_patience needs load_best_model_at_end=True, and evaluations.")
            self.restore_callback_states_from_checkpoint = True  # or a run that goes on would count anew

    def _check_matryoshka(self) -> None:
        dims, weights = self.matryoshka_dims, self.matryoshka_weights
        if dims is not None and (not dims or any(dim < 1 for dim in dims) or len(set(dims)) < len(dims)):
            raise ValueError(f"matryoshka_dims must be different numbers of 1 or more; got {dims}.")
        if weights is not None and (dims is None or len(weights) != len(dims)):
            raise ValueError(f"matryoshka_weights needs a number for each of matryoshka_dims ({dims}); got {weights}.")
        if weights is not None and self.learnable_temperature:
            raise ValueError("learnable_temperature cannot go with matryoshka_weights; leave the weights at 1.")


def check_teacher(args: CocoaContrastiveConfig, teacher: Any = None) -> None:
    """
    Check the teacher, without loading it.

    Args:
        args ([`CocoaContrastiveConfig`]).
        teacher (*optional*): The one in memory that a trainer was given.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: there are two teachers, or options of distillation without one.
    """
    if teacher is not None and args.teacher is not None:
        raise ValueError(f"One teacher was given, and args.teacher is {args.teacher!r}; leave one of them out.")
    if teacher is None and args.teacher is None:
        for name, default in (("distillation_weight", DISTILLATION_WEIGHT), ("distillation_temperature", None)):
            if getattr(args, name) != default:
                raise ValueError(f"{name} is {getattr(args, name)}, and there is no teacher; give one.")
    files = ("modules.json", "config.json")
    if args.teacher is not None and not any(find_checkpoint_file(args.teacher, file) for file in files):
        raise FileNotFoundError(
            f"teacher: {args.teacher} is neither the folder of a model nor a name, owner/name, that can be had from "
            "the Hub; check it."
        )
