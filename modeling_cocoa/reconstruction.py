# SPDX-License-Identifier: Apache-2.0
"""
Reconstruction pre-training: masked text and pixels are rebuilt, in the bridge through the EOS alone.

The backbone stays what it is; the heads here are thrown away after pre-training (the language-model head apart, which
the backbone shares or the generative checkpoint brings).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .attention import EOS, PADDING, SOURCE, TARGET, attention_mask_for
from .auto import load_backbone
from .checkpoint_files import find_checkpoint_file
from .image_decoder import ImageDecoder
from .losses import LOSSES, ReconstructionOutput, count_losses, masked_token_loss, normalize_patches
from .model_folder import save_folder
from .packing import pack

logger = logging.getLogger(__name__)

HEADS_FILE = "reconstruction.safetensors"
"""File beside the weights of a pre-training checkpoint that holds the heads."""

BRIDGES = ("layerwise", "embedding")


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


def read_lm_head(pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Tensor | None:
    """
    The language-model head of a generative checkpoint, read without building the generative model.

    Args:
        pretrained_model_name_or_path: Folder or Hub name.
        kwargs: As in [`~checkpoint_files.find_checkpoint_file`].

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


class CocoaForReconstruction(PreTrainedModel):
    """
    A CoCoA backbone with the heads of stages 1 and 2 (CoCoA, arXiv 2603.01471).

    It has no embeddings of training rows: where the EOS sees the target, they are not those of inference, which the
    backbone gives for the source alone.

    Rows are `source · EOS` in the warm-up and `source · EOS · target` in the bridge, told apart by `segment_ids`; the
    attention between them is collaborative ([`~attention.is_visible`]). Masked text at position i is predicted from
    the hidden state at i - 1, so the pre-trained language-model head keeps its meaning; the first target token is
    predicted from the EOS itself. Hidden image units are predicted at their own position.

    Args:
        backbone ([`CocoaModelMixin`]): One of [`~auto.BACKBONES`].
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

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # Whatever the backbone attends with: it has checked that when it was made.
    _supports_sdpa = True
    _supports_flash_attn = True

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
        super().__init__(backbone.config)
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
        self.post_init()
        # New heads learn by small steps, which half precision loses, whatever the backbone is in.
        self.to(device=embeddings.device)

    def get_input_embeddings(self) -> None:
        """
        None: they are the backbone's. The text head reads its weights outside of a module's forward pass, so FSDP must
        not shard embeddings or head by themselves, which it does with those that a model names.
        """

    def get_output_embeddings(self) -> None:
        """None; see [`~CocoaForReconstruction.get_input_embeddings`]."""

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize the heads; the backbone has its weights, and may have adapters."""
        self.unit_mask_embedding.normal_(std=self.config.get_text_config().initializer_range)
        self._initialize_decoder(self.image_decoder)
        if self.bridge_projection is not None:
            # The bridge token starts as the embedding itself, as long as a word's embedding is on average.
            embeddings = self.model.get_input_embeddings().weight
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
        Load a generative Qwen-VL checkpoint (new heads), or the checkpoint of an earlier pre-training
        run (its heads; those of another bridge start anew).

        Args:
            pretrained_model_name_or_path: Folder or Hub name.
            bridge (`str`, defaults to `"layerwise"`): As in the class, and so the next three.
            eos_sees_target (`bool`, *optional*): As in the class.
            image_loss_weight (`float`, defaults to 0.5): As in the class.
            normalize_pixels (`bool`, defaults to `True`): As in the class.
            kwargs: For the backbone's `from_pretrained`.

        Raises:
            ValueError: the checkpoint has no text head: neither tied embeddings, nor `lm_head`, nor saved heads.
        """
        name = pretrained_model_name_or_path
        backbone = load_backbone(name, **kwargs)
        heads_file = find_checkpoint_file(name, HEADS_FILE, **kwargs)
        heads = {} if heads_file is None else load_file(heads_file)
        if not heads and backbone.cocoa.mask_token_id is not None:
            logger.warning(
                "The reconstruction heads are new: %s has no %s (or it could not be fetched); a model that has been "
                "through its contrastive stage has none.",
                name,
                HEADS_FILE,
            )
        lm_head = heads.get("lm_head.weight")
        if lm_head is None and not backbone.config.tie_word_embeddings:
            lm_head = read_lm_head(name, **kwargs)
            if lm_head is None:
                raise ValueError(
                    f"{name} has no text head: start from the generative checkpoint, or from a pre-training "
                    f"checkpoint, which keeps its heads in {HEADS_FILE}."
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
        Write the heads beside a backbone's weights; [`~CocoaForReconstruction.save_pretrained`] writes both.

        Args:
            folder (`str` or `os.PathLike`): The backbone's.
            state_dict (`Mapping[str, Tensor]`, *optional*): The model's weights, where it holds parts of them only.
        """
        heads = {name: value.contiguous() for name, value in self.heads_state_dict(state_dict).items()}
        save_file(heads, Path(folder) / HEADS_FILE)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *,
        processor: Any = None,
        state_dict: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """
        Write the backbone's folder, which every loader of embedding models takes, with the heads in it.

        Args:
            save_directory (`str` or `os.PathLike`): Where to.
            processor ([`CocoaProcessor`], *optional*): Saved with the model.
            state_dict (`Mapping[str, Tensor]`, *optional*): The model's weights, where it holds parts of them only.
            kwargs: Others of [`~model_folder.save_folder`], such as `push_to_hub` and `repo_id`.
        """
        if state_dict is not None:
            prefix = f"{self.base_model_prefix}."
            weights = {name: value for name, value in state_dict.items() if name.startswith(prefix)}
            kwargs["state_dict"] = {name.removeprefix(prefix): value for name, value in weights.items()}
        write_heads = partial(self.save_heads, state_dict=state_dict)
        save_folder(self.model, save_directory, processor=processor, complete=write_heads, **kwargs)

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
            image_grid_thw (`Tensor` of shape `(images, 3)`): Patches of each image in time, height and width.
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
        images: dict[str, Tensor] = {}
        if pixel_values is not None:
            features = self._image_features(pixel_values, image_grid_thw, image_is_target)
            images = {"is_visual": image_tokens, "features": features}
        positions = backbone.mrope_positions(input_ids, attention_mask, image_grid_thw)

        attention = self._attention(segment_ids, inputs_embeds.dtype)
        if self.bridge == "embedding" and bool((segment_ids == TARGET).any()):
            hidden = self._two_passes(inputs_embeds, positions, segment_ids, images)
        else:
            hidden = self._read(inputs_embeds, positions, attention, images)

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
            seen = torch.cat(seen).to(features.dtype)
            # Deeper features, which Qwen3-VL adds to its first layers, are zero where there is no image to see.
            features = nn.functional.pad(features, (0, seen.shape[-1] - features.shape[-1])).clone()
            features[~target_patches[::merge]] = seen
        return features

    def _attention(self, segment_ids: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        """How layers are told who sees whom: a packing, or for eager attention on the padded batch a dense mask."""
        if self.model.attention == "eager":
            mask = attention_mask_for("eager", segment_ids, None, dtype, self.eos_sees_target)
            return {"attention_mask": mask}
        return {"packing": pack(segment_ids, self.eos_sees_target), "implementation": self.model.attention}

    def _read(
        self, inputs_embeds: Tensor, positions: Tensor, attention: dict[str, Any], images: dict[str, Tensor]
    ) -> Tensor:
        """Final hidden states of rows under collaborative attention; of padding, they mean nothing."""
        if (packing := attention.get("packing")) is not None:
            packed = inputs_embeds.flatten(0, 1).index_select(0, packing.index)
            hidden = self.model.run_packed(packed, positions, packing, **images)
            return packing.to(hidden.device).unpack(hidden, inputs_embeds.shape[:2])
        return self.model.run_padded(inputs_embeds, positions, attention["attention_mask"], **images)

    def _two_passes(
        self, inputs_embeds: Tensor, positions: Tensor, segment_ids: Tensor, images: dict[str, Tensor]
    ) -> Tensor:
        """The `embedding` bridge: read source and EOS; then the target beside a token made from the embedding."""
        is_eos, is_target = segment_ids == EOS, segment_ids == TARGET
        dtype, is_source = inputs_embeds.dtype, segment_ids == SOURCE
        first = self._read(
            inputs_embeds, positions, self._attention(segment_ids.masked_fill(is_target, PADDING), dtype), images
        )
        embeddings = nn.functional.normalize(first[is_eos], dim=-1)
        bridge_tokens = self.bridge_projection(embeddings.to(self.bridge_projection.weight.dtype)).to(inputs_embeds)
        second_embeds = inputs_embeds.masked_scatter(is_eos[..., None], bridge_tokens)
        second = self._read(
            second_embeds, positions, self._attention(segment_ids.masked_fill(is_source, PADDING), dtype), images
        )
        return torch.where((is_eos | is_target)[..., None], second, first)
