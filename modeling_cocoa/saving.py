# SPDX-License-Identifier: Apache-2.0
"""
One folder, two loaders: `SentenceTransformer(folder)` through stock classes, and with `trust_remote_code=True` ours.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.model_card import generate_model_card
from sentence_transformers.sentence_transformer import SentenceTransformerModelCardData
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from torch import nn
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

from .auto import BACKBONES
from .modeling_cocoa import CocoaModelMixin, stock_class
from .processing_cocoa import CocoaProcessor
from .sentence_transformer import CocoaTransformer

REQUIREMENTS = {
    "transformers": {
        "specifier": ">=5.21,<6",
        "reason": "Older versions embed photos lying on their side, and the oldest read in one direction only.",
    },
    "sentence-transformers": {"specifier": ">=6.2,<7", "reason": "Older versions fail on lists of images."},
}
"""What sentence-transformers checks before it loads a folder, through either loader."""

CARD_MARK = "<!-- written by cocoa-embed, and again at every save: what is to stay goes into card.yaml -->"
"""At the end of a card that may be written again."""
MODULE_FILE = "sentence_transformer"
SENTENCE_TRANSFORMERS_FILE = "config_sentence_transformers.json"
WEIGHT_FILES = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
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
) -> None:
    """
    Write a model so that it loads through both loaders, whole or not at all.

    The folder is made ready beside its place and then moved file by file, the file that makes it loadable last; what
    else lies in an existing folder stays, older safetensors weights of a model apart.

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

    Raises:
        ValueError: the model holds no CoCoA backbone, or one with adapters; a `SentenceTransformer` has modules that
            the folder would lose; the processor is missing; `modules` is neither of the two.
    """
    if modules not in ("stock", "cocoa"):
        raise ValueError(f"modules must be 'stock' or 'cocoa'; got {modules!r}.")
    backbone: Any = model
    settings: dict[str, Any] = {}
    if isinstance(model, SentenceTransformer):
        backbone = model.transformers_model
        settings = {"truncate_dim": model.truncate_dim, "similarity_fn_name": model.similarity_fn_name}
        prompts = model.prompts if prompts is None else prompts
        default_prompt_name = model.default_prompt_name if default_prompt_name is None else default_prompt_name
    _check_backbone(backbone)
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
    if processor.prompt and default_prompt_name is None:
        prompts, default_prompt_name = {**(prompts or {}), "default": processor.prompt}, "default"
    settings.update(prompts=prompts, default_prompt_name=default_prompt_name)
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write_layout(type(backbone), backbone.config, processor, staging, settings)
        backbone.save_pretrained(staging)
        if modules == "cocoa":
            _name_cocoa_module(staging)
        repair_cocoa(staging)
        if complete is not None:
            complete(staging)
        elif isinstance(model, SentenceTransformer) and _has_own_card(model):
            model.model_card_data.save_dir = str(staging)
            (staging / "README.md").write_text(generate_model_card(model), encoding="utf-8")
        elif not (folder / "README.md").exists():
            (staging / "README.md").write_text(_card(backbone, modules), encoding="utf-8")
        _move_into(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def repair_cocoa(folder: str | os.PathLike) -> list[str]:
    """
    Complete a CoCoA folder that was saved by other means than [`save_cocoa`].

    Saved again through the stock loader, a folder keeps the reference to our code but neither the code nor the version
    requirements: `trust_remote_code=True` then fails on a missing file. Saved by a `SentenceTransformer` of
    [`CocoaTransformer`], it names our package instead of code of its own.

    Args:
        folder (`str` or `os.PathLike`): A folder with a CoCoA model's `config.json` and a `modules.json`.

    Returns:
        `list[str]`: The names of the files that were written; empty where nothing was amiss.

    Raises:
        ValueError: the folder holds no CoCoA model, or nothing that sentence-transformers can load.
    """
    folder = Path(folder)
    config = _read_json(folder / "config.json")
    cls = BACKBONES.get(config.get("model_type"))
    if "cocoa" not in config or cls is None:
        raise ValueError(f"{folder} holds no CoCoA model: its config.json has no entry `cocoa`, or there is none.")
    modules = _read_json(folder / "modules.json")
    if not modules:
        raise ValueError(f"{folder} has no modules.json; load the model and its processor and call save_cocoa.")
    for module in modules:
        if module["type"].endswith(f".{CocoaTransformer.__name__}"):
            module["type"] = f"{MODULE_FILE}.{CocoaTransformer.__name__}"
    written = []
    for file in code_files(config["model_type"], modules):
        target = folder / file.name
        if not target.exists() or target.read_bytes() != file.read_bytes():
            shutil.copyfile(file, target)
            written.append(file.name)
    model_file = cls.__module__.rpartition(".")[2]
    # Loaded from the Hub by the stock class, the reference comes with the repository's name in front.
    config["auto_map"] = {"AutoModel": f"{model_file}.{cls.__name__}"}
    settings = {**_read_json(folder / SENTENCE_TRANSFORMERS_FILE), "requirements": REQUIREMENTS}
    for name, content in (("config.json", config), (SENTENCE_TRANSFORMERS_FILE, settings), ("modules.json", modules)):
        if content != _read_json(folder / name):
            (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            written.append(name)
    return written


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
    sources = Path(__file__).parent
    starts = [sources / f"{BACKBONES[model_type].__module__.rpartition('.')[2]}.py"]
    if any(module["type"].endswith(f".{CocoaTransformer.__name__}") for module in modules):
        starts.append(sources / f"{MODULE_FILE}.py")
    found = [file for start in starts for file in (start, *map(Path, get_relative_import_files(start)))]
    return list(dict.fromkeys(found))


def _read_json(path: Path) -> Any:
    """What a file holds; an empty dict where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _check_backbone(backbone: Any) -> None:
    """Raise `ValueError` unless it is a CoCoA backbone of plain weights."""
    modules = backbone.modules() if isinstance(backbone, nn.Module) else ()
    if any(type(module).__module__.split(".")[0] == "peft" for module in modules):
        raise ValueError(
            "The model has adapters, and a saved folder holds plain weights: save "
            "trainers.adapters.merge_adapters(backbone)."
        )
    if not (isinstance(backbone, PreTrainedModel) and hasattr(backbone, "cocoa")):
        raise ValueError(
            f"save_cocoa saves CoCoA models; got {type(backbone).__name__}. Load it with load_backbone, or "
            "through SentenceTransformer with trust_remote_code=True."
        )


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


def _write_layout(
    cls: type,
    config: Any,
    processor: CocoaProcessor,
    folder: Path,
    settings: dict[str, Any],
) -> None:
    """
    Let sentence-transformers write its own files and the processor's, from a throwaway model of the same kind.

    What it writes depends on the kind of model and on the processor, not on the weights; so nothing large is loaded.
    """
    with tempfile.TemporaryDirectory() as scratch:
        _small_stock_model(cls, config).save_pretrained(scratch)
        processor.save_pretrained(scratch)
        transformer = Transformer(scratch, model_kwargs={"local_files_only": True})
        dimension = transformer.get_embedding_dimension()
        layout = SentenceTransformer(
            modules=[transformer, Pooling(dimension, pooling_mode="lasttoken"), Normalize()],
            device="cpu",
            **settings,
        )
        layout.save_pretrained(str(folder), create_model_card=False)
    pooling = folder / "1_Pooling" / "config.json"
    size = config.get_text_config().hidden_size
    sized = {key: size if "dimension" in key else value for key, value in _read_json(pooling).items()}
    pooling.write_text(json.dumps(sized, indent=4) + "\n", encoding="utf-8")
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()


def _small_stock_model(cls: type, config: Any) -> PreTrainedModel:
    """A stock model of the same kind with next to no weights."""
    text = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 8,
        "layer_types": ["full_attention"],
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }
    vision = {"depth": 1, "num_heads": 1, "patch_size": config.vision_config.patch_size}
    if hasattr(config.vision_config, "embed_dim"):  # Qwen2-VL
        vision.update(embed_dim=16, hidden_size=32)
    else:
        vision.update(hidden_size=16, out_hidden_size=32, intermediate_size=16, fullatt_block_indexes=[0])
    return stock_class(cls)(type(config)(text_config=text, vision_config=vision))


def _name_cocoa_module(folder: Path) -> None:
    """Name [`CocoaTransformer`] as the folder's only module."""
    path = folder / "modules.json"
    module = {"idx": 0, "name": "0", "path": "", "type": f"{MODULE_FILE}.{CocoaTransformer.__name__}"}
    path.write_text(json.dumps([module], indent=2) + "\n", encoding="utf-8")
    for name in ("1_Pooling", "2_Normalize"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _move_into(staging: Path, folder: Path) -> None:
    """Put the staged files in place; where the folder exists, file by file and `modules.json` last."""
    if not folder.exists():
        os.chmod(staging, 0o755)
        os.replace(staging, folder)
        return
    files = [path for path in staging.rglob("*") if path.is_file()]
    # Whole weights left beside new shards, or shards of another number, would be loaded instead of them.
    stale = {path for pattern in WEIGHT_FILES for path in folder.glob(pattern) if not (staging / path.name).exists()}
    # Whoever is cut off in here leaves a folder that does not load, not one of two models' files.
    for old in (folder / "modules.json", *stale):
        old.unlink(missing_ok=True)
    for path in sorted(files, key=lambda path: (path.name == "modules.json", path)):
        target = folder / path.relative_to(staging)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)


def _has_own_card(model: SentenceTransformer) -> bool:
    """Whether its card data is not the general kind of sentence-transformers."""
    return type(model.model_card_data) is not SentenceTransformerModelCardData


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
