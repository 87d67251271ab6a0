"""Peak memory of a call, above what was alive before it.

On CUDA the caching allocator counts. On a CPU the profiler records every allocation and release of torch's CPU allocator, in
Python, in C++ kernels and in compiled code alike, and their running sum is the memory of the storages alive. (A
``TorchDispatchMode`` sees only the outputs of operators: neither the temporaries inside of an opaque operator nor those of a
compiled function.)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import torch
from torch.profiler import ProfilerActivity, profile

# The profiler's library prints two lines for every profile; it reads its log level when it is first used.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

CPU_METHOD = "sum of the CPU allocator's live bytes (torch.profiler)"
CUDA_METHOD = "torch.cuda.max_memory_allocated"


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """Peak bytes that ``call`` has alive beyond those alive before it, its result included.

    The call is run once before, so that compilation, workspaces and caches are not counted.
    """
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    return running_peak(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))


def running_peak(changes: Iterable[int]) -> int:
    """The largest running sum of allocations (positive) and releases (negative), at least 0."""
    live = peak = 0
    for change in changes:
        live += change
        peak = max(peak, live)
    return peak


def method(device: torch.device) -> str:
    """How :func:`peak_bytes` counts on a device, for the record."""
    return CUDA_METHOD if device.type == "cuda" else CPU_METHOD
