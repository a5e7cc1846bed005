# SPDX-License-Identifier: Apache-2.0
"""Stages 1 and 2: reconstruction pre-training."""

from __future__ import annotations

import os
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback, set_seed

from modeling_cocoa.modeling_cocoa import CocoaModelMixin
from modeling_cocoa.processing_cocoa import CocoaProcessor
from modeling_cocoa.reconstruction import HEADS_FILE, CocoaForReconstruction, attach_mask_token
from modeling_cocoa.saving import save_cocoa

from .adapters import add_adapter, load_checkpoint, merged, save_adapter
from .base import CocoaTrainerMixin
from .collators import ReconstructionCollator
from .datasets import EpochSampler, ReconstructionDataset, check_rows
from .masking import IGNORE_INDEX
from .progress import RunningMeans
from .reconstruction_config import CocoaReconstructionConfig


class CocoaReconstructionTrainer(CocoaTrainerMixin, Trainer):
    """
    Trainer of the warm-up and of the EOS-bridged stage (CoCoA, arXiv 2603.01471).

    Args:
        model (`str`, [`CocoaForReconstruction`] or a CoCoA backbone): A name or folder is loaded with
            [`CocoaForReconstruction.from_pretrained`], in float32: a generative Qwen2-VL / Qwen2.5-VL checkpoint, or
            one that an earlier stage saved.
        args ([`CocoaReconstructionConfig`], *optional*).
        train_dataset, eval_dataset ([`~datasets.Dataset`], *optional*): Columns `image` and `text`; a row may lack
            either.
        processing_class ([`CocoaProcessor`], *optional*): By default the model's own, with `args`' sizes.
        peft_config ([`~peft.PeftConfig`], *optional*): Train adapters in the backbone; the heads train in full.
        callbacks, optimizers: As in [`~transformers.Trainer`].

    Raises:
        ValueError: wrong columns, a row that cannot be read, a model that does not fit.
    """

    def __init__(
        self,
        model: str | os.PathLike | CocoaForReconstruction | CocoaModelMixin,
        args: CocoaReconstructionConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: CocoaProcessor | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
    ) -> None:
        args = args if args is not None else CocoaReconstructionConfig(output_dir="cocoa-reconstruction")
        # Before the heads are drawn, so that the same seed is the same run.
        set_seed(args.seed)
        if isinstance(model, (str, os.PathLike)):
            # In float32 whatever the checkpoint holds: steps of 2e-6 are lost in bfloat16 weights. With `bf16=True`
            # the computation is in bfloat16 all the same.
            name = model
            model = CocoaForReconstruction.from_pretrained(name, dtype=torch.float32, **args.head_options())
            if processing_class is None:
                processing_class = CocoaProcessor.from_pretrained(name, **args.processor_options())
        elif isinstance(model, CocoaModelMixin):
            model = CocoaForReconstruction(model, **args.head_options())
        if processing_class is None:
            raise ValueError("Give `processing_class` (a CocoaProcessor) together with a model that is in memory.")
        attach_mask_token(model.model, processing_class.mask_token_id)
        if peft_config is not None:
            add_adapter(model.model, peft_config)

        self._means = {"train": RunningMeans(), "eval": RunningMeans()}
        collator = ReconstructionCollator(
            processing_class,
            stage=args.stage,
            text_mask_ratio=args.text_mask_ratio,
            image_mask_ratio=args.image_mask_ratio,
            image_mask_fill=args.image_mask_fill,
            source_mask_ratio=args.source_mask_ratio,
            target_mask_ratio=args.target_mask_ratio,
            direction_weights=args.direction_weights,
            on_bad_sample=args.on_bad_sample,
        )
        rows = {
            name: ReconstructionDataset(dataset, args.seed) if dataset is not None else None
            for name, dataset in (("training", train_dataset), ("evaluation", eval_dataset))
        }
        if args.check_data and args.on_bad_sample == "raise":
            for name, dataset in rows.items():
                if dataset is not None:
                    check_rows(dataset, collator, name)
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=rows["training"],
            eval_dataset=rows["evaluation"],
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.label_names = ["labels"]
        self.show_losses()

    def _get_train_sampler(self, train_dataset: torch.utils.data.Dataset | None = None) -> EpochSampler:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        return EpochSampler(len(dataset), self.args.seed, epoch=lambda: int(self.state.epoch or 0))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted sum of the losses; their means by name go to the log."""
        means = self._means["train" if model.training else "eval"]
        inputs = dict(inputs)
        skipped, directions = inputs.pop("num_skipped", 0), inputs.pop("directions")
        output = model(**inputs)
        for name, loss in output.losses.items():
            means.add(f"loss_{name}", loss.detach(), 1)
        if output.token_losses is not None:
            losses, correct = output.token_losses.detach(), output.token_correct
            means.add("token_accuracy", correct.sum(), len(correct))
            rows = (inputs["labels"] != IGNORE_INDEX).nonzero()[:, 0]
            for direction in sorted(set(directions)):
                of_direction = torch.tensor([name == direction for name in directions], device=rows.device)[rows]
                means.add(f"text_{direction}", (losses * of_direction).sum(), of_direction.sum())
        if self.args.on_bad_sample == "skip":
            means.add("skipped_rows", skipped, 1)
        return (output.loss, {}) if return_outputs else output.loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, None, None]:
        """Losses only: nothing is predicted that would have to be gathered."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach().mean(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate; the losses by name are among the metrics."""
        self._means["eval"].take()
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{name}": value for name, value in self._means["eval"].take().items()})
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the losses by name to a training log."""
        if "loss" in logs:
            logs.update(self._means["train"].take())
        super().log(logs, *args, **kwargs)

    def write_model(self, folder: str) -> None:
        """Write the folder that both doors load; adapters are folded in, and kept beside it for resuming."""
        save_cocoa(merged(self.model.model), self.processing_class, folder)
        self.model.save_heads(folder)
        save_adapter(self.model.model, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        own = model if model is not None else self.model
        own.load_heads(load_file(os.path.join(resume_from_checkpoint, HEADS_FILE)))
        load_checkpoint(own.model, resume_from_checkpoint)
