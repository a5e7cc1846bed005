# SPDX-License-Identifier: Apache-2.0
"""What the trainers of all stages add to transformers' Trainer: resuming, saving, pushing."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import ProgressCallback
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from modeling_cocoa.adapter_base import AdapterBase
from modeling_cocoa.processing_cocoa import CocoaProcessor
from modeling_cocoa.saving import save_cocoa

from .adapter_files import ADAPTER_FOLDER, save_adapter, save_adapter_folder
from .adapters import has_adapter, merge_adapters
from .checkpoints import begin_run, is_complete, last_checkpoint, read_state
from .measuring import measuring, random_state_kept
from .pictures import last_picture
from .progress import LossProgressCallback
from .record import RunRecord
from .run_folder import locked
from .sharding import check_sharding, unsharded_weights

logger = logging.get_logger(__name__)

NO_STEP = (
    "{rows} does not make a single step, and nothing was trained: give more rows, lower per_device_train_batch_size, "
    "or leave dataloader_drop_last and num_train_epochs at their defaults."
)


class CocoaTrainerMixin:
    """
    In front of a [`~transformers.Trainer`]: resuming from the last complete checkpoint, losses in the bar, and folders
    that [`save_cocoa`] writes, each with its card. A trainer defines `backbone`, `processor`, `model_to_save`,
    `write_model` and `_load_from_checkpoint`, and makes a `record`.
    """

    backbone: nn.Module
    """The CoCoA backbone."""
    processor: CocoaProcessor
    """What makes inputs of rows."""
    record: RunRecord
    """What the run began with."""
    adapter_base: AdapterBase | None = None
    """What adapters belong to, where they are saved."""
    was_resumed: bool = False
    """Whether its time is not that of the whole run."""
    first_rate_is_zero: bool = False
    """Whether the first step changes nothing; not known where DeepSpeed makes the scheduler."""
    picture: Path | None = None
    """The last one that the run drew of what it rebuilds."""

    def finish_init(self) -> None:
        """What is left to do once [`~transformers.Trainer`] is set up."""
        self.check_sharding()
        if self.args.save_adapters != "merged" and has_adapter(self.backbone):
            self.adapter_base = AdapterBase.of_model(self.backbone)
            if self.args.push_to_hub and os.path.isdir(self.adapter_base.name_or_path):
                raise ValueError(
                    f"push_to_hub=True with save_adapters={self.args.save_adapters!r} would publish adapters of the "
                    f"local folder {self.adapter_base.name_or_path}: train from a model on the Hub, or set "
                    "save_adapters='merged'."
                )
        if not self.args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(LossProgressCallback)

    def check_sharding(self) -> None:
        """Raise `ValueError` where the processes share the weights out in a way that does not work."""
        check_sharding(self)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the repository is made by the push, once the model is checked."""

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """
        Train, and with `push_to_hub` push the model; see [`~transformers.Trainer.train`].

        The output folder keeps what the run was started with, and is locked while it trains.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): A checkpoint folder, or `True` for the last complete
                one in `output_dir` (from the beginning, with a warning, where there is none). Where that is the end of
                the run, its weights are loaded and no step is made.

        Raises:
            BlockingIOError: another run trains in the folder.
            ValueError: the folder holds checkpoints and the run is to begin anew; it goes on from, or ends in, a
                checkpoint of a run with other settings, data or base model (a run that has not ended may be made
                longer); the checkpoint has no optimizer state; there is nothing to train on.
        """
        folder = Path(self.args.output_dir)
        checkpoint = last_checkpoint(folder) if resume_from_checkpoint is True else resume_from_checkpoint or None
        if resume_from_checkpoint is True and checkpoint is None:
            logger.warning(f"{folder} holds no complete checkpoint to resume from: training starts anew.")
        with ExitStack() as held:

            def enter() -> None:
                held.enter_context(locked(folder))
                begin_run(checkpoint, self.args, self.record.started_with(self))

            self._on_main_process(enter)
            self.was_resumed = checkpoint is not None
            if checkpoint is not None:
                state = read_state(checkpoint)
                self.picture = last_picture(folder, state.global_step)
                if is_complete(state, self.args):
                    # transformers would make one more step, wherever the last one was not the end of an epoch.
                    best = state.best_model_checkpoint if self.args.load_best_model_at_end else None
                    with unsharded_weights(self.args):
                        self._load_from_checkpoint(best or checkpoint)
                    self.state = state
                    logger.warning(f"{folder} had ended at step {state.global_step}; nothing was trained.")
                    return TrainOutput(state.global_step, 0.0, {})
            try:
                result = super().train(resume_from_checkpoint=checkpoint, **kwargs)
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
                logger.warning(f"\nStopped at step {self.state.global_step}; {goes_on}.")
                raise
            if not self.was_resumed and self.state.global_step == 0:
                raise ValueError(NO_STEP.format(rows="The training data"))
        if self.args.load_best_model_at_end and self.state.best_global_step == 1 and self.first_rate_is_zero:
            logger.warning(
                f"The best evaluation was that after step 1, whose learning rate is 0 (warmup_steps="
                f"{self.args.warmup_steps}): the model that is kept is the one that training began with. Train for "
                "more steps, or set warmup_steps=0."
            )
        if self.args.push_to_hub:
            self.push_to_hub()
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

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Warn of a warm-up that takes all steps, whose first has rate 0; see transformers' `create_scheduler`."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        self.first_rate_is_zero = not any(scheduler.get_last_lr())
        if self.args.get_warmup_steps(num_training_steps) >= num_training_steps and self.first_rate_is_zero:
            logger.warning(
                f"The warm-up (warmup_steps={self.args.warmup_steps}) takes all of the {num_training_steps} steps: "
                "the first has a rate of 0, and learning_rate is never reached. For so short a run set warmup_steps=0."
            )
        return scheduler

    def check_steps(self, loader: Any) -> Any:
        """The same data loader; raises `ValueError` where it has no batch."""
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
        Stop before a step with a non-finite loss, which would make the weights NaN.

        Args:
            loss (`Tensor`).
            rows (`Callable`): Says what the batch's rows are called.

        Raises:
            FloatingPointError: names the step and the rows.
        """
        if not bool(torch.isfinite(loss).all()):
            raise FloatingPointError(
                f"The loss is {loss.tolist()} at step {self.state.global_step + 1}, of the rows {rows()}; no step was "
                f"made with it. The last good checkpoint is {last_checkpoint(self.args.output_dir)}. Look at these "
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
        from hub_cards.push import push_model  # which training does not need

        repo_id = repo_id or self.args.hub_model_id
        if repo_id is None or not blocking:
            raise ValueError("Say where to: push_to_hub(repo_id='organization/name') or hub_model_id; it blocks.")
        with tempfile.TemporaryDirectory() as folder:
            self.save_model(folder)
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
        super().save_model(output_dir, _internal_call=True)  # or it would push, which is done at the end

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:  # transformers calls this in every process
            return
        if state_dict == {}:
            # What transformers passes where DeepSpeed cannot put the weights together.
            raise ValueError(
                "A checkpoint holds the whole model: set stage3_gather_16bit_weights_on_model_save (zero3_save_16bit_"
                "model in accelerate's file), as in trainers/accelerate_configs/deepspeed_zero3.yaml."
            )
        folder = output_dir if output_dir is not None else self.args.output_dir
        with unsharded_weights(self.args), random_state_kept():
            self.write_model(folder, state_dict)

    def model_to_save(self, backbone: nn.Module) -> Any:
        """What [`save_cocoa`] saves, with a backbone in the place of the one that trains."""
        return backbone

    def write_backbone(
        self,
        folder: str,
        state_dict: Mapping[str, Tensor] | None = None,
        write_more: Callable[[Path], Any] = lambda staging: None,
    ) -> None:
        """
        Write the folder that both loaders load, as `save_adapters` asks for; adapters are kept for resuming.

        Args:
            folder (`str`): Where to.
            state_dict (`Mapping[str, Tensor]`, *optional*): The backbone's weights, where processes share them out.
            write_more (`Callable`, *optional*): Called with the folder that is made ready, to write more into it.
        """
        kind = self.args.save_adapters if has_adapter(self.backbone) else None

        def complete_adapters(staging: Path) -> None:
            self.record.write_stages(staging, self)
            if kind == "adapter":
                write_more(staging)

        def complete_model(staging: Path) -> None:
            write_more(staging)
            if kind == "merged":
                save_adapter(self.backbone, staging, state_dict)
            self.record.complete_folder(staging, target=Path(folder), trainer=self)

        if kind in ("adapter", "both"):
            save_adapter_folder(
                self.model_to_save(self.backbone),
                self.backbone,
                self.processor,
                folder if kind == "adapter" else os.path.join(folder, ADAPTER_FOLDER),
                self.adapter_base,
                state_dict,
                complete=complete_adapters,
            )
        if kind != "adapter":
            model = self.model_to_save(merge_adapters(self.backbone, state_dict))
            save_cocoa(model, self.processor, folder, complete=complete_model)

    def _load_best_model(self) -> None:
        # sentence-transformers only logs a failure here, and the last weights would pass for the best.
        if self.is_deepspeed_enabled:
            deepspeed_load_checkpoint(self.model_wrapped, self.state.best_model_checkpoint)
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
