"""How the model of a run is spread over processes: whole on each, or sharded by DeepSpeed's ZeRO or by FSDP2.

transformers' Trainer and accelerate do the work. What stands here is what they leave to their caller: the processes of a
sharded run on CPUs (where their flags fall back to whole copies without a word), the sharded weights put together again, and
the refusal of settings that do not go together.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, DistributedType
from torch import Tensor, nn
from transformers import Trainer

from model.training.recipe import TrainRecipe

CONFIGS = Path(__file__).resolve().parents[1] / "recipes"
_SHIPPED = {"zero2": "deepspeed-zero2.json", "zero3": "deepspeed-zero3.json", "fsdp2": "fsdp2.json"}

# `accelerate launch` writes what its own configuration asks for into the environment, and so does accelerate in this process
# later on: only what stands there at the start is the launcher's.
_ASKED_BY_LAUNCHER = [name for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED") if os.environ.get(name) == "true"]


def uses_deepspeed(distributed: str) -> bool:
    """Whether a value of ``TrainRecipe.distributed`` names DeepSpeed."""
    return distributed not in ("ddp", "fsdp2")


def start_processes(distributed: str) -> PartialState:
    """Join the processes that a launcher started, or be the only one.

    Args:
        distributed: as in the recipe.

    Raises:
        ImportError: DeepSpeed is asked for and not installed.
        ValueError: a sharded run without a launcher, or a launcher that asks for sharding of its own.
    """
    if _ASKED_BY_LAUNCHER:
        raise ValueError(
            f"accelerate's configuration sets {_ASKED_BY_LAUNCHER[0]}; the recipe says how a model is sharded: set its field "
            "distributed, and let accelerate only launch (accelerate launch --multi_gpu -m model train ...)"
        )
    if distributed != "ddp" and "LOCAL_RANK" not in os.environ:
        raise ValueError(
            f"distributed is {distributed!r}, but this process was started alone; start it by a launcher, such as "
            "torchrun --nproc_per_node=8 -m model train RECIPE, or leave distributed at 'ddp'"
        )
    AcceleratorState._reset_state(reset_partial_state=True)
    # Left behind by an earlier run of this process.
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        os.environ.pop(name, None)
    on_cpu = not torch.cuda.is_available()
    if not uses_deepspeed(distributed):
        # Without the flag accelerate takes the ranks of a run on CPUs for so many runs of their own.
        return PartialState(cpu=on_cpu)
    _require_deepspeed()
    # accelerate starts DeepSpeed only where it is not told "cpu", and then looks for a GPU unless it is told the device.
    if not on_cpu:
        with _environment({"ACCELERATE_USE_DEEPSPEED": "true"}):
            return PartialState()
    without_compiled_communication()
    with _environment({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_TORCH_DEVICE": "cpu"}):
        return PartialState(backend="gloo")


def distributed_arguments(recipe: TrainRecipe, model: nn.Module, *, all_learn: bool = True) -> dict[str, Any]:
    """What ``TrainingArguments`` take for ``recipe.distributed``.

    Args:
        recipe: the run.
        model: its blocks are gathered one at a time under FSDP2.
        all_learn: whether every parameter that learns takes part in every step, as in a model that has what it reads, also in
            a step without images; DistributedDataParallel else has to search for those that do not.

    Raises:
        FileNotFoundError, ValueError: the DeepSpeed file is missing or is no JSON object.
    """
    on_cpu = not torch.cuda.is_available()
    if recipe.distributed == "ddp":
        return {"use_cpu": on_cpu, "ddp_find_unused_parameters": not all_learn}
    config = read_config(recipe.distributed)
    if uses_deepspeed(recipe.distributed):
        # The state is that of start_processes: from the arguments alone accelerate finds no backend on a CPU.
        return {"use_cpu": on_cpu, "deepspeed": config, "accelerator_config": {"use_configured_state": True}}
    config["transformer_layer_cls_to_wrap"] = sorted({type(layer).__name__ for layer in model.model.language_model.layers})
    return {"use_cpu": on_cpu, "fsdp": True, "fsdp_config": config}


def read_config(distributed: str) -> dict[str, Any]:
    """The shipped configuration of ``zero2``, ``zero3`` or ``fsdp2``, or that of a DeepSpeed JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no JSON object.
    """
    file = CONFIGS / _SHIPPED[distributed] if distributed in _SHIPPED else Path(distributed)
    if not file.is_file():
        raise FileNotFoundError(f"distributed: no DeepSpeed configuration at {file}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"distributed: {file} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"distributed: {file} holds a {type(config).__name__}, expected a JSON object of DeepSpeed's settings")
    return config


def finish_accelerator(trainer: Trainer) -> None:
    """What accelerate leaves out of FSDP2: processes on CPUs, and gradients summed in fp32.

    Called once the Trainer has made its accelerator, before it prepares the model.
    """
    if trainer.args.fsdp_plugin_args is None:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy

    state = trainer.accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        from accelerate.utils import FullyShardedDataParallelPlugin

        # What accelerate itself does for any other kind of device.
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
        trainer.is_fsdp_enabled = True
    if trainer.accelerator.mixed_precision == "bf16":
        # accelerate would sum the gradients in bf16, and round the loss to it.
        state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def is_sharded(trainer: Trainer) -> bool:
    """Whether no process may hold the whole model."""
    return bool(trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)


def gathered_state(trainer: Trainer) -> dict[str, Tensor]:
    """The weights of the whole model, on the CPU of the first process; an empty dictionary on the others.

    Every process must call it. What learns comes in fp32: under DeepSpeed from the optimizer's own copy, since the
    model's is in bf16 there.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.is_fsdp_enabled:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        state: dict[str, Any] = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    elif trainer.is_deepspeed_enabled:
        state = _gathered_by_deepspeed(model, trainer.is_world_process_zero())
    else:
        state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    return state if trainer.is_world_process_zero() else {}


def _gathered_by_deepspeed(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    found: dict[nn.Parameter, Tensor] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            whole = safe_get_full_fp32_param(parameter)
        else:
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                whole = parameter.detach().clone() if keep else None
        if keep:
            found[parameter] = whole.detach().cpu()
    state: dict[str, Tensor] = {}
    if keep:
        named = dict(model.named_parameters(remove_duplicate=False))
        buffers = dict(model.named_buffers())
        for name in model.state_dict():
            state[name] = found[named[name]] if name in named else buffers[name].detach().cpu()
    return state


def without_compiled_communication() -> None:
    """Let DeepSpeed use gloo alone on CPUs.

    It would compile an operator over shared memory when it starts: that takes a compiler, and blocks for ever behind the lock
    of a compilation that was killed.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _require_deepspeed() -> None:
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise ImportError("DeepSpeed is not installed: pip install 'igva-kernels[deepspeed]'") from error


@contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
