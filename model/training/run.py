"""One training run, from a recipe to a checkpoint.

result = train(load_recipe("recipe.yaml"))
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.console import Console, RenderableType
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers.trainer_utils import SaveStrategy, set_seed

from model.attention import choose_attention
from model.configuration import IgvaLlavaConfig
from model.data.batches import StepBatchSampler
from model.data.collator import ImageTextCollator, PackingCollator
from model.data.dataset import LlavaDataset
from model.data.problems import Problems
from model.loading import load_model
from model.modeling import IgvaLlavaForConditionalGeneration
from model.processing import IgvaLlavaProcessor
from model.quantization import is_quantized
from model.training.callbacks import JsonlLog, StatusLine, keep_tensorboard
from model.training.card import adapter_card, model_card, public_name
from model.training.checkpoints import RunIdentity, step_of, telling_what_is_safe
from model.training.data import load_data, load_questions, step_batches
from model.training.distributed import (
    distributed_arguments,
    gathered_state,
    read_config,
    start_processes,
    uses_deepspeed,
)
from model.training.folders import RunFolders
from model.training.freeze import apply_stage
from model.training.held_out import EXACT_MATCH, HeldOutQuestions
from model.training.layers import prepare_layers
from model.training.lora import add_lora, has_lora, load_adapters, merge_lora, merged_state, save_adapters
from model.training.meter import peak_memory_gb
from model.training.parts import load_parts
from model.training.precision import choose_precision, hold_frozen_weights
from model.training.recipe import SMOKE_STEPS, TrainRecipe
from model.training.trainer import IgvaTrainer


def train(recipe: TrainRecipe, callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Train as a recipe says and save the checkpoint.

    Args:
        recipe: the run.
        callbacks: further callbacks of transformers' Trainer.

    Returns:
        ``checkpoint`` (folder, loadable by ``AutoModelForImageTextToText`` and ``AutoProcessor`` after
        ``import model``), ``steps``, ``kept_step`` (whose weights the checkpoint holds: the last one, or the best where
        ``evaluation.keep_best`` asks for it), ``train_loss`` (over the steps taken now, None if there were none left),
        ``eval_loss`` (None without held-out data) and ``exact_match`` (scores of the held-out questions by their names in the
        log, empty without) of the kept step, ``seconds``, ``precision``, ``peak_memory_gb``, ``parameters`` (counts by part)
        and ``samples_left_out`` (counts by kind).

    Raises:
        ValueError, FileNotFoundError, FileExistsError: settings, data or folders that do not fit; nothing was trained
            then.
    """
    start = time.perf_counter()
    ranks = start_processes(recipe.distributed)
    folders = RunFolders(recipe)
    if ranks.is_main_process:
        folders.check()
    set_seed(recipe.seed)

    say(f"[bold]{recipe.name}[/bold]: loading the parts")
    model, processor = load_parts(recipe.model, recipe.language_model_quantization)
    model.config.balance_loss_weight = recipe.balance_loss_weight
    model.config.legacy_double_softmax = recipe.legacy_double_softmax

    if recipe.resolved_language_model_training == "lora":
        add_lora(model, recipe.lora)
    instructions = processor.sentence_encoder is not None
    report = apply_stage(model, recipe.stage, recipe.resolved_language_model_training, instructions=instructions)
    say(report.table())
    # The tower is frozen and keeps nothing; only the language model has activations worth giving up.
    for line in prepare_layers(model.model.language_model, recipe, ranks.device):
        say(line)

    # One rank makes the folder and embeds the instructions; the others find both.
    with ranks.main_process_first():
        if ranks.is_main_process:
            folders.start()
        problems = Problems(recipe.data.on_error, folders.problems)
        train_data, eval_data = load_data(
            recipe,
            processor,
            folders.instructions,
            reads_instruction=model.reads_instruction,
            problems=problems,
            fills=ranks.is_main_process,
        )
        question_data = load_questions(
            recipe,
            processor,
            folders.instructions,
            eval_data,
            reads_instruction=model.reads_instruction,
            problems=problems,
            fills=ranks.is_main_process,
        )
    questions = held_out_questions(recipe, question_data, model)
    say(f"{len(train_data):,} samples to train on, {len(eval_data) if eval_data else 0:,} held out")

    # A model that reads instructions and gets none has parameters that take no part.
    all_learn = instructions or not model.reads_instruction
    arguments = training_arguments(recipe, folders, distributed_arguments(recipe, model, all_learn=all_learn))
    precision = "bf16" if arguments.bf16 else "fp32"
    prepare_language_model(model, recipe, precision)
    # As it was resolved: a CPU's choice by the clock may fall the other way when the run goes on.
    identity = RunIdentity.of({**recipe.to_dict(), "precision": precision}, ranks.num_processes, train_data.estimated_lengths())
    resume_from = folders.resume_from(identity)
    if ranks.is_main_process:
        folders.check_room(*checkpoint_sizes(model, arguments.save_strategy != SaveStrategy.NO))
    trainer = IgvaTrainer(
        model=model,
        args=arguments,
        data_collator=PackingCollator() if recipe.data.packing else ImageTextCollator(processor.tokenizer.pad_token_id),
        batches=deal_batches(recipe, train_data),
        questions=questions,
        train_dataset=train_data,
        eval_dataset=eval_data,
        processing_class=processor,
        callbacks=[StatusLine(), JsonlLog(folders.log, {"recipe": recipe.to_dict(), "parts": report.to_dict()}), *callbacks],
        projector_learning_rate=recipe.projector_learning_rate,
        allocator_learning_rate=recipe.allocator_learning_rate,
        identity=identity,
    )
    trainer.remove_callback(PrinterCallback)
    keep_tensorboard(trainer.callback_handler.callbacks, folders.tensorboard)
    outcome = trainer.train(resume_from_checkpoint=resume_from)
    kept_step = _kept_step(trainer)
    held_out = _held_out_scores(trainer, kept_step) if eval_data else {}
    left_out = report_problems(trainer, problems)

    result = {
        "checkpoint": str(folders.checkpoint),
        "steps": outcome.global_step,
        "kept_step": kept_step,
        # A run that was stopped after its last step has none to take, and the Trainer's mean over none is 0.
        "train_loss": outcome.training_loss if outcome.global_step > step_of(resume_from) else None,
        "eval_loss": held_out.get("eval_loss"),
        "exact_match": {name: value for name, value in held_out.items() if name.startswith(f"eval_{EXACT_MATCH}")},
        "seconds": time.perf_counter() - start,
        "precision": precision,
        "peak_memory_gb": peak_memory_gb(),
        "parameters": report.to_dict(),
        "samples_left_out": left_out,
    }
    save_checkpoint(recipe, trainer, processor, folders, result)
    say(f"saved {folders.checkpoint}")
    trainer.accelerator.wait_for_everyone()
    return result


def process_state() -> PartialState:
    """This process among the ranks of the run."""
    # Without the flag accelerate takes the ranks of a run on CPUs for so many runs of their own.
    return PartialState(cpu=not torch.cuda.is_available())


def say(message: RenderableType) -> None:
    """Tell the person at the terminal, once for all ranks."""
    if process_state().is_main_process:
        Console(stderr=True).print(message)


def prepare_language_model(model: IgvaLlavaForConditionalGeneration, recipe: TrainRecipe, precision: str) -> None:
    """Set the attention of the run and hold what does not learn as the recipe says."""
    device = process_state().device
    attention = choose_attention(recipe.attention, device, packing=recipe.data.packing, half_precision=precision == "bf16")
    model.model.language_model.set_attn_implementation(attention.name)
    say(f"attention: {attention.name} ({attention.reason})")
    # FSDP2 shards frozen and learning weights together, and those of one shard must have one type.
    held_in = "fp32" if recipe.distributed == "fsdp2" else recipe.frozen_weights
    in_bf16 = hold_frozen_weights(model, held_in, device, precision)
    if in_bf16:
        say(f"{in_bf16:,} parameters that do not learn are held, and will be saved, in bf16")


def deal_batches(recipe: TrainRecipe, data: LlavaDataset) -> StepBatchSampler:
    """Which samples share a step and a forward pass, for this rank."""
    ranks = process_state()
    lengths = data.estimated_lengths()
    return step_batches(recipe, data.samples, lengths, rank=ranks.process_index, num_ranks=ranks.num_processes)


def checkpoint_sizes(model: IgvaLlavaForConditionalGeneration, saves_steps: bool) -> tuple[int, int]:
    """About how many bytes the finished checkpoint takes, and one of a step (0 where none is saved)."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    # AdamW keeps two numbers in fp32 for each that learns.
    states = sum(8 * parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return weights, (weights + states if saves_steps else 0)


def training_arguments(recipe: TrainRecipe, folders: RunFolders, distributed: dict[str, Any]) -> TrainingArguments:
    """The settings of a recipe in the words of transformers' Trainer.

    Args:
        recipe: the run.
        folders: where it writes.
        distributed: what :func:`model.training.distributed.distributed_arguments` gives.
    """
    ranks = process_state()
    # One rank's timing counts for all: close to a tie each might come to a choice of its own.
    (precision,) = broadcast_object_list([choose_precision(recipe.precision, ranks.device)])
    say(f"arithmetic: {precision.precision} ({precision.reason})")
    max_steps = recipe.max_steps or -1
    if recipe.smoke:
        max_steps = min(SMOKE_STEPS, recipe.max_steps or SMOKE_STEPS)
    save_every = None if recipe.smoke else recipe.save_every
    best = recipe.evaluation.keep_best
    return TrainingArguments(
        output_dir=str(folders.intermediate),
        run_name=recipe.name,
        per_device_train_batch_size=recipe.micro_batch_size,
        per_device_eval_batch_size=recipe.eval_batch_size or recipe.micro_batch_size,
        gradient_accumulation_steps=recipe.accumulation_steps(ranks.num_processes),
        num_train_epochs=recipe.epochs,
        max_steps=max_steps,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        warmup_steps=recipe.warmup,
        lr_scheduler_type="constant_with_warmup" if recipe.scheduler == "constant" else recipe.scheduler,
        bf16=precision.precision == "bf16",
        seed=recipe.seed,
        logging_steps=1 if recipe.smoke else recipe.log_every,
        logging_first_step=True,
        save_strategy="best" if best else "steps" if save_every else "no",
        save_steps=save_every or 500,
        save_total_limit=1,
        eval_strategy="steps" if recipe.eval_every else "no",
        eval_steps=recipe.eval_every,
        load_best_model_at_end=best is not None,
        metric_for_best_model=best,
        greater_is_better=None if best is None else best != "loss",
        prediction_loss_only=True,
        dataloader_num_workers=recipe.data.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        # The collator's tensors are not all arguments that the Trainer would find by name before collation.
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=recipe.trackers or "none",
        disable_tqdm=True,  # StatusLine shows more
        **distributed,
    )


def held_out_questions(
    recipe: TrainRecipe, data: LlavaDataset | None, model: IgvaLlavaForConditionalGeneration
) -> HeldOutQuestions | None:
    """The questions of ``recipe.evaluation``, checked before the first step; None where there are none.

    Raises:
        ValueError: no questions, one that is too long for the language model, or a metric to keep the best step by that they
            do not have.
    """
    if data is None:
        return None
    if uses_deepspeed(recipe.distributed) and read_config(recipe.distributed)["zero_optimization"]["stage"] == 3:
        raise ValueError(
            f"evaluation.exact_match is set, but {recipe.distributed} asks DeepSpeed for stage 3, whose weights cannot be "
            "gathered while it generates; set it to false, or choose a lower stage"
        )
    settings, ranks = recipe.evaluation, process_state()
    questions = HeldOutQuestions(
        data,
        max_samples=settings.max_samples,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size or recipe.eval_batch_size or recipe.micro_batch_size,
        rank=ranks.process_index,
        num_ranks=ranks.num_processes,
    )
    questions.check_length(getattr(model.config.text_config, "max_position_embeddings", None))
    if settings.keep_best not in (None, "loss", *questions.metrics):
        raise ValueError(
            f"evaluation.keep_best is {settings.keep_best!r}, but the held-out questions give {', '.join(questions.metrics)}"
        )
    say(f"{len(questions):,} held-out questions are answered at each evaluation, of the kinds {', '.join(questions.kinds)}")
    return questions


def report_problems(trainer: IgvaTrainer, problems: Problems) -> dict[str, int]:
    """Say and log how many samples were left out, by kind; nothing where there were none."""
    # Every rank has met its last sample.
    trainer.accelerator.wait_for_everyone()
    counts = problems.counts()
    if counts:
        say(problems.table())
        trainer.log({"samples_left_out": sum(counts.values()), **{f"left_out_{kind}": n for kind, n in counts.items()}})
    return counts


def save_checkpoint(
    recipe: TrainRecipe,
    trainer: IgvaTrainer,
    processor: IgvaLlavaProcessor,
    folders: RunFolders,
    result: dict[str, Any],
) -> None:
    """Put the checkpoint together and move it to its place; every process must call it.

    Adapters are saved as they are, in ``adapters/``, and merged: the checkpoint itself is a plain model.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    state = gathered_state(trainer)
    if not trainer.is_world_process_zero():
        return
    with telling_what_is_safe("the finished checkpoint", folders.staging, trainer.checkpoints.newest()):
        folders.stage()
        if has_lora(model):
            adapters = folders.staging / "adapters"
            base = None if recipe.model.checkpoint is None else public_name(recipe.model.checkpoint)
            save_adapters(model, adapters, state, base=base)
            processor.save_pretrained(adapters)
            card = adapter_card(recipe, base, has_stages=model.fusion_stage is not None)
            (adapters / "README.md").write_text(card, encoding="utf-8")
            if is_quantized(model):
                # The base's own weights, as quantised ones have no room for what the adapters add.
                model = merged_with_base(recipe, adapters, model.config)
                state = model.state_dict()
            else:
                state = merged_state(model, state)
        model.save_pretrained(folders.staging, state_dict=state)
        processor.save_pretrained(folders.staging)
        card = model_card(recipe, model.config, result, processor.instruction_policy)
        (folders.staging / "README.md").write_text(card, encoding="utf-8")
        trainer.state.save_to_json(str(folders.records / "trainer_state.json"))
        (folders.records / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False), encoding="utf-8")
        (folders.records / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        for file in (folders.log, folders.problems):
            if file.is_file():
                shutil.copy(file, folders.records / file.name)
        if folders.tensorboard.is_dir():
            shutil.copytree(folders.tensorboard, folders.records / folders.tensorboard.name)
        folders.publish()


def merged_with_base(recipe: TrainRecipe, adapters: Path, config: IgvaLlavaConfig) -> IgvaLlavaForConditionalGeneration:
    """The plain model of a run on a quantised language model: the checkpoint that it began from, with its adapters merged.

    Args:
        recipe: with ``model.checkpoint``.
        adapters: the folder that :func:`model.training.lora.save_adapters` wrote.
        config: of the trained model, for the settings of the loss.
    """
    model = load_model(str(recipe.model.checkpoint), dtype=torch.float32)
    load_adapters(model, adapters)
    merge_lora(model)
    model.config.balance_loss_weight = config.balance_loss_weight
    model.config.legacy_double_softmax = config.legacy_double_softmax
    return model


def _kept_step(trainer: IgvaTrainer) -> int:
    """The step whose weights the trainer holds at the end."""
    best = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
    return best or trainer.state.global_step


def _held_out_scores(trainer: IgvaTrainer, step: int) -> dict[str, float]:
    """The log entry of the held-out data at a step, which an evaluation every few steps may have made already."""
    entries = [entry for entry in trainer.state.log_history if "eval_loss" in entry and entry["step"] == step]
    return entries[-1] if entries else trainer.evaluate()
