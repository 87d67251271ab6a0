"""Time and peak memory of the fusion against the official eager formulation, on the model's own hidden states.

The benchmark suite measures this at the sizes of real models; here it is a line of the quickstart's report, at its own size.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from igva_kernels import FusionPlan, fuse
from igva_kernels.plan import Layer, Weighted

ROUNDS = 30


@dataclass(frozen=True)
class Cost:
    """Median seconds of a forward pass, and the bytes that it had alive at its peak beyond its inputs."""

    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class FusionCost:
    """Both formulations on the same hidden states, which were alive throughout."""

    images: int
    tokens: int
    width: int
    dtype: str
    fused: Cost
    official: Cost

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@torch.inference_mode()
def measure_fusion(hidden_states: Sequence[Tensor], plan: FusionPlan, weights: Tensor, num_prefix_tokens: int) -> FusionCost:
    """Times both in turns, after checking that they agree.

    Args:
        hidden_states: L + 1 tensors (B, T, D).
        plan: of IGVA: one weighted slot and one layer.
        weights: (B, K).
        num_prefix_tokens: P.

    Raises:
        RuntimeError: the results differ by more than rounding, in which case no speed is worth stating.
    """
    calls: dict[str, Callable[[], Tensor]] = {
        "fused": lambda: fuse(hidden_states, plan, weights, num_prefix_tokens=num_prefix_tokens),
        "official": lambda: official_fusion(hidden_states, plan, weights, num_prefix_tokens),
    }
    result, expected = calls["fused"](), calls["official"]()
    # Sums of up to some ten terms in another order: a few units in the last place.
    tolerance = 16 * torch.finfo(expected.dtype).eps * expected.abs().max()
    if (result - expected).abs().max() > tolerance:
        raise RuntimeError(f"fuse and the official formulation differ by {(result - expected).abs().max():.3e}")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            _wait(hidden_states[0].device)
            seconds[name].append(time.perf_counter() - start)
    costs = {
        name: Cost(statistics.median(seconds[name]), peak_bytes(call, hidden_states[0].device)) for name, call in calls.items()
    }
    images, tokens, width = hidden_states[0].shape
    dtype = str(hidden_states[0].dtype).removeprefix("torch.")
    return FusionCost(images, tokens - num_prefix_tokens, width, dtype, costs["fused"], costs["official"])


def official_fusion(hidden_states: Sequence[Tensor], plan: FusionPlan, weights: Tensor, num_prefix_tokens: int) -> Tensor:
    """The steps of the released code (YiZheng-zy/IGVA, ``encode_images``), in the plan's order of slots: a mean of a stack per
    group, a stack of the groups, a product with the weights, a sum, a concatenation.

    Returns:
        (B, N, 2D).
    """
    slots = []
    for slot in plan.slots:
        if isinstance(slot, Layer):
            slots.append(hidden_states[slot.index][:, num_prefix_tokens:])
        elif isinstance(slot, Weighted):
            means = [torch.stack([hidden_states[layer] for layer in group]).mean(dim=0) for group in slot.groups]
            patches = torch.stack([mean[:, num_prefix_tokens:] for mean in means])
            slots.append((patches * weights.to(patches.dtype).t()[:, :, None, None]).sum(dim=0))
        else:
            raise ValueError(f"the official formulation has no slot {slot!r}")
    return torch.cat(slots, dim=-1)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Bytes alive at the peak of a call, its result included, beyond those alive before it.

    On a CPU this is the running sum of all allocations and releases that the profiler sees.
    """
    call()
    if device.type == "cuda":
        _wait(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
