# SPDX-License-Identifier: Apache-2.0
"""What makes a stock Qwen2-VL model a CoCoA model; shared by every backbone."""

from __future__ import annotations

import inspect
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.utils import ModelOutput

from .attention import FLEX_ATTENTION
from .checkpoint_files import KEY_MAPPING, read_model_type
from .configuration_cocoa import CocoaConfig
from .layers import CONVOLUTION_ROWS, keep_freed_memory, merged_rotary
from .packing import Packing, pack, sdpa_kernel
from .pooling import EosPooler

MINIMUM_TRANSFORMERS = (5, 2)
"""Of the model alone; training and sentence-transformers need what pyproject.toml says."""

CPU_VISION_PATCHES = 2048
"""Patches that pass the vision tower at once on a CPU, whose caches more would overflow: 14 % slower at 4096."""

CPU_ROWS = 32
"""On a CPU without gradient, rows come in multiples of this, filled up with rows that nobody reads: oneDNN keeps a
kernel for each number of rows, and memory would grow with their variety."""


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
    Turns a stock Qwen2-VL base model into an embedding model: attention that reads both ways, and an EOS pooler.

    Put it before the stock class: `class CocoaQwen2VLModel(CocoaModelMixin, Qwen2VLModel)`.

    A batch is run as one row without padding, samples of equal length attending together (see [`~packing.pack`]).
    `attn_implementation="eager"` runs the stock layers on the padded batch instead: the plain reference.
    """

    packed_layers: ClassVar[dict[type[nn.Module], type[nn.Module]]] = {}
    """Of each stock module that works otherwise on packed rows, the class that does."""

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
        cocoa = CocoaConfig.from_model_config(config)
        config.cocoa = cocoa.to_dict()
        if config._attn_implementation == FLEX_ATTENTION:
            # The vision tower attends image by image, without a mask; flex has nothing to give it.
            config.vision_config._attn_implementation = "sdpa"
        super().__init__(config)
        self.cocoa = cocoa
        self.pooler = EosPooler(cocoa.eos_token_id)
        for layer in self.language_model.layers:
            # Before transformers 5.4, sdpa and flash attention ask the module, not the configuration, and would be
            # causal in a batch without padding.
            layer.self_attn.is_causal = False
        # Quantizers look for linear layers by their very class.
        kept = {nn.Linear} if getattr(config, "quantization_config", None) is not None else set()
        for module in self.modules():
            # The same module with another forward: weights, names, and how it was initialised stay.
            if type(module) not in kept:
                module.__class__ = self.packed_layers.get(type(module), type(module))
        # By name, for sharding; stock collects the names of its own classes.
        replaced = {old.__name__: new.__name__ for old, new in self.packed_layers.items()}
        self._no_split_modules = {replaced.get(name, name) for name in self._no_split_modules}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *model_args: Any, **kwargs: Any
    ) -> CocoaModelMixin:
        """
        Load a CoCoA checkpoint, or make a CoCoA model of a generative Qwen2-VL / Qwen2.5-VL checkpoint.

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
            pretrained_model_name_or_path, *model_args, key_mapping=KEY_MAPPING, output_loading_info=True, **kwargs
        )
        missing = sorted(info["missing_keys"])
        unexpected = sorted(info["unexpected_keys"])
        for kind, keys in (("lacks", missing), ("has unknown", unexpected)):
            if keys:
                raise ValueError(
                    f"{pretrained_model_name_or_path} {kind} {len(keys)} weights for {cls.__name__}, among them "
                    f"{keys[:3]}. The checkpoint is incomplete, or not a Qwen2-VL model."
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

        kwargs.setdefault("weight_mapping", [WeightRenaming(*names) for names in KEY_MAPPING.items()])
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

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """
        [`~transformers.PreTrainedModel.save_pretrained`], with weight names and `architectures` that the stock base
        class loads, and the model's own code beside the weights.
        """
        # The "original format" would be names made from KEY_MAPPING's patterns.
        super().save_pretrained(save_directory, **{**kwargs, "save_original_format": False})
        path = Path(save_directory) / "config.json"
        if path.exists():
            config = json.loads(path.read_text(encoding="utf-8"))
            config["architectures"] = [stock_class(type(self)).__name__]
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def extra_repr(self) -> str:
        """How packed rows attend, in front of the modules."""
        kernel = self.language_model.config._attn_implementation
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
        known = inspect.signature(self.get_rope_index).parameters
        if "mm_token_type_ids" in known:
            kwargs["mm_token_type_ids"] = self.media_types(input_ids)
        if "second_per_grid_ts" in known and video_grid_thw is not None:
            # Stock's own default, but one a video: stock has as many as a row has tokens, which may be fewer.
            kwargs.setdefault("second_per_grid_ts", [1] * len(video_grid_thw))
        return self.get_rope_index(
            input_ids,
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
            inputs_embeds (`Tensor` of shape `(batch, tokens, hidden)`, *optional*): Instead of `input_ids`, with
                `position_ids`.
            pixel_values, pixel_values_videos (`Tensor` of shape `(patches, channels * time * height * width)`).
            image_grid_thw, video_grid_thw (`Tensor` of shape `(images or videos, 3)`): Patches in time, height, width.
            mm_token_type_ids (`Tensor` of shape `(batch, tokens)`, *optional*): Accepted since processors give it;
                the ids say the same.
            second_per_grid_ts (`Tensor` of shape `(videos,)`, *optional*): Seconds a temporal patch, for Qwen2.5-VL.
            image_features (`Tensor` of shape `(image tokens, hidden)`, *optional*): With `image_grid_thw`, instead of
                `pixel_values`: what [`~CocoaModelMixin.encode_images`] gave for the images, one after another. So an
                image that occurs several times passes the vision tower once.
            eos_only (`bool`, defaults to `False`): Give the embeddings alone, and have the last layer compute no other
                token: faster, with the same gradients.
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
        if input_ids is not None and self.language_model.config._attn_implementation != "eager":
            media = {}
            if pixel_values is not None:
                image_features = torch.cat(self.encode_images(pixel_values, image_grid_thw))
            if image_features is not None:
                media[self.config.image_token_id] = image_features
            if pixel_values_videos is not None:
                media[self.config.video_token_id] = torch.cat(self.encode_images(pixel_values_videos, video_grid_thw))
            return self.forward_packed(input_ids, attention_mask, position_ids, inputs_embeds, media, eos_only)
        if image_features is not None:
            inputs_embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
            is_image = (input_ids == self.config.image_token_id)[..., None]
            inputs_embeds = inputs_embeds.masked_scatter(is_image, image_features.to(inputs_embeds))
        hidden = (
            super()
            .forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                pixel_values=pixel_values,
                pixel_values_videos=pixel_values_videos,
                image_grid_thw=image_grid_thw,
                video_grid_thw=video_grid_thw,
                use_cache=False,
                return_dict=True,
            )
            .last_hidden_state
        )
        pooled = self.pooler(hidden, attention_mask, input_ids)
        return CocoaModelOutput(last_hidden_state=None if eos_only else hidden, pooler_output=pooled)

    def encode_images(self, pixel_values: Tensor, grid_thw: Tensor) -> list[Tensor]:
        """
        Features of images (or videos) from the vision tower: those of equal size attend together; on a CPU a few at a
        time.

        Args:
            pixel_values (`Tensor` of shape `(patches, channels * time * height * width)`).
            grid_thw (`Tensor` of shape `(images, 3)`).

        Returns:
            `list[Tensor]`: One an image, of shape `(tokens, hidden)`.
        """
        keep_freed_memory()
        sizes = grid_thw.prod(-1)
        order = sizes.argsort(stable=True)
        if bool((order[1:] < order[:-1]).any()):
            values = pixel_values.split(sizes.tolist())
            pixel_values = torch.cat([values[image] for image in order.tolist()])
        limit = CPU_VISION_PATCHES if pixel_values.device.type == "cpu" else len(pixel_values)
        features: list[Tensor] = []
        done = 0
        for grids in split_by_patches(grid_thw[order], limit):
            patches = int(grids.prod(-1).sum())
            pixels = pixel_values[done : done + patches]
            done += patches
            filling = missing_rows(patches, pixels.device)
            place = int((grids.prod(-1) < filling).sum())
            if filling:  # one more image, of two rows of patches, in its place by size
                before = int(grids[:place].prod(-1).sum())
                pixels = torch.cat([pixels[:before], pixels.new_zeros(filling, pixels.shape[1]), pixels[before:]])
                grids = torch.cat([grids[:place], grids.new_tensor([[1, 2, filling // 2]]), grids[place:]])
            found = list(self.get_image_features(pixels, grids, return_dict=True).pooler_output)
            features += found[:place] + found[place + bool(filling) :]
        places = order.argsort().tolist()
        return [features[place] for place in places]

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

    def forward_packed(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        inputs_embeds: Tensor | None,
        media: dict[int, Tensor],
        eos_only: bool,
    ) -> CocoaModelOutput:
        """[`~CocoaModelMixin.forward`] on one row without padding; `media`: features, by the id of their tokens."""
        keep_freed_memory()
        shape = input_ids.shape
        filling = missing_rows(int(attention_mask.sum()), input_ids.device)
        if filling:
            width = max(shape[1], filling) - shape[1]
            input_ids = nn.functional.pad(input_ids, (0, width, 0, 1), value=self.cocoa.eos_token_id)
            position_ids = nn.functional.pad(position_ids, (0, width, 0, 1))
            attention_mask = nn.functional.pad(attention_mask, (0, width, 0, 1))
            attention_mask[-1, :filling] = 1
            if inputs_embeds is not None:
                inputs_embeds = nn.functional.pad(inputs_embeds, (0, 0, 0, width, 0, 1))
        packing = pack(attention_mask.long())
        ids = input_ids.flatten()[packing.index]
        self.pooler.check(ids[packing.eos])
        if inputs_embeds is None:
            hidden = self.get_input_embeddings()(ids)
        else:
            hidden = inputs_embeds.flatten(0, 1).index_select(0, packing.index)
        for token, features in media.items():
            # Features come in the batch's order; tokens lie in the packed one.
            places = (ids == token).nonzero()[:, 0]
            places = places[packing.index[places].argsort()]
            hidden = hidden.index_copy(0, places, features.to(hidden))
        hidden = self.run_layers(hidden, position_ids.flatten(1)[:, packing.index], packing, eos_only)
        packing = packing.to(hidden.device)  # where the layers are spread over devices
        if eos_only:
            pooled = torch.empty_like(hidden).index_copy(0, packing.order, hidden)[: shape[0]]
            return CocoaModelOutput(pooler_output=nn.functional.normalize(pooled, dim=-1))
        return CocoaModelOutput(
            last_hidden_state=packing.unpack(hidden, input_ids.shape)[: shape[0], : shape[1]],
            pooler_output=nn.functional.normalize(hidden.index_select(0, packing.eos[: shape[0]]), dim=-1),
        )

    def run_layers(self, hidden: Tensor, positions: Tensor, packing: Packing, eos_only: bool = False) -> Tensor:
        """
        The text layers and the last norm over a packed row.

        Args:
            hidden (`Tensor` of shape `(tokens, hidden)`): Input embeddings.
            positions (`Tensor` of shape `(3, tokens)`): Rotary positions.
            packing ([`Packing`]).
            eos_only (`bool`, defaults to `False`): Of the last layer, only the EOS tokens.

        Returns:
            `Tensor` of shape `(tokens, hidden)`, or `(batch, hidden)` in packed order with `eos_only`.
        """
        text = self.language_model
        rotary = tuple(part[0] for part in merged_rotary(text, hidden, positions[:, None]))
        for layer in text.layers:
            is_last = layer is text.layers[-1]
            hidden = layer(hidden, packing=packing, eos_only=eos_only and is_last, position_embeddings=rotary)
        return text.norm(hidden)


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


def missing_rows(rows: int, device: torch.device) -> int:
    """How many rows fill a number of them up to a multiple of [`CPU_ROWS`]; none where that is of no use."""
    is_of_use = device.type == "cpu" and rows >= CONVOLUTION_ROWS and not torch.is_grad_enabled()
    return -rows % CPU_ROWS if is_of_use else 0


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


def stock_class(cls: type) -> type:
    """The transformers class that a CoCoA backbone subclasses."""
    return next(base for base in cls.__mro__ if base.__module__.startswith("transformers.models."))
