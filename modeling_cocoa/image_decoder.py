# SPDX-License-Identifier: Apache-2.0
"""The head that rebuilds images in reconstruction pre-training."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .packed_attention import TEXT_ATTENTION, attend_row
from .packing import Packing


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
        config._attn_implementation = TEXT_ATTENTION
        self.layers = nn.ModuleList(layer_class(config, index) for index in range(backbone.cocoa.image_decoder_layers))
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
        implementation: str = "sdpa",
        attention_mask: Any = None,
    ) -> Tensor:
        """
        Pixels of some units.

        Args:
            hidden_states (`Tensor` of shape `(batch, tokens, hidden)`).
            position_embeddings: Cosines and sines `(batch, tokens, head size)`.
            units (`Tensor` of bool, shape `(batch, tokens)`): Which tokens to rebuild.
            packing ([`Packing`], *optional*): Run on one row without padding; otherwise on the padded batch.
            implementation (`str`, defaults to `"sdpa"`): As in [`~packed_attention.attend`].
            attention_mask (*optional*): For the padded batch.

        Returns:
            `Tensor` of shape `(units, patches a unit, values a patch)`, in the batch's order.
        """
        places = units.flatten().nonzero()[:, 0]
        if packing is not None:
            parts = (hidden_states, *position_embeddings)
            packed = [part.flatten(0, 1).index_select(0, packing.index) for part in parts]
            hidden_states, *position_embeddings = (part[None] for part in packed)
            places = torch.empty_like(units.flatten(), dtype=torch.long).index_copy(
                0, packing.index, torch.arange(len(packing.index), device=packing.index.device)
            )[places]
        options = {"attention_mask": attention_mask}
        if packing is not None:
            options = {"packed_attention": partial(attend_row, packing=packing, implementation=implementation)}
        for layer in self.layers:
            hidden_states = layer(hidden_states, position_embeddings=position_embeddings, **options)
        chosen = hidden_states.flatten(0, -2).index_select(0, places)
        return self.projection(self.norm(chosen)).view(-1, self.patches_per_unit, self.values_per_patch)
