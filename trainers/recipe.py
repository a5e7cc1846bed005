# SPDX-License-Identifier: Apache-2.0
"""A training run as one YAML file: a model, its data, and the stages that it goes through."""

from __future__ import annotations

import copy
import gc
import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, partial
from inspect import signature
from pathlib import Path
from typing import Any, get_type_hints

import torch
import yaml
from datasets import DatasetDict, IterableDataset
from transformers.utils import logging
from trl import ModelConfig, get_peft_config, get_quantization_config

from hub_cards.card_data import CocoaModelCardData
from modeling_cocoa.auto import check_backbone, load_backbone
from modeling_cocoa.reconstruction import CocoaForReconstruction

from .base import unsharded_weights
from .contrastive_config import CocoaContrastiveConfig
from .contrastive_rows import column_prompts
from .contrastive_trainer import CocoaContrastiveTrainer
from .from_scratch import build_model
from .recipe_checks import check_stage_data, check_writable, converted, parse_options, require_known, require_mapping
from .recipe_data import FindFile, column_texts, contrastive_data, name_source, read_source, reconstruction_data
from .reconstruction_config import CocoaReconstructionConfig
from .reconstruction_trainer import CocoaReconstructionTrainer
from .run_folder import (
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
from .tiny_processor import build_tiny_processor

logger = logging.get_logger(__name__)

STAGES = ("warmup", "bridge", "contrastive")
SECTIONS = {"output_dir", "seed", "num_threads", "model", "data", "stages", "evaluate", "card"}
DATA_SECTIONS = {"sources", "reconstruction", "contrastive"}


@dataclass
class RecipeModelConfig(ModelConfig):
    """TRL's `ModelConfig`, and how its adapters start."""

    init_lora_weights: str | None = field(
        default=None, metadata={"help": "Start of the adapters, such as 'gaussian'; by default PEFT's own."}
    )


@dataclass
class Recipe:
    """
    What a recipe file holds.

    Args:
        output_dir (`str`): Each stage trains in a folder of its own in it.
        model (`dict`): Fields of TRL's `ModelConfig` (`model_name_or_path`, `dtype`, `use_peft`, ...) and
            `init_lora_weights`, or `from_scratch` with the arguments of `build_tiny_processor` (`processor`) and
            `build_model`.
        data (`dict`): Where rows come from, and what a stage is given of them.

            - `sources`, by name: the arguments of `datasets.load_dataset` (`split` is `train` unless said;
              `streaming: true` reads as it goes), `where`: which of its rows, by the values of columns, `eval`: what
              to change in all this for the rows to evaluate on. `layout: mmeb_train` with `image_dir` reads
              MMEB-train as published, into the columns `query`, `positive` and `negative_1`, ...; so do the
              hard-negative files of mmE5 and MoCa. Where `name` is a list of subsets, an entry of the source becomes
              one dataset for each, called `entry_subset`.
            - `contrastive`, by name: `query`, `positive`, `negative_1`, ..., each with a column of the source, or a
              text with columns in braces; an entry without columns takes the source's of these names.
            - `reconstruction`, by name: the same, or the columns of rows of one side ([`~rows.parts_of`]: `image`,
              `text`, `messages`, ...). Left out where stages 1 and 2 train on the pairs of stage 3.

            An entry names its `source`, unless there is one only. A column of lists is joined with commas, as
            `{column:sample}` only a random part of each list, in random order. An entry with `variants` is used that
            many times in training, each time with samples of its own; with `augment: true` all but the first also
            have their pictures changed a little (`augment_pictures`).
        stages (`dict`): For each of `warmup`, `bridge`, `contrastive` that is to run, the fields of its configuration.
        seed (`int`, defaults to 42).
        num_threads (`int`, *optional*): CPU threads of torch; sums depend on it in their last bit, so a run that is to
            be repeated bit for bit fixes it.
        evaluate (`str`, *optional*): An evaluation to run at the end; there is `"emoji"`.
        card (`dict`, *optional*): What the model's card says beside what the run knows: fields of
            [`CocoaModelCardData`] (`license`, `language`, `model_name`, `train_datasets`, `notes`, ...).

    Raises:
        ValueError: `evaluate` is another; `card` has fields that there are not.
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
            setattr(self, name, converted(getattr(self, name), hint, name))
        known = CocoaModelCardData.field_names()
        if unknown := sorted(set(self.card) - set(known)):
            raise ValueError(f"card has unknown fields {unknown}; there are {known}.")
        if self.evaluate not in (None, "emoji"):
            raise ValueError(f"evaluate must be 'emoji' or left out; got {self.evaluate!r}.")

    @classmethod
    def load(cls, path: str | os.PathLike) -> Recipe:
        """
        Read a recipe.

        Raises:
            ValueError: a section is missing or unknown; says which there are.
        """
        with open(path, encoding="utf-8") as file:
            try:
                values = yaml.safe_load(file)
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} is not a recipe: it holds no sections.")
        unknown, missing = set(values) - SECTIONS, {"output_dir", "model", "data", "stages"} - set(values)
        if unknown or missing:
            raise ValueError(
                f"{path}: unknown sections {sorted(unknown)}, missing {sorted(missing)}; "
                f"a recipe has {sorted(SECTIONS)}."
            )
        for section in ("model", "data", "stages"):
            require_mapping(f"{path}: {section}", values[section])
        unknown, missing = set(values["data"]) - DATA_SECTIONS, {"sources"} - set(values["data"])
        if unknown or missing:
            raise ValueError(
                f"{path}: data has unknown parts {sorted(unknown)}, missing {sorted(missing)}; it has "
                f"{sorted(DATA_SECTIONS)}."
            )
        if wrong := [stage for stage in values["stages"] if stage not in STAGES]:
            raise ValueError(f"{path}: unknown stages {wrong}; there are {list(STAGES)}.")
        stages = {stage: {} if options is None else options for stage, options in values["stages"].items()}
        return cls(**{**values, "stages": stages})  # a stage without options has all defaults


def find_recipe(name: str | os.PathLike) -> Path:
    """
    The path of a recipe: a file, or the name of one that comes with the package.

    Raises:
        FileNotFoundError: there is neither; lists those that come with the package.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = {recipe.stem: recipe for recipe in sorted((Path(__file__).parent / "recipes").glob("*.yaml"))}
    if str(name) in shipped:
        return shipped[str(name)]
    raise FileNotFoundError(f"There is no recipe {str(name)!r}: give a file, or one of {list(shipped)}.")


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
    """
    A stage of a recipe that can run, or has run.

    Args:
        stage (`str`): One of [`STAGES`].
        train_dataset, eval_dataset (`dict` of datasets by name): The latter *optional*.
        ended (`bool`): Its model is there already.
    """

    stage: str
    train_dataset: dict[str, Any]
    eval_dataset: dict[str, Any] | None
    ended: bool


def plan_stages(recipe: Recipe, arguments: dict[str, Any], find_file: FindFile) -> list[StagePlan]:
    """
    Check a recipe completely, before anything is trained: the model, the data of all stages, and that stages that have
    ended are those that the recipe asks for.

    Args:
        recipe ([`Recipe`]).
        arguments (`dict`): The configuration of each stage.
        find_file (`Callable`): From a data file's name in the recipe to its path.

    Raises:
        ValueError, OSError: something is wrong; names it.
    """
    finals = {stage: Path(recipe.output_dir) / stage / "final" for stage in arguments}
    ended = {stage: (final / "modules.json").is_file() for stage, final in finals.items()}
    if not ended[next(iter(arguments))]:
        check_model(recipe, list(arguments.values()))
    read = cache(partial(stage_data, recipe, find_file))
    plans: list[StagePlan] = []
    for stage, args in arguments.items():
        with args.main_process_first(desc="reading the data"):
            train_dataset, eval_dataset = read(stage == "contrastive")
        if isinstance(args, CocoaContrastiveConfig):
            prompts_for_variants(args, list(train_dataset))
        check_stage_data(stage, args, train_dataset, eval_dataset)
        if ended[stage] and plans and not plans[-1].ended:
            raise ValueError(
                f"{finals[stage]} was trained from another model of the stage {plans[-1].stage!r}, which is to be "
                f"trained now: delete {finals[stage].parent}, or choose another output_dir."
            )
        if ended[stage]:
            check_ended(recipe, args, train_dataset)
        plans.append(StagePlan(stage, train_dataset, eval_dataset, ended[stage]))
    return plans


def stage_data(
    recipe: Recipe, find_file: FindFile, is_contrastive: bool
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The datasets of a stage by name, to train and to evaluate on."""
    read = contrastive_data if is_contrastive else reconstruction_data
    train_dataset: dict[str, Any] = dict(read(recipe.data, find_file, recipe.seed))
    eval_dataset = dict(read(recipe.data, find_file, recipe.seed, evaluation=True))
    return train_dataset, eval_dataset or None


def check_ended(recipe: Recipe, args: Any, train_dataset: dict[str, Any]) -> None:
    """
    Raise `ValueError` where a stage that has ended was trained with other settings or data, or from another model.

    Args:
        recipe ([`Recipe`]).
        args: Configuration of the stage.
        train_dataset (`dict`): What it would be trained on now.
    """
    folder = Path(args.output_dir)
    before = read_run(folder)
    if before is None:
        logger.warning(f"{folder} does not say what its run was started with: not compared.")
        return
    args = copy.copy(args)
    if isinstance(args, CocoaContrastiveConfig):
        args.prompts = column_prompts(args, train_dataset)
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
    """Train one stage, and save its model to `final` in its folder; nothing of it stays in memory."""
    trainer = build_trainer(recipe, plan, model_path, find_file)
    trainer.record.recipe_model = recipe.model
    if prepare is not None:
        prepare(plan.stage, trainer)
    trainer.train(resume_from_checkpoint=True)
    if trainer.eval_dataset is not None:
        trainer.log_metrics(plan.stage, trainer.evaluate())
    trainer.save_model(str(Path(recipe.output_dir) / plan.stage / "final"))
    trainer.accelerator.wait_for_everyone()  # others ask next whether it is there
    trainer.accelerator.free_memory()


def build_trainer(
    recipe: Recipe, plan: StagePlan, model_path: str | None, find_file: FindFile
) -> CocoaReconstructionTrainer | CocoaContrastiveTrainer:
    """
    The trainer of one stage, which works in the stage's folder of `output_dir`.

    Args:
        recipe ([`Recipe`]).
        plan ([`StagePlan`]): Of the stage.
        model_path (`str`, *optional*): The model that the stage before it saved; the recipe's own where there is none.
        find_file (`Callable`): From a data file's name in the recipe to its path.
    """
    is_contrastive = plan.stage == "contrastive"
    train_dataset: Any = plan.train_dataset
    eval_dataset: Any = plan.eval_dataset
    args = stage_arguments(recipe, plan.stage)  # anew: DeepSpeed keeps those that were made last
    if is_contrastive:
        prompts_for_variants(args, list(train_dataset))
        train_dataset = DatasetDict(train_dataset)
        eval_dataset = eval_dataset and DatasetDict(eval_dataset)
    with unsharded_weights(args):
        model, processor, peft_config = load_model(recipe, model_path, args, find_file)
    trainer_class = CocoaContrastiveTrainer if is_contrastive else CocoaReconstructionTrainer
    return trainer_class(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        peft_config=peft_config,
        card_data=CocoaModelCardData(**recipe.card),
    )


def stage_arguments(recipe: Recipe, stage: str) -> CocoaContrastiveConfig | CocoaReconstructionConfig:
    """
    The configuration of one stage.

    Args:
        recipe ([`Recipe`]).
        stage (`str`): One of [`STAGES`].

    Raises:
        ValueError: an option is unknown, of another type or out of range, or not for this device; names it.
    """
    given = recipe.stages.get(stage) or {}
    require_mapping(f"stage {stage!r}", given)
    options = {
        "output_dir": str(Path(recipe.output_dir) / stage),
        "seed": recipe.seed,
        "report_to": "none",
        **given,
    }
    if stage != "contrastive":
        options["stage"] = stage
    config_class = CocoaContrastiveConfig if stage == "contrastive" else CocoaReconstructionConfig
    return parse_options(config_class, options, f"stage {stage!r}")


def check_model(recipe: Recipe, arguments: list[Any]) -> None:
    """
    Raise `ValueError` or `OSError` where the recipe's own model is not there, is of another kind, or has options or
    sizes that there are not.

    Args:
        recipe ([`Recipe`]).
        arguments (`list`): Configurations of the stages, whose sizes the processor must take.
    """
    if "from_scratch" in recipe.model:
        require_known("model", "part", recipe.model, ["from_scratch"])
        scratch_options(recipe)
        return
    config = model_config(recipe)
    if config.model_name_or_path is None:
        raise ValueError("model: give model_name_or_path, a folder or a name on the Hub.")
    check_backbone(config.model_name_or_path, revision=config.model_revision)
    for args in arguments:
        args.load_processor(config.model_name_or_path, revision=config.model_revision)


def model_config(recipe: Recipe) -> RecipeModelConfig:
    """What a recipe says of a model that is loaded."""
    config = parse_options(RecipeModelConfig, recipe.model, "model")
    if config.dtype not in (None, "auto") and not isinstance(getattr(torch, config.dtype, None), torch.dtype):
        raise ValueError(f"model: dtype must be a name such as float32 or bfloat16; got {config.dtype!r}.")
    if get_quantization_config(config) is not None and not config.use_peft:
        raise ValueError("model: weights in 4 or 8 bits do not train; set use_peft, and adapters do.")
    return config


def scratch_options(recipe: Recipe) -> tuple[dict[str, Any], dict[str, Any], list[str], str]:
    """
    Of a model that is made from nothing, the arguments of `build_model` and of `build_tiny_processor`, and the columns
    and the source that the processor learns words from.
    """
    parts = {"seed": recipe.seed, **recipe.model["from_scratch"]}
    options = dict(parts.pop("processor", {}))
    columns = options.pop("text_columns", ())
    if not columns:
        raise ValueError("model: from_scratch needs `processor: {text_columns: [...]}`, which it learns words from.")
    source = name_source(recipe.data, {"source": options.pop("source")} if "source" in options else {}, "processor")
    check_options("model: from_scratch", build_model, processor=None, **parts)
    check_options("model: processor of from_scratch", build_tiny_processor, texts=(), **options)
    return parts, options, columns, source


def prompts_for_variants(args: CocoaContrastiveConfig, datasets: list[str]) -> None:
    """Give prompts of a dataset to all of its variants (`name_2`, ...) as well."""
    for option in ("query_prompt", "target_prompt"):
        prompts = getattr(args, option)
        if not isinstance(prompts, dict):
            continue
        for name in datasets:
            first = re.sub(r"_\d+$", "", name)
            if name not in prompts and first in datasets and first in prompts:
                prompts[name] = prompts[first]


def load_model(recipe: Recipe, model_path: str | None, args: Any, find_file: FindFile) -> tuple[Any, Any, Any]:
    """The model a stage starts from, its processor (its tokenizer learned from the training rows), and adapters."""
    if "from_scratch" in recipe.model:
        if model_path is not None:
            return model_path, None, None
        parts, options, columns, source = scratch_options(recipe)
        rows = read_source(recipe.data["sources"][source], find_file, as_pairs=False)
        texts = [text for name in columns for text in column_texts(rows, name) if text is not None]
        processor = build_tiny_processor(texts, **options)
        return build_model(processor, **parts), processor, None
    config = model_config(recipe)
    quantization = get_quantization_config(config)
    name = model_path or config.model_name_or_path
    hub = {} if model_path is not None else {"revision": config.model_revision}
    options = {
        "dtype": config.dtype if config.dtype in (None, "auto") else getattr(torch, config.dtype),
        "attn_implementation": config.attn_implementation,
        **({} if quantization is None else {"quantization_config": quantization}),
        **hub,
    }
    if isinstance(args, CocoaContrastiveConfig):
        model = load_backbone(name, **options)
    else:
        model = CocoaForReconstruction.from_pretrained(name, **args.head_options(), **options)
    peft_config = get_peft_config(config)
    if peft_config is not None and config.init_lora_weights is not None:
        peft_config.init_lora_weights = config.init_lora_weights
    return model, args.load_processor(name, **hub), peft_config


def check_options(what: str, function: Callable[..., Any], **options: Any) -> None:
    """Raise `ValueError` where a function does not take some options, or needs others; lists those that it takes."""
    takes = signature(function)
    try:
        takes.bind(**options)
    except TypeError as error:
        raise ValueError(f"{what}: {error}; there are {list(takes.parameters)[1:]}.") from error
