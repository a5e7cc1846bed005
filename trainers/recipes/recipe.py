# SPDX-License-Identifier: Apache-2.0
"""A training run as one YAML file: a model, its data, and the stages that it goes through."""

from __future__ import annotations

import copy
import gc
import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import torch
import yaml
from datasets import DatasetDict, IterableDataset
from transformers.utils import logging

from evaluation.assets import find_recipe
from hub_cards.card_data import CocoaModelCardData

from ..checkpoints import last_checkpoint
from ..contrastive_config import CocoaContrastiveConfig
from ..contrastive_trainer import CocoaContrastiveTrainer
from ..data.contrastive_rows import prepare_contrastive_data
from ..reconstruction_config import CocoaReconstructionConfig
from ..reconstruction_trainer import CocoaReconstructionTrainer
from ..run_folder import (
    DATA,
    MODEL,
    SETTINGS,
    as_json,
    differences,
    fingerprint_data,
    locked,
    read_run,
    run_settings,
)
from ..sharding import unsharded_weights
from .options import check_mapping, check_names, convert, parse_options
from .recipe_checks import check_stage_data, check_writable
from .recipe_data import FindFile, contrastive_data, reconstruction_data
from .recipe_model import check_model, load_model

logger = logging.get_logger(__name__)

STAGES = ("warmup", "bridge", "contrastive")
DATA_PARTS = ("sources", "reconstruction", "contrastive")


@dataclass
class Recipe:
    """
    What a recipe file holds. `base: RECIPE` in a file takes all that it does not give from another recipe.

    Args:
        output_dir (`str`): Each stage trains in a folder of its own in it.
        model (`dict`): Fields of TRL's `ModelConfig` (`model_name_or_path`, `dtype`, `use_peft`, ...) and
            `init_lora_weights`, or `from_scratch` with the arguments of `build_tiny_processor` (`processor`) and
            `build_model`.
        data (`dict`): Where rows come from, and what a stage is given of them.

            - `sources`, by name: the arguments of `datasets.load_dataset` (`split` defaults to `train`), `where`: its
              rows with given values of columns, `eval`: changes of these options for the rows to evaluate on.
              `layout: mmeb_train` with `image_dir` reads MMEB-train as published, into the columns `query`, `positive`
              and `negative_1`, ...; so do the hard-negative files of mmE5 and MoCa. Where `name` is a list of subsets,
              an entry of the source becomes one dataset for each, called `entry_subset`.
            - `contrastive`, by name: `query`, `positive`, `negative_1`, ..., each with a column of the source, or a
              text with columns in braces; an entry without columns takes the source's of these names.
            - `reconstruction`, by name: the same, or the columns of rows of one side ([`~rows.parts_of`]: `image`,
              `text`, `messages`, ...). Left out where stages 1 and 2 train on the pairs of stage 3.

            An entry names its `source`, unless there is one only. A column of lists is joined with commas, as
            `{column:sample}` only a random part of each list, in random order. An entry with `variants` is used that
            many times in training, each time with samples of its own; with `augment: true` all but the first also
            have their images changed a little (`augment_images`).
        stages (`dict`): For each of `warmup`, `bridge`, `contrastive` that is to run, the fields of its configuration.
        seed (`int`, defaults to 42): Of all stages.
        num_threads (`int`, *optional*): CPU threads of torch; sums depend on it in their last bit, so a run that is to
            be repeated bit for bit fixes it.
        evaluate (`str`, *optional*): An evaluation to run at the end; there is `"emoji"`.
        card (`dict`, *optional*): What the model's card says in addition to the run's record: fields of
            [`CocoaModelCardData`] (`license`, `language`, `model_name`, `train_datasets`, `notes`, ...).
    """

    output_dir: str
    model: dict[str, Any]
    data: dict[str, Any]
    stages: dict[str, dict[str, Any]]
    seed: int = 42
    num_threads: int | None = None
    evaluate: str | None = None
    card: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            setattr(self, name, convert(getattr(self, name), hint, name))
        check_names("card", "field", self.card, CocoaModelCardData.field_names())
        if self.evaluate not in (None, "emoji"):
            raise ValueError(f"evaluate must be 'emoji' or left out; got {self.evaluate!r}.")

    @classmethod
    def load(cls, path: str | os.PathLike) -> Recipe:
        """
        Read a recipe.

        Raises:
            ValueError: the file is no YAML, or a section is missing or unknown; says which there are.
        """
        values = read_sections(path)
        sections = [item.name for item in fields(cls)]
        check_names(str(path), "section", values, sections, ["output_dir", "model", "data", "stages"])
        for section in ("model", "data", "stages"):
            check_mapping(f"{path}: {section}", values[section])
        check_names(f"{path}: data", "part", values["data"], DATA_PARTS, ["sources"])
        check_names(f"{path}: stages", "stage", values["stages"], STAGES)
        stages = {stage: {} if options is None else options for stage, options in values["stages"].items()}
        return cls(**{**values, "stages": stages})  # a stage without options has all defaults


def read_sections(path: str | os.PathLike) -> dict[str, Any]:
    """The sections of a recipe file, over those of the recipe that it names as its `base`."""
    with open(path, encoding="utf-8") as file:
        try:
            values = yaml.safe_load(file)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a recipe: it holds no sections.")
    base = values.pop("base", None)
    return values if base is None else override(read_sections(find_recipe(base)), values)


def override(base: Any, changes: Any) -> Any:
    """The mapping `base` with the values of `changes`, name by name; anything else is replaced."""
    if not isinstance(base, dict) or not isinstance(changes, dict):
        return changes
    return {**base, **{name: override(base.get(name), value) for name, value in changes.items()}}


def run_recipe(
    recipe: Recipe,
    find_file: FindFile,
    prepare: Callable[[str, CocoaReconstructionTrainer | CocoaContrastiveTrainer], None] | None = None,
) -> str:
    """
    Run the stages of a recipe, one from the result of the other.

    The recipe is checked completely before its first step; see [`plan_stages`]. A stage that has ended is not run
    again, and one that was cut off goes on from its last checkpoint: so the same call after a kill finishes the run,
    with the same weights.

    Args:
        recipe ([`Recipe`]).
        find_file (`Callable`): From a data file's name in the recipe to its path.
        prepare (`Callable`, *optional*): Called with each stage that runs and its trainer, before it trains.

    Returns:
        `str`: The folder of the last stage's model.

    Raises:
        BlockingIOError: another run trains in the folder.
        ValueError, OSError: something is wrong with the recipe; names it. Also where the folder holds a stage that was
            trained with other settings.
    """
    if recipe.num_threads is not None:
        torch.set_num_threads(recipe.num_threads)
    if not recipe.stages:
        raise ValueError("The recipe has no stages to run.")
    arguments = {stage: stage_arguments(recipe, stage) for stage in STAGES if stage in recipe.stages}
    check_writable(recipe.output_dir)
    with ExitStack() as held:
        if next(iter(arguments.values())).process_index == 0:
            held.enter_context(locked(recipe.output_dir))
        plans = plan_stages(recipe, arguments, find_file)
        model_path = None
        for plan in plans:
            final = Path(recipe.output_dir) / plan.stage / "final"
            if plan.ended:
                logger.warning(f"{final.parent} had ended; nothing was trained.")
            else:
                run_stage(recipe, plan, model_path, find_file, prepare)
                gc.collect()  # a trainer refers to itself, and the next model needs its room
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
            model_path = str(final)
    return str(model_path)


@dataclass
class StagePlan:
    """A stage of a recipe, its datasets by name, and whether its model has been trained already."""

    stage: str
    train_dataset: dict[str, Any]
    eval_dataset: dict[str, Any] | None
    ended: bool


def plan_stages(recipe: Recipe, arguments: dict[str, Any], find_file: FindFile) -> list[StagePlan]:
    """
    Check a recipe completely, before anything is trained: the model, the data of all stages, and that stages that have
    ended are those that the recipe asks for.

    Raises:
        ValueError, OSError: something is wrong; names it.
    """
    finals = {stage: Path(recipe.output_dir) / stage / "final" for stage in arguments}
    ended = {stage: (final / "modules.json").is_file() for stage, final in finals.items()}
    if not ended[next(iter(arguments))]:
        check_model(recipe, list(arguments.values()))

    @cache
    def read(is_contrastive: bool) -> tuple[dict[str, Any], dict[str, Any] | None]:
        make = contrastive_data if is_contrastive else reconstruction_data
        train_dataset = dict(make(recipe.data, find_file, recipe.seed))
        return train_dataset, dict(make(recipe.data, find_file, recipe.seed, evaluation=True)) or None

    plans: list[StagePlan] = []
    for stage, args in arguments.items():
        with args.main_process_first(desc="reading the data"):
            train_dataset, eval_dataset = read(stage == "contrastive")
        if isinstance(args, CocoaContrastiveConfig):
            prompts_for_variants(args, list(train_dataset))
        check_stage_data(stage, args, train_dataset, eval_dataset)
        if plans and recipe.model.get("use_peft") and arguments[plans[-1].stage].save_adapters == "adapter":
            raise ValueError(
                f"stage {plans[-1].stage!r}: save_adapters='adapter' saves no merged model, from which the stage "
                f"{stage!r} could start; set 'merged' or 'both'."
            )
        if ended[stage] and plans and not plans[-1].ended:
            raise ValueError(
                f"{finals[stage]} was trained from another model of the stage {plans[-1].stage!r}, which is to be "
                f"trained now: delete {finals[stage].parent}, or choose another output_dir."
            )
        if ended[stage]:
            check_ended(recipe, args, train_dataset, eval_dataset)
        plans.append(StagePlan(stage, train_dataset, eval_dataset, ended[stage]))
    return plans


def check_ended(recipe: Recipe, args: Any, train_dataset: dict[str, Any], eval_dataset: dict[str, Any] | None) -> None:
    """Raise `ValueError` where a stage that has ended had other settings or data, or another model."""
    folder = Path(args.output_dir)
    before = read_run(folder)
    if before is None:
        logger.warning(f"{folder} does not say what its run was started with: not compared.")
        return
    if isinstance(args, CocoaContrastiveConfig):
        args = copy.copy(args)
        *_, args.prompts = prepare_contrastive_data(train_dataset, eval_dataset, args)
    streamed = any(isinstance(part, IterableDataset) for part in train_dataset.values())
    now = {
        SETTINGS: run_settings(args, streamed=streamed),
        DATA: fingerprint_data(train_dataset),
        MODEL: as_json(recipe.model),
    }
    if changed := differences(before, now):
        raise ValueError(
            f"{folder} had ended, and its run had other settings: {'; '.join(changed)}. Nothing was trained. Choose "
            f"another output_dir, or delete {folder}."
        )


def run_stage(
    recipe: Recipe,
    plan: StagePlan,
    model_path: str | None,
    find_file: FindFile,
    prepare: Callable[..., None] | None,
) -> None:
    """Train one stage from `model_path` or the recipe's own model, and save it; nothing of it stays in memory."""
    args = stage_arguments(recipe, plan.stage)  # anew: DeepSpeed keeps those that were made last
    is_contrastive = isinstance(args, CocoaContrastiveConfig)
    train_dataset: Any = plan.train_dataset
    eval_dataset: Any = plan.eval_dataset
    if is_contrastive:
        prompts_for_variants(args, list(train_dataset))
        train_dataset = DatasetDict(train_dataset)
        eval_dataset = eval_dataset and DatasetDict(eval_dataset)
    with unsharded_weights(args):
        model, processor, peft_config = load_model(recipe, model_path, args, find_file)
    trainer_class = CocoaContrastiveTrainer if is_contrastive else CocoaReconstructionTrainer
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        peft_config=peft_config,
        card_data=CocoaModelCardData(**recipe.card),
    )
    trainer.record.recipe_model = recipe.model
    if prepare is not None:
        prepare(plan.stage, trainer)
    trainer.train(resume_from_checkpoint=last_checkpoint(trainer.args.output_dir))
    if trainer.eval_dataset is not None:
        trainer.log_metrics(plan.stage, trainer.evaluate())
    trainer.save_model(str(Path(recipe.output_dir) / plan.stage / "final"))
    trainer.accelerator.wait_for_everyone()  # others ask next whether it is there
    trainer.accelerator.free_memory()


def stage_arguments(recipe: Recipe, stage: str) -> CocoaContrastiveConfig | CocoaReconstructionConfig:
    """
    The configuration of one stage.

    Raises:
        ValueError: an option is unknown, of another type or out of range, or not for this device; names it.
    """
    given = recipe.stages.get(stage, {})
    options = {"output_dir": str(Path(recipe.output_dir) / stage), "seed": recipe.seed, "report_to": "none", **given}
    if stage == "contrastive":
        return parse_options(CocoaContrastiveConfig, options, f"stage {stage!r}")
    return parse_options(CocoaReconstructionConfig, {**options, "stage": stage}, f"stage {stage!r}")


def prompts_for_variants(args: CocoaContrastiveConfig, datasets: list[str]) -> None:
    """Give prompts of a dataset to all of its variants (`name_2`, ...) as well."""
    for prompts in (args.query_prompt, args.target_prompt):
        if not isinstance(prompts, dict):
            continue
        for name in datasets:
            first = re.sub(r"_\d+$", "", name)
            if name not in prompts and first in datasets and first in prompts:
                prompts[name] = prompts[first]
