# SPDX-License-Identifier: Apache-2.0
"""The server's process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from modeling_cocoa import CocoaTransformer
from modeling_cocoa.encoding import CPU_BATCH_TOKENS, GPU_BATCH_TOKENS
from modeling_cocoa.model_folder import SETTINGS_FILE
from modeling_cocoa.sentence_transformer import read_settings

API_KEY = "COCOA_API_KEY"
"""Environment variable of the key that clients must send; a command line would show it to others."""


def serve(
    model: str | os.PathLike,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    **limits: int,
) -> None:
    """
    Load a model and answer requests until the process is told to stop; what was taken is answered first.

    Args:
        model (`str` or `os.PathLike`): Folder or Hub name.
        host (`str`, defaults to this machine alone), port (`int`, defaults to 8000).
        name (`str`, *optional*): The model's name in requests; by default the folder's.
        dtype (`str`, *optional*): `"float32"`, `"bfloat16"` or `"float16"`; by default the checkpoint's.
        device (`str`, *optional*): By default a GPU where there is one.
        limits: Fields of [`~api.Limits`]; by default a batch has more tokens on a GPU.

    Raises:
        ValueError: the folder asks for shorter vectors or a prompt by default.
    """
    try:
        import uvicorn

        from .api import Limits, create_app
    except ImportError as error:
        raise ImportError(f'{error}. The server needs an extra: pip install "cocoa-embed[serve]"') from error
    settings = read_settings(str(model))
    if settings.get("truncate_dim") or settings.get("default_prompt_name"):
        raise ValueError(
            f"{model} sets truncate_dim or default_prompt_name in {SETTINGS_FILE}, which requests have to ask for "
            "here: remove them there, and send `dimensions` or `prompt_name`."
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options: dict[str, Any] = {} if dtype is None else {"model_kwargs": {"dtype": dtype}}
    module = CocoaTransformer(str(model), **options).to(device)
    on_cpu = module.model.device.type == "cpu"
    limits.setdefault("batch_num_tokens", CPU_BATCH_TOKENS if on_cpu else GPU_BATCH_TOKENS)
    app = create_app(
        module,
        name=name or Path(model).resolve().name,
        prompts=module.prompts,
        limits=Limits(**limits),
        api_key=os.environ.get(API_KEY) or None,
    )
    uvicorn.run(app, host=host, port=port, log_level="info", access_log=False)
