# SPDX-License-Identifier: Apache-2.0
"""Stages 1 and 2: reconstruction pre-training."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, set_seed

from hub_cards.card_data import CocoaModelCardData
from modeling_cocoa.checkpoint_files import hub_arguments
from modeling_cocoa.inputs import CocoaInputError
from modeling_cocoa.modeling_cocoa import CocoaModelMixin
from modeling_cocoa.processing_cocoa import CocoaProcessor
from modeling_cocoa.reconstruction import (
    HEADS_FILE,
    LOSSES,
    CocoaForReconstruction,
    count_losses,
)
from modeling_cocoa.special_tokens import attach_eos_token, attach_mask_token

from .adapter_files import load_checkpoint, load_weights, submodule_state_dict
from .adapters import has_adapter, prepare_parts
from .base import check_given, check_sizes
from .base_trainer import CocoaTrainerMixin
from .data.batching import TokenBatchSampler, count_row_tokens
from .data.collators import Example, ReconstructionCollator, model_arguments, split_batch, swap_sources
from .data.datasets import EpochSampler, ReconstructionDataset
from .data.streaming import ReconstructionStream
from .loss_means import RowMeans, RunningMeans, sums_of_rows
from .measuring import measuring
from .pictures import draw_pictures, list_texts, save_reconstructions, write_texts
from .reconstruction_config import CocoaReconstructionConfig
from .reconstruction_rows import read_rows
from .record import RunRecord
from .sharding import unsharded_weights
from .tracking import log_image, log_table

EOS_ROWS = 16
"""Rows of a batch by which `eos_information` is measured in training."""
EVALUATED_EOS_ROWS = 64
"""Rows of an evaluation set by which it is measured: the first ones, whatever the size of batches."""
SHOWN_ROWS = 8
"""Rows of the evaluation data whose reconstructions are written out."""
EOS_KINDS = {"text_target": "text", "image": "image"}
"""Losses of a target, and what their part of `eos_information` is called."""


class CocoaReconstructionTrainer(CocoaTrainerMixin, Trainer):
    """
    Trainer of the warm-up and of the EOS-bridged stage (CoCoA, arXiv 2603.01471).

    Args:
        model (`str`, [`CocoaForReconstruction`] or a CoCoA backbone): A name or folder is loaded with
            [`CocoaForReconstruction.from_pretrained`], in float32: a generative Qwen-VL checkpoint, or
            one that an earlier stage saved.
        args ([`CocoaReconstructionConfig`], *optional*): By default all of its defaults.
        train_dataset ([`~datasets.Dataset`] or a dict of them, *optional*): Rows in any of the forms of
            [`~rows.parts_of`]: `query` and `positive`, the pairs of contrastive training; or rows of one side, `image`
            or `images` and `text`, interleaved `images` and `texts`, or `messages`. Several datasets by name are read
            as one, in training by `dataset_weights`; also an [`~datasets.IterableDataset`], with `max_steps`.
        eval_dataset ([`~datasets.Dataset`] or a dict of them, *optional*): The same, not streamed.
        processing_class ([`CocoaProcessor`], *optional*): By default the model's own, with `args`' sizes.
        peft_config ([`~peft.PeftConfig`], *optional*): Train adapters in the backbone; the heads train in full.
        callbacks (`list`, *optional*): As in [`~transformers.Trainer`].
        optimizers (`tuple`, defaults to `(None, None)`): As in [`~transformers.Trainer`].
        card_data ([`CocoaModelCardData`], *optional*): What the saved model's card says beside what the run knows:
            licence, language, name, notes.

    Raises:
        ValueError: wrong columns, a row that cannot be read, a model that does not fit.
    """

    def __init__(
        self,
        model: str | os.PathLike | CocoaForReconstruction | CocoaModelMixin,
        args: CocoaReconstructionConfig | None = None,
        train_dataset: Dataset | IterableDataset | Mapping[str, Dataset | IterableDataset] | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: CocoaProcessor | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        card_data: CocoaModelCardData | None = None,
    ) -> None:
        args = args if args is not None else CocoaReconstructionConfig(output_dir="cocoa-reconstruction")
        check_given(args, model)
        # Before the heads are drawn, so that the same seed is the same run.
        set_seed(args.seed)
        if isinstance(model, (str, os.PathLike)):
            # In float32 whatever the checkpoint holds: steps of 2e-6 are lost in bfloat16 weights. With `bf16=True`
            # the computation is in bfloat16 all the same.
            name, options = model, {"dtype": torch.float32, **(args.model_init_kwargs or {})}
            with unsharded_weights(args):
                model = CocoaForReconstruction.from_pretrained(name, **options, **args.head_options())
            if processing_class is None:
                processing_class = args.load_processor(name, **hub_arguments(options))
        elif isinstance(model, CocoaModelMixin):
            model = CocoaForReconstruction(model, **args.head_options())
        if processing_class is None:
            raise ValueError("Give `processing_class` (a CocoaProcessor) together with a model that is in memory.")
        check_sizes(args, processing_class)
        self.record = RunRecord(model.model, train_dataset, card_data)
        attach_eos_token(model.model, processing_class.eos_token_id)
        attach_mask_token(model.model, processing_class.mask_token_id)
        prepare_parts(model.model, args.freeze_parts, peft_config)
        if model.lm_head is None and isinstance(model.model.get_input_embeddings(), BaseTunerLayer):
            raise ValueError(
                "peft_config adapts embed_tokens, which is the text head of this model as well (tie_word_embeddings): "
                "the head would be another one once they are merged. Leave embed_tokens out of target_modules."
            )
        if peft_config is not None and model.lm_head is not None:
            model.lm_head.requires_grad_(False)  # pretrained like the base, and tied to it in other models

        self._row_tokens: dict[str, np.ndarray] | None = None
        self._means = RunningMeans()
        self._row_means = RowMeans()
        self._untrained_pixels: torch.Tensor | None = None  # of the rows that are drawn, always the same
        collator = ReconstructionCollator(
            processing_class,
            stage=args.stage,
            text_mask_ratio=args.text_mask_ratio,
            image_mask_ratio=args.image_mask_ratio,
            image_mask_fill=args.image_mask_fill,
            source_mask_ratio=args.source_mask_ratio,
            target_mask_ratio=args.target_mask_ratio,
            direction_weights=args.direction_weights,
            image_size=args.image_size,
            on_bad_row=args.on_bad_row,
        )
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=read_rows(train_dataset, "training", collator, args),
            eval_dataset=read_rows(eval_dataset, "evaluation", collator, args),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.label_names = ["labels"]
        # The losses are divided by the counts of the whole step, over its batches and processes.
        self.model_accepts_loss_kwargs = True
        self.finish_init()

    @property
    def backbone(self) -> nn.Module:
        """The CoCoA backbone."""
        return self.model.model

    @property
    def processor(self) -> CocoaProcessor:
        """What makes inputs of rows."""
        return self.processing_class

    def _get_train_sampler(self, train_dataset: torch.utils.data.Dataset | None = None) -> EpochSampler:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        return EpochSampler(len(dataset), self.args.seed, epoch=lambda: int(self.state.epoch or 0))

    def get_train_dataloader(self) -> DataLoader:
        """Batches of rows, or of tokens where `per_device_train_batch_num_tokens` is given."""
        workers = {
            "num_workers": self.args.dataloader_num_workers,
            "pin_memory": self.args.dataloader_pin_memory,
            "persistent_workers": self.args.dataloader_persistent_workers,
            "prefetch_factor": self.args.dataloader_prefetch_factor,
        }
        if isinstance(self.train_dataset, ReconstructionStream):
            # It has been split over processes already, so that no process reads what others train on.
            return prepare_data_loader(
                DataLoader(self.train_dataset, batch_size=None, **workers),
                device=self.accelerator.device,
                num_processes=1,
                process_index=0,
                put_on_device=True,
                dispatch_batches=False,
            )
        batch_num_tokens = self.args.per_device_train_batch_num_tokens
        if batch_num_tokens is None or self.train_dataset is None:
            return self.check_steps(super().get_train_dataloader())
        rows, collator = self.train_dataset, self.data_collator
        if self._row_tokens is None:
            self._row_tokens = {
                name: count_row_tokens(part, self.processing_class, collator.image_size)
                for name, part in rows.parts.items()
            }

        def tokens(key: int) -> int:
            name, row, seed = rows.visit(key)
            return collator.count_tokens(*self._row_tokens[name][row].tolist(), seed)

        batches = TokenBatchSampler(
            self._get_train_sampler(), tokens, batch_num_tokens, processes=self.accelerator.num_processes
        )
        return self.accelerator.prepare(DataLoader(rows, batch_sampler=batches, collate_fn=collator, **workers))

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        """Batches of the rows that were given, or of the trainer's own; see [`~transformers.Trainer`]."""
        if isinstance(eval_dataset, (Dataset, Mapping)):
            eval_dataset = read_rows(eval_dataset, "evaluation", self.data_collator, self.args)
        return super().get_eval_dataloader(eval_dataset)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor]:
        """The batches of a step, and how many terms each of its losses has in all of them and in all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [count_losses(batch["labels"], batch["segment_ids"], batch.get("unit_mask")) for batch in batches]
        total = torch.stack(counts).sum(0).to(device) if counts else torch.zeros(len(LOSSES), device=device)
        return batches, self.accelerator.reduce(total)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted sum of the losses; their means by name go to the log."""
        # DDP and its kin take the mean over processes, of losses that are parts of a sum here.
        counts = None if num_items_in_batch is None else num_items_in_batch / self.accelerator.num_processes
        # What is frozen, or without adapters, leaves batches in which nothing has a gradient.
        use_all_parameters = self._is_distributed or bool(self.args.freeze_parts) or has_adapter(self.backbone)
        output = model(**model_arguments(inputs), loss_counts=counts, use_all_parameters=use_all_parameters)
        self.check_loss(output.loss, lambda: inputs["rows"])
        sums = sums_of_rows(inputs, output)
        if not model.training:
            self._row_means.add(inputs["rows"], sums)
            return (output.loss, {}) if return_outputs else output.loss
        for name, (totals, numbers) in sums.items():
            self._means.add(name, totals.sum(), numbers.sum())
        if self.args.stage == "bridge" and self._logs_this_step():
            for name, (total, number) in self._eos_information(model, split_batch(inputs)[:EOS_ROWS]).items():
                self._means.add(name, total, number)
        if self.args.on_bad_row == "skip" or isinstance(self.train_dataset, ReconstructionStream):
            self._means.add("skipped_rows", inputs.get("num_skipped", 0), 1)
        return (output.loss, {}) if return_outputs else output.loss

    @property
    def _is_distributed(self) -> bool:
        return self.accelerator.num_processes > 1

    def _logs_this_step(self) -> bool:
        step = self.state.global_step
        return step == 0 if self.state.logging_steps < 1 else (step + 1) % self.state.logging_steps == 0

    @torch.no_grad()
    def _eos_information(
        self, model: nn.Module, examples: list[Example], batch_size: int = EOS_ROWS
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """
        How much of the targets the EOS tells: their loss behind another row's source, minus that behind their own.

        Every process makes the same calls of the model, with pairs of rows or without, because sharded weights are
        gathered in them.

        Args:
            model (`nn.Module`): As the trainer has wrapped it.
            examples (`list[Example]`): Of any directions.
            batch_size (`int`): So many at a time.

        Returns:
            `dict`: By name, the sum over tokens or image units, and their number; none without two rows of a
            direction.
        """
        own, swapped = swap_sources(examples)
        found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        with measuring(model), self.compute_loss_context_manager():
            for rows, sign in ((own or examples, -1), (swapped or examples, 1)):
                for start in range(0, len(rows), batch_size):
                    batch = self._prepare_inputs(self.data_collator.collate(rows[start : start + batch_size]))
                    sums = sums_of_rows(
                        batch, model(**model_arguments(batch), use_all_parameters=self._is_distributed)
                    )
                    for loss, kind in EOS_KINDS.items():
                        if own and (pair := sums.get(f"loss_{loss}")) is not None:
                            name = f"eos_information_{kind}"
                            total, number = found.get(name, (0.0, 0.0))
                            number = number + pair[1].sum() if sign > 0 else number
                            found[name] = (total + sign * pair[0].sum(), number)
        return found

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, None, None]:
        """Losses only: nothing is predicted that would have to be gathered."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach().mean(), None, None

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **kwargs: Any) -> Any:
        """
        Evaluate; the losses by name are among the metrics.

        Each is the mean over all tokens or image units of the evaluation set, and `loss` their weighted sum: none
        depends on the size of batches or the number of processes.
        """
        self._row_means.take()
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        means, rows = self._row_means.take()
        weights = {"loss_image": self.args.image_loss_weight}
        means["loss"] = sum(weights.get(name, 1.0) * means.get(name, 0.0) for name in map("loss_{}".format, LOSSES))
        if self.args.on_bad_row == "skip":
            means["skipped_rows"] = len(dataloader.dataset) - rows
        if self.args.stage == "bridge":
            examples = self._first_examples(dataloader.dataset, EVALUATED_EOS_ROWS)
            found = self._eos_information(self.model_wrapped, examples, self.args.per_device_eval_batch_size)
            means.update({name: float(total / number) for name, (total, number) in found.items()})
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{name}": value for name, value in means.items()})
        return output

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """
        The losses of the evaluation data, and what the model makes of its first rows, in `reconstructions/`; see
        [`~transformers.Trainer.evaluate`].
        """
        metrics = super().evaluate(eval_dataset, *args, **kwargs)
        self._show_reconstructions()
        return metrics

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """Batches of the rows that [`~transformers.Trainer.predict`] was given; only their losses are predicted."""
        return super().get_test_dataloader(read_rows(test_dataset, "evaluation", self.data_collator, self.args))

    def _first_examples(self, dataset: ReconstructionDataset, count: int) -> list[Example]:
        """Those of the first rows that can be read."""
        examples = []
        for row in range(min(count, len(dataset))):
            try:
                examples.append(self.data_collator.example(dataset[row]))
            except CocoaInputError:
                continue  # counted by the evaluation itself
        return examples

    @torch.no_grad()
    def _show_reconstructions(self) -> None:
        """Write what the model makes of the first rows of the evaluation data, always masked alike."""
        if self.eval_dataset is None:
            return
        examples = self._first_examples(self.eval_dataset, SHOWN_ROWS)
        if not examples:
            return
        batch = self._prepare_inputs(self.data_collator.collate(examples))
        with measuring(self.model_wrapped), self.compute_loss_context_manager():
            output = self.model_wrapped(**model_arguments(batch))
            if output.pixels is not None and self._untrained_pixels is None:
                torch.manual_seed(self.args.seed)
                with self.model.untrained_decoder():
                    self._untrained_pixels = self.model_wrapped(**model_arguments(batch)).pixels.cpu()
        if self.is_world_process_zero():
            grid = draw_pictures(
                batch,
                output,
                self.processing_class,
                normalized=self.args.normalize_pixels,
                untrained=self._untrained_pixels,
            )
            texts = list_texts(batch, output, self.processing_class)
            path = save_reconstructions(Path(self.args.output_dir), self.state.global_step, grid, write_texts(texts))
            self.picture = path or self.picture
            if grid is not None:
                log_image(self, "reconstructions", grid)
            if texts:
                log_table(self, "reconstructed_texts", texts)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the losses by name to a training log."""
        if "loss" in logs:
            logs.update(self._means.take())
        super().log(logs, *args, **kwargs)

    def write_model(self, folder: str, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
        """
        Write the model's folder and the heads into it.

        Args:
            folder (`str`): Where to.
            state_dict (`Mapping[str, Tensor]`, *optional*): The weights, where processes share them out.
        """
        self.write_backbone(
            folder,
            None if state_dict is None else submodule_state_dict(state_dict, "model."),
            lambda staging: self.model.save_heads(staging, state_dict),
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        own = model if model is not None else self.model
        heads = own.fitting_heads(load_file(os.path.join(resume_from_checkpoint, HEADS_FILE)))
        load_weights(own, heads, strict=False)
        load_checkpoint(own.model, resume_from_checkpoint)
