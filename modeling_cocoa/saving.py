# SPDX-License-Identifier: Apache-2.0
"""
One folder, two loaders: `SentenceTransformer(folder)` through stock classes, and with `trust_remote_code=True` ours.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.model_card import generate_model_card
from sentence_transformers.sentence_transformer import SentenceTransformerModelCardData
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

from .auto import BACKBONES
from .model_folder import (
    MODULES_FILE,
    REQUIREMENTS,
    SETTINGS_FILE,
    check_no_adapters,
    read_json,
    save_folder,
    use_hub_layout,
    write_json,
)
from .modeling_cocoa import CocoaModelMixin
from .processing_cocoa import CocoaProcessor
from .sentence_transformer import CocoaTransformer

CARD_MARK = "<!-- written by cocoa-embed, and again at every save: what is to stay goes into card.yaml -->"
"""At the end of a card that may be written again."""
COCOA_MODULE = f"sentence_transformer.{CocoaTransformer.__name__}"
"""[`CocoaTransformer`] as a folder with its code names it."""
SAVED_MODULES = (["CocoaTransformer"], ["CocoaTransformer", "Normalize"], ["Transformer", "Pooling", "Normalize"])
"""Modules of a `SentenceTransformer` that a folder can stand for."""


def save_cocoa(
    model: CocoaModelMixin | SentenceTransformer,
    processor: CocoaProcessor | None,
    folder: str | os.PathLike,
    *,
    modules: Literal["stock", "cocoa"] = "stock",
    prompts: dict[str, str] | None = None,
    default_prompt_name: str | None = None,
    complete: Callable[[Path], Any] | None = None,
    write_weights: Callable[[Path], Any] | None = None,
) -> None:
    """
    Write a model so that it loads through both loaders, whole or not at all: what a backbone's `save_pretrained`
    writes, with the settings of a `SentenceTransformer` and a card; see [`~model_folder.save_folder`].

    Args:
        model: A CoCoA backbone, or a `SentenceTransformer` that holds one, whose prompts, `truncate_dim` and
            `similarity_fn_name` are then kept.
        processor ([`CocoaProcessor`], *optional*): By default that of the `SentenceTransformer`. Its own `prompt`, if
            it has one, is saved as the prompt "default", which `encode` uses where none is asked for.
        folder (`str` or `os.PathLike`): Where to.
        modules (`"stock"` or `"cocoa"`): The modules that the folder names: sentence-transformers' own, which load
            without remote code, or [`CocoaTransformer`], which needs `trust_remote_code=True`.
        prompts (`dict[str, str]`, *optional*): Instructions by name, for `encode(prompt_name=...)`, `encode_query`
            and `encode_document`.
        default_prompt_name (`str`, *optional*): The prompt used where none is asked for.
        complete (`Callable`, *optional*): Called with the folder that is made ready, to write what else is to be in
            it, its card (`README.md`) among that. By default the card is that of the `SentenceTransformer`'s
            `model_card_data` where that is of a kind of its own, and a short one otherwise, unless there is one.
        write_weights (`Callable`, *optional*): Called with the folder to write adapters of the model into it, instead
            of the model's configuration, weights and code.

    Raises:
        ValueError: the model holds no CoCoA backbone, or one with adapters; a `SentenceTransformer` has modules that
            the folder would lose; the processor is missing, or of another model; `modules` is neither of the two;
            `default_prompt_name` is none of the prompts.
    """
    if modules not in ("stock", "cocoa"):
        raise ValueError(f"modules must be 'stock' or 'cocoa'; got {modules!r}.")
    backbone: Any = model
    settings: dict[str, Any] = {}
    if isinstance(model, SentenceTransformer):
        backbone = model.transformers_model
        settings = {"similarity_fn_name": model.similarity_fn_name}
        if model.truncate_dim is not None:
            settings["truncate_dim"] = model.truncate_dim
        prompts = model.prompts if prompts is None else prompts
        default_prompt_name = model.default_prompt_name if default_prompt_name is None else default_prompt_name
    if write_weights is None and isinstance(backbone, nn.Module):
        check_no_adapters(backbone)
    if not (isinstance(backbone, PreTrainedModel) and hasattr(backbone, "cocoa")):
        raise ValueError(
            f"save_cocoa saves CoCoA models; got {type(backbone).__name__}. Load it with load_backbone, or "
            "through SentenceTransformer with trust_remote_code=True."
        )
    if isinstance(model, SentenceTransformer):
        _check_modules(model)
        if processor is None:
            processor = model[0].processor
    if processor is None:
        raise ValueError("Give `processor` (a CocoaProcessor) together with a backbone.")
    if not isinstance(processor, CocoaProcessor):
        # A stock processor, or the CocoaProcessor of a remote copy, which holds one.
        prompt = getattr(processor, "prompt", None)
        processor = CocoaProcessor(getattr(processor, "processor", processor), prompt=prompt)
    prompts = {name: prompt or "" for name, prompt in (prompts or {}).items()}
    if processor.prompt and default_prompt_name is None:
        prompts["default"] = processor.prompt
        default_prompt_name = "default"
    if default_prompt_name not in (None, *prompts):
        raise ValueError(f"default_prompt_name is {default_prompt_name!r}, and the prompts are {sorted(prompts)}.")
    settings.update(prompts=prompts, default_prompt_name=default_prompt_name)

    def finish(staging: Path) -> None:
        if modules == "cocoa":
            write_json(staging / MODULES_FILE, [{"idx": 0, "name": "0", "path": "", "type": COCOA_MODULE}])
            for name in ("1_Pooling", "2_Normalize"):
                shutil.rmtree(staging / name)
        if write_weights is None:
            repair_cocoa(staging)
        if complete is not None:
            complete(staging)
        elif (
            isinstance(model, SentenceTransformer)
            and type(model.model_card_data) is not SentenceTransformerModelCardData
        ):
            model.model_card_data.save_dir = str(staging)
            (staging / "README.md").write_text(generate_model_card(model), encoding="utf-8")
        elif not Path(folder, "README.md").exists():
            (staging / "README.md").write_text(_card(backbone, modules), encoding="utf-8")

    save_folder(backbone, folder, processor=processor, settings=settings, complete=finish, write_weights=write_weights)


def repair_cocoa(folder: str | os.PathLike) -> list[str]:
    """
    Complete a CoCoA folder that was saved by other means than [`save_cocoa`].

    Saved again through the stock loader, a folder keeps the reference to our code but neither the code nor the version
    requirements: `trust_remote_code=True` then fails on a missing file. Saved by a `SentenceTransformer` of
    [`CocoaTransformer`], it names our package instead of code of its own. Both write weights under names that vLLM
    does not know.

    Args:
        folder (`str` or `os.PathLike`): A folder with a CoCoA model's `config.json` and a `modules.json`.

    Returns:
        `list[str]`: The names of the files that were written; empty where nothing was amiss.

    Raises:
        ValueError: the folder holds no CoCoA model, or nothing that sentence-transformers can load.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    cls = BACKBONES.get(config.get("model_type"))
    if "cocoa" not in config or cls is None:
        raise ValueError(f"{folder} holds no CoCoA model: its config.json has no entry `cocoa`, or there is none.")
    modules = read_json(folder / MODULES_FILE)
    if not modules:
        raise ValueError(f"{folder} has no {MODULES_FILE}; load the model and its processor and call save_cocoa.")
    for module in modules:
        if module["type"].endswith(f".{CocoaTransformer.__name__}"):
            module["type"] = COCOA_MODULE
    written = []
    for file in code_files(config["model_type"], modules):
        target = folder / file.name
        if not target.exists() or target.read_bytes() != file.read_bytes():
            shutil.copyfile(file, target)
            written.append(file.name)
    written += use_hub_layout(folder, cls)
    config = read_json(folder / "config.json")
    # Loaded from the Hub by the stock class, the reference comes with the repository's name in front.
    config["auto_map"] = {"AutoModel": f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"}
    settings = {**read_json(folder / SETTINGS_FILE), "requirements": REQUIREMENTS}
    for name, content in (("config.json", config), (SETTINGS_FILE, settings), (MODULES_FILE, modules)):
        if content != read_json(folder / name):
            write_json(folder / name, content)
            written.append(name)
    return list(dict.fromkeys(written))


def mend_cocoa(folder: str | os.PathLike) -> list[str]:
    """The former name of [`repair_cocoa`]; goes in the next release."""
    warnings.warn("mend_cocoa is now called repair_cocoa.", FutureWarning, stacklevel=2)
    return repair_cocoa(folder)


def code_files(model_type: str, modules: Iterable[Mapping[str, Any]]) -> list[Path]:
    """
    The files of this package that a model's folder carries.

    Args:
        model_type (`str`): Of the model's configuration.
        modules (`Iterable[Mapping]`): What its `modules.json` names.
    """
    names = [BACKBONES[model_type].__module__.rpartition(".")[2]]
    if any(module["type"].endswith(f".{CocoaTransformer.__name__}") for module in modules):
        names.append("sentence_transformer")
    starts = [Path(__file__).with_name(f"{name}.py") for name in names]
    found = [file for start in starts for file in (start, *map(Path, get_relative_import_files(start)))]
    return list(dict.fromkeys(found))


def _check_modules(model: SentenceTransformer) -> None:
    """Raise `ValueError` where the model has other modules than the saved folder will have."""
    names = [type(module).__name__ for module in model]
    modes = {module.pooling_mode for module in model if isinstance(module, Pooling)}
    if names not in SAVED_MODULES or modes - {"lasttoken"}:
        raise ValueError(
            f"A CoCoA folder holds one of the module lists {list(SAVED_MODULES)}, the pooling being 'lasttoken'; this "
            f"model has {names}{f' with pooling {list(modes)}' if modes else ''}, and would be another one once "
            "saved. Save it with its own save_pretrained."
        )


def _card(backbone: Any, modules: str) -> str:
    """A short model card."""
    trust, notes = ", trust_remote_code=True", ""
    if modules == "stock":
        trust = ""
        notes = """
With `trust_remote_code=True` the model code in this folder is used; the vectors are the same. A folder that was saved
again without it has lost that code: `modeling_cocoa.repair_cocoa(folder)` of the package `cocoa-embed` puts it back.

sentence-transformers' own module refuses a conversation beside other inputs in one call, a `pathlib.Path` and image
bytes. `SentenceTransformer(modules=[modeling_cocoa.CocoaTransformer(folder)])` takes them.
"""
    return f"""---
library_name: sentence-transformers
pipeline_tag: feature-extraction
tags:
- sentence-transformers
- multimodal
- cocoa
---

# A CoCoA embedding model

Texts, images, videos and mixtures of them to vectors of length {backbone.config.get_text_config().hidden_size}
(`{type(backbone).__name__}`; method: arXiv 2603.01471).

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/or/name"{trust})
vectors = model.encode(["a text", {{"image": "picture.png", "text": "about it"}}])
```
{notes}
{CARD_MARK}
"""
