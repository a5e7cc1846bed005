# SPDX-License-Identifier: Apache-2.0
"""What fewer bits cost and bring: speed and memory of a model with random weights, accuracy of the trained one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TorchAoConfig

from evaluation.emoji import load_emoji, recalls
from modeling_cocoa import CocoaTransformer

from .measure import alternate
from .models import device, make_texts


def bench_precision(folder: Path, trained: Path, count: int, repeats: int) -> dict[str, Any]:
    """
    Measure `CocoaTransformer` in float32, in half precision and with weights of 8 bits.

    Returns:
        `dict`: By precision, texts a second and memory of the weights with `folder`; with the `trained` model, on all
        emoji, the cosines with the vectors of float32 and the recall from names to Noto pictures among 1,906.
    """
    from torchao.quantization import Int8WeightOnlyConfig

    options: dict[str, dict[str, Any]] = {
        "float32": {},
        "bfloat16": {"dtype": "bfloat16"},
        "float16": {"dtype": "float16"},
        "int8 weights": {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())},
    }
    texts, emoji = make_texts(count), load_emoji()
    modules, sizes = {}, {}
    for name, kwargs in options.items():
        modules[name] = CocoaTransformer(folder, model_kwargs=kwargs).to(device())
        sizes[name] = sum(weight_bytes(p) for p in modules[name].model.parameters()) / 2**20
    results, _ = alternate({name: partial(module.encode, texts) for name, module in modules.items()}, repeats)
    del modules
    exact: tuple[np.ndarray, np.ndarray] | None = None
    report: dict[str, Any] = {}
    for name, kwargs in options.items():
        module = CocoaTransformer(trained, model_kwargs=kwargs).to(device())
        vectors = module.encode(emoji["name"]), module.encode(list(emoji["noto"]))
        exact = exact or vectors
        cosines = np.concatenate([(a * b).sum(1) for a, b in zip(exact, vectors, strict=True)])
        found = recalls(vectors[0] @ vectors[1].T)
        report[name] = {
            "texts a second": count / results[name].median,
            "weights MiB": sizes[name],
            "mean cosine": float(cosines.mean()),
            "least cosine": float(cosines.min()),
            **{f"R@{k}": found[k].value for k in (1, 10)},
        }
    return {"precision": report}


def weight_bytes(parameter: torch.Tensor) -> int:
    """Bytes of a parameter, quantized ones by their parts."""
    if hasattr(parameter, "__tensor_flatten__"):
        return sum(getattr(parameter, name).nbytes for name in parameter.__tensor_flatten__()[0])
    return parameter.nbytes
