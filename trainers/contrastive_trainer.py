# SPDX-License-Identifier: Apache-2.0
"""Stage 3: contrastive training, on sentence-transformers' trainer, samplers and losses."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from peft import PeftConfig
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed

from modeling_cocoa.inputs import CocoaInputError
from modeling_cocoa.modeling_cocoa import CocoaModelMixin
from modeling_cocoa.processing_cocoa import CocoaProcessor
from modeling_cocoa.saving import save_cocoa
from modeling_cocoa.sentence_transformer import CocoaTransformer

from .adapters import below, load_checkpoint, merged, prepare_parts, save_adapter
from .base import CocoaTrainerMixin, whole_weights
from .contrastive_config import CocoaContrastiveConfig
from .datasets import check_rows
from .rows import opened, undecoded


@dataclass
class ContrastiveCollator(SentenceTransformerDataCollator):
    """
    sentence-transformers' collator, which also says which row is bad, or leaves it out.

    Args:
        on_bad_sample (`"raise"` or `"skip"`): What to do with a row that cannot be read.

    Raises:
        ValueError: a row cannot be read, or with `"skip"` no row of the batch can.
    """

    on_bad_sample: str = "raise"
    skipped: int = 0

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        try:
            return self.check(features)
        except CocoaInputError as error:
            if self.on_bad_sample == "raise":
                raise ValueError(
                    f"A row of this batch cannot be read: {error.reason} Mend it, or set on_bad_sample='skip'."
                ) from error
        readable = [row for row in features if self._can_read(row)]
        self.skipped += len(features) - len(readable)
        if not readable:
            raise ValueError("No row of this batch can be read.")
        return self.check(readable)

    def check(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """
        The batch of some rows, none of which is bad.

        Raises:
            CocoaInputError: one is.
        """
        rows = [{name: opened(value) for name, value in row.items()} for row in features]
        return super().__call__(rows)

    def _can_read(self, row: dict[str, Any]) -> bool:
        try:
            self.check([row])
        except CocoaInputError:
            return False
        return True


class CocoaContrastiveTrainer(CocoaTrainerMixin, SentenceTransformerTrainer):
    """
    Trainer of the contrastive stage: InfoNCE on EOS embeddings of queries and targets (CoCoA, arXiv 2603.01471).

    Args:
        model (`str`, [`~sentence_transformers.SentenceTransformer`] or a CoCoA backbone): A name or folder is loaded
            with [`CocoaTransformer`], in float32: a checkpoint of an earlier stage, or a generative Qwen2-VL or
            Qwen2.5-VL one.
        args ([`CocoaContrastiveConfig`], *optional*).
        train_dataset, eval_dataset ([`~datasets.Dataset`] or a dict of them, *optional*): Columns `query`, `positive`
            and any number of `negative_1`, `negative_2`, ...; each a text, an image or a dict of both. With several
            datasets, each batch comes from one of them.
        processing_class ([`CocoaProcessor`], *optional*): With a backbone in memory; otherwise the model's own.
        peft_config ([`~peft.PeftConfig`], *optional*): Train adapters in the backbone.
        evaluator: Of sentence-transformers.
        callbacks, optimizers: As in [`~transformers.Trainer`].

    Raises:
        ValueError: wrong columns, a row that cannot be read, a model that does not fit.
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
    ) -> None:
        args = args if args is not None else CocoaContrastiveConfig(output_dir="cocoa-contrastive")
        # Before adapters are drawn, so that the same seed is the same run.
        set_seed(args.seed)
        if isinstance(model, CocoaModelMixin):
            if processing_class is None:
                raise ValueError("Give `processing_class` (a CocoaProcessor) together with a backbone in memory.")
            model = SentenceTransformer(modules=[CocoaTransformer(model, processing_class)])
        elif not isinstance(model, SentenceTransformer):
            # In float32 whatever the checkpoint holds: small steps are lost in bfloat16 weights.
            with whole_weights(args):
                module = CocoaTransformer(
                    model, processing_class, **args.processor_options(), model_kwargs={"dtype": torch.float32}
                )
            model = SentenceTransformer(modules=[module])
        if len(model) != 1 or not isinstance(model[0], CocoaTransformer):
            raise ValueError(
                f"The model's modules are {[type(module).__name__ for module in model]}, not CocoaTransformer alone: "
                "give the folder or name, and it is loaded as one."
            )
        backbone = model[0].model
        prepare_parts(backbone, args.freeze_parts, peft_config)
        collator = ContrastiveCollator(model.preprocess, prompts=args.prompts, on_bad_sample=args.on_bad_sample)
        check_columns("train_dataset", train_dataset)
        check_columns("eval_dataset", eval_dataset)
        train_dataset, eval_dataset = (
            readable_rows(dataset, collator, name, args)
            for name, dataset in (("training", train_dataset), ("evaluation", eval_dataset))
        )
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            loss=contrastive_loss(model, args),
            evaluator=evaluator,
            data_collator=collator,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.check_sharding()
        self.show_losses()

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """None: the card is written by `save_cocoa`, and the callback would read the datasets to no purpose."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the number of rows left out to a training log."""
        if "loss" in logs and self.data_collator.on_bad_sample == "skip":
            logs["skipped_rows"] = self.data_collator.skipped
        super().log(logs, *args, **kwargs)

    def write_model(self, folder: str, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """
        Write the folder that both doors load; adapters are folded in, and kept beside it for resuming.

        Args:
            folder (`str`): Where to.
            state_dict (`Mapping[str, Tensor]`, *optional*): The whole weights, where processes share them out.
        """
        module = self.model[0]
        model = self.model
        state_dict = None if state_dict is None else below(state_dict, "0.model.")
        plain = merged(module.model, state_dict)
        if plain is not module.model:
            model = SentenceTransformer(
                modules=[CocoaTransformer(plain, module.processor)],
                prompts=model.prompts,
                default_prompt_name=model.default_prompt_name,
                truncate_dim=model.truncate_dim,
                similarity_fn_name=model.similarity_fn_name,
            )
        save_cocoa(model, None, folder)
        save_adapter(module.model, folder, state_dict)

    def _load_from_checkpoint(self, checkpoint_path: str, model: nn.Module | None = None) -> None:
        load_checkpoint(self.model[0].model, checkpoint_path)


def readable_rows(
    dataset: Dataset | dict[str, Dataset] | None,
    collator: ContrastiveCollator,
    name: str,
    args: CocoaContrastiveConfig,
) -> Any:
    """
    The same rows, their images to be opened by the collator; without bad ones where they were looked for and skipped.

    Raises:
        ValueError: a row is bad, or all are; see [`check_rows`].
    """
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        parts = {key: readable_rows(part, collator, f"{name} ({key})", args) for key, part in dataset.items()}
        return type(dataset)(parts)
    dataset = dataset.cast(undecoded(dataset.features))
    if not args.check_data:
        return dataset
    good = check_rows(dataset, lambda row: collator.check([row]), name, args.on_bad_sample)
    return dataset if len(good) == len(dataset) else dataset.select(good)


def contrastive_loss(model: SentenceTransformer, args: CocoaContrastiveConfig) -> nn.Module:
    """InfoNCE as sentence-transformers has it, cached (GradCache) where `mini_batch_size` is set."""
    options: dict[str, Any] = {"scale": 1 / args.temperature, "gather_across_devices": args.gather_across_devices}
    if args.symmetric:
        options.update(directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction")
    if args.mini_batch_size is None:
        return MultipleNegativesRankingLoss(model, **options)
    return CachedMultipleNegativesRankingLoss(model, mini_batch_size=args.mini_batch_size, **options)


def check_columns(name: str, dataset: Dataset | dict[str, Dataset] | None) -> None:
    """Raise `ValueError` unless the columns are `query`, `positive` and `negative_1` to `negative_n`, in order."""
    if dataset is None:
        return
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            check_columns(f"{name}[{key!r}]", part)
        return
    columns = list(dataset.column_names)
    negatives = [column for column in columns if re.fullmatch(r"negative_\d+", column)]
    expected = ["query", "positive", *(f"negative_{number + 1}" for number in range(len(negatives)))]
    if columns != expected:
        raise ValueError(
            f"{name} needs the columns 'query', 'positive' and then 'negative_1', 'negative_2', ... if it has "
            f"negatives, in this order; it has {columns}. Use dataset.rename_column(...) and select_columns(...)."
        )
    if not len(dataset):
        raise ValueError(f"{name} has no rows.")
