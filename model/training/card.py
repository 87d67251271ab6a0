"""The model card of a checkpoint: what was trained on what, how, what came of it, and how to load it.

It names parts of the hub by their names, and folders and files of this machine by their last part alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from model.configuration import IgvaLlavaConfig
from model.training.recipe import TrainRecipe

#: Of transformers' hub: what finds the model there.
_TAGS = ["igva", "llava", "vision-language"]

_LOADING = """\
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

import model  # of igva-kernels: tells the Auto classes of the model type

igva = AutoModelForImageTextToText.from_pretrained("THIS FOLDER")
processor = AutoProcessor.from_pretrained("THIS FOLDER")
```

In the terminal: `igva chat "THIS FOLDER" picture.jpg`, `igva explain "THIS FOLDER" picture.jpg "What colour is it?"`.
"""


def model_card(recipe: TrainRecipe, config: IgvaLlavaConfig, result: dict[str, Any], instruction_policy: str) -> str:
    """The text of ``README.md`` for a finished run.

    Args:
        recipe: the run.
        config: of the model as it is saved.
        result: what :func:`model.training.run.train` returns.
        instruction_policy: which turns stood for the instruction.
    """
    source = recipe.model
    parts = {
        "checkpoint": source.checkpoint,
        "vision tower": source.vision_tower,
        "language model": source.language_model,
        "sentence encoder": source.sentence_encoder,
    }
    named = {what: _name(where) for what, where in parts.items() if where is not None}
    of_hub = [name for name in named.values() if name.count("/") == 1]
    head = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": _TAGS,
        **({"base_model": of_hub} if of_hub else {}),
    }
    stage = config.fusion.get("stage")
    slots = config.fusion_plan(stage).slots
    fusion = {key: value for key, value in config.fusion.items() if value is not None}
    learned = recipe.resolved_language_model_training
    run = {
        "made from": "; ".join(f"{what}: {name}" for what, name in named.items()),
        "fusion": ", ".join(f"{key}: {value}" for key, value in fusion.items()),
        "slots of the fused map": "; ".join(map(str, slots)),
        "stage": f"{recipe.stage}; language model: {learned}",
        "instruction": instruction_policy,
        "data": _name(recipe.data.path) + (f", held out: {_name(recipe.data.eval_path)}" if recipe.data.eval_path else ""),
        "samples left out": ", ".join(f"{kind}: {count}" for kind, count in result["samples_left_out"].items()) or "none",
        "pictures": recipe.data.aspect_ratio,
        "steps, batch": f"{result['steps']:,}, {recipe.batch_size}",
        "learning rate": f"{recipe.learning_rate:g}, {recipe.scheduler}, warm-up {recipe.warmup:g}",
        "balance term": f"{recipe.balance_loss_weight:g}",
        "precision": result["precision"],
        "loss in training, held out": f"{_number(result['train_loss'])}, {_number(result['eval_loss'])}",
        "time, peak memory of a process": f"{result['seconds'] / 3600:.2f} h, {result['peak_memory_gb']:.1f} GB",
    }
    rows = "\n".join(f"| {what} | {value} |" for what, value in run.items())
    counts = "\n".join(
        f"| {part} | {count['trainable']:,} | {count['frozen']:,} |" for part, count in result["parameters"].items()
    )
    adapters = (
        "\nThe adapters stand in `adapters/`, with projector and allocator; the weights here have them merged.\n"
        if learned == "lora"
        else ""
    )
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {recipe.name}\n\n"
        "A vision-language model that fuses the layers of its vision tower, trained with igva-kernels.\n\n"
        f"{_LOADING}\n## How it was made\n\n| | |\n|---|---|\n{rows}\n\n"
        f"| part | parameters that learned | that did not |\n|---|---|---|\n{counts}\n{adapters}\n"
        "The whole recipe, the log and the result are in `training/`. Nothing was measured beyond the losses above; for "
        "accuracy run `igva evaluate`.\n"
    )


def _name(where: str) -> str:
    """A hub name as it is; of a path its last part."""
    path = Path(where)
    is_hub_name = where.count("/") == 1 and not path.exists() and not where.startswith((".", "/", "~"))
    return where if is_hub_name and not path.suffix else path.name


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
