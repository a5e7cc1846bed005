# SPDX-License-Identifier: Apache-2.0
"""A backbone takes over the EOS and the mask token of its processor."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedModel


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
