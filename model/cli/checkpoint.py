"""Loading a checkpoint for use, with the settings that it was trained with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForImageTextToText, AutoProcessor

import model as _registration  # noqa: F401 (the Auto classes learn of the model type)
from model.instruction import InstructionPolicy
from model.modeling import IgvaLlavaForConditionalGeneration
from model.processing import IgvaLlavaProcessor
from model.training.folders import RUN_RECORDS, require_checkpoint
from model.training.recipe import DataSource


@dataclass(frozen=True)
class Checkpoint:
    """A model ready to answer, and how its pictures and instructions are prepared."""

    model: IgvaLlavaForConditionalGeneration
    processor: IgvaLlavaProcessor
    aspect_ratio: str
    instruction_policy: InstructionPolicy


def load_checkpoint(name: str) -> Checkpoint:
    """Load a folder, or a hub name, onto the GPU if there is one.

    A checkpoint of ``igva train`` says in ``training/recipe.yaml`` how its data were prepared; others get the
    defaults of recipes.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder holds no model of this package.
    """
    require_checkpoint(name)
    model = AutoModelForImageTextToText.from_pretrained(name)
    if torch.cuda.is_available():
        model = model.cuda()
    aspect_ratio, policy = _trained_with(Path(name))
    return Checkpoint(model.eval(), AutoProcessor.from_pretrained(name), aspect_ratio, policy)


def _trained_with(folder: Path) -> tuple[str, InstructionPolicy]:
    recipe = folder / RUN_RECORDS / "recipe.yaml"
    data = yaml.safe_load(recipe.read_text(encoding="utf-8"))["data"] if recipe.is_file() else {}
    source = DataSource(path="", **{key: data[key] for key in ("aspect_ratio", "instruction_policy") if key in data})
    return source.aspect_ratio, source.instruction_policy
