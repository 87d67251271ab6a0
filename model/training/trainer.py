"""transformers' Trainer with what this model needs: groups of learning rates, and a log that shows the fusion."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from model.data.batches import StepBatchSampler
from model.training.lora import has_lora, load_adapters, save_adapters
from model.training.meter import StepMeter

_PROJECTOR = "model.multi_modal_projector."
_ALLOCATOR = "model.fusion."


class IgvaTrainer(Trainer):
    """Trainer of :class:`model.modeling.IgvaLlavaForConditionalGeneration`.

    The loss is exact by tokens under accumulation and over ranks: the Trainer counts the labels of the whole window
    and the model divides its sums by that count, the balance term included (see the model's forward). What is logged as
    ``loss``, ``train_loss`` and ``eval_loss`` is the cross-entropy; ``balance`` stands beside it, and ``objective`` is the sum
    that is minimised, where it differs.

    Args:
        batches: deals the samples to this rank's forward passes; None leaves that to ``transformers.Trainer``.
        projector_learning_rate: peak learning rate of the projector; None: that of the arguments.
        allocator_learning_rate: the same for the weight allocator.
        **kwargs: those of ``transformers.Trainer``.
    """

    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        *args: Any,
        batches: StepBatchSampler | None = None,
        projector_learning_rate: float | None = None,
        allocator_learning_rate: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._batches = batches
        self._learning_rates = {_PROJECTOR: projector_learning_rate, _ALLOCATOR: allocator_learning_rate}
        self._config = self.accelerator.unwrap_model(self.model).config
        self.start_window()
        self.add_callback(_StartWindow(self))
        # The Trainer guesses this from forward's signature; a wrong guess would make accumulation inexact in silence.
        self.model_accepts_loss_kwargs = True

    def start_window(self) -> None:
        """Begin to count and to time anew, at the step where the run stands."""
        self._meter = StepMeter(self._config, self.args.device)
        self._last_logged_step = self.state.global_step

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One group for each pair of learning rate and weight decay that occurs."""
        model = self.model if model is None else model
        if self.optimizer is None:
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(self._parameter_groups(model), **settings)
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        # A cache would keep every key and value of the batch for steps that never come.
        inputs = {**inputs, "use_cache": False}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        balance, weight = outputs.get("balance"), self._config.balance_loss_weight
        if model.training:
            self._meter.update(inputs, outputs.get("fusion_weights"), balance)
        if balance is not None and weight:
            # Without gradient: the value becomes that of the cross-entropy, and the gradient remains that of the sum. The
            # Trainer has multiplied the loss by the number of ranks, over which DistributedDataParallel averages.
            ranks = self.accelerator.num_processes
            scaled = num_items_in_batch is not None and self.args.average_tokens_across_devices
            loss = loss - (ranks if scaled else 1) * weight * balance.detach()
        return (loss, outputs) if return_outputs else loss

    def get_train_dataloader(self) -> DataLoader:
        """As in transformers; with ``batches``, a loader of this rank's batches only, which is not to be sharded once more."""
        if self._batches is None:
            return super().get_train_dataloader()
        workers = self.args.dataloader_num_workers
        return _EpochLoader(
            self.train_dataset,
            batch_sampler=self._batches,
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # "loss" marks the entries of training steps; those of evaluations and the final summary have other keys.
        if "loss" in logs:
            steps = self.state.global_step - self._last_logged_step
            logs |= self._meter.read(steps, lambda counts: self.accelerator.reduce(counts, "sum"))
            self.start_window()
            weight = self._config.balance_loss_weight
            if weight and "balance" in logs:
                logs["objective"] = logs["loss"] + weight * logs["balance"]
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        start = time.perf_counter()
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._meter.pause(time.perf_counter() - start)

    def _parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        decayed = set(self.get_decay_parameter_names(model))
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                key = (self._learning_rate(name), self.args.weight_decay if name in decayed else 0.0)
                groups.setdefault(key, []).append(parameter)
        return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]

    def _learning_rate(self, name: str) -> float:
        for part, learning_rate in self._learning_rates.items():
            # "in": a wrapper such as DistributedDataParallel puts a prefix before the name.
            if part in name and learning_rate is not None:
                return learning_rate
        return self.args.learning_rate

    # Intermediate checkpoints of a LoRA run hold the trained parts only; the base model is where the run began.

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if not has_lora(model):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            save_adapters(model, output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = self.accelerator.unwrap_model(self.model if model is None else model)
        if has_lora(target):
            load_adapters(target, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)


class _EpochLoader(DataLoader):
    """A loader that tells its batch sampler the epoch, as the Trainer asks of it."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


class _StartWindow(TrainerCallback):
    """Keeps what lies before the first step (loading, resuming) out of the speeds."""

    def __init__(self, trainer: IgvaTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer.start_window()
