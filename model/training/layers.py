"""How the layers of the language model run: with Liger's kernels, compiled, and with which activations kept.

All three act on the layers of the language model, where nearly all of a step's time and memory goes (docs/fast-training.md).
Parameters, their names and the checkpoint stay the same.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from model._hf_compat import enable_activation_checkpointing

if TYPE_CHECKING:
    from model.training.recipe import TrainRecipe

#: What is taken of Liger. Its cross-entropies are not: they work on ``LlamaForCausalLM.forward``, which is not run here, and
#: the loss of this package never makes the full logits either (model/cross_entropy.py).
_LIGER_PARTS = ("rope", "rms_norm", "swiglu", "geglu")
_LIGER_LOSSES = ("cross_entropy", "fused_linear_cross_entropy")

#: Compiled variants of a layer: training or evaluation, one row or several, with a mask or without, checkpointed or not.
#: Dynamo stops to compile at 8 of them by default, and runs the rest without a word as it was.
_VARIANTS = 32


def prepare_layers(language_model: PreTrainedModel, recipe: TrainRecipe, device: torch.device) -> list[str]:
    """Set the layers up as a recipe says; returns what was done, in words for the person at the terminal.

    Raises:
        ValueError: see :func:`use_liger_kernels` and :func:`checkpoint_layers`.
    """
    done = []
    if recipe.liger_kernels:
        done.append(f"Liger's kernels in the language model: {', '.join(use_liger_kernels(language_model, device))}")
    if recipe.activation_checkpointing:
        kept, total = checkpoint_layers(language_model, recipe.checkpoint_every_n_layers)
        done.append(f"activations of {kept} of {total} layers of the language model are computed again in the backward pass")
    if recipe.compile:
        count = compile_layers(language_model)
        done.append(
            f"torch.compile: the {count} layers of the language model, each by itself; not the tower, the fusion, the "
            "projector and the loss. The first steps take longer"
        )
    return done


def checkpoint_layers(language_model: PreTrainedModel, every_n_layers: int = 1) -> tuple[int, int]:
    """Keep only the input of every n-th layer, from the first on, and compute the rest again in the backward pass.

    transformers has an argument of this name from some version on; here it works in all that the package supports.

    Args:
        language_model: without head, changed in place.
        every_n_layers: 1 for all layers.

    Returns:
        How many layers compute their activations again, and how many there are.

    Raises:
        ValueError: ``every_n_layers`` below 1, or a language model whose layers cannot do that.
    """
    if every_n_layers < 1:
        raise ValueError(f"checkpoint_every_n_layers must be 1 or more, got {every_n_layers}")
    enable_activation_checkpointing(language_model)
    layers = [module for module in language_model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index % every_n_layers == 0
    return sum(layer.gradient_checkpointing for layer in layers), len(layers)


def compile_layers(language_model: PreTrainedModel, backend: str = "inductor") -> int:
    """Compile each layer in place, with sizes left open: one graph serves all layers, and rows of all lengths.

    The whole model as one graph would have to be compiled in one piece, minutes for 32 layers, and breaks at the merging of
    image tokens, whose number depends on the data.

    Args:
        language_model: without head, changed in place; parameters keep their names.
        backend: of ``torch.compile``.

    Returns:
        How many layers there are.

    Raises:
        ValueError: the language model has no list of ``layers``.
    """
    layers = getattr(language_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            f"compile is set, but {type(language_model).__name__} has no list of layers to compile; set compile to false"
        )
    dynamo = importlib.import_module("torch._dynamo")
    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, _VARIANTS)
    for layer in layers:
        layer.compile(backend=backend, dynamic=True)
    return len(layers)


def use_liger_kernels(language_model: PreTrainedModel, device: torch.device) -> tuple[str, ...]:
    """Put Liger's norms, rotary embedding and gated feed-forward into the language model, by Liger's own function for its type.

    The rotary embedding is replaced in transformers' module of that type: for every such model of this process.

    Args:
        language_model: without head, changed in place.
        device: where it runs; Liger's kernels need a GPU.

    Returns:
        The parts that Liger has for this type.

    Raises:
        ValueError: liger-kernel is not installed, the device is no GPU, or Liger does not know the type.
    """
    apply = _liger_function(language_model.config.model_type)
    if device.type != "cuda":
        raise ValueError(f"liger_kernels is set, but they need a GPU and the model runs on {device.type}; set it to false")
    known = inspect.signature(apply).parameters
    parts = tuple(name for name in _LIGER_PARTS if name in known)
    options: dict[str, Any] = dict.fromkeys(parts, True) | {name: False for name in _LIGER_LOSSES if name in known}
    apply(model=language_model, **options)
    return parts


def _liger_function(model_type: str) -> Callable[..., None]:
    try:
        functions = importlib.import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise ValueError(
            "liger_kernels is set, but liger-kernel is not installed or cannot be imported "
            f"({error}); install it with pip install 'igva-kernels[liger]', or set liger_kernels to false"
        ) from error
    if model_type not in functions:
        raise ValueError(
            f"liger_kernels is set, but Liger has no kernels for language models of type {model_type!r}; set it to false"
        )
    return functions[model_type]
