# SPDX-License-Identifier: Apache-2.0
"""The folder that a model is saved to, for transformers and for sentence-transformers."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import HfApi
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from .files import atomic_folder, atomic_write

REQUIREMENTS = {
    "transformers": {
        "specifier": ">=5.21",
        "reason": "Older versions embed photos lying on their side, and the oldest read in one direction only.",
    },
    "sentence-transformers": {"specifier": ">=6.2", "reason": "Older versions fail on lists of images."},
}
"""What sentence-transformers checks before it loads a folder, through either loader."""

MODULES_FILE = "modules.json"
SETTINGS_FILE = "config_sentence_transformers.json"
WEIGHT_FILES = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "adapter_model.safetensors",
    "adapter_config.json",
)
"""Files that say what model a folder holds; older ones beside new ones would make another model of it."""


def save_folder(
    model: PreTrainedModel,
    folder: str | os.PathLike,
    *,
    processor: Any = None,
    settings: Mapping[str, Any] | None = None,
    complete: Callable[[Path], Any] | None = None,
    write_weights: Callable[[Path], Any] | None = None,
    push_to_hub: bool = False,
    repo_id: str | None = None,
    commit_message: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    **kwargs: Any,
) -> None:
    """
    Write a backbone's folder: weights, configuration, code, and the files of sentence-transformers around them.

    The folder is made ready beside its place and then moved file by file, the file that makes it loadable last; what
    else lies in an existing folder stays, older safetensors weights of a model apart. A backbone with adapters of
    `load_adapter` writes the adapters alone, as in transformers.

    Args:
        model (`PreTrainedModel`): A CoCoA backbone.
        folder (`str` or `os.PathLike`): Where to.
        processor (*optional*): A [`CocoaProcessor`], or the stock processor of a CoCoA folder. Without it, save the
            processor into the folder yourself.
        settings (`Mapping`, *optional*): `prompts`, `default_prompt_name`, `truncate_dim` and `similarity_fn_name` of
            sentence-transformers. By default what the folder has, or sentence-transformers' own defaults.
        complete (`Callable`, *optional*): Called with the folder that is made ready, to change it or write more.
        write_weights (`Callable`, *optional*): Called with the folder to write adapters of the model into it, instead
            of the model's configuration, weights and code.
        push_to_hub (`bool`, defaults to `False`): Upload what was written, as one commit.
        repo_id, commit_message, private, create_pr (*optional*): Of the upload; by default to a repository with the
            name of the folder.
        kwargs: Others of [`~transformers.PreTrainedModel.save_pretrained`], such as `max_shard_size`.

    Raises:
        ValueError: the model has adapters inside its layers, or the processor is not one of a CoCoA model.
    """
    adapters_alone = getattr(model, "_hf_peft_config_loaded", False)
    if write_weights is None and not adapters_alone:
        check_no_adapters(model)
    if processor is not None:
        check_processor(model, processor)
    folder = Path(folder)
    with atomic_folder(folder, last=MODULES_FILE, stale=WEIGHT_FILES) as staging:
        if write_weights is None:
            state_dict = kwargs.pop("state_dict", None)
            if not adapters_alone:
                state_dict = model.state_dict() if state_dict is None else state_dict
                if not any(value.is_meta for value in state_dict.values()):  # those that are offloaded go by own names
                    state_dict = {hub_name(name, type(model)): value for name, value in state_dict.items()}
            kwargs["state_dict"] = state_dict
            # The "original format" would be names made from the patterns of `key_mapping`.
            PreTrainedModel.save_pretrained(model, staging, **{**kwargs, "save_original_format": False})
        is_model = (staging / "config.json").is_file()  # not of a process that leaves it to another
        if is_model:
            use_hub_layout(staging, type(model))
        if is_model or write_weights is not None:
            if processor is not None:
                processor.save_pretrained(staging)
            hidden_size = model.config.get_text_config().hidden_size
            for name, content in sentence_transformers_files(folder, hidden_size, settings).items():
                write_json(staging / name, content)
            if write_weights is not None:
                write_weights(staging)
            if complete is not None:
                complete(staging)
        written = [path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file()]
    if push_to_hub and written:
        api = HfApi(token=kwargs.get("token"))
        repo_id = api.create_repo(repo_id or folder.name, private=private, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=[*written, "README.md"],
            delete_patterns=list(WEIGHT_FILES),  # old whole weights would be loaded instead of new shards
            commit_message=commit_message or f"Upload {type(model).__name__}",
            create_pr=create_pr,
        )


def sentence_transformers_files(
    folder: Path, hidden_size: int, settings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """
    What sentence-transformers reads around a model: its own modules, pooling the last token, and settings.

    Args:
        folder (`Path`): Where they go to. The modules and settings that it has for vectors of this length stay where
            none are given: sentence-transformers writes its own before it has the model save itself.
        hidden_size (`int`): Length of a vector.
        settings (`Mapping`, *optional*): As in [`save_folder`].

    Returns:
        `dict`: Their contents by name.
    """
    size_there = read_json(folder / "config.json").get("text_config", {}).get("hidden_size", hidden_size)
    if settings is None and (folder / SETTINGS_FILE).is_file() and size_there == hidden_size:
        found = {SETTINGS_FILE: {**read_json(folder / SETTINGS_FILE), "requirements": REQUIREMENTS}}
        if (folder / MODULES_FILE).is_file():
            found[MODULES_FILE] = read_json(folder / MODULES_FILE)
        return found
    modules = {
        "": "base.modules.transformer.Transformer",
        "1_Pooling": "sentence_transformer.modules.pooling.Pooling",
        "2_Normalize": "base.modules.normalize.Normalize",
    }
    output = {"method": "forward", "method_output_name": "last_hidden_state"}
    return {
        MODULES_FILE: [
            {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.{name}"}
            for index, (path, name) in enumerate(modules.items())
        ],
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            "modality_config": {
                **dict.fromkeys(("text", "image", "video"), output),
                "message": {**output, "format": "structured"},
            },
            "module_output_name": "token_embeddings",
        },
        "1_Pooling/config.json": {
            "embedding_dimension": hidden_size,
            "pooling_mode": "lasttoken",
            "include_prompt": True,
        },
        "2_Normalize/config.json": {
            "module_input_name": "sentence_embedding",
            "module_output_name": "sentence_embedding",
        },
        SETTINGS_FILE: {
            "__version__": {"pytorch": version("torch"), "transformers": version("transformers")},
            "model_type": "SentenceTransformer",
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
            **(settings or {}),
            "prompts": {"query": "", "document": "", **((settings or {}).get("prompts") or {})},
            "requirements": REQUIREMENTS,
        },
    }


def use_hub_layout(folder: Path, cls: type) -> list[str]:
    """
    Give a saved model the layout of the Hub's own files of its kind, which stock transformers, sentence-transformers
    and vLLM load alike: names of weights, the generative class as architecture, and two-sided attention at the top of
    the configuration, where vLLM reads it.

    Args:
        folder (`Path`): With `config.json` and weights.
        cls (`type`): The class of the CoCoA backbone.

    Returns:
        `list[str]`: The names of the files that were changed.
    """
    changed = []
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names, metadata = list(file.keys()), file.metadata()
        if names != [hub_name(name, cls) for name in names]:
            weights = {hub_name(name, cls): value for name, value in load_file(path).items()}
            with atomic_write(path) as partial:
                save_file(weights, partial, metadata=metadata)
            changed.append(path.name)
    for path in sorted(folder.glob("model*.safetensors.index.json")):
        index = read_json(path)
        places = {hub_name(name, cls): file for name, file in index["weight_map"].items()}
        if places != index["weight_map"]:
            write_json(path, {**index, "weight_map": places})
            changed.append(path.name)
    config = read_json(folder / "config.json")
    generative = f"{stock_class(cls).__name__.removesuffix('Model')}ForConditionalGeneration"
    wanted = {**config, "architectures": [generative], "is_causal": False}
    if wanted != config:
        write_json(folder / "config.json", wanted)
        changed.append("config.json")
    return changed


def hub_name(name: str, cls: type) -> str:
    """What a weight of a CoCoA backbone is called in the Hub's files of its kind."""
    for own, hub in cls.hub_prefixes.items():
        if name.startswith(own):
            return hub + name.removeprefix(own)
    return name


def name_in_any_layout(name: str) -> str:
    """What a saved weight is called without the beginnings in which layouts differ."""
    return re.sub(r"^(?:model\.)?(?:language_model\.)?(?:model\.)?", "", name)


def check_processor(model: PreTrainedModel, processor: Any) -> None:
    """
    Raise `ValueError` where a processor closes inputs with another EOS than the model pools, or where it fails
    [`check_image_processor`].
    """
    last = processor.tokenizer("")["input_ids"][-1:]
    if last != [model.cocoa.eos_token_id]:
        raise ValueError(
            f"The processor closes inputs with {last}, and the model pools EOS token {model.cocoa.eos_token_id}: give "
            "the CocoaProcessor of the model's checkpoint, or call modeling_cocoa.special_tokens.attach_eos_token."
        )
    check_image_processor(model, processor)


def check_image_processor(model: PreTrainedModel, processor: Any) -> None:
    """Raise `ValueError` where a processor cuts images into other patches than a model's, or normalizes otherwise."""
    vision = model.config.vision_config
    wanted = {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "image_mean": model.video_processor_class.image_mean,
        "image_std": model.video_processor_class.image_std,
    }
    for part in (processor.image_processor, processor.video_processor):
        for name, value in wanted.items():
            if not np.array_equal(found := getattr(part, name), value):
                raise ValueError(
                    f"The {type(part).__name__} has {name}={found}, and {type(model).__name__} needs {value}: "
                    "give the CocoaProcessor of the model's checkpoint, or correct the processor's configuration."
                )


def check_no_adapters(model: nn.Module) -> None:
    """Raise `ValueError` where layers of peft are inside a model."""
    if any(type(module).__module__.split(".")[0] == "peft" for module in model.modules()):
        raise ValueError(
            "The model has adapters, and a saved folder holds plain weights: save "
            "trainers.adapters.merge_adapters(backbone)."
        )


def stock_class(cls: type) -> type:
    """The transformers class that a CoCoA backbone subclasses."""
    return next(base for base in cls.__mro__ if base.__module__.startswith("transformers.models."))


def read_json(path: Path) -> Any:
    """What a file holds; an empty dict where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_json(path: Path, content: Any) -> None:
    """Write a file as transformers writes its own."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
