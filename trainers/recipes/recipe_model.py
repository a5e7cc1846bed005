# SPDX-License-Identifier: Apache-2.0
"""The model of a recipe: one that is loaded, by TRL's `ModelConfig`, or one with random weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from trl import ModelConfig, get_peft_config, get_quantization_config

from modeling_cocoa.auto import check_backbone, load_backbone
from modeling_cocoa.reconstruction import CocoaForReconstruction

from ..contrastive_config import CocoaContrastiveConfig
from .from_scratch import build_model
from .options import check_names, parse_options
from .recipe_data import FindFile, column_texts, name_source, read_source
from .tiny_processor import build_tiny_processor

if TYPE_CHECKING:
    from .recipe import Recipe


@dataclass
class RecipeModelConfig(ModelConfig):
    """TRL's `ModelConfig`, and how its adapters start."""

    init_lora_weights: str | None = field(
        default=None, metadata={"help": "Start of the adapters, such as 'gaussian'; by default PEFT's own."}
    )


def check_model(recipe: Recipe, arguments: list[Any]) -> None:
    """Raise where the recipe's model does not exist, or has options, or `arguments` sizes, that do not fit it."""
    if "from_scratch" in recipe.model:
        check_names("model", "part", recipe.model, ["from_scratch"])
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
    Of a model with random weights: arguments of `build_model` and `build_tiny_processor`, and the columns and the
    source that the tokenizer is trained on.
    """
    parts = {"seed": recipe.seed, **recipe.model["from_scratch"]}
    options = dict(parts.pop("processor", {}))
    columns = options.pop("text_columns", ())
    if not columns:
        raise ValueError("model: from_scratch needs `processor: {text_columns: [...]}`, which it learns words from.")
    source = name_source(recipe.data, {"source": options.pop("source")} if "source" in options else {}, "processor")
    for what, function, given in (
        ("model: from_scratch", build_model, parts),
        ("model: processor of from_scratch", build_tiny_processor, options),
    ):
        _, *takes = signature(function).parameters.values()  # all but what is trained on, or the processor
        required = [item.name for item in takes if item.default is item.empty]
        check_names(what, "option", given, [item.name for item in takes], required)
    return parts, options, columns, source


def load_model(recipe: Recipe, model_path: str | None, args: Any, find_file: FindFile) -> tuple[Any, Any, Any]:
    """The model that a stage starts from, its processor (its tokenizer trained on the training rows), and adapters."""
    if "from_scratch" in recipe.model:
        if model_path is not None:
            return model_path, None, None
        parts, options, columns, source = scratch_options(recipe)
        rows = read_source(recipe.data["sources"][source], find_file, as_pairs=False)
        texts = [text for name in columns for text in column_texts(rows, name) if text is not None]
        processor = build_tiny_processor(texts, **options)
        return build_model(processor, **parts), processor, None
    config = model_config(recipe)
    name = model_path or config.model_name_or_path
    hub = {} if model_path is not None else {"revision": config.model_revision}
    options = {
        "dtype": config.dtype if config.dtype in (None, "auto") else getattr(torch, config.dtype),
        "attn_implementation": config.attn_implementation,
        **hub,
    }
    if (quantization := get_quantization_config(config)) is not None:
        options["quantization_config"] = quantization
    if isinstance(args, CocoaContrastiveConfig):
        model = load_backbone(name, **options)
    else:
        model = CocoaForReconstruction.from_pretrained(name, **args.head_options(), **options)
    peft_config = get_peft_config(config)
    if peft_config is not None and config.init_lora_weights is not None:
        peft_config.init_lora_weights = config.init_lora_weights
    return model, args.load_processor(name, **hub), peft_config
