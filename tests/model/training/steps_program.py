"""Run by test_steps.py, on one process or two: gradients of one step of the trainer, by accumulation and ranks.

    python steps_program.py FOLDER BATCH_SIZE            # or by torch.distributed.run

FOLDER holds a model (``model/``) and ``samples.pt``, a list of samples as LlavaDataset gives them. For accumulation 1 and 4,
padded and packed, rank 0 writes ``RANKS-ACCUMULATION-LAYOUT.pt``: the gradients that the optimizer gets, the logged ``loss``
and ``balance``, and the held-out loss over all samples.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, TrainerCallback, TrainingArguments

import model  # noqa: F401 (registers the model)
from model.data.batches import StepBatchSampler
from model.data.collator import ImageTextCollator, PackingCollator
from model.training.freeze import apply_stage
from model.training.trainer import IgvaTrainer


class KeepGradients(TrainerCallback):
    """Copies the gradients just before the optimizer's step."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = {name: p.grad.clone() for name, p in kwargs["model"].named_parameters() if p.grad is not None}
        self.gradients = {name.removeprefix("module."): grad for name, grad in named.items()}


def take_step(folder: Path, batch_size: int, accumulation: int, layout: str) -> dict[str, Any]:
    network = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=torch.float32)
    apply_stage(network, 2, "full")
    samples = torch.load(folder / "samples.pt")
    arguments = TrainingArguments(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=1,
        per_device_eval_batch_size=3,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        learning_rate=0.0,  # the evaluation that follows sees the same weights
        max_grad_norm=0.0,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        prediction_loss_only=True,
    )
    micro_batch_size = batch_size // accumulation // arguments.world_size
    batches = StepBatchSampler(
        [len(sample["input_ids"]) for sample in samples],
        ["pixel_values" in sample for sample in samples],
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        packing=layout == "packed",
        rank=arguments.process_index,
        num_ranks=arguments.world_size,
    )
    kept = KeepGradients()
    trainer = IgvaTrainer(
        model=network,
        args=arguments,
        train_dataset=samples,
        eval_dataset=samples,
        data_collator=PackingCollator() if layout == "packed" else ImageTextCollator(256),
        batches=batches,
        callbacks=[kept],
    )
    trainer.train()
    held_out = trainer.evaluate()["eval_loss"]
    logged = next(entry for entry in trainer.state.log_history if "loss" in entry)
    return {"gradients": kept.gradients, "held_out": held_out, **{name: logged[name] for name in ("loss", "balance")}}


def main() -> None:
    folder, batch_size = Path(sys.argv[1]), int(sys.argv[2])
    for accumulation in (1, 4):
        for layout in ("padded", "packed"):
            result = take_step(folder, batch_size, accumulation, layout)
            ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
            if ranks == 1 or torch.distributed.get_rank() == 0:
                torch.save(result, folder / f"{ranks}-{accumulation}-{layout}.pt")


if __name__ == "__main__":
    main()
