# SPDX-License-Identifier: Apache-2.0
"""CoCoA as a module of sentence-transformers."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers.base.modules import InputModule
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from .auto import load_backbone
from .checkpoint_files import find_checkpoint_file
from .encoding import encode_inputs
from .inputs import CocoaInputError
from .model_folder import SETTINGS_FILE, check_image_processor
from .modeling_cocoa import CocoaModelMixin
from .processing_cocoa import CocoaProcessor


def read_settings(name: str | os.PathLike, **options: str) -> dict[str, Any]:
    """
    What sentence-transformers keeps of a checkpoint beside its modules (prompts, `truncate_dim`, ...); empty where it
    keeps nothing.

    Args:
        name (`str` or `os.PathLike`): Folder or Hub name.
        options: Those of `from_pretrained` that say where the files are, such as `revision`.
    """
    file = find_checkpoint_file(name, SETTINGS_FILE, **options)
    return {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))


class Features(dict):
    """
    Features of a batch whose `token_embeddings` are computed when they are asked for: a vector needs only the last
    token's, and with those alone the last layer is nearly free. A copy (accelerate makes one under autocast) has none.
    """

    def __init__(self, values: Mapping[str, Any], token_embeddings: Callable[[], Tensor] | None = None) -> None:
        super().__init__(values)
        self._token_embeddings = token_embeddings

    def __missing__(self, name: str) -> Any:
        if name != "token_embeddings":
            raise KeyError(name)
        if self._token_embeddings is None:
            raise KeyError(
                "token_embeddings: this is a copy, which accelerate makes of the output of a model in half-precision "
                "training; load the saved model anew to see its tokens."
            )
        self[name] = self._token_embeddings()
        return self[name]


class CocoaTransformer(InputModule):
    """
    The whole of a CoCoA model as one sentence-transformers module: inputs of any kind in, unit vectors out.

    ```python
    model = SentenceTransformer(modules=[CocoaTransformer("org/cocoa-qwen2vl")])
    ```

    Against the stock modules that a saved CoCoA folder loads with, it also takes a conversation beside other inputs in
    one call, drops keys that are None, keeps the order of text and image fixed, and says which input is wrong.

    Args:
        model_name_or_path (`str`, `os.PathLike` or a CoCoA backbone): A CoCoA or a generative Qwen-VL
            checkpoint, or a backbone in memory, which then needs its `processor`.
        processor ([`CocoaProcessor`], *optional*): By default the checkpoint's.
        min_pixels (`int`, *optional*): Changes this size of the checkpoint's processor; so do the next two.
        max_pixels (`int`, *optional*): See [`CocoaProcessor`].
        max_length (`int`, *optional*): See [`CocoaProcessor`].
        model_kwargs (`dict`, *optional*): For the backbone's `from_pretrained` (`dtype`, `attn_implementation`, ...).
        processor_kwargs (`dict`, *optional*): For [`CocoaProcessor.from_pretrained`].

    Raises:
        ValueError: the checkpoint is of another kind of model; a backbone came without its processor; sizes were given
            beside a processor.
    """

    save_in_root = True

    def __init__(
        self,
        model_name_or_path: str | os.PathLike | CocoaModelMixin,
        processor: CocoaProcessor | None = None,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_length: int | None = None,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        sizes = {"min_pixels": min_pixels, "max_pixels": max_pixels, "max_length": max_length}
        given = [name for name, size in sizes.items() if size is not None]
        if processor is not None and (given or processor_kwargs):
            raise ValueError(
                f"{given or list(processor_kwargs)} would change a processor that is loaded, and one was given: load "
                "it so with CocoaProcessor.from_pretrained."
            )
        if isinstance(model_name_or_path, PreTrainedModel):
            if processor is None:
                raise ValueError("Give `processor` (a CocoaProcessor) together with a backbone in memory.")
            self.model = model_name_or_path
            settings: dict[str, Any] = {}
        else:
            self.model = load_backbone(model_name_or_path, **(model_kwargs or {}))
            settings = read_settings(model_name_or_path, **(model_kwargs or {}))
        self.prompts: dict[str, str] = settings.get("prompts") or {}
        """The checkpoint's prompts, by name; none of a backbone in memory."""
        if processor is None:
            options = {**sizes, **(processor_kwargs or {})}
            processor = CocoaProcessor.from_pretrained(model_name_or_path, **options)
        check_image_processor(self.model, processor)
        self.processor = processor
        self.use_all_parameters = False
        """Let the vision tower take part in batches without images too, with a gradient of zero: processes that train
        together must, or those that have images wait for the others. Trainers set it."""

    @property
    def modalities(self) -> list[Any]:
        """What sentence-transformers may pass on; with `message`, any mixture."""
        return ["text", "image", "video", "message"]

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer."""
        return self.processor.tokenizer

    @property
    def auto_model(self) -> PreTrainedModel:
        """The backbone, by the name that sentence-transformers gives it."""
        return self.model

    @property
    def max_seq_length(self) -> int:
        """Tokens of an input, the EOS among them, beyond which text is cut."""
        return self.processor.max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self.tokenizer.model_max_length = value

    def get_embedding_dimension(self) -> int:
        """Length of a vector."""
        return self.model.config.get_text_config().hidden_size

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any) -> dict[str, Any]:
        """
        Args:
            inputs (`Sequence`): As in [`CocoaProcessor.preprocess`].
            prompt (`str`, *optional*): Instruction, put in front of each input as a system message.
            kwargs: `max_length` (`int`, *optional*) for these inputs; the rest of what sentence-transformers passes
                (`task`) has no bearing here.

        Returns:
            `dict`: What [`CocoaProcessor`] gives, but `second_per_grid_ts` of shape `(batch, videos of a sample)`.

        Raises:
            CocoaInputError: an input cannot be encoded; names its position among these inputs, which are a batch of
                those given to `encode`.
            ValueError: `processing_kwargs`, which change what inputs mean in one call, were passed.
        """
        if kwargs.get("processing_kwargs"):
            raise ValueError(
                "CocoaTransformer takes no processing_kwargs; give min_pixels, max_pixels and max_length when loading "
                "the model (SentenceTransformer(..., processor_kwargs={...})), or set model.max_seq_length."
            )
        if not inputs:
            return {}
        try:
            features = dict(self.processor(inputs, prompt=prompt, max_length=kwargs.get("max_length")))
        except CocoaInputError as error:
            counted = " within its batch (encode of sentence-transformers sorts inputs by length)"
            raise CocoaInputError(error.reason, error.position, counted) from error
        if "second_per_grid_ts" in features:
            # By sample, because the cached losses of sentence-transformers cut it as if it were.
            seconds = features["second_per_grid_ts"].split(features["num_videos_per_sample"].tolist())
            features["second_per_grid_ts"] = pad_sequence(seconds, batch_first=True)
        return features

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """
        Add `sentence_embedding` to the features: unit vectors `(batch, hidden)`; `token_embeddings`
        `(batch, tokens, hidden)` are computed at the first `features["token_embeddings"]`.

        What is not on the model's device yet is brought there, so that pixels may wait on the CPU for their turn.
        """
        device = self.model.device
        names = features.keys() & set(self.processor.model_input_names)
        inputs: dict[str, Tensor] = {name: features[name].to(device, non_blocking=True) for name in names}
        if "second_per_grid_ts" in inputs:
            seconds, videos = inputs.pop("second_per_grid_ts"), features["num_videos_per_sample"]
            if "video_grid_thw" in inputs:
                columns = torch.arange(seconds.shape[1], device=seconds.device)
                inputs["second_per_grid_ts"] = seconds[columns < videos.to(device)[:, None]]
        if self.use_all_parameters and "pixel_values" not in inputs and "pixel_values_videos" not in inputs:
            # Into the inputs, as an image's features go: the backward pass has the order of one with images.
            touched = 0.0 * self.model.dummy_vision_sum()
            embeds = self.model.get_input_embeddings()(inputs["input_ids"])
            inputs["inputs_embeds"] = embeds + touched.to(embeds)
        features["sentence_embedding"] = self.model(**inputs, eos_only=True).pooler_output
        return Features(features, lambda: self.model(**inputs).last_hidden_state)

    def encode(
        self,
        inputs: Iterable[Any],
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        batch_num_tokens: int | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool = False,
        batch_tokens: int | None = None,
    ) -> np.ndarray:
        """
        The fastest way to embed many inputs, on the device that the module is on; see [`~encoding.encode_inputs`] for
        the other arguments. `batch_tokens` is the former name of `batch_num_tokens`, for one release.

        A model that was trained with prompts needs them: `prompt_name="query"` for what searches, `"document"` for
        what is searched. Without `prompt` and `prompt_name` nothing is put in front.

        Args:
            prompt (`str`, *optional*): Instruction, put in front of each input.
            prompt_name (`str`, *optional*): One of the checkpoint's `prompts`, in place of `prompt`.

        Returns:
            `np.ndarray` of shape `(inputs, hidden)`, float32: unit vectors.

        Raises:
            ValueError: there is no prompt of this name, or `prompt` was given too.
            CocoaInputError: an input cannot be encoded; names its position.
        """
        if prompt_name is not None:
            if prompt is not None:
                raise ValueError("Set either prompt or prompt_name, not both.")
            if prompt_name not in self.prompts:
                raise ValueError(
                    f"There is no prompt {prompt_name!r}; this model's prompts are {sorted(self.prompts)}."
                )
            prompt = self.prompts[prompt_name] or None
        if batch_tokens is not None:
            warnings.warn("batch_tokens is now called batch_num_tokens.", FutureWarning, stacklevel=2)
            batch_num_tokens = batch_tokens
        return encode_inputs(
            self.model,
            self.processor,
            inputs,
            prompt=prompt,
            batch_num_tokens=batch_num_tokens,
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
        ).numpy()

    def save(self, output_path: str, *args: Any, **kwargs: Any) -> None:
        """Write weights, configuration, code and processor into the folder that sentence-transformers is saving."""
        self.model.save_pretrained(output_path)
        self.processor.save_pretrained(output_path)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
        backend: str = "torch",
        **kwargs: Any,
    ) -> CocoaTransformer:
        """
        Load the module from a folder or the Hub, as sentence-transformers does.

        Raises:
            ValueError: `backend` is not torch.
        """
        if backend != "torch":
            raise ValueError(f"CocoaTransformer runs on torch only; got backend={backend!r}.")
        hub = {
            "subfolder": subfolder,
            "token": token,
            "cache_dir": cache_folder,
            "revision": revision,
            "local_files_only": local_files_only,
        }
        return cls(
            model_name_or_path,
            model_kwargs={**hub, **(config_kwargs or {}), **(model_kwargs or {})},
            processor_kwargs={**hub, **(processor_kwargs or {})},
        )

    def __repr__(self) -> str:
        return f"CocoaTransformer({type(self.model).__name__}, max_seq_length={self.max_seq_length})"
