"""Low-rank adapters on the language model, saved together with what else was trained, and merged.

The adapters go into the model itself: it stays an ``IgvaLlavaForConditionalGeneration``, and its forward, its loss
arguments and its generation are the same with and without them. A folder of adapters is one of peft's: its
``adapter_config.json`` names projector and fusion (IGVA's allocator) under ``modules_to_save``, and
``adapter_model.safetensors`` holds their tensors beside the adapters', under the names that peft gives them. So
``PeftModel.from_pretrained(base, folder)`` loads all that was trained, and never half of it.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from model.quantization import is_quantized
from model.training.recipe import LoraSettings

if TYPE_CHECKING:
    from model.modeling import IgvaLlavaForConditionalGeneration

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_LANGUAGE_MODEL = "model.language_model"
_TRAINED_PARTS = ("model.multi_modal_projector", "model.fusion")

#: What ``PeftModel`` puts before the names of the model that it wraps.
_PEFT_PREFIX = "base_model.model."


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
    if is_quantized(model):
        # transformers' Trainer refuses a quantised model whose adapters it does not know of.
        model._hf_peft_config_loaded = True


def has_lora(model: nn.Module) -> bool:
    """Whether any layer carries an adapter."""
    return any("lora_" in name for name, _ in model.named_parameters())


def save_adapters(
    model: IgvaLlavaForConditionalGeneration,
    folder: str | Path,
    state: dict[str, torch.Tensor] | None = None,
    *,
    base: str | None = None,
) -> None:
    """Write adapters, projector and fusion of a model that was given adapters by :func:`add_lora`, as peft would.

    Args:
        model: with adapters.
        folder: made where it is missing.
        state: the model's state dict, where the model itself holds shards only; None: the model's own.
        base: the checkpoint that the adapters belong to, a hub name or the name of a folder; None names none.

    Raises:
        ValueError: the model has no adapters.
    """
    _require_lora(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict() if state is None else state
    parts = _trained_parts(state)
    tensors = {f"{_PEFT_PREFIX}{name}": tensor for name, tensor in {**_adapters(model, state), **parts}.items()}
    save_file(_contiguous(tensors), folder / ADAPTER_FILE, metadata={"format": "pt"})
    config = copy.copy(model.peft_config["default"])
    config.modules_to_save = [part for part in _TRAINED_PARTS if any(name.startswith(f"{part}.") for name in parts)]
    config.base_model_name_or_path = base
    # Last, as its presence says that the folder is whole.
    config.save_pretrained(str(folder))


def load_adapters(model: IgvaLlavaForConditionalGeneration, folder: str | Path) -> None:
    """Load what :func:`save_adapters`, or peft itself, wrote into the base model it was trained from; adds adapters where
    there are none. IGVA's fusion is switched to stage 2.

    Raises:
        FileNotFoundError: a file of the folder is missing.
        ValueError: adapters of another kind than LoRA (DoRA and its other variants are LoRA to peft), or tensors that do not
            fit the model: another model's, or a folder without projector and fusion.
    """
    peft = _peft()
    folder = Path(folder)
    for name in (CONFIG_FILE, ADAPTER_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}; it is not a folder of adapters, or was not written to its end")
    kind = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{folder} holds adapters of the kind {kind!r}, expected 'LORA'; load others with PeftModel")
    file = folder / ADAPTER_FILE
    tensors = {name.removeprefix(_PEFT_PREFIX): tensor for name, tensor in load_file(file).items()}
    parts = _trained_parts(tensors)
    _check_fit(_trained_parts(model.state_dict()), parts, file)
    if not has_lora(model):
        config = peft.LoraConfig.from_pretrained(str(folder))
        # Projector and fusion are loaded in place: a wrapper around them would hide what they are from the kernels.
        config.modules_to_save = None
        _inject(config, model)
    adapters = {name: tensor for name, tensor in tensors.items() if name not in parts}
    _check_fit(_adapters(model, model.state_dict()), adapters, file)
    peft.set_peft_model_state_dict(model, adapters)
    if model.fusion_stage is not None:
        # Adapters are of stage 2; what they were trained from may be of stage 1, whose weights are uniform.
        model.set_fusion_stage(2)
    for part in _TRAINED_PARTS:
        state = {name.removeprefix(f"{part}."): tensor for name, tensor in parts.items() if name.startswith(f"{part}.")}
        if state:
            model.get_submodule(part).load_state_dict(state)


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
        ValueError: the model has no adapters, or such with more than two factors (DoRA), which :func:`merge_lora` merges; or a
            merged weight is not finite.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    _require_lora(model)
    if any(".lora_magnitude_vector." in name or (".lora_B." in name and name.endswith(".bias")) for name in state):
        raise ValueError("the adapters are no plain LoRA (DoRA, or with biases); merge them in the model, with merge_lora")
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
    prefixes = tuple(f"{part}." for part in _TRAINED_PARTS)
    return {name: tensor for name, tensor in state.items() if name.startswith(prefixes)}


def _adapters(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    # The embeddings are the base's: asked whether they changed, peft would look for the base at the hub.
    adapters: dict[str, torch.Tensor] = _peft().get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    return adapters


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
