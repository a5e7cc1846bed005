# SPDX-License-Identifier: Apache-2.0
"""
Reconstruction pre-training: masked text and pixels are rebuilt, in the bridge through the EOS alone.

The backbone stays what it is; the heads here are thrown away after pre-training (the language-model head apart, which
the backbone shares or the generative checkpoint brings).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .attention import EOS, PADDING, SOURCE, TARGET, attention_mask_for
from .auto import load_backbone
from .files import atomic_write
from .heads import ImageDecoder, find_checkpoint_file, read_lm_head
from .layers import merged_rotary
from .losses import masked_token_loss, normalize_patches
from .packing import pack

logger = logging.getLogger(__name__)

HEADS_FILE = "reconstruction.safetensors"
"""File beside the weights of a pre-training checkpoint that holds the heads."""

BRIDGES = ("layerwise", "embedding")

LOSSES = ("text_source", "text_target", "image")
"""Names of the losses: masked source tokens, masked target tokens, predicted image units."""


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
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    token_losses: Tensor | None = None
    token_predictions: Tensor | None = None
    unit_losses: Tensor | None = None
    pixels: Tensor | None = None


def count_losses(labels: Tensor, segment_ids: Tensor, unit_mask: Tensor | None) -> Tensor:
    """How many terms each of [`LOSSES`] has in a batch, `(3,)`; arguments as in [`CocoaForReconstruction.forward`]."""
    masked = labels != -100
    is_target = segment_ids == TARGET
    units = torch.zeros((), dtype=torch.long, device=labels.device) if unit_mask is None else unit_mask.sum()
    return torch.stack([(masked & ~is_target).sum(), (masked & is_target).sum(), units])


def resolve_eos_sees_target(bridge: str, eos_sees_target: bool | None) -> bool:
    """
    Whether the EOS attends to the target: as asked for, or the default of the bridge.

    Raises:
        ValueError: it is asked for with the `embedding` bridge.
    """
    if bridge == "embedding" and eos_sees_target:
        raise ValueError(
            "eos_sees_target=True needs bridge='layerwise': in the 'embedding' bridge the target is read after the "
            "embedding is made. Leave eos_sees_target out."
        )
    return bridge == "layerwise" if eos_sees_target is None else eos_sees_target


class CocoaForReconstruction(nn.Module):
    """
    A CoCoA backbone with the heads of stages 1 and 2 (CoCoA, arXiv 2603.01471).

    It has no embeddings of training rows: where the EOS sees the target, they are not those of inference, which the
    backbone gives for the source alone.

    Rows are `source · EOS` in the warm-up and `source · EOS · target` in the bridge, told apart by `segment_ids`; the
    attention between them is collaborative ([`~attention.is_visible`]). Masked text at position i is predicted from
    the hidden state at i - 1, so the pre-trained language-model head keeps its meaning; the first target token is
    predicted from the EOS itself. Hidden image units are predicted at their own position.

    Args:
        backbone: [`CocoaQwen2VLModel`] or [`CocoaQwen2_5_VLModel`].
        lm_head (`Tensor` of shape `(vocabulary, hidden)`, *optional*): The text head; by default the embedding matrix,
            which is the head of a checkpoint with `tie_word_embeddings`.
        bridge (`"layerwise"` or `"embedding"`): How the target reaches its source: by attending to the EOS in every
            layer (the authors'), or to one token made from the final embedding by a linear layer.
        eos_sees_target (`bool`, *optional*): Whether the EOS attends to the target, as in the authors' code; by
            default `True` with the `layerwise` bridge, and `False` with `embedding`, where the embedding comes first.
        image_loss_weight (`float`, defaults to 0.5): Of the pixel loss against the text loss.
        normalize_pixels (`bool`, defaults to `True`): Predict each patch at zero mean and unit variance; otherwise
            the processor's pixel values as they are.

    Raises:
        ValueError: `bridge` is neither of the two; `eos_sees_target=True` with the `embedding` bridge; the text head
            does not fit the embedding matrix.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        *,
        lm_head: Tensor | None = None,
        bridge: Literal["layerwise", "embedding"] = "layerwise",
        eos_sees_target: bool | None = None,
        image_loss_weight: float = 0.5,
        normalize_pixels: bool = True,
    ) -> None:
        super().__init__()
        if bridge not in BRIDGES:
            raise ValueError(f"bridge must be one of {BRIDGES}; got {bridge!r}.")
        self.model = backbone
        self.bridge = bridge
        self.eos_sees_target = resolve_eos_sees_target(bridge, eos_sees_target)
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
        # New heads learn by small steps, which half precision loses, whatever the backbone is in.
        self.to(device=embeddings.device)

    @torch.no_grad()
    def _initialize_heads(self, embeddings: Tensor) -> None:
        self.unit_mask_embedding.normal_(std=self.config.get_text_config().initializer_range)
        self._initialize_decoder(self.image_decoder)
        if self.bridge_projection is not None:
            # The bridge token starts as the embedding itself, as long as a word's embedding is on average.
            self.bridge_projection.weight.copy_(torch.eye(embeddings.shape[1]) * embeddings.norm(dim=-1).mean())
            self.bridge_projection.bias.zero_()

    @torch.no_grad()
    def _initialize_decoder(self, decoder: ImageDecoder) -> None:
        std = self.config.get_text_config().initializer_range
        for module in decoder.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=std)
                if module.bias is not None:
                    module.bias.zero_()

    @contextmanager
    def untrained_decoder(self) -> Iterator[None]:
        """Within it, images are decoded by new weights, which show what is no work of training."""
        trained = self.image_decoder
        decoder = ImageDecoder(self.model)
        self._initialize_decoder(decoder)
        self.image_decoder = decoder.to(self.unit_mask_embedding.device).train(self.training)
        try:
            yield
        finally:
            self.image_decoder = trained

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
        eos_sees_target: bool | None = None,
        image_loss_weight: float = 0.5,
        normalize_pixels: bool = True,
        **kwargs: Any,
    ) -> CocoaForReconstruction:
        """
        Load a generative Qwen2-VL / Qwen2.5-VL checkpoint (new heads), or the checkpoint of an earlier pre-training
        run (its heads; those of another bridge start anew).

        Args:
            pretrained_model_name_or_path: Folder or Hub name.
            bridge, eos_sees_target, image_loss_weight, normalize_pixels: As in the class.
            kwargs: For the backbone's `from_pretrained`.

        Raises:
            ValueError: the checkpoint has no text head: neither tied embeddings, nor `lm_head`, nor saved heads.
        """
        backbone = load_backbone(pretrained_model_name_or_path, **kwargs)
        lm_head = (
            None if backbone.config.tie_word_embeddings else read_lm_head(pretrained_model_name_or_path, **kwargs)
        )
        heads_file = find_checkpoint_file(pretrained_model_name_or_path, HEADS_FILE, **kwargs)
        heads = {} if heads_file is None else load_file(heads_file)
        if not heads and backbone.cocoa.mask_token_id is not None:
            logger.warning(
                "%s was pre-trained, but there is no %s with it (or it could not be fetched): new heads begin at "
                "random.",
                pretrained_model_name_or_path,
                HEADS_FILE,
            )
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
            eos_sees_target=eos_sees_target,
            image_loss_weight=image_loss_weight,
            normalize_pixels=normalize_pixels,
        )
        if heads:
            model.load_state_dict(model.fitting_heads(heads), strict=False)
        return model

    def heads_state_dict(self, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Everything that is not the backbone's, of the model's own weights or of given ones."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        return {name: value for name, value in state_dict.items() if not name.startswith("model.")}

    def fitting_heads(self, heads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """
        Of saved heads, those that have a place here; the projection of a bridge may be missing.

        Raises:
            ValueError: a head is missing or of another shape.
        """
        own = self.heads_state_dict()
        missing = [name for name in own if name not in heads and not name.startswith("bridge_projection.")]
        wrong = [name for name, value in own.items() if name in heads and heads[name].shape != value.shape]
        if missing or wrong:
            raise ValueError(f"Reconstruction heads do not fit this model: missing {missing}, of other shape {wrong}.")
        return {name: value for name, value in heads.items() if name in own}

    def save_heads(self, folder: str | os.PathLike, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """
        Write the heads beside a backbone's weights, whole or not at all.

        Args:
            folder (`str` or `os.PathLike`): The backbone's.
            state_dict (`Mapping[str, Tensor]`, *optional*): The model's weights, where it holds parts of them only.
        """
        heads = {name: value.contiguous() for name, value in self.heads_state_dict(state_dict).items()}
        with atomic_write(Path(folder) / HEADS_FILE) as path:
            save_file(heads, path)

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
        loss_counts: Tensor | None = None,
        use_all_parameters: bool = False,
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
            loss_counts (`Tensor` of shape `(3,)`, *optional*): By what the sums of the losses [`LOSSES`] are divided;
                by default what this batch has of each (see [`count_losses`]), which makes them means. Where a step is
                spread over processes or batches, its count in all of them makes the step's gradients those of one
                batch.
            use_all_parameters (`bool`, defaults to `False`): Let every weight take part, with a gradient of zero where
                this batch has no use for it, and every layer be called as often and in the same order as for any
                other batch: processes that train together must, and all the more where they share out the weights.

        Returns:
            [`ReconstructionOutput`].
        """
        backbone = self.model
        image_tokens = input_ids == backbone.config.image_token_id
        inputs_embeds = backbone.get_input_embeddings()(input_ids)
        touched = []
        reads_no_image = pixel_values is None or (image_is_target is not None and bool(image_is_target.all()))
        if use_all_parameters and reads_no_image:
            # Into the inputs, as an image's features go: the backward pass has the order of one with images.
            inputs_embeds = inputs_embeds + (0.0 * backbone.dummy_vision_sum()).to(inputs_embeds)
        if pixel_values is not None:
            features = self._image_features(pixel_values, image_grid_thw, image_is_target).to(inputs_embeds)
            inputs_embeds = inputs_embeds.masked_scatter(image_tokens[..., None], features)
        positions = backbone.mrope_positions(input_ids, attention_mask, image_grid_thw)

        attention = self._attention(segment_ids, inputs_embeds.dtype)
        if self.bridge == "embedding" and bool((segment_ids == TARGET).any()):
            hidden = self._two_passes(inputs_embeds, positions, segment_ids)
        else:
            hidden = self._read(inputs_embeds, positions, attention)

        output = ReconstructionOutput(losses={})
        own_counts = count_losses(labels, segment_ids, unit_mask)
        if loss_counts is None:
            loss_counts = own_counts
        masked = labels != -100
        sums: dict[str, Tensor] = {}
        # Looked up even where no token asks for it: ZeRO-3 then puts it together, in every process or in none.
        weight = self.lm_head.weight if self.lm_head is not None else backbone.get_input_embeddings().weight
        if bool(masked.any()):
            predicting = hidden[:, :-1][masked[:, 1:]]
            output.token_losses, output.token_predictions = masked_token_loss(predicting, weight, labels[masked])
            segments = segment_ids[masked]
            for name, segment in (("text_source", SOURCE), ("text_target", TARGET)):
                if bool((segments == segment).any()):
                    sums[name] = output.token_losses[segments == segment].sum()
        if unit_mask is not None and bool(unit_mask.any()):
            units = torch.zeros_like(image_tokens)
            units[image_tokens] = unit_mask
            output.pixels = self._decode(hidden, positions, units, attention)
            targets = pixel_labels.view(-1, *output.pixels.shape[1:])[unit_mask].float()
            if self.normalize_pixels:
                targets = normalize_patches(targets)
            output.unit_losses = (output.pixels.float() - targets).square().mean(dim=(1, 2))
            sums["image"] = output.unit_losses.sum()
        elif use_all_parameters:
            touched.append(self._dummy_decoder_sum(hidden))
        if not sums:
            raise ValueError("Nothing is masked in this batch: no labels and no units to predict.")
        counts = dict(zip(LOSSES, own_counts, strict=True))
        weights = {"image": self.image_loss_weight}
        output.losses = {name: total / counts[name] for name, total in sums.items()}
        divisors = dict(zip(LOSSES, loss_counts, strict=True))
        output.loss = torch.stack(
            [weights.get(name, 1.0) * total / divisors[name] for name, total in sums.items()]
        ).sum()
        if use_all_parameters:
            state = hidden.flatten(0, 1)[:1]
            heads = [head for head in (self.lm_head, self.bridge_projection) if head is not None]
            touched += [
                (state + self.unit_mask_embedding).float().sum(),
                *(head(state.to(head.weight.dtype)).float().sum() for head in heads),
            ]
            output.loss = output.loss + 0.0 * torch.stack(touched).sum()
        return output

    def _dummy_decoder_sum(self, hidden: Tensor) -> Tensor:
        """A number that every weight of the image decoder has a part in, from one token."""
        segments = torch.full((1, 1), EOS, device=hidden.device)
        positions = torch.zeros(3, 1, 1, dtype=torch.long, device=hidden.device)
        attention = self._attention(segments, hidden.dtype)
        return self._decode(hidden[:1, :1], positions, segments == EOS, attention).float().sum()

    def _decode(self, hidden: Tensor, positions: Tensor, units: Tensor, attention: dict[str, Any]) -> Tensor:
        """[`ImageDecoder`], in its own precision, on rows under collaborative attention."""
        language_model = self.model.language_model
        dtype = self.unit_mask_embedding.dtype
        hidden = hidden.to(dtype)
        if (mask := attention.get("attention_mask")) is not None and mask.dtype != dtype:
            attention = {"attention_mask": mask.to(dtype).masked_fill(mask < 0, torch.finfo(dtype).min)}
        if "packing" in attention:
            rotary = merged_rotary(language_model, hidden, positions)
        else:
            rotary = language_model.rotary_emb(hidden, positions)
        return self.image_decoder(hidden, rotary, units, **attention)

    def _image_features(self, pixel_values: Tensor, image_grid_thw: Tensor, image_is_target: Tensor | None) -> Tensor:
        """Features of every unit, in order: the vision tower's for sources, the mask embedding for targets."""
        merge = self.config.vision_config.spatial_merge_size**2
        patches = image_grid_thw.prod(dim=-1)
        if image_is_target is None:
            image_is_target = torch.zeros_like(patches, dtype=torch.bool)
        target_patches = image_is_target.repeat_interleave(patches)
        features = self.unit_mask_embedding.expand(pixel_values.shape[0] // merge, -1)
        if bool((~image_is_target).any()):
            seen = self.model.encode_images(pixel_values[~target_patches], image_grid_thw[~image_is_target])
            features = features.clone()
            features[~target_patches[::merge]] = torch.cat(seen).to(features.dtype)
        return features

    def _attention(self, segment_ids: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        """How layers are told who sees whom: a packing, or for eager attention on the padded batch a dense mask."""
        implementation = self.model.language_model.config._attn_implementation
        if implementation == "eager":
            mask = attention_mask_for(implementation, segment_ids, None, dtype, self.eos_sees_target)
            return {"attention_mask": mask}
        return {"packing": pack(segment_ids, self.eos_sees_target)}

    def _read(self, inputs_embeds: Tensor, positions: Tensor, attention: dict[str, Any]) -> Tensor:
        """Final hidden states of rows under collaborative attention; of padding, they mean nothing."""
        if (packing := attention.get("packing")) is not None:
            packed = inputs_embeds.flatten(0, 1).index_select(0, packing.index)
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

    def _two_passes(self, inputs_embeds: Tensor, positions: Tensor, segment_ids: Tensor) -> Tensor:
        """The `embedding` bridge: read source and EOS; then the target beside a token made from the embedding."""
        is_eos, is_target = segment_ids == EOS, segment_ids == TARGET
        dtype, is_source = inputs_embeds.dtype, segment_ids == SOURCE
        first = self._read(
            inputs_embeds, positions, self._attention(segment_ids.masked_fill(is_target, PADDING), dtype)
        )
        embeddings = nn.functional.normalize(first[is_eos], dim=-1)
        bridge_tokens = self.bridge_projection(embeddings.to(self.bridge_projection.weight.dtype)).to(inputs_embeds)
        second_embeds = inputs_embeds.masked_scatter(is_eos[..., None], bridge_tokens)
        second = self._read(
            second_embeds, positions, self._attention(segment_ids.masked_fill(is_source, PADDING), dtype)
        )
        return torch.where((is_eos | is_target)[..., None], second, first)
