# SPDX-License-Identifier: Apache-2.0
"""What makes a stock Qwen-VL model a CoCoA model; shared by every backbone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, Qwen2VLVideoProcessor
from transformers.utils import ModelOutput

from .checkpoint_files import read_model_type
from .configuration_cocoa import CocoaSettings
from .last_layer import compute_rows, select_rows
from .model_folder import save_folder
from .packed_attention import TEXT_ATTENTION, VISION_ATTENTION, attend_row, sdpa_kernel
from .packing import Packing, pack
from .pooling import EosPooler

MINIMUM_TRANSFORMERS = (5, 21)
"""The oldest version whose vectors are right; as in pyproject.toml."""

CPU_VISION_PATCHES = 2048
"""Patches that pass the vision tower at once on a CPU, whose caches more would overflow: 14 % slower at 4096."""


def check_transformers_version(minimum: tuple[int, int], version: str = transformers.__version__) -> None:
    """Raise `ImportError` where transformers is older than the oldest version that gives right vectors."""
    if tuple(int(part) for part in version.split(".")[:2]) < minimum:
        needed = ".".join(map(str, minimum))
        raise ImportError(
            f"This CoCoA model needs transformers {needed} or newer, found {version}. Run: "
            f'pip install "transformers>={needed}"'
        )


check_transformers_version(MINIMUM_TRANSFORMERS)


@dataclass
class CocoaModelOutput(ModelOutput):
    """
    Output of a CoCoA model.

    Args:
        last_hidden_state (`Tensor` of shape `(batch, tokens, hidden)`, *optional*): After the last norm; padding is
            zero, but with `eager` attention. `None` with `eos_only`.
        pooler_output (`Tensor` of shape `(batch, hidden)`): Unit-norm EOS embeddings.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None


class CocoaModelMixin:
    """
    Turns a stock Qwen-VL base model into an embedding model: attention that reads both ways, and an EOS pooler.

    Put it before the stock class: `class CocoaQwen2VLModel(CocoaModelMixin, Qwen2VLModel)`.

    A batch is run as one row without padding, samples of equal length attending together (see [`~packing.pack`]).
    `attn_implementation="eager"` runs the stock layers on the padded batch instead: the plain reference.
    """

    key_mapping: ClassVar[dict[str, str]] = {
        r"^(?:model\.)?visual\.": "visual.",
        r"^(?:model\.)?(?:language_model\.)?(?:model\.)?embed_tokens\.": "language_model.embed_tokens.",
        r"^(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.": "language_model.layers.",
        r"^(?:model\.)?(?:language_model\.)?(?:model\.)?norm\.": "language_model.norm.",
    }
    """From every layout that weights are published in to the base model's own names."""

    hub_prefixes: ClassVar[dict[str, str]] = {"language_model.": "model."}
    """Beginnings of the base model's own names, and what the Hub's files of this model have instead: weights are saved
    with these."""

    video_processor_class: ClassVar[type] = Qwen2VLVideoProcessor
    """The stock video processor, whose defaults of `image_mean` and `image_std` the weights were trained with."""

    has_timestamps: ClassVar[bool] = False
    """Whether the stock processor writes its time and the tokens around each frame of a video, and limits the pixels
    of all frames together."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.weight$"]

    def __init__(self, config: PretrainedConfig) -> None:
        if "sliding_attention" in (getattr(config.text_config, "layer_types", None) or ()):
            raise ValueError(
                f"This checkpoint's text layers attend within a sliding window of {config.text_config.sliding_window} "
                "tokens (use_sliding_window with max_window_layers, or layer_types), which CoCoA models do not "
                "support: their EOS reads all tokens. Use a checkpoint without sliding windows."
            )
        # On the text configuration, not on the top-level one, where the flag does nothing.
        config.text_config.is_causal = False
        cocoa = CocoaSettings.from_model_config(config)
        config.cocoa = cocoa.to_dict()
        if config.vision_config._attn_implementation == VISION_ATTENTION:
            # Of another model; transformers would look for a kernel of that name.
            config.vision_config._attn_implementation = "sdpa"
        super().__init__(config)
        self.cocoa = cocoa
        self.pooler = EosPooler(cocoa.eos_token_id)
        self._attention = "sdpa"
        select_rows(self.language_model.layers[-1].mlp)

    @property
    def attention(self) -> str:
        """
        How tokens attend, as `attn_implementation` or `set_attn_implementation` say: `"eager"` on the padded batch, or
        what [`~packed_attention.attend`] takes on packed rows.
        """
        self.route_attention()
        return self._attention

    def route_attention(self) -> None:
        """Have stock layers call our attention functions, whatever implementation was set on them since."""
        text, vision = self.language_model.config, self.visual.config
        if text._attn_implementation != TEXT_ATTENTION:
            self._attention = text._attn_implementation
            if self._attention != "eager":
                text._attn_implementation = TEXT_ATTENTION
        if vision._attn_implementation != "eager" and "flash" not in vision._attn_implementation:
            vision._attn_implementation = VISION_ATTENTION

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *model_args: Any, **kwargs: Any
    ) -> CocoaModelMixin:
        """
        Load a CoCoA checkpoint, or make a CoCoA model of a generative Qwen-VL checkpoint.

        Takes the flat configuration that the Hub's files have and the nested one of transformers 5, and weights named
        `visual.*` + `model.layers.*`, `model.visual.*` + `model.language_model.*`, or as the base model names them.
        Arguments are those of [`~transformers.PreTrainedModel.from_pretrained`], without `key_mapping`.

        Raises:
            ValueError: the checkpoint is of another kind of model, or lacks weights, or has weights that this model
                has no place for (a generative checkpoint's `lm_head` apart).
        """
        if kwargs.pop("key_mapping", None) is not None:
            raise ValueError(f"{cls.__name__} maps weight names itself; drop `key_mapping`.")
        return_info = kwargs.pop("output_loading_info", False)
        config = kwargs.get("config")
        found = config.model_type if config is not None else read_model_type(pretrained_model_name_or_path, **kwargs)
        if found != cls.config_class.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path} is a checkpoint of model type {found!r}; {cls.__name__} takes "
                f"{cls.config_class.model_type!r}."
            )
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, key_mapping=cls.key_mapping, output_loading_info=True, **kwargs
        )
        missing = sorted(info["missing_keys"])
        unexpected = sorted(info["unexpected_keys"])
        for kind, keys in (("lacks", missing), ("has unknown", unexpected)):
            if keys:
                raise ValueError(
                    f"{pretrained_model_name_or_path} {kind} {len(keys)} weights for {cls.__name__}, among them "
                    f"{keys[:3]}. The checkpoint is incomplete, or of another model."
                )
        keep_quantized_weights(model)
        return (model, info) if return_info else model

    def load_adapter(
        self, peft_model_id: str | None = None, adapter_name: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """
        Load adapters; see [`~transformers.PreTrainedModel.load_adapter`]. Those whose weights are named as earlier
        versions of transformers name them (`model.layers.*`: VLM2Vec, ColQwen2) find their places too.

        Raises:
            ValueError: an adapter of the model finds no weights in the folder, or weights no place in the model.
        """
        from transformers.core_model_loading import WeightRenaming

        kwargs.setdefault("weight_mapping", [WeightRenaming(*names) for names in self.key_mapping.items()])
        info = super().load_adapter(peft_model_id, adapter_name, *args, **kwargs)
        for kind, keys in (("lacks", sorted(info.missing_keys)), ("has unknown", sorted(info.unexpected_keys))):
            if keys:
                for module in [part for part in self.modules() if hasattr(part, "base_layer")]:
                    module.delete_adapter(adapter_name or "default")
                self.peft_config.pop(adapter_name or "default")
                self._hf_peft_config_loaded = bool(self.peft_config)
                raise ValueError(
                    f"The adapter {peft_model_id or adapter_name} {kind} {len(keys)} weights for "
                    f"{type(self).__name__}, among them {keys[:3]}: it was trained in another kind of model."
                )
        return info

    def save_pretrained(self, save_directory: str | os.PathLike, *, processor: Any = None, **kwargs: Any) -> None:
        """
        Write a folder that transformers and sentence-transformers load, whole or not at all; with `push_to_hub=True`,
        upload it. See [`~model_folder.save_folder`] for the arguments.
        """
        save_folder(self, save_directory, processor=processor, **kwargs)

    def extra_repr(self) -> str:
        """How packed rows attend, in front of the modules."""
        kernel = self.attention
        if kernel == "sdpa":
            kernel = sdpa_kernel(self.device, self.dtype)
        return f"attention={kernel}"

    def media_types(self, input_ids: Tensor) -> Tensor:
        """0 for text, 1 for image and 2 for video tokens: `mm_token_type_ids`, which the ids determine."""
        types = (input_ids == self.config.image_token_id).long()
        return types + 2 * (input_ids == self.config.video_token_id).long()

    def check_media(self, input_ids: Tensor, token: int, grid: Tensor | None, kind: str) -> None:
        """Raise `ValueError` where the ids hold another number of image (or video) tokens than the grids ask for."""
        found = int((input_ids == token).sum())
        wanted = 0 if grid is None else int(grid.prod(-1).sum()) // self.visual.spatial_merge_size**2
        if found != wanted:
            raise ValueError(
                f"The ids hold {found} {kind} tokens, the {kind} grids ask for {wanted}. Build inputs with "
                "CocoaProcessor."
            )

    def mrope_positions(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """
        Rotary positions (time, height, width) of each token, counted from a row's first token that is not padding.

        Returns:
            `Tensor` of shape `(3, batch, tokens)`.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if image_grid_thw is None and video_grid_thw is None:
            # All text counts up in all three directions; the general way goes row by row in Python.
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0).expand(3, -1, -1)
        if video_grid_thw is not None:
            # Stock's own default, but one a video: stock has as many as a row has tokens, which may be fewer.
            kwargs.setdefault("second_per_grid_ts", [1] * len(video_grid_thw))
        return self.get_rope_index(
            input_ids,
            mm_token_type_ids=self.media_types(input_ids),
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            attention_mask=attention_mask,
            **kwargs,
        )[0]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        second_per_grid_ts: Tensor | None = None,
        image_features: Tensor | None = None,
        eos_only: bool = False,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
    ) -> CocoaModelOutput:
        """
        Args:
            input_ids (`Tensor` of shape `(batch, tokens)`): Each row's last token must be the EOS.
            attention_mask (`Tensor` of shape `(batch, tokens)`, *optional*): 0 for padding, on either side.
            position_ids (`Tensor` of shape `(3, batch, tokens)` or `(batch, tokens)`, *optional*): Rotary positions;
                worked out from the ids and grids where not given.
            inputs_embeds (`Tensor` of shape `(batch, tokens, hidden)`, *optional*): Beside `input_ids`; or instead of
                them, with `position_ids`, for a padded batch.
            pixel_values, pixel_values_videos (`Tensor` of shape `(patches, channels * time * height * width)`).
            image_grid_thw, video_grid_thw (`Tensor` of shape `(images or videos, 3)`): Patches in time, height, width.
            mm_token_type_ids (`Tensor` of shape `(batch, tokens)`, *optional*): Accepted since processors give it;
                the ids say the same.
            second_per_grid_ts (`Tensor` of shape `(videos,)`, *optional*): Seconds a temporal patch, for Qwen2.5-VL.
            image_features (`Tensor` of shape `(image tokens, ...)`, *optional*): With `image_grid_thw`, instead of
                `pixel_values`: what [`~CocoaModelMixin.encode_images`] gave for the images, one after another. So an
                image that occurs several times passes the vision tower once.
            eos_only (`bool`, defaults to `False`): Give the embeddings alone.
            use_cache, return_dict (*optional*): Accepted since callers pass them; there is no cache, and the result is
                always a [`CocoaModelOutput`].

        Returns:
            [`CocoaModelOutput`].

        Raises:
            ValueError: a row does not end in the EOS, or images, their tokens and their grids do not match.
        """
        if attention_mask is None and input_ids is not None:
            attention_mask = torch.ones_like(input_ids)
        for kind, given, grid in (
            ("image", (pixel_values, image_features), image_grid_thw),
            ("video", (pixel_values_videos,), video_grid_thw),
        ):
            found = sum(part is not None for part in given)
            if found > 1 or (found == 1) != (grid is not None) and inputs_embeds is None:
                raise ValueError(f"Give the {kind}s' pixels (or features) and their grids, or neither.")
        if input_ids is not None:
            self.check_media(input_ids, self.config.image_token_id, image_grid_thw, "image")
            self.check_media(input_ids, self.config.video_token_id, video_grid_thw, "video")
        if position_ids is None:
            if input_ids is None:
                raise ValueError("With `inputs_embeds`, give `position_ids` too: positions are read from the ids.")
            seconds = {} if second_per_grid_ts is None else {"second_per_grid_ts": second_per_grid_ts}
            position_ids = self.mrope_positions(input_ids, attention_mask, image_grid_thw, video_grid_thw, **seconds)
        elif position_ids.ndim == 2:
            position_ids = position_ids.expand(3, -1, -1)
        media = {}
        if pixel_values is not None:
            image_features = torch.cat(self.encode_images(pixel_values, image_grid_thw))
        if image_features is not None:
            media[self.config.image_token_id] = image_features
        if pixel_values_videos is not None:
            media[self.config.video_token_id] = torch.cat(self.encode_images(pixel_values_videos, video_grid_thw))
        is_visual, features = self.join_media(input_ids, media)
        if input_ids is not None and self.attention != "eager":
            packing = pack(attention_mask.long())  # every token a source's
            ids = input_ids.flatten()[packing.index]
            self.pooler.check(ids[packing.eos])
            if inputs_embeds is None:
                row = self.get_input_embeddings()(ids)
            else:
                row = inputs_embeds.flatten(0, 1).index_select(0, packing.index)
            # Not where gradients are wanted, for which checkpointing may run the layer again, outside of this.
            eos_alone = eos_only and not torch.is_grad_enabled()
            with compute_rows(packing.eos, len(row)) if eos_alone else nullcontext():
                row = self.run_packed(row, position_ids, packing, is_visual, features)
            packing = packing.to(row.device)  # where the layers are spread over devices
            return CocoaModelOutput(
                last_hidden_state=None if eos_only else packing.unpack(row, input_ids.shape),
                pooler_output=nn.functional.normalize(row.index_select(0, packing.eos), dim=-1),
            )
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        hidden = self.run_padded(inputs_embeds, position_ids, attention_mask, is_visual, features)
        pooled = self.pooler(hidden, attention_mask, input_ids)
        return CocoaModelOutput(last_hidden_state=None if eos_only else hidden, pooler_output=pooled)

    def join_media(self, input_ids: Tensor | None, media: dict[int, Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """
        Which tokens of a batch are of images or videos, `(batch, tokens)`, and the features of all of them in the
        order of the batch, from the features of each kind by the id of its tokens; `None` where there are none.
        """
        if not media:
            return None, None
        is_visual = torch.isin(input_ids, torch.tensor(list(media), device=input_ids.device))
        ids = input_ids[is_visual]
        order = torch.cat([(ids == token).nonzero()[:, 0] for token in media]).argsort()
        return is_visual, torch.cat(list(media.values())).index_select(0, order)

    def encode_images(self, pixel_values: Tensor, grid_thw: Tensor) -> list[Tensor]:
        """
        Features of images (or videos) from the vision tower: those of equal size attend together; on a CPU a few at a
        time.

        Args:
            pixel_values (`Tensor` of shape `(patches, channels * time * height * width)`).
            grid_thw (`Tensor` of shape `(images, 3)`).

        Returns:
            `list[Tensor]`: One an image, of shape `(tokens, hidden * (1 + deepstack layers))`; only Qwen3-VL has the
            latter.
        """
        limit = CPU_VISION_PATCHES if pixel_values.device.type == "cpu" else len(pixel_values)
        self.route_attention()
        features: list[Tensor] = []
        done = 0
        for grids in split_by_patches(grid_thw, limit):
            patches = int(grids.prod(-1).sum())
            pixels = pixel_values[done : done + patches]
            features += self.vision_features(pixels, grids)
            done += patches
        return features

    def vision_features(self, pixel_values: Tensor, grid_thw: Tensor) -> Sequence[Tensor]:
        """[`~CocoaModelMixin.encode_images`] of images that pass the vision tower at once."""
        return self.get_image_features(pixel_values, grid_thw, return_dict=True).pooler_output

    def dummy_vision_sum(self) -> Tensor:
        """
        A number that every weight of the vision tower has a part in, from one grey image of a single token: for
        processes that train together, of which one has no image.
        """
        vision = self.config.vision_config  # not the weights, of which a process may hold a part only
        grid = torch.tensor([[1, vision.spatial_merge_size, vision.spatial_merge_size]], device=self.device)
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        pixels = torch.zeros(int(grid.prod()), width, device=self.device)
        return self.encode_images(pixels, grid)[0].float().sum()

    def run_packed(
        self,
        row: Tensor,
        position_ids: Tensor,
        packing: Packing,
        is_visual: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """
        The text layers and the last norm over a batch packed into one row.

        Args:
            row (`Tensor` of shape `(tokens in the row, hidden)`): Input embeddings, packed.
            position_ids (`Tensor` of shape `(3, batch, tokens)`): Rotary positions of the batch.
            packing ([`Packing`]): Of the batch.
            is_visual (`Tensor` of bool, shape `(batch, tokens)`, *optional*): Tokens of images and videos.
            features (`Tensor` of shape `(visual tokens, ...)`, *optional*): Theirs, in the order of the batch.

        Returns:
            `Tensor` of shape `(tokens in the row, hidden)`.
        """
        inputs: dict[str, Any] = {"inputs_embeds": row[None]}
        if features is not None:
            is_visual = is_visual.flatten()
            places = is_visual[packing.index].nonzero()[:, 0]
            order = (is_visual.cumsum(0) - 1)[packing.index[places]]
            inputs = self.place_features(row[None], places, features.index_select(0, order))
        return self.language_model(
            **inputs,
            position_ids=position_ids.flatten(1)[:, None, packing.index],
            attention_mask=None,
            use_cache=False,
            packed_attention=partial(attend_row, packing=packing, implementation=self.attention),
        ).last_hidden_state[0]

    def run_padded(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Any,
        is_visual: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """
        The text layers and the last norm over a padded batch: the plain reference of
        [`~CocoaModelMixin.run_packed`].

        Args:
            inputs_embeds (`Tensor` of shape `(batch, tokens, hidden)`).
            position_ids (`Tensor` of shape `(3, batch, tokens)`): Rotary positions.
            attention_mask: As the stock text model takes it.
            is_visual, features (*optional*): As in [`~CocoaModelMixin.run_packed`].

        Returns:
            `Tensor` of shape `(batch, tokens, hidden)`.
        """
        inputs: dict[str, Any] = {"inputs_embeds": inputs_embeds}
        if features is not None:
            inputs = self.place_features(inputs_embeds, is_visual.flatten().nonzero()[:, 0], features)
        return self.language_model(
            **inputs, position_ids=position_ids, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state

    @staticmethod
    def place_features(inputs_embeds: Tensor, places: Tensor, features: Tensor) -> dict[str, Any]:
        """
        What the stock text model takes of input embeddings and the features of images and videos.

        Args:
            inputs_embeds (`Tensor` of shape `(batch, tokens, hidden)`).
            places (`Tensor` of shape `(visual tokens,)`): Of the flattened batch, ascending.
            features (`Tensor` of shape `(visual tokens, hidden * (1 + deepstack layers))`): What replaces the input
                embeddings, and beside it what Qwen3-VL adds to the hidden states after each of its first layers.
        """
        own, *deepstack = features.to(inputs_embeds).split(inputs_embeds.shape[-1], dim=-1)
        inputs = {"inputs_embeds": inputs_embeds.flatten(0, 1).index_copy(0, places, own).view_as(inputs_embeds)}
        if deepstack:
            is_visual = inputs_embeds.new_zeros(inputs_embeds.shape[:2].numel(), dtype=torch.bool)
            is_visual = is_visual.index_fill(0, places, True).view(inputs_embeds.shape[:2])
            inputs |= {"visual_pos_masks": is_visual, "deepstack_visual_embeds": deepstack}
        return inputs


def keep_quantized_weights(model: nn.Module) -> None:
    """
    Have 4-bit layers keep their weights in the form that they are saved in.

    On a CPU with AVX512-BF16, bitsandbytes packs them anew at the first forward in evaluation mode; some sizes fail
    then, and the weights that are saved or trained on afterwards are others.

    Args:
        model (`nn.Module`): With or without such layers.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def split_by_patches(grid_thw: Tensor, limit: int) -> list[Tensor]:
    """Grids of images `(images, 3)`, parted so that each part has at most so many patches, or one image."""
    counts, patches = [], 0
    for size in grid_thw.prod(-1).tolist():
        if not counts or patches + size > limit:
            counts.append(0)
            patches = 0
        counts[-1] += 1
        patches += size
    return list(grid_thw.split(counts))
