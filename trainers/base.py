# SPDX-License-Identifier: Apache-2.0
"""What the trainers of all stages have in common."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.distributed.fsdp import StateDictType
from transformers import ProgressCallback, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import (
    deepspeed_load_checkpoint,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from evaluation.mmeb_tasks import IMAGE_SIZES
from hub_cards.push import push_model
from modeling_cocoa.checkpoint_files import check_is_there
from modeling_cocoa.processing_cocoa import CocoaProcessor

from .adapters import PARTS
from .checkpoints import has_optimizer, last_checkpoint
from .measuring import measuring, random_state_kept
from .pictures import last_picture
from .progress import LossProgressCallback
from .record import RunRecord
from .run_folder import LENGTHS, differences, locked, read_run, write_run

logger = logging.get_logger(__name__)

NO_STEP = (
    "{rows} does not make a single step, and nothing was trained: give more rows, lower per_device_train_batch_size, "
    "or leave dataloader_drop_last and num_train_epochs at their defaults."
)
MAX_LENGTH = 1280
"""Most tokens of an input where none are asked for and no processor is given."""


@dataclass
class SharedOptions:
    """What the configurations of all stages have: how rows become inputs, and which parts of the model train."""

    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest input (in the bridge: source or target), in tokens; text is cut, images never. A pair "
            "whose text to rebuild is longer is a bad row. By default the checkpoint's, "
            f"{MAX_LENGTH} at most, or what a processor that is given has."
        },
    )
    min_pixels: int | None = field(default=None, metadata={"help": "Smaller images are enlarged to this many pixels."})
    max_pixels: int | None = field(default=None, metadata={"help": "Larger images are reduced to this many pixels."})
    image_resolution: str | None = field(
        default=None,
        metadata={
            "help": "Stretch every image to a square: a side in pixels, such as 336, or VLM2Vec's 'high' (1344), "
            "'mid' (672), 'low' (128). By default images keep their shape, between min_pixels and max_pixels."
        },
    )
    check_data: bool = field(
        default=True,
        metadata={"help": "Read every row once before the first step, and act on bad ones then (see on_bad_sample)."},
    )
    on_bad_sample: str = field(
        default="raise",
        metadata={
            "help": "A row that cannot be read: 'raise' names it and stops; 'skip' leaves it out, counted in the log.",
            "choices": ["raise", "skip"],
        },
    )

    freeze_parts: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"Parts of the backbone that stay as they are, in themselves and without adapters: {list(PARTS)}."
        },
    )

    def __post_init__(self) -> None:
        check_choices(self, "on_bad_sample")
        if self.image_resolution is not None:
            self.image_resolution = str(self.image_resolution)  # a number in a recipe
            known = self.image_resolution in IMAGE_SIZES
            if not known and not re.fullmatch(r"[1-9][0-9]*", self.image_resolution):
                raise ValueError(
                    f"image_resolution must be a side in pixels or one of {list(IMAGE_SIZES)}; got "
                    f"{self.image_resolution!r}."
                )
        if unknown := [part for part in self.freeze_parts if part not in PARTS]:
            raise ValueError(f"freeze_parts must be of {list(PARTS)}; got {unknown}.")
        if self.push_to_hub:
            raise ValueError(
                "push_to_hub=True would upload checkpoints unchecked, with the optimizer's pickled state: call "
                "trainer.push_to_hub() after training."
            )
        super().__post_init__()

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Width and height to which images are stretched, in pixels; none where they keep their shape."""
        if self.image_resolution is None:
            return None
        return IMAGE_SIZES.get(self.image_resolution) or (int(self.image_resolution),) * 2

    def load_processor(self, name: str | os.PathLike, **kwargs: Any) -> CocoaProcessor:
        """
        A checkpoint's processor, with the sizes that are asked for.

        Args:
            name (`str` or `os.PathLike`): Folder or Hub name.
            kwargs: Further ones of [`CocoaProcessor.from_pretrained`].

        Raises:
            FileNotFoundError: the name is the path of a folder that is not there.
        """
        check_is_there(os.fspath(name), has_owner=True)
        sizes = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels, "max_length": self.max_length}
        processor = CocoaProcessor.from_pretrained(name, **sizes, **kwargs)
        if self.max_length is None:
            processor.tokenizer.model_max_length = min(processor.max_length, MAX_LENGTH)
        return processor


def check_devices(args: TrainingArguments) -> None:
    """Raise `ValueError` where transformers would share each batch out over several GPUs, which cuts pixels apart."""
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are in sight of one process: start one for each with `accelerate launch`, or show it "
            "a single one with CUDA_VISIBLE_DEVICES=0."
        )


def check_not_peft(model: Any) -> None:
    """Raise `ValueError` where a model is wrapped by peft: trainers put adapters into a backbone themselves."""
    inner = model[0].model if isinstance(model, SentenceTransformer) and hasattr(model[0], "model") else model
    if isinstance(inner, PeftModel):
        raise ValueError(
            "The model is a PeftModel: give model.merge_and_unload(), to go on from its weights, and adapters to "
            "train as peft_config; or its base, with base.load_adapter(folder, is_trainable=True)."
        )


def check_choices(options: Any, *names: str) -> None:
    """Raise `ValueError` where a dataclass field is none of the choices in its metadata."""
    for name in names:
        choices = type(options).__dataclass_fields__[name].metadata["choices"]
        if getattr(options, name) not in choices:
            raise ValueError(f"{name} must be one of {choices}; got {getattr(options, name)!r}.")


def check_sizes(options: SharedOptions, processor: Any) -> None:
    """Raise `ValueError` where sizes were asked for that a processor, which was given, does not have."""
    size = processor.image_processor.size
    has = {
        "min_pixels": size["shortest_edge"],
        "max_pixels": size["longest_edge"],
        "max_length": processor.max_length,
    }
    for name, value in has.items():
        if getattr(options, name) not in (None, value):
            raise ValueError(
                f"{name} is {getattr(options, name)}, and the processor that was given has {value}: load it with "
                f"CocoaProcessor.from_pretrained(..., {name}={getattr(options, name)}), or leave {name} out."
            )


def is_complete(state: TrainerState, args: TrainingArguments) -> bool:
    """Whether a run with these arguments has nothing left to do in this state."""
    patience = getattr(args, "early_stopping_patience", None)
    stoppers = state.stateful_callbacks.get("EarlyStoppingCallback", [])
    for stopper in stoppers if isinstance(stoppers, list) else [stoppers]:
        if patience is not None and stopper["attributes"]["early_stopping_patience_counter"] >= patience:
            return True
    if args.max_steps > 0:
        return state.global_step >= args.max_steps
    return state.epoch is not None and state.epoch >= args.num_train_epochs


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


class CocoaTrainerMixin:
    """
    In front of a [`~transformers.Trainer`]: resuming from the last complete checkpoint, losses in the bar, and folders
    that [`save_cocoa`] writes, each with its card. A trainer defines `backbone`, `write_model(folder, state_dict)` and
    `_load_from_checkpoint`, and makes a `record`.
    """

    record: RunRecord
    """What the run began with."""
    was_resumed: bool = False
    """Whether its time is not that of the whole run."""
    picture: Path | None = None
    """The last one that the run drew of what it rebuilds."""

    def complete_folder(self, folder: Path, target: str | os.PathLike) -> None:
        """
        Write the record of all stages and the card into a folder that a model is saved to.

        Args:
            folder (`Path`): Where it is made ready.
            target (`str` or `os.PathLike`): Where it goes; may exist.
        """
        self.record.complete_folder(folder, self, self.backbone, self.picture)
        self.record.write_card(folder, Path(target))

    def show_losses(self) -> None:
        """Have the progress bar show the latest losses by name."""
        if not self.args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(LossProgressCallback)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """
        Train; see [`~transformers.Trainer.train`].

        The output folder keeps what the run was started with, and is locked while it trains.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): A checkpoint folder, or `True` for the last complete
                one in `output_dir` (from the beginning where there is none). Where that is the end of the run, its
                weights are loaded and no step is made.

        Raises:
            BlockingIOError: another run trains in the folder.
            ValueError: the folder holds checkpoints and the run is to begin anew; it goes on from, or ends in, a
                checkpoint of a run with other settings, data or base model (a run that has not ended may be made
                longer); the checkpoint has no optimizer state; there is nothing to train on.
        """
        folder = Path(self.args.output_dir)
        with ExitStack() as held:
            if resume_from_checkpoint is True:
                resume_from_checkpoint = last_checkpoint(folder)
            resume_from_checkpoint = resume_from_checkpoint or None
            self._on_main_process(lambda: self._enter_folder(folder, resume_from_checkpoint, held))
            self.was_resumed = resume_from_checkpoint is not None
            begun_at = 0
            if resume_from_checkpoint is not None:
                state = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, TRAINER_STATE_NAME))
                begun_at = state.global_step
                self.picture = last_picture(folder, begun_at)
                if is_complete(state, self.args):
                    # transformers would make one more step, wherever the last one was not the end of an epoch.
                    best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
                    with unsharded_weights(self.args):
                        self._load_from_checkpoint(best or resume_from_checkpoint)
                    self.state = state
                    logger.warning(f"{folder} had ended at step {begun_at}; nothing was trained.")
                    return TrainOutput(state.global_step, 0.0, {})
            try:
                result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            except KeyboardInterrupt:
                last = last_checkpoint(folder)
                goes_on = (
                    "there is no checkpoint to go on from"
                    if last is None
                    else (
                        f"the last checkpoint is {last}. The same command goes on from it (in Python: "
                        "trainer.train(resume_from_checkpoint=True))"
                    )
                )
                logger.warning(f"Stopped at step {self.state.global_step}; {goes_on}.")
                raise
            if not self.was_resumed and self.state.global_step == begun_at:
                raise ValueError(NO_STEP.format(rows="The training data"))
            return result

    def _on_main_process(self, check: Callable[[], None]) -> None:
        """Run a check in the main process; where it raises, all processes do."""
        error: list[BaseException | None] = [None]
        if self.is_world_process_zero():
            try:
                check()
            except (OSError, ValueError) as found:
                error = [found]
        broadcast_object_list(error)
        if error[0] is not None:
            raise error[0]

    def _enter_folder(self, folder: Path, checkpoint: str | None, held: ExitStack) -> None:
        """Lock the output folder, see that the run fits what is in it, and write what the run is started with."""
        held.enter_context(locked(folder))
        facts = self.record.started_with(self)
        existing = last_checkpoint(folder)
        if existing is not None and (checkpoint is None or Path(checkpoint).resolve().parent != folder.resolve()):
            raise ValueError(
                f"{folder} holds checkpoints of an earlier run ({Path(existing).name}), from which a later call would "
                "go on. To go on from them now: trainer.train(resume_from_checkpoint=True). To train anew: choose "
                f"another output_dir, or delete {folder}."
            )
        if checkpoint is None:
            write_run(folder, facts)
            return
        state = TrainerState.load_from_json(os.path.join(checkpoint, TRAINER_STATE_NAME))
        ended = is_complete(state, self.args)
        before = read_run(Path(checkpoint).parent)
        if before is None:
            logger.warning(f"{Path(checkpoint).parent} does not say what its run was started with: not compared.")
        changed = [] if before is None else differences(before, facts, ignore=() if ended else LENGTHS)
        if changed and ended:
            raise ValueError(
                f"{folder} had ended at step {state.global_step} of a run with other settings: {'; '.join(changed)}. "
                f"Nothing was trained. Choose another output_dir, or delete {folder}."
            )
        if changed:
            raise ValueError(
                f"{checkpoint} is of a run with other settings: {'; '.join(changed)}. Go on with those of then; or "
                f"choose another output_dir, or delete {folder}, to train anew."
            )
        if not ended and not has_optimizer(checkpoint):
            raise ValueError(
                f"{checkpoint} has no state of the optimizer and the learning rate (save_only_model=True), without "
                "which the run cannot go on. To train its weights further, give it as the model of a run in another "
                "output_dir."
            )
        if not ended:
            write_run(folder, facts)

    def check_steps(self, loader: Any) -> Any:
        """
        The same data loader.

        Raises:
            ValueError: it has no batch.
        """
        if len(loader) == 0:
            raise ValueError(NO_STEP.format(rows=f"The training data of {len(loader.dataset)} rows"))
        return loader

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate, leaving the run as it is (see [`measuring`]); see [`~transformers.Trainer.evaluate`]."""
        with measuring(self.model):
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predict, leaving the run as it is (see [`measuring`]); see [`~transformers.Trainer.predict`]."""
        with measuring(self.model):
            return super().predict(*args, **kwargs)

    def check_loss(self, loss: Tensor, rows: Callable[[], list[Any]]) -> None:
        """
        Stop before a step with a loss that is no number, which would spoil the weights.

        Args:
            loss (`Tensor`).
            rows (`Callable`): Says what the batch's rows are called.

        Raises:
            FloatingPointError: names the step and the rows.
        """
        if not bool(torch.isfinite(loss).all()):
            raise FloatingPointError(
                f"The loss is {loss.tolist()} at step {self.state.global_step + 1}, of the rows {rows()}; no step was "
                f"made with it. The last checkpoint is whole: {last_checkpoint(self.args.output_dir)}. Look at these "
                "rows, or lower the learning rate, and train with resume_from_checkpoint=True."
            )

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        repo_id: str | None = None,
    ) -> str | None:
        """
        Save the model, check it as its users will load it, and upload it as one commit; see [`~push.push_model`].

        Args:
            commit_message (`str`, *optional*).
            blocking (`bool`, defaults to `True`): Nothing else is done; it is here because callers of
                [`~transformers.Trainer`] pass it.
            token, revision, private (*optional*): By default `hub_token`, `hub_revision` and `hub_private_repo` of the
                configuration.
            repo_id (`str`, *optional*): By default `hub_model_id` of the configuration.

        Returns:
            `str`: Address of the commit, in the main process; none in others.

        Raises:
            ValueError: no name was given; the model is not fit for the Hub.
            PushError: the Hub did not take it.
        """
        repo_id = repo_id or self.args.hub_model_id
        if repo_id is None or not blocking:
            raise ValueError("Say where to: push_to_hub(repo_id='organization/name') or hub_model_id; it blocks.")
        with tempfile.TemporaryDirectory() as folder:
            self.save_model(folder, _internal_call=True)
            if not self.is_world_process_zero():
                return None
            return push_model(
                folder,
                repo_id,
                private=private if private is not None else self.args.hub_private_repo,
                revision=revision if revision is not None else self.args.hub_revision,
                token=token if token is not None else self.args.hub_token,
                commit_message=commit_message or "End of training",
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Write the model's folder; see [`~transformers.Trainer.save_model`].

        After a run that had ended there is no DeepSpeed engine, whose parts transformers would put together.
        """
        if self.is_deepspeed_enabled and self.model_wrapped is self.model:
            self._save(output_dir)
            return
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:  # transformers calls this in every process
            return
        if state_dict == {}:
            # What transformers passes where DeepSpeed cannot put the weights together.
            raise ValueError(
                "A checkpoint holds the whole model: set stage3_gather_16bit_weights_on_model_save (zero3_save_16bit_"
                "model in accelerate's file), as in trainers/accelerate_configs/deepspeed_zero3.yaml."
            )
        with unsharded_weights(self.args), random_state_kept():
            self.write_model(output_dir if output_dir is not None else self.args.output_dir, state_dict)

    def _load_best_model(self) -> None:
        # sentence-transformers only logs a failure here, and the last weights would pass for the best.
        if self.is_deepspeed_enabled:
            deepspeed_load_checkpoint(self.model_wrapped, self.state.best_model_checkpoint)
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def check_sharding(self) -> None:
        """
        Raise `ValueError` where the processes share the weights out in a way that leaves checkpoints without a model.
        """
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
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
