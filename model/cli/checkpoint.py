"""Loading a checkpoint for use, with the settings that it was trained with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import model as _registration  # noqa: F401 (the Auto classes learn of the model type)
from model.instruction import InstructionPolicy
from model.modeling import IgvaLlavaForConditionalGeneration
from model.processing import IgvaLlavaProcessor
from model.training.folders import require_checkpoint


@dataclass(frozen=True)
class Checkpoint:
    """A model ready to answer; its processor says how pictures and instructions were prepared in training."""

    model: IgvaLlavaForConditionalGeneration
    processor: IgvaLlavaProcessor

    @property
    def aspect_ratio(self) -> str:
        """How pictures are brought to the tower's square."""
        return self.processor.aspect_ratio

    @property
    def instruction_policy(self) -> InstructionPolicy:
        """Which turns stand for the instruction."""
        return self.processor.instruction_policy


def load_checkpoint(name: str) -> Checkpoint:
    """Load a folder, or a hub name, onto the GPU if there is one.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the folder holds no model of this package.
    """
    require_checkpoint(name)
    model = AutoModelForImageTextToText.from_pretrained(name)
    if torch.cuda.is_available():
        model = model.cuda()
    return Checkpoint(model.eval(), AutoProcessor.from_pretrained(name))
