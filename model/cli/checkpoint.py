"""Loading a checkpoint for use, with the settings that it was trained with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoProcessor

import model as _registration  # noqa: F401 (the Auto classes learn of the model type)
from model.adapters import adapter_folder, load_adapted
from model.instruction import InstructionPolicy
from model.loading import load_model
from model.modeling import IgvaLlavaForConditionalGeneration
from model.processing import IgvaLlavaProcessor
from model.quantization import Quantization, loading_options
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
        """Which turns stand for the instruction of a question."""
        return self.processor.question_policy


def load_checkpoint(
    name: str, *, base: str | None = None, quantization: Quantization | None = None, dtype: str = "auto"
) -> Checkpoint:
    """Load a folder, or a hub name, onto the GPU if there is one.

    Args:
        name: a checkpoint, or adapters.
        base: where ``name`` is a folder of adapters, the checkpoint that they were trained from; None: the one that they name.
        quantization: see :func:`model.quantization.quantization_config`.
        dtype: of the weights, by its name in torch; ``"auto"``: that of the checkpoint.

    Raises:
        FileNotFoundError: there is no such folder, or it lacks a file.
        ImportError: the library of the quantisation is not installed.
        ValueError: the folder holds no model of this package, a damaged file, weights of another model than its config
            describes, or another sentence encoder than the one that was saved; ``base`` for what is no folder of adapters.
    """
    options = loading_options(quantization, "auto" if dtype == "auto" else getattr(torch, dtype))
    adapters = adapter_folder(name)
    if adapters is not None:
        model, processor = load_adapted(adapters, base, **options)
    elif base is not None:
        raise ValueError(f"--base goes with a folder of adapters, and {name} is none; leave it out")
    else:
        require_checkpoint(name)
        model, processor = load_model(name, **options), AutoProcessor.from_pretrained(name)
    if torch.cuda.is_available() and quantization is None:
        model = model.cuda()
    return Checkpoint(model.eval(), processor)
