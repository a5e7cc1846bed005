# SPDX-License-Identifier: Apache-2.0
"""A training run as one YAML file: a model, its data, and the stages that it goes through."""

from __future__ import annotations

import os
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import yaml
from datasets import Dataset, DatasetDict, concatenate_datasets
from transformers import HfArgumentParser
from trl import ModelConfig, get_peft_config

from modeling_cocoa.auto import load_backbone
from modeling_cocoa.processing_cocoa import CocoaProcessor
from modeling_cocoa.reconstruction import CocoaForReconstruction

from .augment import augment_pictures
from .contrastive_config import CocoaContrastiveConfig
from .contrastive_trainer import CocoaContrastiveTrainer
from .from_scratch import build_model
from .reconstruction_config import CocoaReconstructionConfig
from .reconstruction_trainer import CocoaReconstructionTrainer
from .tiny_processor import build_tiny_processor

STAGES = ("warmup", "bridge", "contrastive")
SECTIONS = {"output_dir", "seed", "num_threads", "model", "data", "stages", "evaluate"}


@dataclass
class Recipe:
    """
    What a recipe file holds.

    Args:
        output_dir (`str`): Each stage trains in a folder of its own in it.
        model (`dict`): Fields of TRL's `ModelConfig` (`model_name_or_path`, `dtype`, `use_peft`, ...), or
            `from_scratch` with the arguments of `build_tiny_processor` (`processor`) and `build_model`.
        data (`dict`): `source`: arguments of `datasets.load_dataset`; `train` and `eval`: which of its rows, by the
            values of columns; `reconstruction`: a list of `{image, text}`; `contrastive`: named
            `{query, positive, negative_1, ...}`. A value is a column's name, or a text with columns in braces; a
            column of lists is joined with commas, as `{column:sample}` only a random part of each list, in random
            order. An entry with `variants` is used that many times in training, each time with samples of its own;
            with `augment: true` all but the first also have their pictures changed a little (`augment_pictures`).
        stages (`dict`): For each of `warmup`, `bridge`, `contrastive` that is to run, the fields of its configuration.
        seed (`int`, defaults to 42).
        num_threads (`int`, *optional*): CPU threads of torch; sums depend on it in their last bit, so a run that is to
            be repeated bit for bit fixes it.
        evaluate (`str`, *optional*): An evaluation to run at the end; there is `"emoji"`.

    Raises:
        ValueError: `evaluate` is another.
    """

    output_dir: str
    model: dict[str, Any]
    data: dict[str, Any]
    stages: dict[str, dict[str, Any]]
    seed: int = 42
    num_threads: int | None = None
    evaluate: str | None = None

    def __post_init__(self) -> None:
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
            values = yaml.safe_load(file)
        if not isinstance(values, dict):
            raise ValueError(f"{path} is not a recipe: it holds no sections.")
        unknown, missing = set(values) - SECTIONS, {"output_dir", "model", "data", "stages"} - set(values)
        if unknown or missing:
            raise ValueError(
                f"{path}: unknown sections {sorted(unknown)}, missing {sorted(missing)}; "
                f"a recipe has {sorted(SECTIONS)}."
            )
        if wrong := [stage for stage in values["stages"] if stage not in STAGES]:
            raise ValueError(f"{path}: unknown stages {wrong}; there are {list(STAGES)}.")
        return cls(**values)


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
    find_file: Callable[[str], str | os.PathLike],
    prepare: Callable[[str, CocoaReconstructionTrainer | CocoaContrastiveTrainer], None] | None = None,
) -> str:
    """
    Run the stages of a recipe, one from the result of the other.

    A stage that has ended is not run again, and one that was cut off goes on from its last checkpoint: so the same
    call after a kill finishes the run, with the same weights.

    Args:
        recipe ([`Recipe`]).
        find_file (`Callable`): From a data file's name in the recipe to its path.
        prepare (`Callable`, *optional*): Called with each stage that runs and its trainer, before it trains.

    Returns:
        `str`: The folder of the last stage's model.
    """
    if recipe.num_threads is not None:
        torch.set_num_threads(recipe.num_threads)
    model_path = None
    for stage in STAGES:
        if stage not in recipe.stages:
            continue
        final = Path(recipe.output_dir) / stage / "final"
        if not (final / "modules.json").is_file():
            trainer = build_trainer(recipe, stage, model_path, find_file)
            if prepare is not None:
                prepare(stage, trainer)
            train_stage(trainer, stage, final)
        model_path = str(final)
    if model_path is None:
        raise ValueError("The recipe has no stages to run.")
    return model_path


def train_stage(trainer: CocoaReconstructionTrainer | CocoaContrastiveTrainer, stage: str, final: Path) -> None:
    """Train one stage, and save its model to `final`."""
    trainer.train(resume_from_checkpoint=True)
    if trainer.eval_dataset is not None:
        trainer.log_metrics(stage, trainer.evaluate())
    trainer.save_model(str(final))


def build_trainer(
    recipe: Recipe, stage: str, model_path: str | None, find_file: Callable[[str], str | os.PathLike]
) -> CocoaReconstructionTrainer | CocoaContrastiveTrainer:
    """
    The trainer of one stage, which works in the stage's folder of `output_dir`.

    Args:
        recipe ([`Recipe`]).
        stage (`str`): One of [`STAGES`].
        model_path (`str`, *optional*): The model that the stage before it saved; the recipe's own where there is none.
        find_file (`Callable`): From a data file's name in the recipe to its path.
    """
    options = {
        "output_dir": str(Path(recipe.output_dir) / stage),
        "seed": recipe.seed,
        "report_to": "none",
        **recipe.stages[stage],
    }
    is_contrastive = stage == "contrastive"
    config_class = CocoaContrastiveConfig if is_contrastive else CocoaReconstructionConfig
    if not is_contrastive:
        options["stage"] = stage
    (args,) = HfArgumentParser(config_class).parse_dict(options)
    source = read_source(recipe, find_file)
    train_rows = select_rows(source, recipe.data["train"])
    build = contrastive_data if is_contrastive else reconstruction_data
    train_dataset = build(train_rows, recipe.data, recipe.seed)
    eval_dataset = None
    if "eval" in recipe.data:
        eval_rows = select_rows(source, recipe.data["eval"])
        eval_dataset = build(eval_rows, recipe.data, recipe.seed, with_variants=False)
    model, processor, peft_config = load_model(recipe, model_path, args, train_rows)
    trainer_class = CocoaContrastiveTrainer if is_contrastive else CocoaReconstructionTrainer
    return trainer_class(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        peft_config=peft_config,
    )


def load_model(recipe: Recipe, model_path: str | None, args: Any, rows: Dataset) -> tuple[Any, Any, Any]:
    """The model a stage starts from, its processor (its tokenizer learned from the training rows), and adapters."""
    if "from_scratch" in recipe.model:
        if model_path is not None:
            return model_path, None, None
        parts = dict(recipe.model["from_scratch"])
        options = dict(parts.pop("processor"))
        columns = options.pop("text_columns")
        texts = [text for name in columns for text in column_texts(rows, name)]
        processor = build_tiny_processor(texts, **options)
        return build_model(processor, seed=recipe.seed, **parts), processor, None
    (config,) = HfArgumentParser(ModelConfig).parse_dict(recipe.model)
    if config.load_in_8bit or config.load_in_4bit:
        raise ValueError("model: load_in_8bit and load_in_4bit are not supported; use dtype: bfloat16 and use_peft.")
    name = model_path or config.model_name_or_path
    hub = {} if model_path is not None else {"revision": config.model_revision}
    options = {
        "dtype": config.dtype if config.dtype in (None, "auto") else getattr(torch, config.dtype),
        "attn_implementation": config.attn_implementation,
        **hub,
    }
    if isinstance(args, CocoaContrastiveConfig):
        model = load_backbone(name, **options)
    else:
        model = CocoaForReconstruction.from_pretrained(name, **args.head_options(), **options)
    return model, CocoaProcessor.from_pretrained(name, **args.processor_options(), **hub), get_peft_config(config)


def read_source(recipe: Recipe, find_file: Callable[[str], str | os.PathLike]) -> Dataset:
    """The dataset of a recipe; `data_files` are looked for by `find_file`."""
    options = {"split": "train", **recipe.data["source"]}
    if "data_files" in options:
        files = options["data_files"]
        options["data_files"] = [str(find_file(file)) for file in ([files] if isinstance(files, str) else files)]
    return datasets.load_dataset(**options)


def select_rows(source: Dataset, where: Mapping[str, Any]) -> Dataset:
    """
    The rows whose columns have the given values (or one of a list of them).

    Raises:
        ValueError: a column does not exist, or no row is left.
    """
    keep = range(len(source))
    for name, wanted in where.items():
        require_columns(source, [name])
        values = set(wanted) if isinstance(wanted, list) else {wanted}
        column = source[name]
        keep = [index for index in keep if column[index] in values]
    if not len(keep):
        raise ValueError(f"No row of the data has {dict(where)}.")
    return source.select(keep)


def require_columns(source: Dataset, names: list[str]) -> None:
    """Raise `ValueError` where a column does not exist, listing those that do."""
    missing = [name for name in names if name not in source.column_names]
    if missing:
        raise ValueError(f"The data has no column {missing}; it has {source.column_names}.")


class Words(list):
    """
    A cell that holds several words, as a text shows it: `{column}` all of them, `{column:sample}` a random part.

    Args:
        words (`list[str]`).
        generator (`np.random.Generator`): Draws a sample: how many words (one to all), which, their order.
    """

    def __init__(self, words: list[str], generator: np.random.Generator) -> None:
        super().__init__(words)
        self.generator = generator

    def __format__(self, spec: str) -> str:
        if spec not in ("", "sample"):
            raise ValueError(f"A column of lists is written {{column}} or {{column:sample}}; got {{column:{spec}}}.")
        if spec == "sample" and self:
            size = self.generator.integers(1, len(self) + 1)
            return ", ".join(self[index] for index in self.generator.permutation(len(self))[:size])
        return ", ".join(self)


def column_texts(source: Dataset, value: str, generator: np.random.Generator | None = None) -> list[str]:
    """A column as texts, or a text with columns in braces, row by row; see [`Words`] for columns of lists."""
    if "{" not in value:
        value = f"{{{value}}}"
    names = [name for _, name, _, _ in string.Formatter().parse(value) if name]
    require_columns(source, names)
    generator = generator if generator is not None else np.random.default_rng(0)
    columns = {
        name: [Words(cell, generator) if isinstance(cell, list) else str(cell) for cell in source[name]]
        for name in names
    }
    return [value.format(**{name: cells[row] for name, cells in columns.items()}) for row in range(len(source))]


def assemble(source: Dataset, columns: Mapping[str, str], generator: np.random.Generator | None = None) -> Dataset:
    """A dataset of the named columns: an existing non-text column as it is, anything else as texts."""
    parts = []
    for name, value in columns.items():
        if "{" not in value:
            require_columns(source, [value])
            if isinstance(source.features[value], datasets.Image):
                parts.append(source.select_columns([value]).rename_columns({value: name}))
                continue
        parts.append(Dataset.from_dict({name: column_texts(source, value, generator)}))
    return concatenate_datasets(parts, axis=1)


def assemble_variants(
    source: Dataset, entries: Mapping[str, Mapping[str, Any]], seed: int, with_variants: bool
) -> dict[str, Dataset]:
    """
    The datasets of some entries by name, numbered (`name_2`, ...) where an entry has several variants.

    Raises:
        ValueError: `variants` is not a whole number of 1 or more, or `augment` has no variants to change.
    """
    made = {}
    for number, (name, entry) in enumerate(entries.items()):
        columns = dict(entry)
        variants, augment = columns.pop("variants", 1), columns.pop("augment", False)
        if not isinstance(variants, int) or variants < 1:
            raise ValueError(f"data: variants must be a whole number of 1 or more; {name} has {variants!r}.")
        if augment and variants == 1:
            raise ValueError(f"data: augment leaves the first variant as it is; give {name} variants of 2 or more.")
        for variant in range(variants if with_variants else 1):
            generator = np.random.default_rng((seed, number, variant))
            rows = assemble(source, columns, generator)
            if augment and variant:
                pictures = [column for column, kind in rows.features.items() if isinstance(kind, datasets.Image)]
                rows = augment_pictures(rows, pictures, seed=int(generator.integers(2**31)))
            made[f"{name}_{variant + 1}" if variant else name] = rows
    return made


def reconstruction_data(
    source: Dataset, data: Mapping[str, Any], seed: int = 0, *, with_variants: bool = True
) -> Dataset:
    """The rows of stages 1 and 2: one for each row of the data, entry of `reconstruction` and variant."""
    entries = {f"reconstruction[{number}]": entry for number, entry in enumerate(data["reconstruction"])}
    return concatenate_datasets(list(assemble_variants(source, entries, seed, with_variants).values()))


def contrastive_data(
    source: Dataset, data: Mapping[str, Any], seed: int = 0, *, with_variants: bool = True
) -> DatasetDict:
    """The datasets of stage 3, by name: one for each entry of `contrastive` and variant."""
    return DatasetDict(assemble_variants(source, data["contrastive"], seed, with_variants))
