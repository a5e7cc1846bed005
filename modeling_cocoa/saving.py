# SPDX-License-Identifier: Apache-2.0
"""
One folder, two doors: `SentenceTransformer(folder)` through stock classes, and with `trust_remote_code=True` ours.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

from .modeling_cocoa import CocoaModelMixin, stock_class
from .processing_cocoa import CocoaProcessor
from .sentence_transformer import CocoaTransformer

REQUIREMENTS = {
    "transformers": {
        "specifier": ">=5.4,<6",
        "reason": "Older versions ignore text_config.is_causal=False in batches without padding.",
    },
    "sentence-transformers": {"specifier": ">=6,<7", "reason": "Older versions cannot embed images with this model."},
}
"""What sentence-transformers checks before it loads a folder, through either door."""

MODULE_FILE = "sentence_transformer"
SENTENCE_TRANSFORMERS_FILE = "config_sentence_transformers.json"


def save_cocoa(
    model: CocoaModelMixin | SentenceTransformer,
    processor: CocoaProcessor | None,
    folder: str | os.PathLike,
    *,
    modules: Literal["stock", "cocoa"] = "stock",
    prompts: dict[str, str] | None = None,
    default_prompt_name: str | None = None,
) -> None:
    """
    Write a model so that it loads through both doors, whole or not at all.

    The folder is made ready beside its place and then moved file by file, the file that makes it loadable last; what
    else lies in an existing folder stays.

    Args:
        model: A CoCoA backbone, or a `SentenceTransformer` that holds one, whose prompts are then kept.
        processor ([`CocoaProcessor`], *optional*): By default that of the `SentenceTransformer`.
        folder (`str` or `os.PathLike`): Where to.
        modules (`"stock"` or `"cocoa"`): The modules that the folder names: sentence-transformers' own, which load
            without remote code, or [`CocoaTransformer`], which needs `trust_remote_code=True`.
        prompts (`dict[str, str]`, *optional*): Instructions by name, for `encode(prompt_name=...)`, `encode_query`
            and `encode_document`.
        default_prompt_name (`str`, *optional*): The prompt used where none is asked for.

    Raises:
        ValueError: the model holds no CoCoA backbone, or the processor is missing; `modules` is neither of the two.
    """
    if modules not in ("stock", "cocoa"):
        raise ValueError(f"modules must be 'stock' or 'cocoa'; got {modules!r}.")
    backbone: Any = model
    if isinstance(model, SentenceTransformer):
        backbone = model.transformers_model
        prompts = model.prompts if prompts is None else prompts
        default_prompt_name = model.default_prompt_name if default_prompt_name is None else default_prompt_name
        if processor is None:
            own = model[0].processor
            processor = own if isinstance(own, CocoaProcessor) else CocoaProcessor(own)
    if not hasattr(backbone, "cocoa"):
        raise ValueError(
            f"save_cocoa saves CoCoA models; got {type(backbone).__name__}. Load it with load_backbone, or "
            "through SentenceTransformer with trust_remote_code=True."
        )
    if processor is None:
        raise ValueError("Give `processor` (a CocoaProcessor) together with a backbone.")
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write_layout(type(backbone), backbone.config, processor, staging, prompts, default_prompt_name)
        backbone.save_pretrained(staging)
        if modules == "cocoa":
            _name_cocoa_module(staging)
        mend_cocoa(staging)
        if not (folder / "README.md").exists():
            (staging / "README.md").write_text(_card(backbone, modules), encoding="utf-8")
        _move_into(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def mend_cocoa(folder: str | os.PathLike) -> list[str]:
    """
    Complete a CoCoA folder that was saved again through the stock door, which keeps the reference to our code but
    neither the code nor the version requirements: without the code, `trust_remote_code=True` fails on a missing file.

    Args:
        folder (`str` or `os.PathLike`): A folder with a CoCoA model's `config.json`.

    Returns:
        `list[str]`: The names of the files that were written.

    Raises:
        ValueError: the folder holds no CoCoA model.
    """
    folder = Path(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    reference = config.get("auto_map", {}).get("AutoModel")
    if "cocoa" not in config or reference is None:
        raise ValueError(f"{folder} holds no CoCoA model: its config.json has no `cocoa` and `auto_map`.")
    written = []
    sources = Path(__file__).parent
    starts = [sources / f"{reference.split('.')[0]}.py"]
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    if any(module["type"].startswith(f"{MODULE_FILE}.") for module in modules):
        starts.append(sources / f"{MODULE_FILE}.py")
    for start in starts:
        for file in (start, *map(Path, get_relative_import_files(start))):
            target = folder / file.name
            if not target.exists() or target.read_bytes() != file.read_bytes():
                shutil.copyfile(file, target)
                written.append(file.name)
    path = folder / SENTENCE_TRANSFORMERS_FILE
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("requirements") != REQUIREMENTS:
        settings["requirements"] = REQUIREMENTS
        path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        written.append(path.name)
    return written


def _write_layout(
    cls: type,
    config: Any,
    processor: CocoaProcessor,
    folder: Path,
    prompts: dict[str, str] | None,
    default_prompt_name: str | None,
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
            prompts=prompts,
            default_prompt_name=default_prompt_name,
            device="cpu",
        )
        layout.save_pretrained(str(folder), create_model_card=False)
    pooling = folder / "1_Pooling" / "config.json"
    settings = json.loads(pooling.read_text(encoding="utf-8"))
    size = config.get_text_config().hidden_size
    settings = {key: size if value == dimension and "dimension" in key else value for key, value in settings.items()}
    pooling.write_text(json.dumps(settings, indent=4) + "\n", encoding="utf-8")
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()


def _small_stock_model(cls: type, config: Any) -> PreTrainedModel:
    """A stock model of the same kind with next to no weights."""
    config = copy.deepcopy(config)
    text, vision = config.text_config, config.vision_config
    pairs = 8
    small_text = {
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
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [pairs - 6, 3, 3]},
    }
    text_config = type(text)(**small_text)
    is_qwen2 = hasattr(vision, "embed_dim")
    widths = {"embed_dim": 16, "hidden_size": 32} if is_qwen2 else {"hidden_size": 16, "out_hidden_size": 32}
    vision_config = type(vision)(
        depth=1,
        num_heads=1,
        patch_size=vision.patch_size,
        **widths,
        **({} if is_qwen2 else {"intermediate_size": 16, "fullatt_block_indexes": [0]}),
    )
    return stock_class(cls)(type(config)(text_config=text_config, vision_config=vision_config))


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
    for path in sorted(files, key=lambda path: (path.name == "modules.json", path)):
        target = folder / path.relative_to(staging)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)


def _card(backbone: Any, modules: str) -> str:
    """A short model card."""
    trust = ", trust_remote_code=True" if modules == "cocoa" else ""
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

With `trust_remote_code=True` the model code in this folder is used; the vectors are the same. A folder that was saved
again without it has lost that code: `modeling_cocoa.mend_cocoa(folder)` of the package `cocoa-embed` puts it back.

Without the package's `CocoaTransformer`, do not mix a conversation with other inputs in one call (its content would be
lost), and drop keys that are None.
"""
