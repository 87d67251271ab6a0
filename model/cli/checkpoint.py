"""Loading a checkpoint for use, with the settings that it was trained with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

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
        ValueError: the folder holds no model of this package, or weights of another model than its config describes.
    """
    require_checkpoint(name)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of what does not fit, a line a tensor; ours is one line
    try:
        model, loading = AutoModelForImageTextToText.from_pretrained(
            name, output_loading_info=True, ignore_mismatched_sizes=True
        )
    finally:
        logging.set_verbosity(verbosity)
    _check_complete(name, model, loading)
    if torch.cuda.is_available():
        model = model.cuda()
    return Checkpoint(model.eval(), AutoProcessor.from_pretrained(name))


def _check_complete(name: str, model: IgvaLlavaForConditionalGeneration, loading: dict[str, Any]) -> None:
    """Refuse what transformers only warns of: weights that are not there, or of another shape, would be random."""
    wrong = [f"{key} is missing" for key in sorted(loading["missing_keys"])]
    wrong += [f"{key} is {tuple(found)}, expected {tuple(wanted)}" for key, found, wanted in sorted(loading["mismatched_keys"])]
    wrong += [f"{key} has no place in it" for key in sorted(loading["unexpected_keys"])]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"the weights in {name} are not those of the model that its config.json describes, with the fusion "
            f"{model.config.fusion['type']!r}: {'; '.join(wrong[:3])}{more}. Take config.json and weights from one checkpoint; "
            "`igva convert` changes the fusion's order"
        )
