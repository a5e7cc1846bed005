# SPDX-License-Identifier: Apache-2.0
"""Adapters and weights from a model in training to files, and back."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Size, Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from modeling_cocoa.adapter_base import AdapterBase
from modeling_cocoa.auto import load_backbone
from modeling_cocoa.files import atomic_write
from modeling_cocoa.model_folder import read_json, write_json
from modeling_cocoa.processing_cocoa import CocoaProcessor
from modeling_cocoa.saving import save_cocoa

from .adapters import has_adapter

ADAPTER_FILE = "adapter_state.safetensors"
"""File of a checkpoint that holds the adapters of the run; the weights beside it have them merged."""
ADAPTER_FOLDER = "adapter"
"""Folder of adapters in the folder of the merged model."""
CARD = """
# Adapters of a CoCoA embedding model

`{kind}` adapters of `{base}`, for texts, images, videos and mixtures of them (method: arXiv 2603.01471).

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/or/name")
vectors = model.encode(["a text", {{"image": "picture.png", "text": "about it"}}])
```

`modeling_cocoa.load_backbone` loads them too, and checks that the base has the weights that they were trained in.
"""


def adapter_state_dict(backbone: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The weights that train, by name: what a checkpoint must keep beside the frozen base."""
    state_dict = backbone.state_dict() if state_dict is None else state_dict
    return {name: state_dict[name] for name, parameter in backbone.named_parameters() if parameter.requires_grad}


def peft_name(name: str, adapter: str) -> str:
    """
    What a weight of an adapter is called in PEFT's files: without the adapter's name. The magnitudes of DoRA keep
    their `.weight`, which PEFT leaves out and takes, and transformers asks for.
    """
    return ".".join(["base_model.model", *(part for part in name.split(".") if part != adapter)])


def save_adapter(
    backbone: nn.Module, folder: str | os.PathLike, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Write the adapters of a run into its checkpoint, beside the merged weights."""
    with atomic_write(Path(folder) / ADAPTER_FILE) as path:
        save_file(adapter_state_dict(backbone, state_dict), path)


def save_adapter_folder(
    model: Any,
    backbone: Any,
    processor: CocoaProcessor,
    folder: str | os.PathLike,
    base: AdapterBase,
    state_dict: Mapping[str, Tensor] | None = None,
    complete: Callable[[Path], Any] = lambda staging: None,
) -> None:
    """
    Write adapters as PEFT does, with what sentence-transformers needs to load base and adapters as an embedding model.

    `model` and `complete` are those of [`save_cocoa`]: the backbone or the `SentenceTransformer` around it, and what
    writes further files. `state_dict` has the backbone's weights, where it holds parts of them only.
    """
    ((adapter, config),) = backbone.peft_config.items()
    config = copy.copy(config)
    config.base_model_name_or_path, config.revision = base.name_or_path, base.revision
    config.inference_mode = True

    def write(staging: Path) -> None:
        config.save_pretrained(staging)
        weights = adapter_state_dict(backbone, state_dict)
        named = {peft_name(name, adapter): value for name, value in weights.items()}
        save_file(named, staging / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        base.write(staging)
        # The base is loaded with its own configuration, which reads in one direction if it is no CoCoA model.
        layout = staging / "sentence_bert_config.json"
        write_json(layout, {**read_json(layout), "config_kwargs": {"text_config": {"is_causal": False}}})
        if not Path(folder, "README.md").exists():
            card = ModelCardData(
                library_name="sentence-transformers",
                pipeline_tag="feature-extraction",
                base_model=base.name_or_path if base.revision else None,  # the name of a folder is no name on the Hub
                tags=["sentence-transformers", "multimodal", "cocoa", "peft"],
            )
            text = CARD.format(kind=config.peft_type.value, base=base.name_or_path)
            ModelCard(f"---\n{card.to_yaml()}\n---\n{text}").save(staging / "README.md")

    save_cocoa(model, processor, folder, write_weights=write, complete=complete)


def load_checkpoint(backbone: Any, folder: str | os.PathLike) -> None:
    """
    Put the weights of a checkpoint into the backbone that goes on training: its adapters, or all of them.

    Raises:
        ValueError: the checkpoint's adapters are not those of the backbone.
    """
    places = (ADAPTER_FILE, SAFETENSORS_WEIGHTS_NAME, f"{ADAPTER_FOLDER}/{SAFETENSORS_WEIGHTS_NAME}")
    file = next((path for path in (Path(folder, place) for place in places) if path.is_file()), None)
    if has_adapter(backbone) != (file is not None):
        there, here = ("has no", "has some") if file is None else ("has", "has none")
        raise ValueError(
            f"The checkpoint {folder} {there} adapters, and this run {here}: give the peft_config of then."
        )
    if file is None:
        load_weights(backbone, load_backbone(folder, dtype=backbone.dtype).state_dict(), strict=True)
        return
    (adapter,) = backbone.peft_config
    own = {name: unsharded_shape(value) for name, value in backbone.named_parameters() if value.requires_grad}
    names = {peft_name(name, adapter): name for name in own}
    state = {names.get(name, name): value for name, value in load_file(file).items()}
    found = {name: value.shape for name, value in state.items()}
    if found != own:
        wrong = sorted(name for name in {*found, *own} if found.get(name) != own.get(name))
        raise ValueError(
            f"The adapters in {folder} are not those of this run's peft_config; they differ in {wrong[:3]}"
            f"{' and others' if len(wrong) > 3 else ''}."
        )
    load_weights(backbone, state, strict=False)


def unsharded_shape(weight: Tensor) -> Size:
    """The shape of a weight, also where DeepSpeed has shared it out."""
    return Size(getattr(weight, "ds_shape", weight.shape))


def submodule_state_dict(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights of a part of a model, by their names in it."""
    return {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], *, strict: bool) -> None:
    """
    Put weights in their places, in each process its part of those that are shared out.

    Raises:
        RuntimeError: one has no place, or with `strict` one is missing; names them.
    """
    options = StateDictOptions(full_state_dict=True, strict=strict)
    if unknown := set_model_state_dict(module, dict(weights), options=options).unexpected_keys:
        raise RuntimeError(f"The weights {sorted(unknown)} have no place in {type(module).__name__}.")
