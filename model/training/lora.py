"""Low-rank adapters on the language model, saved together with what else was trained, and merged.

The adapters go into the model itself: it stays an ``IgvaLlavaForConditionalGeneration``, and its forward, its loss
arguments and its generation are the same with and without them. A folder of adapters holds

    adapter_config.json, adapter_model.safetensors     what peft writes
    projector_and_allocator.safetensors                the other trained parts: without them it is half a checkpoint
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from model.training.recipe import LoraSettings

if TYPE_CHECKING:
    from model.modeling import IgvaLlavaForConditionalGeneration

ADAPTER_FILE = "adapter_model.safetensors"
TRAINED_PARTS_FILE = "projector_and_allocator.safetensors"
_LANGUAGE_MODEL = "model.language_model"
_TRAINED_PARTS = ("model.multi_modal_projector.", "model.fusion.")


def add_lora(model: IgvaLlavaForConditionalGeneration, settings: LoraSettings) -> None:
    """Put new adapters (which change nothing yet) on linear layers of the language model, in place.

    Raises:
        ImportError: peft is not installed.
        ValueError: the model has adapters already, or ``target_modules`` names no linear layer of the language model.
    """
    peft = _peft()
    if has_lora(model):
        raise ValueError("the model has adapters already; merge them first with merge_lora")
    config = peft.LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=_target_modules(model, settings),
        bias="none",
    )
    _inject(config, model)


def has_lora(model: nn.Module) -> bool:
    """Whether any layer carries an adapter."""
    return any("lora_" in name for name, _ in model.named_parameters())


def save_adapters(
    model: IgvaLlavaForConditionalGeneration, folder: str | Path, state: dict[str, torch.Tensor] | None = None
) -> None:
    """Write adapters, projector and allocator of a model that was given adapters by :func:`add_lora`.

    Args:
        model: with adapters.
        folder: made where it is missing.
        state: the model's state dict, where the model itself holds shards only; None: the model's own.

    Raises:
        ValueError: the model has no adapters.
    """
    peft = _peft()
    _require_lora(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict() if state is None else state
    save_file(_contiguous(peft.get_peft_model_state_dict(model, state_dict=state)), folder / ADAPTER_FILE)
    save_file(_contiguous(_trained_parts(state)), folder / TRAINED_PARTS_FILE)
    # Last, as its presence says that the folder is whole.
    model.peft_config["default"].save_pretrained(str(folder))


def load_adapters(model: IgvaLlavaForConditionalGeneration, folder: str | Path) -> None:
    """Load what :func:`save_adapters` wrote into the base model it was trained from; adds adapters where there are
    none.

    Raises:
        FileNotFoundError: a file of the folder is missing.
        ValueError: the tensors do not fit the model.
    """
    peft = _peft()
    folder = Path(folder)
    for name in ("adapter_config.json", ADAPTER_FILE, TRAINED_PARTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}; it is not a folder of adapters, or was not written to its end")
    parts = load_file(folder / TRAINED_PARTS_FILE)
    _check_fit(_trained_parts(model.state_dict()), parts, folder / TRAINED_PARTS_FILE)
    if not has_lora(model):
        _inject(peft.LoraConfig.from_pretrained(str(folder)), model)
    adapters = load_file(folder / ADAPTER_FILE)
    _check_fit(peft.get_peft_model_state_dict(model), adapters, folder / ADAPTER_FILE)
    peft.set_peft_model_state_dict(model, adapters)
    model.load_state_dict(parts, strict=False)


@torch.no_grad()
def merge_lora(model: IgvaLlavaForConditionalGeneration) -> None:
    """Add the adapters into the weights and remove them, in place: a plain model is left, which saves and loads
    without peft.

    Raises:
        ValueError: the model has no adapters, or a merged weight is not finite.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    _require_lora(model)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, layer in layers:
        layer.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    del model.peft_config


@torch.no_grad()
def merged_state(model: IgvaLlavaForConditionalGeneration, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of the plain model that :func:`merge_lora` would leave, in fp32; the model is not read or changed.

    Args:
        model: with adapters; it may hold shards only.
        state: its whole state dict.

    Raises:
        ValueError: the model has no adapters, or a merged weight is not finite.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    _require_lora(model)
    merged = {name: tensor for name, tensor in state.items() if ".lora_" not in name}
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        for key in [key for key in merged if key.startswith(f"{name}.base_layer.")]:
            merged[key.replace(".base_layer.", ".")] = merged.pop(key)
        (adapter,) = layer.active_adapters
        # In fp32: a merged weight in bf16 would round the adapters away.
        down, up = (state[f"{name}.{part}.{adapter}.weight"].float() for part in ("lora_A", "lora_B"))
        weight = merged[f"{name}.weight"].float() + (up @ down) * layer.scaling[adapter]
        if not weight.isfinite().all():
            raise ValueError(f"the merged weight of {name} is not finite; the adapters diverged in training")
        merged[f"{name}.weight"] = weight
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in merged.items()}


def _inject(config: Any, model: nn.Module) -> None:
    _peft().inject_adapter_in_model(config, model)
    # New modules are born in training mode: their dropout would be at work in a model that is in eval mode.
    model.train(model.training)


def _target_modules(model: nn.Module, settings: LoraSettings) -> list[str]:
    # Full names: a short one such as "q_proj" would match the tower and the allocator too.
    linear = [
        f"{_LANGUAGE_MODEL}.{name}"
        for name, module in model.get_submodule(_LANGUAGE_MODEL).named_modules()
        if isinstance(module, nn.Linear)
    ]
    if settings.target_modules == "all-linear":
        return linear
    wanted = set(settings.target_modules)
    missing = wanted - {name.rpartition(".")[2] for name in linear}
    if missing:
        there = sorted({name.rpartition(".")[2] for name in linear})
        raise ValueError(f"lora.target_modules: no linear layer {sorted(missing)} in the language model, which has {there}")
    return [name for name in linear if name.rpartition(".")[2] in wanted]


def _trained_parts(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith(_TRAINED_PARTS)}


def _check_fit(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], file: Path) -> None:
    there, here = ({name: tuple(tensor.shape) for name, tensor in part.items()} for part in (found, expected))
    if there != here:
        name, _ = min(there.items() ^ here.items())
        raise ValueError(
            f"{file} does not fit the model: {name} is {there.get(name, 'absent')} in the file and "
            f"{here.get(name, 'absent')} in the model; load it into the model that it was trained from"
        )


def _contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _require_lora(model: nn.Module) -> None:
    if not has_lora(model):
        raise ValueError("the model has no adapters; add them with add_lora")


def _peft() -> ModuleType:
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install 'igva-kernels[train]'") from error
    return peft
