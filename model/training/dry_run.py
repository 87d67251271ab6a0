"""A recipe checked without a weight: architecture, what learns, optimizer, schedule, data, folders.

The model is built on torch's meta device, where parameters have shapes and no memory: a 13B model takes seconds, and nothing
else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, get_scheduler

from model.configuration import IgvaLlavaConfig
from model.data.llava_json import Sample, read_llava_json
from model.data.problems import Problems, SampleError, check_on_error
from model.modeling import IgvaLlavaForConditionalGeneration
from model.training.data import plain_dataset, step_batches
from model.training.freeze import FreezeReport, apply_stage
from model.training.lora import add_lora
from model.training.parameter_groups import ALLOCATOR, PROJECTOR, parameter_groups
from model.training.parts import architecture_of_run, load_processor
from model.training.recipe import SMOKE_STEPS, TrainRecipe

if TYPE_CHECKING:
    from rich.table import Table

#: Samples that are read, tokenized and checked in full.
NUM_SAMPLES = 16


@dataclass
class DryRun:
    """What a dry run found.

    ``obstacles`` are what would stop the run; ``notes`` what could not be checked here. The rest is None, or empty, where an
    obstacle kept it from being computed. ``memory_gb`` is for weights, gradients and AdamW's states, once over all devices, in
    10^9 bytes, without activations; ``learning_rates`` holds (step, rate of the first group).
    """

    parameters: FreezeReport | None = None
    slots: list[str] = field(default_factory=list)
    tokens_per_image: int | None = None
    groups: list[dict[str, Any]] = field(default_factory=list)
    num_samples: int | None = None
    steps: int | None = None
    learning_rates: list[tuple[int, float]] = field(default_factory=list)
    memory_gb: float | None = None
    samples_checked: int = 0
    obstacles: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def tables(self) -> list[Table]:
        """For a terminal."""
        from rich.table import Table

        tables = [] if self.parameters is None else [self.parameters.table()]
        plan = Table("", "", title="Plan", show_header=False)
        rows = {
            "slots of the fused map": "; ".join(self.slots),
            "tokens of an image": self.tokens_per_image,
            "samples": self.num_samples,
            "optimizer steps": self.steps,
            "learning rate at step": ", ".join(f"{step:,}: {rate:.3g}" for step, rate in self.learning_rates),
            "weights, gradients, AdamW": None if self.memory_gb is None else f"{self.memory_gb:.1f} GB, without activations",
            "samples checked in full": self.samples_checked,
        }
        for name, value in rows.items():
            if value not in (None, ""):
                plan.add_row(name, f"{value:,}" if isinstance(value, int) else value)
        optimizer = Table("parameters", "learning rate", "weight decay", title="Optimizer groups")
        for group in self.groups:
            optimizer.add_row(f"{group['parameters']:,}", f"{group['lr']:g}", f"{group['weight_decay']:g}")
        return [*tables, optimizer, plan]


def dry_run(recipe: TrainRecipe, num_processes: int = 1, shipped: Mapping[str, Path] | None = None) -> DryRun:
    """Check a recipe as far as that goes without weights; nothing is written.

    Args:
        recipe: the run.
        num_processes: processes that it will have.
        shipped: recipes by name: where ``model.checkpoint`` is not there yet and one of them makes it, its architecture is
            taken.

    Returns:
        What was found; errors of the recipe and its data are in ``obstacles``, not raised.
    """
    found = DryRun()
    try:
        recipe.accumulation_steps(num_processes)
    except ValueError as error:
        found.obstacles.append(str(error))
    try:
        config, maker = architecture_of_run(recipe.model, shipped or {})
        if maker is not None:
            found.notes.append(
                f"model.checkpoint {recipe.model.checkpoint} is not there yet: taken as the recipe {maker} makes it"
            )
        _check_model(recipe, config, found)
    except (ValueError, OSError, ImportError) as error:
        found.obstacles.append(f"model: {_short(error)}")
    samples = _check_records(recipe, found)
    if samples:
        _check_samples(recipe, samples, found)
        if not any(text.startswith("batch_size") for text in found.obstacles):
            _check_schedule(recipe, samples, num_processes, found)
    for text in _folder_obstacles(recipe):
        found.obstacles.append(text)
    return found


def _check_model(recipe: TrainRecipe, config: IgvaLlavaConfig, found: DryRun) -> None:
    found.tokens_per_image = config.num_image_tokens
    found.slots = [str(slot) for slot in config.fusion_plan(recipe.stage if config.fusion.get("stage") else None).slots]
    with torch.device("meta"):
        model = IgvaLlavaForConditionalGeneration(config)
        if recipe.resolved_language_model_training == "lora":
            add_lora(model, recipe.lora)
    found.parameters = apply_stage(model, recipe.stage, recipe.resolved_language_model_training)
    groups = parameter_groups(
        model,
        set(Trainer.get_decay_parameter_names(None, model)),
        learning_rate=recipe.learning_rate,
        part_learning_rates={PROJECTOR: recipe.projector_learning_rate, ALLOCATOR: recipe.allocator_learning_rate},
        weight_decay=recipe.weight_decay,
    )
    found.groups = [{**group, "parameters": sum(tensor.numel() for tensor in group.pop("params"))} for group in groups]
    # fp32 weight, its gradient and two moments; what does not learn in bf16 where the recipe allows it, else fp32.
    frozen_bytes = 4 if recipe.frozen_weights == "fp32" or recipe.precision == "fp32" else 2
    found.memory_gb = (16 * found.parameters.trainable + frozen_bytes * found.parameters.frozen) / 1e9


def _check_records(recipe: TrainRecipe, found: DryRun) -> list[Sample]:
    source = recipe.data
    missing = [
        f"data.{name}: nothing at {path}"
        for name, path in (("path", source.path), ("image_folder", source.image_folder), ("eval_path", source.eval_path))
        if path is not None and not Path(path).exists()
    ]
    if recipe.evaluation.path is not None and not Path(recipe.evaluation.path).exists():
        missing.append(f"evaluation.path: nothing at {recipe.evaluation.path}")
    found.obstacles += missing
    if source.instruction_cache is not None and not Path(source.instruction_cache).is_file():
        found.notes.append(
            f"data.instruction_cache {source.instruction_cache} is not there: instructions are embedded before the first step"
        )
    if missing:
        return []
    problems = Problems("skip")
    try:
        samples = read_llava_json(source.path, source.image_folder, problems)
        for path in filter(None, {recipe.held_out_path, recipe.questions_path}):
            read_llava_json(path, source.image_folder, problems)
    except (ValueError, OSError) as error:
        found.obstacles.append(f"data: {_short(error)}")
        return []
    found.num_samples = len(samples)
    actions = check_on_error(source.on_error)
    for kind, count in problems.counts().items():
        first = next(problem.message for problem in problems.all() if problem.kind == kind)
        text = f"data: {count:,} x {kind}, first: {first}"
        (found.notes if actions[kind] == "skip" else found.obstacles).append(text)
    return samples


def _check_samples(recipe: TrainRecipe, samples: list[Sample], found: DryRun) -> None:
    """Read, tokenize and label samples from all over the file."""
    try:
        processor = load_processor(recipe.model)
    except (ValueError, OSError) as error:
        found.notes.append(f"texts and images of the samples were not checked, as there is no processor: {_short(error)}")
        return
    data, _ = plain_dataset(recipe, processor, samples)
    actions = check_on_error(recipe.data.on_error)
    step = max(1, len(data) // NUM_SAMPLES)
    for index in list(range(0, len(data), step))[:NUM_SAMPLES]:
        try:
            data[index]
            found.samples_checked += 1
        except SampleError as error:
            (found.notes if actions[error.kind] == "skip" else found.obstacles).append(f"data: {_short(error)}")
        except ValueError as error:
            found.obstacles.append(f"data: {_short(error)}")


def _check_schedule(recipe: TrainRecipe, samples: list[Sample], num_processes: int, found: DryRun) -> None:
    # Lengths say which samples share a step, and not how many steps there are.
    passes = len(step_batches(recipe, samples, [1] * len(samples), rank=0, num_ranks=num_processes))
    steps = math.ceil(passes / recipe.accumulation_steps(num_processes) * recipe.epochs)
    steps = recipe.max_steps or steps
    found.steps = min(steps, SMOKE_STEPS) if recipe.smoke else steps
    peak = found.groups[0]["lr"] if found.groups else recipe.learning_rate
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    warmup = math.ceil(recipe.warmup * found.steps) if recipe.warmup < 1 else int(recipe.warmup)
    name = "constant_with_warmup" if recipe.scheduler == "constant" else recipe.scheduler
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=found.steps)
    rate = scheduler.lr_lambdas[0]
    marks = sorted({0, warmup, (warmup + found.steps) // 2, found.steps - 1} & set(range(found.steps)))
    found.learning_rates = [(step, peak * rate(step)) for step in marks]


def _folder_obstacles(recipe: TrainRecipe) -> list[str]:
    folder = recipe.checkpoint_folder
    partial = folder.with_name(folder.name + ".partial")
    if recipe.smoke or recipe.overwrite:
        return []
    if folder.is_dir() and any(folder.iterdir()):
        return [f"output_dir: {folder} is not empty; choose another, or set overwrite=true"]
    if partial.is_dir() and any(partial.iterdir()) and not recipe.resume:
        return [f"output_dir: an unfinished run stands in {partial}; set resume=true, or overwrite=true"]
    return []


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]
