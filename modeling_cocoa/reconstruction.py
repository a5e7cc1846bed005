# SPDX-License-Identifier: Apache-2.0
"""
Reconstruction pre-training: masked text and pixels are rebuilt, in the bridge through the EOS alone.

The backbone stays what it is; the heads here are thrown away after pre-training (the language-model head apart, which
the backbone shares or the generative checkpoint brings).
"""

from __future__ import annotations

import copy
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, ModelOutput, cached_file

from .attention import EOS, PADDING, SOURCE, TARGET, attention_mask_for
from .auto import load_backbone
from .layers import merged_rotary
from .losses import masked_token_loss, normalize_patches
from .modeling_cocoa import hub_arguments
from .packing import Packing, pack

HEADS_FILE = "reconstruction.safetensors"
"""File beside the weights of a pre-training checkpoint that holds the heads."""

BRIDGES = ("layerwise", "embedding")


@dataclass
class ReconstructionOutput(ModelOutput):
    """
    Output of [`CocoaForReconstruction`].

    Args:
        loss (`Tensor`): `text_source + text_target + image_loss_weight * image`, of those that are present.
        losses (`dict[str, Tensor]`): Means by name, without weights: `text_source` (masked source tokens),
            `text_target` (masked target tokens; nats), `image` (squared error of normalised pixels).
        token_losses, token_predictions (`Tensor` of shape `(masked tokens,)`): Of each masked token, its loss and the
            likeliest token in its place, in the order of `labels[labels != -100]`.
        unit_losses (`Tensor` of shape `(predicted units,)`): In the order of `unit_mask.nonzero()`.
        pixels (`Tensor` of shape `(predicted units, 4 patches, values)`): The rebuilt (normalised) pixels.
        embeddings (`Tensor` of shape `(batch, hidden)`): Unit-norm EOS embeddings of the sources.
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    token_losses: Tensor | None = None
    token_predictions: Tensor | None = None
    unit_losses: Tensor | None = None
    pixels: Tensor | None = None
    embeddings: Tensor | None = None


def read_lm_head(pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Tensor | None:
    """
    The language-model head of a generative checkpoint, read without building the generative model.

    Args:
        pretrained_model_name_or_path: Folder or Hub name.
        kwargs: Those of `from_pretrained`, of which the Hub's (`revision`, `token`, `cache_dir`, ...) are used.

    Returns:
        `Tensor` of shape `(vocabulary, hidden)`, or `None` where the checkpoint has none.
    """
    hub = hub_arguments(kwargs)

    def find(name: str) -> str | None:
        try:
            return cached_file(pretrained_model_name_or_path, name, **hub)
        except OSError:  # how transformers says that there is no such file
            return None

    file = find(SAFE_WEIGHTS_NAME)
    if file is None and (index := find(SAFE_WEIGHTS_INDEX_NAME)) is not None:
        shard = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].get("lm_head.weight")
        file = find(shard) if shard else None
    if file is None:
        return None
    with safe_open(file, framework="pt") as weights:
        return weights.get_tensor("lm_head.weight") if "lm_head.weight" in weights.keys() else None


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
            packed = [part.flatten(0, 1)[packing.index] for part in (hidden_states, *position_embeddings)]
            hidden_states, position_embeddings = packed[0], tuple(packed[1:])
            places = torch.empty_like(units.flatten(), dtype=torch.long).index_copy(
                0, packing.index, torch.arange(len(packing.index), device=packing.index.device)
            )[places]
        for layer in self.layers:
            options = {"packing": packing} if packing is not None else {"attention_mask": attention_mask}
            output = layer(hidden_states, position_embeddings=position_embeddings, **options)
            hidden_states = (
                output[0] if isinstance(output, tuple) else output
            )  # the stock layer before transformers 5.4
        chosen = hidden_states.flatten(0, -2)[places]
        return self.projection(self.norm(chosen)).view(-1, self.patches_per_unit, self.values_per_patch)


class CocoaForReconstruction(nn.Module):
    """
    A CoCoA backbone with the heads of stages 1 and 2 (CoCoA, arXiv 2603.01471).

    Rows are `source · EOS` in the warm-up and `source · EOS · target` in the bridge, told apart by `segment_ids`; the
    attention between them is collaborative ([`~attention.is_visible`]). Masked text at position i is predicted from
    the hidden state at i - 1, so the pre-trained language-model head keeps its meaning; the first target token is
    predicted from the EOS itself. Hidden image units are predicted at their own position.

    Args:
        backbone: [`CocoaQwen2VLModel`] or [`CocoaQwen2_5_VLModel`].
        lm_head (`Tensor` of shape `(vocabulary, hidden)`, *optional*): The text head; by default the embedding matrix,
            which is the head of a checkpoint with `tie_word_embeddings`.
        bridge (`"layerwise"` or `"embedding"`): How the target reaches its source: by attending to the EOS in every
            layer, or to one token made from the final embedding by a linear layer.
        image_loss_weight (`float`, defaults to 0.1): Of the pixel loss against the text loss.
        normalize_pixels (`bool`, defaults to `True`): Predict each patch at zero mean and unit variance; otherwise
            the processor's pixel values as they are.

    Raises:
        ValueError: `bridge` is neither of the two; the text head does not fit the embedding matrix.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        *,
        lm_head: Tensor | None = None,
        bridge: Literal["layerwise", "embedding"] = "layerwise",
        image_loss_weight: float = 0.1,
        normalize_pixels: bool = True,
    ) -> None:
        super().__init__()
        if bridge not in BRIDGES:
            raise ValueError(f"bridge must be one of {BRIDGES}; got {bridge!r}.")
        self.model = backbone
        self.bridge = bridge
        self.image_loss_weight = image_loss_weight
        self.normalize_pixels = normalize_pixels
        embeddings = backbone.get_input_embeddings().weight
        hidden_size = embeddings.shape[1]
        self.lm_head = None
        if lm_head is not None:
            if lm_head.shape != embeddings.shape:
                raise ValueError(
                    f"lm_head of shape {tuple(lm_head.shape)} does not fit embeddings of {tuple(embeddings.shape)}."
                )
            self.lm_head = nn.Linear(hidden_size, lm_head.shape[0], bias=False)
            self.lm_head.weight.data = lm_head.to(embeddings)
        self.unit_mask_embedding = nn.Parameter(torch.empty(hidden_size))
        self.image_decoder = ImageDecoder(backbone)
        self.bridge_projection = nn.Linear(hidden_size, hidden_size) if bridge == "embedding" else None
        self._initialize_heads(embeddings)
        self.to(device=embeddings.device, dtype=embeddings.dtype)

    @torch.no_grad()
    def _initialize_heads(self, embeddings: Tensor) -> None:
        std = self.config.get_text_config().initializer_range
        self.unit_mask_embedding.normal_(std=std)
        for module in self.image_decoder.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=std)
                if module.bias is not None:
                    module.bias.zero_()
        if self.bridge_projection is not None:
            # The bridge token starts as the embedding itself, as long as a word's embedding is on average.
            self.bridge_projection.weight.copy_(torch.eye(embeddings.shape[1]) * embeddings.norm(dim=-1).mean())
            self.bridge_projection.bias.zero_()

    @property
    def config(self) -> Any:
        """The backbone's configuration."""
        return self.model.config

    @property
    def _no_split_modules(self) -> set[str]:
        """Where sharding finds the layers' names."""
        return self.model._no_split_modules

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        bridge: Literal["layerwise", "embedding"] = "layerwise",
        image_loss_weight: float = 0.1,
        normalize_pixels: bool = True,
        **kwargs: Any,
    ) -> CocoaForReconstruction:
        """
        Load a generative Qwen2-VL / Qwen2.5-VL checkpoint (new heads), or the checkpoint of an earlier pre-training
        run (its heads; those of another bridge start anew).

        Args:
            pretrained_model_name_or_path: Folder or Hub name.
            bridge, image_loss_weight, normalize_pixels: As in the class.
            kwargs: For the backbone's `from_pretrained`.

        Raises:
            ValueError: the checkpoint has no text head: neither tied embeddings, nor `lm_head`, nor saved heads.
        """
        backbone = load_backbone(pretrained_model_name_or_path, **kwargs)
        lm_head = (
            None if backbone.config.tie_word_embeddings else read_lm_head(pretrained_model_name_or_path, **kwargs)
        )
        heads_file = Path(pretrained_model_name_or_path) / HEADS_FILE
        heads = load_file(heads_file) if heads_file.is_file() else {}
        lm_head = heads.get("lm_head.weight", lm_head)
        if lm_head is None and not backbone.config.tie_word_embeddings:
            raise ValueError(
                f"{pretrained_model_name_or_path} has no text head: start from the generative checkpoint, or from a "
                f"pre-training checkpoint, which keeps its heads in {HEADS_FILE}."
            )
        model = cls(
            backbone,
            lm_head=lm_head,
            bridge=bridge,
            image_loss_weight=image_loss_weight,
            normalize_pixels=normalize_pixels,
        )
        if heads:
            model.load_heads(heads)
        return model

    def heads_state_dict(self) -> dict[str, Tensor]:
        """Everything that is not the backbone's."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("model.")}

    def load_heads(self, heads: dict[str, Tensor]) -> None:
        """
        Put saved heads in place; the projection of a bridge that the saved run did not have stays as it is.

        Raises:
            ValueError: a head is missing or of another shape.
        """
        own = self.heads_state_dict()
        missing = [name for name in own if name not in heads and not name.startswith("bridge_projection.")]
        wrong = [name for name, value in own.items() if name in heads and heads[name].shape != value.shape]
        if missing or wrong:
            raise ValueError(f"Reconstruction heads do not fit this model: missing {missing}, of other shape {wrong}.")
        self.load_state_dict({name: value for name, value in heads.items() if name in own}, strict=False)

    def save_heads(self, folder: str | os.PathLike) -> None:
        """Write the heads beside a backbone's weights, whole or not at all."""
        path = Path(folder) / HEADS_FILE
        partial = path.with_suffix(".partial")
        save_file({name: value.contiguous() for name, value in self.heads_state_dict().items()}, partial)
        os.replace(partial, path)

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Trade computation for memory in the backbone, whose arguments these are."""
        self.model.gradient_checkpointing_enable(**kwargs)

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """What later versions of transformers call [`~CocoaForReconstruction.gradient_checkpointing_enable`]."""
        self.model.activation_checkpointing_enable(**kwargs)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        segment_ids: Tensor,
        labels: Tensor,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_labels: Tensor | None = None,
        unit_mask: Tensor | None = None,
        image_is_target: Tensor | None = None,
    ) -> ReconstructionOutput:
        """
        Args:
            input_ids (`Tensor` of shape `(batch, tokens)`): With `<|mask|>` in the hidden places.
            attention_mask (`Tensor` of shape `(batch, tokens)`): 0 for padding.
            segment_ids (`Tensor` of shape `(batch, tokens)`): `PADDING`, `SOURCE`, `EOS` or `TARGET`.
            labels (`Tensor` of shape `(batch, tokens)`): The hidden tokens in their own places, -100 elsewhere.
            pixel_values (`Tensor` of shape `(patches, values)`): Of all images, in the order of their tokens; what the
                vision tower sees, so with hidden patches already replaced. Those of target images are not read.
            image_grid_thw (`Tensor` of shape `(images, 3)`).
            pixel_labels (`Tensor` of shape `(patches, values)`): The pixels as they were.
            unit_mask (`Tensor` of bool, shape `(units,)`): Units (of all images) to predict.
            image_is_target (`Tensor` of bool, shape `(images,)`): Images of the target segment, whose units carry the
                learned mask embedding and never pass the vision tower.

        Returns:
            [`ReconstructionOutput`].
        """
        backbone = self.model
        image_tokens = input_ids == backbone.config.image_token_id
        inputs_embeds = backbone.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            features = self._image_features(pixel_values, image_grid_thw, image_is_target).to(inputs_embeds)
            inputs_embeds = inputs_embeds.masked_scatter(image_tokens[..., None], features)
        positions = backbone.mrope_positions(input_ids, attention_mask, image_grid_thw)

        attention = self._attention(segment_ids, inputs_embeds.dtype)
        if self.bridge == "embedding" and bool((segment_ids == TARGET).any()):
            hidden, embeddings = self._two_passes(inputs_embeds, positions, segment_ids)
        else:
            hidden = self._read(inputs_embeds, positions, attention)
            embeddings = nn.functional.normalize(hidden[segment_ids == EOS], dim=-1)

        output = ReconstructionOutput(embeddings=embeddings, losses={})
        terms = []
        masked = labels != -100
        if bool(masked.any()):
            weight = self.lm_head.weight if self.lm_head is not None else backbone.get_input_embeddings().weight
            predicting = hidden[:, :-1][masked[:, 1:]]
            output.token_losses, output.token_predictions = masked_token_loss(predicting, weight, labels[masked])
            segments = segment_ids[masked]
            for name, segment in (("text_source", SOURCE), ("text_target", TARGET)):
                if bool((segments == segment).any()):
                    output.losses[name] = output.token_losses[segments == segment].mean()
                    terms.append(output.losses[name])
        if unit_mask is not None and bool(unit_mask.any()):
            units = torch.zeros_like(image_tokens)
            units[image_tokens] = unit_mask
            if "packing" in attention:
                rotary = merged_rotary(backbone.language_model, hidden, positions)
            else:
                rotary = backbone.language_model.rotary_emb(hidden, positions)
            output.pixels = self.image_decoder(hidden, rotary, units, **attention)
            targets = pixel_labels.view(-1, *output.pixels.shape[1:])[unit_mask].float()
            if self.normalize_pixels:
                targets = normalize_patches(targets)
            output.unit_losses = (output.pixels.float() - targets).square().mean(dim=(1, 2))
            output.losses["image"] = output.unit_losses.mean()
            terms.append(self.image_loss_weight * output.losses["image"])
        if not terms:
            raise ValueError("Nothing is masked in this batch: no labels and no units to predict.")
        output.loss = torch.stack(terms).sum()
        return output

    def _image_features(self, pixel_values: Tensor, image_grid_thw: Tensor, image_is_target: Tensor | None) -> Tensor:
        """Features of every unit, in order: the vision tower's for sources, the mask embedding for targets."""
        merge = self.config.vision_config.spatial_merge_size**2
        patches = image_grid_thw.prod(dim=-1)
        if image_is_target is None:
            image_is_target = torch.zeros_like(patches, dtype=torch.bool)
        target_patches = image_is_target.repeat_interleave(patches)
        features = self.unit_mask_embedding.expand(pixel_values.shape[0] // merge, -1)
        if bool((~image_is_target).any()):
            seen = self.model.read_images(pixel_values[~target_patches], image_grid_thw[~image_is_target])
            features = features.clone()
            features[~target_patches[::merge]] = torch.cat(seen).to(features.dtype)
        return features

    def _attention(self, segment_ids: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        """How layers are told who sees whom: a packing, or for eager attention on the padded batch a dense mask."""
        implementation = self.model.language_model.config._attn_implementation
        if implementation == "eager":
            return {"attention_mask": attention_mask_for(implementation, segment_ids, None, dtype)}
        return {"packing": pack(segment_ids)}

    def _read(self, inputs_embeds: Tensor, positions: Tensor, attention: dict[str, Any]) -> Tensor:
        """Final hidden states of rows under collaborative attention; padding is zero."""
        if (packing := attention.get("packing")) is not None:
            packed = inputs_embeds.flatten(0, 1)[packing.index]
            hidden = self.model.run_layers(packed, positions.flatten(1)[:, packing.index], packing)
            return packing.to(hidden.device).unpack(hidden, inputs_embeds.shape[:2])
        language_model = self.model.language_model
        mask = attention["attention_mask"]
        return language_model(
            inputs_embeds=inputs_embeds,
            position_ids=positions,
            attention_mask=dict.fromkeys(set(language_model.config.layer_types), mask),
            use_cache=False,
        ).last_hidden_state

    def _two_passes(self, inputs_embeds: Tensor, positions: Tensor, segment_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The `embedding` bridge: read source and EOS; then the target beside a token made from the embedding."""
        is_eos, is_target = segment_ids == EOS, segment_ids == TARGET
        dtype, is_source = inputs_embeds.dtype, segment_ids == SOURCE
        first = self._read(
            inputs_embeds, positions, self._attention(segment_ids.masked_fill(is_target, PADDING), dtype)
        )
        embeddings = nn.functional.normalize(first[is_eos], dim=-1)
        bridge_tokens = self.bridge_projection(embeddings)
        second_embeds = inputs_embeds.masked_scatter(is_eos[..., None], bridge_tokens)
        second = self._read(
            second_embeds, positions, self._attention(segment_ids.masked_fill(is_source, PADDING), dtype)
        )
        return torch.where((is_eos | is_target)[..., None], second, first), embeddings
