# SPDX-License-Identifier: Apache-2.0
"""What makes a stock Qwen2-VL model a CoCoA model; shared by every backbone."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig
from transformers.utils import ModelOutput

from .attention import FLEX_ATTENTION
from .configuration_cocoa import CocoaConfig
from .pooling import EosPooler

MINIMUM_TRANSFORMERS = (5, 2)

KEY_MAPPING = {
    r"^(?:model\.)?visual\.": "visual.",
    r"^(?:model\.)?(?:language_model\.)?(?:model\.)?embed_tokens\.": "language_model.embed_tokens.",
    r"^(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.": "language_model.layers.",
    r"^(?:model\.)?(?:language_model\.)?(?:model\.)?norm\.": "language_model.norm.",
}
"""From every layout that Qwen2-VL weights are published in to the base model's own names."""

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
"""Arguments of `from_pretrained` that say where the files are."""


def check_transformers_version(version: str = transformers.__version__) -> None:
    """Raise `ImportError` where transformers is older than the oldest version CoCoA works with."""
    found = tuple(int(part) for part in version.split(".")[:2])
    if found < MINIMUM_TRANSFORMERS:
        minimum = ".".join(map(str, MINIMUM_TRANSFORMERS))
        raise ImportError(
            f'CoCoA needs transformers {minimum} or newer, found {version}. Run: pip install "transformers>={minimum}"'
        )


check_transformers_version()


@dataclass
class CocoaModelOutput(ModelOutput):
    """
    Output of a CoCoA model.

    Args:
        last_hidden_state (`Tensor` of shape `(batch, tokens, hidden)`): After the last norm.
        pooler_output (`Tensor` of shape `(batch, hidden)`): Unit-norm EOS embeddings.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None


class CocoaModelMixin:
    """
    Turns a stock Qwen2-VL base model into an embedding model: attention that reads both ways, and an EOS pooler.

    Put it before the stock class: `class CocoaQwen2VLModel(CocoaModelMixin, Qwen2VLModel)`.
    """

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.weight$"]

    def __init__(self, config: PretrainedConfig) -> None:
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
        return (model, info) if return_info else model

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

    def media_types(self, input_ids: Tensor) -> Tensor:
        """0 for text, 1 for image and 2 for video tokens: `mm_token_type_ids`, which the ids determine."""
        types = (input_ids == self.config.image_token_id).long()
        return types + 2 * (input_ids == self.config.video_token_id).long()

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
        if "mm_token_type_ids" in inspect.signature(self.get_rope_index).parameters:
            kwargs["mm_token_type_ids"] = self.media_types(input_ids)
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
        **kwargs: Any,
    ) -> CocoaModelOutput:
        """
        Args:
            input_ids (`Tensor` of shape `(batch, tokens)`): Each row's last token must be the EOS.
            attention_mask (`Tensor` of shape `(batch, tokens)`, *optional*): 0 for padding, on either side.
            position_ids (`Tensor` of shape `(3, batch, tokens)`, *optional*): Rotary positions; worked out from the
                ids and grids where not given.
            inputs_embeds (`Tensor` of shape `(batch, tokens, hidden)`, *optional*): Instead of `input_ids`, with
                `position_ids`.
            pixel_values, pixel_values_videos (`Tensor` of shape `(patches, channels * time * height * width)`).
            image_grid_thw, video_grid_thw (`Tensor` of shape `(images or videos, 3)`): Patches in time, height, width.
            mm_token_type_ids (`Tensor` of shape `(batch, tokens)`, *optional*): Accepted since processors give it;
                the ids say the same.
            second_per_grid_ts (`Tensor` of shape `(videos,)`, *optional*): Seconds a temporal patch, for Qwen2.5-VL.

        Returns:
            [`CocoaModelOutput`].

        Raises:
            ValueError: a row does not end in the EOS.
        """
        if position_ids is None:
            if input_ids is None:
                raise ValueError("With `inputs_embeds`, give `position_ids` too: positions are read from the ids.")
            seconds = {} if second_per_grid_ts is None else {"second_per_grid_ts": second_per_grid_ts}
            position_ids = self.mrope_positions(input_ids, attention_mask, image_grid_thw, video_grid_thw, **seconds)
        kwargs.pop("use_cache", None)
        kwargs.pop("return_dict", None)
        outputs = super().forward(
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
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        return CocoaModelOutput(last_hidden_state=hidden, pooler_output=self.pooler(hidden, attention_mask, input_ids))


def read_model_type(name_or_path: str | os.PathLike, **kwargs: Any) -> str | None:
    """
    The `model_type` of a checkpoint's configuration.

    Args:
        name_or_path: Folder or Hub name.
        kwargs: Those of [`HUB_ARGUMENTS`] that are among them say where the files are.

    Raises:
        FileNotFoundError: an absolute path, or one that begins with a dot or a tilde, is no folder.
    """
    path = os.fspath(name_or_path)
    if (os.path.isabs(path) or path.startswith((".", "~"))) and not os.path.isdir(path):
        raise FileNotFoundError(f"There is no checkpoint folder {path}.")
    return PretrainedConfig.get_config_dict(path, **hub_arguments(kwargs))[0].get("model_type")


def hub_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments of `from_pretrained` that say where the files are."""
    return {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}


def stock_class(cls: type) -> type:
    """The transformers class that a CoCoA backbone subclasses."""
    return next(base for base in cls.__mro__ if base.__module__.startswith("transformers.models."))
