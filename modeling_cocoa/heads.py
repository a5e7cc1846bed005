# SPDX-License-Identifier: Apache-2.0
"""The heads of reconstruction: the decoder of images, and where the text head and the mask token come from."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from .checkpoint_files import hub_arguments
from .packing import Packing


def read_lm_head(pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Tensor | None:
    """
    The language-model head of a generative checkpoint, read without building the generative model.

    Args:
        pretrained_model_name_or_path: Folder or Hub name.
        kwargs: Those of `from_pretrained`, of which the Hub's (`revision`, `token`, `cache_dir`, ...) are used.

    Returns:
        `Tensor` of shape `(vocabulary, hidden)`, or `None` where the checkpoint has none.
    """
    find = partial(find_checkpoint_file, pretrained_model_name_or_path, **kwargs)
    file = find(SAFE_WEIGHTS_NAME)
    if file is None and (index := find(SAFE_WEIGHTS_INDEX_NAME)) is not None:
        shard = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].get("lm_head.weight")
        file = find(shard) if shard else None
    if file is None:
        return None
    with safe_open(file, framework="pt") as weights:
        return weights.get_tensor("lm_head.weight") if "lm_head.weight" in weights.keys() else None


def find_checkpoint_file(pretrained_model_name_or_path: str | os.PathLike, name: str, **kwargs: Any) -> str | None:
    """
    The path of a checkpoint's file, fetched where it is on the Hub; `None` where the checkpoint has no such file.

    Args:
        pretrained_model_name_or_path: Folder or Hub name.
        name (`str`): Of the file.
        kwargs: Those of `from_pretrained`, of which the Hub's (`revision`, `token`, `cache_dir`, ...) are used.
    """
    try:
        return cached_file(pretrained_model_name_or_path, name, **hub_arguments(kwargs))
    except OSError:  # how transformers says that there is no such file
        return None


@torch.no_grad()
def attach_mask_token(backbone: PreTrainedModel, mask_token_id: int) -> None:
    """
    Tell a backbone its `<|mask|>` token; the first time, its embedding becomes the mean of the embedding matrix.

    Raises:
        ValueError: the embedding matrix has no row for the token, or the checkpoint was trained with another one.
    """
    cocoa, weight = backbone.cocoa, backbone.get_input_embeddings().weight
    if cocoa.mask_token_id == mask_token_id:
        return
    if cocoa.mask_token_id is not None:
        raise ValueError(
            f"The checkpoint was trained with mask token {cocoa.mask_token_id}, the processor has {mask_token_id}: "
            "load the processor from the checkpoint."
        )
    if mask_token_id >= weight.shape[0]:
        raise ValueError(
            f"The embedding matrix has {weight.shape[0]} rows, none for mask token {mask_token_id}: "
            "call model.resize_token_embeddings(len(processor.tokenizer)) first."
        )
    weight[mask_token_id] = weight.float().mean(dim=0)
    backbone.cocoa = replace(cocoa, mask_token_id=mask_token_id)
    backbone.config.cocoa = backbone.cocoa.to_dict()


def attach_eos_token(backbone: PreTrainedModel, eos_token_id: int) -> None:
    """
    Have a backbone close inputs with the EOS of its processor. Until CoCoA has trained it, its own may be another: the
    configurations of base checkpoints name the end of a text.

    Raises:
        ValueError: the checkpoint was pre-trained with another EOS.
    """
    cocoa = backbone.cocoa
    if cocoa.eos_token_id == eos_token_id:
        return
    if cocoa.mask_token_id is not None:
        raise ValueError(
            f"The checkpoint was trained with EOS token {cocoa.eos_token_id}, the processor has {eos_token_id}: load "
            "the processor from the checkpoint."
        )
    backbone.cocoa = replace(cocoa, eos_token_id=eos_token_id)
    backbone.config.cocoa = backbone.cocoa.to_dict()
    backbone.pooler.eos_token_id = eos_token_id


class ImageDecoder(nn.Module):
    """
    From hidden states to the pixels of one language-model image token (a unit of 2x2 patches).

    Decoder layers of the backbone's own kind, a norm and a linear layer (MoCa, arXiv 2506.23115).

    Args:
        backbone: The CoCoA backbone whose kind of layer and configuration are used.
    """

    def __init__(self, backbone: PreTrainedModel) -> None:
        super().__init__()
        language_model, vision = backbone.language_model, backbone.config.vision_config
        layer_class, norm_class = type(language_model.layers[0]), type(language_model.norm)
        config = copy.deepcopy(language_model.config)
        self.layers = nn.ModuleList(layer_class(config, index) for index in range(backbone.cocoa.image_decoder_layers))
        for layer in self.layers:
            layer.self_attn.is_causal = False
        self.norm = norm_class(config.hidden_size, eps=config.rms_norm_eps)
        self.patches_per_unit = vision.spatial_merge_size**2
        self.values_per_patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        self.projection = nn.Linear(config.hidden_size, self.patches_per_unit * self.values_per_patch)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        units: Tensor,
        *,
        packing: Packing | None = None,
        attention_mask: Any = None,
    ) -> Tensor:
        """
        Pixels of some units.

        Args:
            hidden_states (`Tensor` of shape `(batch, tokens, hidden)`).
            position_embeddings: Cosines and sines `(batch, tokens, head size)`.
            units (`Tensor` of bool, shape `(batch, tokens)`): Which tokens to rebuild.
            packing ([`Packing`], *optional*): Run on one row without padding; otherwise on the padded batch.
            attention_mask (*optional*): For the padded batch.

        Returns:
            `Tensor` of shape `(units, patches a unit, values a patch)`, in the batch's order.
        """
        places = units.flatten().nonzero()[:, 0]
        if packing is not None:
            parts = (hidden_states, *position_embeddings)
            packed = [part.flatten(0, 1).index_select(0, packing.index) for part in parts]
            hidden_states, position_embeddings = packed[0], tuple(packed[1:])
            places = torch.empty_like(units.flatten(), dtype=torch.long).index_copy(
                0, packing.index, torch.arange(len(packing.index), device=packing.index.device)
            )[places]
        for layer in self.layers:
            options = {"packing": packing} if packing is not None else {"attention_mask": attention_mask}
            hidden_states = layer(hidden_states, position_embeddings=position_embeddings, **options)
        chosen = hidden_states.flatten(0, -2).index_select(0, places)
        return self.projection(self.norm(chosen)).view(-1, self.patches_per_unit, self.values_per_patch)
