# SPDX-License-Identifier: Apache-2.0
"""Weights that processes share out, as FSDP and DeepSpeed do: which settings work, and where models must be whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.fsdp import StateDictType
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config


@contextmanager
def unsharded_weights(args: TrainingArguments) -> Iterator[None]:
    """
    Within it models are loaded and saved whole, also under DeepSpeed's ZeRO-3, where transformers would share them out
    while it loads them: the mask token and the heads are made from whole weights, and one process writes alone.
    """
    plugin = args.deepspeed_plugin
    if plugin is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(getattr(args, "hf_deepspeed_config", None) or plugin.dschf)


def check_sharding(trainer: Trainer) -> None:
    """Raise `ValueError` where the processes share the weights out so that checkpoints have no model in them."""
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if plugin is not None and plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "With FSDP, fsdp_cpu_ram_efficient_loading must be false: every process makes the mask token and the "
            "heads from whole weights. See trainers/accelerate_configs/fsdp2.yaml."
        )
    if plugin is not None and plugin.state_dict_type != StateDictType.FULL_STATE_DICT:
        raise ValueError(
            f"With FSDP, fsdp_state_dict_type must be FULL_STATE_DICT, not {plugin.state_dict_type.name}: a "
            "checkpoint is a folder that loads everywhere. See trainers/accelerate_configs/fsdp2.yaml."
        )
