"""The model cards of checkpoints and adapters: what was trained on what, how, what came of it, and how to load it.

It names parts of the hub by their names, and folders and files of this machine by their last part alone.
"""

from __future__ import annotations

from collections.abc import Iterable
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


_LOADING_ADAPTERS = """\
```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

import model  # of igva-kernels: tells the Auto classes of the model type

base = AutoModelForImageTextToText.from_pretrained("THE BASE")
{stage}igva = PeftModel.from_pretrained(base, "THIS FOLDER")
processor = AutoProcessor.from_pretrained("THIS FOLDER")
```

In the terminal: `igva ask "THIS FOLDER" picture.jpg "What colour is it?"` finds the base where it lies beside this folder or
at the hub, else `--base` names it; `igva merge "THIS FOLDER" OUT` makes a plain checkpoint of both.
"""


_STAGE = "base.set_fusion_stage(2)  # the base may stand at stage 1, where no instruction is read\n"


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
    named = {what: public_name(where) for what, where in parts.items() if where is not None}
    head = _head("transformers", named.values())
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
        "data": public_name(recipe.data.path)
        + (f", held out: {public_name(recipe.held_out_path)}" if recipe.held_out_path else ""),
        "samples left out": ", ".join(f"{kind}: {count}" for kind, count in result["samples_left_out"].items()) or "none",
        "pictures": recipe.data.aspect_ratio,
        "steps, batch": f"{result['steps']:,}, {recipe.batch_size}",
        "learning rate": f"{recipe.learning_rate:g}, {recipe.scheduler}, warm-up {recipe.warmup:g}",
        "balance term": f"{recipe.balance_loss_weight:g}",
        "precision": result["precision"],
        "loss in training, held out": f"{_number(result['train_loss'])}, {_number(result['eval_loss'])}",
        **_exact_match(result.get("exact_match", {})),
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
        f"{head}# {recipe.name}\n\n"
        "A vision-language model that fuses the layers of its vision tower, trained with igva-kernels.\n\n"
        f"{_LOADING}\n## How it was made\n\n| | |\n|---|---|\n{rows}\n\n"
        f"| part | parameters that learned | that did not |\n|---|---|---|\n{counts}\n{adapters}\n"
        "The whole recipe, the log and the result are in `training/`. Nothing was measured beyond what stands above; for "
        "accuracy run `igva evaluate`.\n"
    )


def adapter_card(recipe: TrainRecipe, base: str | None, *, has_stages: bool) -> str:
    """The text of ``README.md`` for the adapters of a finished run.

    Args:
        recipe: the run.
        has_stages: whether the fusion has a plain average (stage 1) that the base may stand at.
        base: the checkpoint that they belong to, as ``adapter_config.json`` names it; None: a new model of parts.
    """
    settings, source = recipe.lora, recipe.model
    of_parts = f"a new model of {public_name(source.vision_tower or '')} and {public_name(source.language_model or '')}"
    quantized = recipe.language_model_quantization
    return (
        f"{_head('peft', [base] if base else [])}# {recipe.name}: adapters\n\n"
        f"Low-rank adapters (rank {settings.r}, alpha {settings.alpha}) of the language model, with projector and fusion "
        f"whole, trained with igva-kernels on {base or of_parts}"
        + (f", whose language model was held in {quantized} meanwhile" if quantized else "")
        + f".\n\n{_LOADING_ADAPTERS.replace('{stage}', _STAGE if has_stages else '')}"
    )


def merged_card(config: IgvaLlavaConfig, adapters: str, base: str) -> str:
    """The text of ``README.md`` for a checkpoint that ``igva merge`` made.

    Args:
        config: of the merged model.
        adapters, base: what it was made of.
    """
    named = public_name(adapters), public_name(base)
    fusion = ", ".join(f"{key}: {value}" for key, value in config.fusion.items() if value is not None)
    return (
        f"{_head('transformers', named)}# {named[1]} with {named[0]}\n\n"
        f"The checkpoint {named[1]} with the adapters {named[0]} added into its weights (`igva merge`, igva-kernels).\n\n"
        f"{_LOADING}\n| | |\n|---|---|\n| fusion | {fusion} |\n"
    )


def _head(library: str, parts: Iterable[str]) -> str:
    """What the hub reads at the top of a card; the parts that have a hub name are the bases."""
    of_hub = [name for name in parts if name.count("/") == 1]
    head = {
        "library_name": library,
        "pipeline_tag": "image-text-to-text",
        "tags": _TAGS,
        **({"base_model": of_hub} if of_hub else {}),
    }
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n"


def public_name(where: str) -> str:
    """A hub name as it is; of a path its last part."""
    path = Path(where)
    is_hub_name = where.count("/") == 1 and not path.exists() and not where.startswith((".", "/", "~"))
    return where if is_hub_name and not path.suffix else path.name


def _exact_match(scores: dict[str, float]) -> dict[str, str]:
    """One row for the answers to held-out questions; none where there were none."""
    shares = []
    for name, value in scores.items():
        if (error := scores.get(f"{name}_stderr")) is not None:
            kind = name.removeprefix("eval_exact_match").removeprefix("_") or "overall"
            shares.append(f"{kind} {100 * value:.1f} ± {100 * error:.1f} %")
    return {"exact match, held out": ", ".join(shares)} if shares else {}


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
