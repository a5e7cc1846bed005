# SPDX-License-Identifier: Apache-2.0
"""Stage 3: contrastive training, on sentence-transformers' trainer, samplers and losses."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from peft import PeftConfig
from PIL import Image
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.base.losses.gradcache import uses_gradient_cache
from sentence_transformers.base.losses.merged_forward import column_merging_disabled
from sentence_transformers.base.sampler import BatchSamplers, MultiDatasetBatchSamplers
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader
from transformers import TrainerCallback, set_seed

from evaluation.encoders import label
from hub_cards.card_data import CocoaModelCardData
from modeling_cocoa.auto import check_backbone
from modeling_cocoa.checkpoint_files import hub_arguments
from modeling_cocoa.modeling_cocoa import CocoaModelMixin
from modeling_cocoa.processing_cocoa import CocoaProcessor
from modeling_cocoa.sentence_transformer import CocoaTransformer
from modeling_cocoa.special_tokens import attach_eos_token

from .adapter_files import load_checkpoint, submodule_state_dict
from .adapters import prepare_parts
from .base import check_given, check_sizes
from .base_trainer import CocoaTrainerMixin
from .contrastive_config import CocoaContrastiveConfig, check_teacher
from .contrastive_losses import Distillation, LearnedTemperatureLoss, check_own_loss, contrastive_loss
from .data.content import content_keys
from .data.contrastive_rows import (
    ContrastiveCollator,
    check_equal_columns,
    check_equal_rows,
    input_columns,
    named_parts,
    prepare_contrastive_data,
    prompts_of,
    readable_rows,
)
from .data.global_batches import GlobalBatchSampler, TaskBatchSampler
from .data.teacher import TeacherVectors
from .measuring import random_state_kept
from .record import RunRecord
from .retrieval import EarlyStoppingCallback, retrieval_evaluator
from .run_folder import fingerprint_weights
from .sharding import unsharded_weights
from .tracking import RETRIEVAL_FOLDER, log_image, save_image

PIXELS = ("pixel_values", "pixel_values_videos")
"""Endings of the columns of a batch that stay on the CPU until the model reads them."""
TEACHER_FOLDER = "teacher"
"""In a run's output folder: vectors of the teacher."""


class CocoaContrastiveTrainer(CocoaTrainerMixin, SentenceTransformerTrainer):
    """
    Trainer of the contrastive stage: InfoNCE on EOS embeddings of queries and targets (CoCoA, arXiv 2603.01471).

    Args:
        model (`str`, [`~sentence_transformers.SentenceTransformer`] or a CoCoA backbone): A name or folder is loaded
            with [`CocoaTransformer`], in float32: a checkpoint of an earlier stage, or a generative
            Qwen-VL one.
        args ([`CocoaContrastiveConfig`], *optional*): By default all of its defaults.
        train_dataset ([`~datasets.Dataset`] or a dict of them, *optional*): Columns `query`, `positive`
            and any number of `negative_1`, `negative_2`, ..., or others in this order; each a text, an image or a dict
            of both. With several datasets, each batch comes from one of them.
        eval_dataset ([`~datasets.Dataset`] or a dict of them, *optional*): The same.
        processing_class ([`CocoaProcessor`], *optional*): With a backbone in memory; otherwise the model's own.
        loss (`nn.Module`, a callable that makes one of the model, or a dict of them by dataset, *optional*): A loss
            of sentence-transformers or of your own, instead of the one that `args` describe.
        teacher ([`~sentence_transformers.SentenceTransformer`], *optional*): A model in memory, for what
            `args.teacher` names. Its vectors are computed before the first step, and kept in `teacher/` of the output
            folder.
        peft_config ([`~peft.PeftConfig`], *optional*): Train adapters in the backbone.
        evaluator: Of sentence-transformers; see also `evaluate_retrieval`.
        callbacks (`list`, *optional*): As in [`~transformers.Trainer`].
        optimizers (`tuple`, defaults to `(None, None)`): As in [`~transformers.Trainer`].
        card_data ([`CocoaModelCardData`], *optional*): What the saved model's card says beside what the run knows:
            licence, language, name, notes. By default that of a `SentenceTransformer` which has it.

    Raises:
        FileNotFoundError: there is no such teacher.
        ValueError: wrong columns, a row that cannot be read, a model or a teacher that does not fit.
    """

    def __init__(
        self,
        model: str | os.PathLike | SentenceTransformer | CocoaModelMixin,
        args: CocoaContrastiveConfig | None = None,
        train_dataset: Dataset | DatasetDict | dict[str, Dataset] | None = None,
        eval_dataset: Dataset | DatasetDict | dict[str, Dataset] | None = None,
        processing_class: CocoaProcessor | None = None,
        peft_config: PeftConfig | None = None,
        evaluator: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        card_data: CocoaModelCardData | None = None,
        loss: nn.Module | Callable[[SentenceTransformer], nn.Module] | dict[str, Any] | None = None,
        teacher: SentenceTransformer | None = None,
    ) -> None:
        args = args if args is not None else CocoaContrastiveConfig(output_dir="cocoa-contrastive")
        check_given(args, model)
        check_teacher(args, teacher)
        if loss is not None:
            check_own_loss(args, teacher)
        # Before adapters are drawn, so that the same seed is the same run.
        set_seed(args.seed)
        self._evaluates = False
        self._skipped_rows = 0
        given = processing_class is not None or isinstance(model, SentenceTransformer)
        if isinstance(model, CocoaModelMixin):
            if processing_class is None:
                raise ValueError("Give `processing_class` (a CocoaProcessor) together with a backbone in memory.")
            model = SentenceTransformer(modules=[CocoaTransformer(model, processing_class)])
        elif not isinstance(model, SentenceTransformer):
            # In float32 whatever the checkpoint holds: small steps are lost in bfloat16 weights.
            options = {"dtype": torch.float32, **(args.model_init_kwargs or {})}
            hub = hub_arguments(options)
            check_backbone(model, **hub)
            with unsharded_weights(args):
                processor = processing_class if processing_class is not None else args.load_processor(model, **hub)
                module = CocoaTransformer(model, processor, model_kwargs=options)
            model = SentenceTransformer(modules=[module])
        if len(model) != 1 or not isinstance(model[0], CocoaTransformer):
            raise ValueError(
                f"The model's modules are {[type(module).__name__ for module in model]}, not CocoaTransformer alone: "
                "give the folder or name, and it is loaded as one."
            )
        if given:
            check_sizes(args, model[0].processor)
        attach_eos_token(model[0].model, model[0].processor.eos_token_id)
        model[0].use_all_parameters = args.world_size > 1
        if card_data is None and isinstance(model.model_card_data, CocoaModelCardData):
            card_data = model.model_card_data
        self.record = RunRecord(model[0].model, train_dataset, card_data)
        prepare_parts(model[0].model, args.freeze_parts, peft_config)
        train_dataset, eval_dataset, args.prompts = prepare_contrastive_data(train_dataset, eval_dataset, args)
        if args.gather_across_devices:
            check_equal_rows(train_dataset, args, "gather_across_devices")
        # Saved for encode_query and encode_document, where they are the same for all datasets.
        own, default_prompt = prompts_of(args.prompts, None), None if args.prompts else model[0].processor.prompt
        for name, column in (("query", "query"), ("document", "positive")):
            if prompt := own.get(column, default_prompt):
                model.prompts[name] = prompt
        collator = ContrastiveCollator(
            model.preprocess,
            prompts=args.prompts,
            on_bad_row=args.on_bad_row,
            image_size=args.image_size,
        )
        train_dataset, eval_dataset = (
            readable_rows(dataset, collator, name, args)
            for name, dataset in (("training", train_dataset), ("evaluation", eval_dataset))
        )
        self.distillation: Distillation | None = None
        if teacher is not None or args.teacher is not None:
            with random_state_kept():
                collator.teacher = self._read_with(teacher, args, train_dataset, eval_dataset)
            self.distillation = Distillation(collator.teacher.vectors, args)
        if args.evaluate_retrieval:
            if evaluator is not None:
                raise ValueError(
                    "evaluate_retrieval makes an evaluator, and another one was given; choose one of them."
                )
            evaluator = retrieval_evaluator(
                eval_dataset,
                args.prompts,
                args.per_device_eval_batch_size,
                collator.image_size,
                default_prompt=default_prompt,
            )
        if args.early_stopping_patience is not None:
            callbacks = [*(callbacks or []), EarlyStoppingCallback(args.early_stopping_patience)]
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            loss=contrastive_loss(model, args, self.distillation) if loss is None else loss,
            evaluator=evaluator,
            data_collator=collator,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.finish_init()
        if args.evaluate_retrieval:
            for part in evaluator.evaluators:
                part.show = self._show_found
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap is None:
            # sentence-transformers names no layers, and the whole model would be gathered at once.
            self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(self.backbone._no_split_modules)

    def _read_with(
        self, teacher: SentenceTransformer | None, args: CocoaContrastiveConfig, train_dataset: Any, eval_dataset: Any
    ) -> TeacherVectors:
        """The vectors of all datasets that a teacher gives, which the record names; one given by name is dropped."""
        if teacher is None:
            with unsharded_weights(args):
                teacher = SentenceTransformer(args.teacher, device=str(args.device))
        name = args.teacher or getattr(teacher.config, "name_or_path", None) or type(teacher[0]).__name__
        self.record.teacher, self.record.teacher_weights = label(name), fingerprint_weights(teacher)
        datasets = {
            " ".join(filter(None, (use, part))): rows
            for use, given in (("training data", train_dataset), ("evaluation data", eval_dataset))
            for part, rows in named_parts(given).items()
        }
        return TeacherVectors(teacher, datasets, Path(args.output_dir) / TEACHER_FOLDER, not args.disable_tqdm)

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """None: the card is written from the run's record, and the callback would read the datasets to no purpose."""

    @property
    def backbone(self) -> nn.Module:
        """The CoCoA backbone."""
        return self.model[0].model

    @property
    def processor(self) -> CocoaProcessor:
        """What makes inputs of rows."""
        return self.model[0].processor

    def get_batch_sampler(
        self, dataset: Dataset, batch_size: int, drop_last: bool, *args: Any, **options: Any
    ) -> GlobalBatchSampler:
        """The rows of one dataset, in steps of all processes; see [`GlobalBatchSampler`]."""
        compares_values = self.args.batch_sampler in (BatchSamplers.NO_DUPLICATES, BatchSamplers.NO_DUPLICATES_HASHED)
        rows = content_keys(dataset) if compares_values else dataset
        options["generator"] = torch.Generator()  # its own, whatever else is drawn between two of its batches
        drop_last = drop_last and not self._evaluates
        # A pair that is alone in a step, and has no negatives, has nothing to be told apart from.
        alone = not self._evaluates and set(input_columns(dataset)) <= {"query", "positive"}
        gathered = self.args.gather_across_devices and self.args.world_size > 1
        sampler = super().get_batch_sampler(rows, batch_size * self.args.world_size, drop_last, *args, **options)
        return GlobalBatchSampler(sampler, len(dataset), self.args.world_size, 2 if alone and not gathered else 1)

    def get_multi_dataset_batch_sampler(
        self, dataset: ConcatDataset, batch_samplers: list[GlobalBatchSampler], *args: Any, **kwargs: Any
    ) -> Any:
        """Steps of several datasets: those of [`TaskBatchSampler`], or of the sampler that `args` ask for."""
        asked = self.args
        if asked.multi_dataset_batch_sampler != MultiDatasetBatchSamplers.PROPORTIONAL:
            for part in batch_samplers:  # sentence-transformers' own ask for it
                part.batch_size = part.sampler.batch_size // part.processes
            sampler = super().get_multi_dataset_batch_sampler(dataset, batch_samplers, *args, **kwargs)
            sampler.batch_size = None  # or accelerate would leave short batches out
            return sampler
        return TaskBatchSampler(dataset, batch_samplers, asked.sampling_alpha, asked.task_homogeneous, asked.seed)

    def get_train_dataloader(self) -> DataLoader:
        """The batches, which accelerate leaves on the CPU; see [`~CocoaContrastiveTrainer._prepare_inputs`]."""
        with self.left_on_cpu():
            loader = super().get_train_dataloader()
        # Of several processes each reads a shard of the sampler. On resuming, transformers and accelerate tell the
        # epoch to the shard alone, and the sampler would begin with its first one again.
        shard = loader.batch_sampler
        if hasattr(inner := getattr(shard, "batch_sampler", None), "set_epoch"):
            shard.set_epoch = inner.set_epoch
        return self.check_steps(loader)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The batches, which accelerate leaves on the CPU; the last one of a set too, whatever its size."""
        self._evaluates = True
        try:
            with self.left_on_cpu():
                return super().get_eval_dataloader(eval_dataset)
        finally:
            self._evaluates = False

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """
        The loss of each evaluation dataset, and what the evaluator finds; see [`~transformers.Trainer.evaluate`].

        The evaluator runs once, with the same names during training and after it.
        """
        evaluator = self.evaluator
        if self.is_in_train or eval_dataset is not None or evaluator is None or self.eval_dataset is None:
            return super().evaluate(eval_dataset, *args, **kwargs)
        self.evaluator = None
        try:
            metrics = super().evaluate(eval_dataset, *args, **kwargs)
        finally:
            self.evaluator = evaluator
        found = self.evaluation_loop(DataLoader([]), description="Retrieval").metrics
        self.log(found)
        return {**metrics, **found}

    def _show_found(self, dataset: str, image: Image.Image) -> None:
        """Keep what a few queries of an evaluation set found."""
        name = "-".join(filter(None, (dataset, f"step-{self.state.global_step}")))
        save_image(Path(self.args.output_dir) / RETRIEVAL_FOLDER / f"{name}.png", image)
        log_image(self, "/".join(filter(None, ("retrieval", dataset))), image)

    @contextmanager
    def left_on_cpu(self) -> Iterator[None]:
        """Within it, data loaders are prepared that do not move batches to the device."""
        placement = self.accelerator.device_placement
        self.accelerator.device_placement = False
        try:
            yield
        finally:
            self.accelerator.device_placement = placement

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if self.model.training:
            self._skipped_rows += inputs.get("num_skipped", 0)
        inputs = {name: value for name, value in inputs.items() if name != "num_skipped"}
        # The pixels of a large batch would fill the device; the model fetches a mini-batch's when it reads them.
        pixels = {name: value for name, value in inputs.items() if name.endswith(PIXELS)}
        rest = super()._prepare_inputs({name: value for name, value in inputs.items() if name not in pixels})
        return {name: pixels.get(name, rest.get(name)) for name in inputs}

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """
        The loss of a batch; see [`~sentence_transformers.SentenceTransformerTrainer.compute_loss`].

        Raises:
            FloatingPointError: it is no number; names the step and the queries.
        """
        queries = inputs["query_input_ids"]
        # Columns that are encoded alike are merged into one pass, which a process decides by what its rows hold: where
        # weights are gathered in each pass, one that makes fewer would wait for the others for ever.
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        with column_merging_disabled() if is_sharded else nullcontext():
            result = super().compute_loss(model, inputs, *args, **kwargs)
        if self.distillation is not None:
            divergence = self.distillation.take()
            if self.model.training:
                self.track_loss_components({"loss_distillation": divergence})
        if self.model.training:
            loss = result[0] if isinstance(result, tuple) else result
            self.check_loss(loss, lambda: self.model.tokenizer.batch_decode(queries, skip_special_tokens=True))
        return result

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Those that weight decay pulls towards zero: not the temperature."""
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith("log_scale")]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the number of rows left out, and a learned temperature, to a training log."""
        if "loss" in logs and self.data_collator.on_bad_row == "skip":
            skipped = torch.tensor(self._skipped_rows, device=self.accelerator.device)
            logs["skipped_rows"] = int(self.accelerator.reduce(skipped, reduction="sum"))
        if "loss" in logs and isinstance(self.loss, LearnedTemperatureLoss):
            logs["temperature"] = self.loss.temperature.item()
        super().log(logs, *args, **kwargs)

    def check_sharding(self) -> None:
        """
        Raise `ValueError` where processes that share the weights out would wait for one another for ever, or lose a
        weight.
        """
        super().check_sharding()
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return
        if self.args.learnable_temperature:
            raise ValueError("A learned temperature is not among the weights that FSDP and DeepSpeed share out.")
        losses = self.loss.values() if isinstance(self.loss, dict) else [self.loss]
        if not any(uses_gradient_cache(loss) for loss in losses):
            check_equal_columns(self.train_dataset, self.args, "shared weights")
            return
        if self.is_deepspeed_enabled:
            raise ValueError(
                "GradCache (mini_batch_size, mini_batch_num_tokens, false_negative_margin) makes several backward "
                "passes a step, which DeepSpeed does not take: set mini_batch_size to None, or use "
                "trainers/accelerate_configs/fsdp2.yaml."
            )
        if self.args.mini_batch_num_tokens is not None:
            raise ValueError(
                "mini_batch_num_tokens gives each process mini-batches of its own number, and those that share the "
                "weights out wait for one another in each: use mini_batch_size."
            )
        check_equal_rows(self.train_dataset, self.args, "cached losses and shared weights")

    def model_to_save(self, backbone: nn.Module) -> SentenceTransformer:
        """The model with its settings, around a backbone in the place of the one that trains."""
        model = self.model
        if backbone is self.backbone:
            return model
        return SentenceTransformer(
            modules=[CocoaTransformer(backbone, self.processor)],
            prompts=model.prompts,
            default_prompt_name=model.default_prompt_name,
            truncate_dim=model.truncate_dim,
            similarity_fn_name=model.similarity_fn_name,
        )

    def write_model(self, folder: str, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """
        Write the model's folder, and a learned temperature into it.

        Args:
            folder (`str`): Where to.
            state_dict (`Mapping[str, Tensor]`, *optional*): The weights, where processes share them out.
        """
        learned = isinstance(self.loss, LearnedTemperatureLoss)
        self.write_backbone(
            folder,
            None if state_dict is None else submodule_state_dict(state_dict, "0.model."),
            self.loss.save if learned else lambda staging: None,
        )

    def _load_from_checkpoint(self, checkpoint_path: str, model: nn.Module | None = None) -> None:
        load_checkpoint(self.model[0].model, checkpoint_path)
        if isinstance(self.loss, LearnedTemperatureLoss):
            self.loss.load(checkpoint_path)
