"""Choosing the arithmetic by measuring it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from model.training.recipe import Precision

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
