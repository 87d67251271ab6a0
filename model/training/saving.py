"""transformers' Trainer with checkpoints that survive: whole or not there, sharded or not, with adapters or without."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from model.training.checkpoints import CheckpointFolder, RunIdentity, telling_what_is_safe
from model.training.distributed import finish_accelerator, is_sharded
from model.training.lora import has_lora, load_adapters, save_adapters


class CheckpointingTrainer(Trainer):
    """Saves as :mod:`model.training.checkpoints` says, and shards as :mod:`model.training.distributed` does.

    What an intermediate checkpoint holds beside the states of optimizer, schedule and random numbers: the model, in the form of
    ``from_pretrained``; of a model with adapters what was trained (the base is where the run began); of a sharded one
    each rank's shards.

    Args:
        identity: what a run that goes on from these checkpoints must share with this one; None: nothing.
        **kwargs: those of ``transformers.Trainer``.
    """

    def __init__(self, *args: Any, identity: RunIdentity | None = None, **kwargs: Any) -> None:
        self._identity = identity
        self._is_saving = False
        super().__init__(*args, **kwargs)
        self.checkpoints = CheckpointFolder(Path(self.args.output_dir))

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        finish_accelerator(self)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not (_internal_call and is_sharded(self)):
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            # The shards follow with the optimizer's; whole weights would be gathered only to be written a second time.
            self.accelerator.unwrap_model(self.model).config.save_pretrained(output_dir)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step, first = self.state.global_step, self.is_world_process_zero()
        with telling_what_is_safe(f"the checkpoint of step {step}", self.checkpoints.folder, self.checkpoints.newest()):
            if first:
                self.checkpoints.clear()
            self.accelerator.wait_for_everyone()
            self._is_saving = True
            try:
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if first:
                    self.checkpoints.publish(step, self._identity)
            except Exception:
                # Its room is worth more than half a checkpoint.
                shutil.rmtree(self.checkpoints.saving, ignore_errors=True)
                raise
            finally:
                self._is_saving = False
        self._find_best()
        self.accelerator.wait_for_everyone()

    def _find_best(self) -> None:
        """Where the best checkpoint is by now: transformers noted the folder that it was written to."""
        if self.state.best_global_step and self.state.best_model_checkpoint is not None:
            self.state.best_model_checkpoint = str(self.checkpoints.of_step(self.state.best_global_step))

    def _load_best_model(self) -> None:
        self._find_best()
        target = self.accelerator.unwrap_model(self.model)
        if has_lora(target):
            load_adapters(target, Path(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.checkpoints.saving) if self._is_saving else super()._get_output_dir(trial)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if not has_lora(model):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            save_adapters(model, output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = self.accelerator.unwrap_model(self.model if model is None else model)
        if has_lora(target) and not is_sharded(self):
            load_adapters(target, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # A run that was killed after its last step would take one more: transformers looks at the end of a step only.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)
