"""Choosing the arithmetic by measuring it, and holding what does not learn in it.

What learns stays in fp32: AdamW's small steps are lost in bf16's 8 bits, so some copy in fp32 there must be. Under DeepSpeed
and FSDP2 that copy is sharded over the ranks and the products run on bf16 copies, so no further kind of optimizer is needed
here. What does not learn needs no such copy: with a frozen 7B language model that is 13.5 GB instead of 27, and spares as much
again of bf16 copies that autocast would make in each forward pass.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from model.training.recipe import FrozenWeights, Precision

if TYPE_CHECKING:
    from model.modeling import IgvaLlavaForConditionalGeneration

# A feed-forward block of a small language model on one micro-batch: large enough that the matrix products decide, and
# done in tens of milliseconds. Measured fp32 / bf16 on three CPUs: 61 / 28 ms with AVX512-BF16, 50 / 112 with plain
# AVX-512, 61 / 1461 with AVX2 only, where PyTorch emulates bf16.
_ROWS, _WIDTH, _INNER = 512, 576, 1536
_REPEATS = 3


@dataclass(frozen=True)
class PrecisionChoice:
    """The arithmetic of a run and why it was taken."""

    precision: Literal["fp32", "bf16"]
    reason: str


def choose_precision(setting: Precision, device: torch.device) -> PrecisionChoice:
    """Resolve ``auto``: bf16 on a GPU that supports it; on a CPU whichever of both does one timed step faster.

    Raises:
        ValueError: ``bf16`` was asked for on a GPU that does not support it.
    """
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
        if setting == "bf16" and not supported:
            raise ValueError(f"precision is bf16, which {torch.cuda.get_device_name(device)} does not support; set fp32")
        if setting == "auto":
            choice: Literal["fp32", "bf16"] = "bf16" if supported else "fp32"
            return PrecisionChoice(choice, f"the GPU {'supports' if supported else 'does not support'} bf16")
    if setting != "auto":
        return PrecisionChoice(setting, "set by the recipe")
    seconds = {name: _timed_step(device, dtype) for name, dtype in (("fp32", None), ("bf16", torch.bfloat16))}
    faster: Literal["fp32", "bf16"] = "bf16" if seconds["bf16"] < seconds["fp32"] else "fp32"
    times = ", ".join(f"{name} {1000 * value:.1f} ms" for name, value in seconds.items())
    return PrecisionChoice(faster, f"one timed step: {times}")


def hold_frozen_weights(
    model: IgvaLlavaForConditionalGeneration, setting: FrozenWeights, device: torch.device, precision: str
) -> int:
    """Convert what does not learn of tower, language model and head to bf16, in place, where the setting says so.

    The allocator and the projector are small and stay in fp32. Buffers do too: positions in bf16 would be wrong.

    Args:
        model: with ``requires_grad`` as in training.
        setting: ``bf16``, ``fp32``, or ``auto`` for bf16 on a GPU that computes in it.
        device: where the model runs.
        precision: the run's, ``fp32`` or ``bf16``.

    Returns:
        How many parameters are held in bf16.

    Raises:
        ValueError: ``bf16`` for a run in fp32.
    """
    if setting == "bf16" and precision != "bf16":
        raise ValueError(
            "frozen_weights is bf16, but the run computes in fp32; set precision to bf16, or frozen_weights to fp32"
        )
    if setting == "fp32" or precision != "bf16" or (setting == "auto" and device.type != "cuda"):
        return 0
    parts = (model.model.vision_tower, model.model.language_model, model.lm_head)
    # Quantised weights are parameters of other classes, and stay as they are.
    frozen = {
        parameter
        for part in parts
        for parameter in part.parameters()
        if not parameter.requires_grad and type(parameter) is nn.Parameter
    }
    for parameter in frozen:
        parameter.data = parameter.data.to(torch.bfloat16)
    return sum(parameter.numel() for parameter in frozen)


def _timed_step(device: torch.device, autocast_dtype: torch.dtype | None) -> float:
    """Seconds of the fastest forward and backward pass of a feed-forward block."""
    block = nn.Sequential(nn.Linear(_WIDTH, _INNER), nn.SiLU(), nn.Linear(_INNER, _WIDTH)).to(device)
    rows = torch.ones(_ROWS, _WIDTH, device=device)

    def step() -> float:
        start = time.perf_counter()
        with torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
            loss = block(rows).float().square().mean()
        loss.backward()
        return time.perf_counter() - start

    first = step()  # carries one-off costs such as packing the weights
    # Emulated bf16 takes seconds a step: one look is then enough.
    return first if first > 1 else min(step() for _ in range(_REPEATS))
