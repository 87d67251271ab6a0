"""transformers' Trainer with what this model needs: groups of learning rates, and a log that shows the fusion."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from model.data.batches import HeldOutBatchSampler, StepBatchSampler
from model.loss import IGNORE_INDEX
from model.training.flops import StepFlops, peak_of_run
from model.training.held_out import HeldOutQuestions, unchanged_random_states
from model.training.meter import StepMeter
from model.training.parameter_groups import ALLOCATOR, PROJECTOR, parameter_groups
from model.training.saving import CheckpointingTrainer


class IgvaTrainer(CheckpointingTrainer):
    """Trainer of :class:`model.modeling.IgvaLlavaForConditionalGeneration`.

    The loss is exact by tokens under accumulation and over ranks: the Trainer counts the labels of the whole window
    and the model divides its sums by that count, the balance term included (see the model's forward). What is logged as
    ``loss``, ``train_loss`` and ``eval_loss`` is the cross-entropy; ``balance`` stands beside it, and ``objective`` is the sum
    that is minimised, where it differs.

    Args:
        batches: deals the samples to this rank's forward passes; None leaves that to ``transformers.Trainer``.
        questions: held-out questions that the model answers at every evaluation; their scores are metrics as ``eval_loss`` is,
            such as ``eval_exact_match``, also for ``metric_for_best_model``.
        projector_learning_rate: peak learning rate of the projector; None: that of the arguments.
        allocator_learning_rate: the same for the weight allocator.
        **kwargs: those of :class:`model.training.saving.CheckpointingTrainer`.
    """

    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        *args: Any,
        batches: StepBatchSampler | None = None,
        questions: HeldOutQuestions | None = None,
        projector_learning_rate: float | None = None,
        allocator_learning_rate: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._batches = batches
        self._questions = questions
        self._learning_rates = {PROJECTOR: projector_learning_rate, ALLOCATOR: allocator_learning_rate}
        whole = self.accelerator.unwrap_model(self.model)
        self._config, self._flops = whole.config, StepFlops.of(whole)
        self._peak_flops = peak_of_run(self.args.device, "bf16" if self.args.bf16 else "fp32")
        self.start_window()
        self.add_callback(_StartWindow(self))
        # The Trainer guesses this from forward's signature; a wrong guess would make accumulation inexact in silence.
        self.model_accepts_loss_kwargs = True

    def start_window(self) -> None:
        """Begin to count and to time anew, at the step where the run stands."""
        self._meter = StepMeter(self._config, self.args.device, self._flops, self._peak_flops)
        self._last_logged_step = self.state.global_step

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One group for each pair of learning rate and weight decay that occurs."""
        model = self.model if model is None else model
        if self.optimizer is None:
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = parameter_groups(
                model,
                set(self.get_decay_parameter_names(model)),
                learning_rate=self.args.learning_rate,
                part_learning_rates=self._learning_rates,
                weight_decay=self.args.weight_decay,
            )
            self.optimizer = optimizer_class(groups, **settings)
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
        return _EpochLoader(self.train_dataset, batch_sampler=self._batches, **self._loader_settings())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """A loader of this rank's held-out batches, each sample once over all ranks (transformers repeats some)."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("there is no eval_dataset; give one to the trainer or to evaluate()")
        batches = HeldOutBatchSampler(
            len(dataset), self.args.per_device_eval_batch_size, self.args.process_index, self.accelerator.num_processes
        )
        return DataLoader(dataset, batch_sampler=batches, **self._loader_settings())

    def _loader_settings(self) -> dict[str, Any]:
        workers = self.args.dataloader_num_workers
        return {
            "collate_fn": self.data_collator,
            "num_workers": workers,
            "pin_memory": self.args.dataloader_pin_memory,
            "persistent_workers": self.args.dataloader_persistent_workers,
            "prefetch_factor": self.args.dataloader_prefetch_factor if workers else None,
        }

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> tuple[list, Any]:
        """As in transformers, with a clock at the loader."""
        return super().get_batch_samples(self._meter.timed(epoch_iterator), num_batches, device)

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
        """As in transformers; the steps that follow are those of a run without evaluations, to the bit."""
        start = time.perf_counter()
        try:
            with unchanged_random_states(self.args.device):
                return super().evaluate(*args, **kwargs)
        finally:
            self._meter.pause(time.perf_counter() - start)

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """As in transformers, with the loss per token over all held-out data: its own is a mean of the batches' means."""
        self._held_out = _HeldOutLoss(dataloader.batch_sampler.num_counted, self.args.device)
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics[f"{metric_key_prefix}_loss"] = self._held_out.read(lambda sums: self.accelerator.reduce(sums, "sum"))
        if self._questions is not None:
            scores = self._scores(self._questions)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in scores.items()})
        return output

    def _scores(self, questions: HeldOutQuestions) -> dict[str, float]:
        model = self.accelerator.unwrap_model(self.model)
        # The tower runs outside of forward(), which accelerate has wrapped in this already.
        with self.accelerator.autocast():
            return questions.score(model, lambda counts: self.accelerator.reduce(counts, "sum"), sharded=self.is_fsdp_enabled)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        """The cross-entropy of a held-out batch per token; logits are never made."""
        inputs = {**self._prepare_inputs(inputs), "use_cache": False}
        whole = self.accelerator.unwrap_model(model).model
        whole.always_encodes_an_image = self.is_deepspeed_enabled
        try:
            with torch.no_grad(), self.compute_loss_context_manager():
                total = model(**inputs, num_items_in_batch=1).cross_entropy
        finally:
            whole.always_encodes_an_image = False
        return self._held_out.add(total, inputs["labels"]), None, None


class _HeldOutLoss:
    """Sums the cross-entropy and the labels of the batches that count.

    Args:
        num_counted: batches of this rank that count; those that follow are fillers.
        device: where the model runs.
    """

    def __init__(self, num_counted: int, device: torch.device) -> None:
        self._left = num_counted
        self._sums = torch.zeros(2, device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)

    def add(self, cross_entropy: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Take in the summed cross-entropy of a batch; returns its mean over the labels."""
        num_labels = (labels[:, 1:] != IGNORE_INDEX).sum()
        if self._left > 0:
            self._sums += torch.stack([cross_entropy.to(self._sums.dtype), num_labels.to(self._sums.dtype)])
        self._left -= 1
        return cross_entropy / num_labels.clamp(min=1)

    def read(self, sum_over_ranks: Callable[[torch.Tensor], torch.Tensor]) -> float:
        """The mean over all labels of all ranks; a collective, which all ranks must call."""
        cross_entropy, num_labels = sum_over_ranks(self._sums).tolist()
        return cross_entropy / max(num_labels, 1)


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
