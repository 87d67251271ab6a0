"""What a call costs the host: times of single pieces, in microseconds, without a GPU.

A piece is measured by leaving out what is around it. The implementation ``"nothing"`` of :func:`no_implementation` returns
tensors that exist already, so what ``fuse`` takes with it are its checks, its dispatch and autograd. The launch itself runs
for real on the stand-in for the CUDA driver (:mod:`benchmarks.stand_in`), where there is no GPU.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

from igva_kernels import FusionPlan, dispatch, fuse
from igva_kernels.program import MixProgram

from .machine import ROOT
from .timing import quantiles

CALLS = 100
"""Calls between two looks at the clock."""

IMPORT_LIMIT_S = 0.05
"""What ``import igva_kernels`` may add to ``import torch``."""

CALL_LIMIT_S = 25e-6
"""What a call with 24 tensors may cost the host in inference and with a frozen tower."""


def per_call(function: Callable[[], object], seconds: float, *, calls: int = CALLS) -> dict[str, float | int]:
    """Seconds of one call over rounds of ``calls``, without garbage collection.

    ``median_s`` with its 20 % and 80 % quantiles is wall time, ``cpu_s`` the median of the thread's processor time, in which
    what other processes take of a busy machine does not count, and ``least_s`` its minimum: they share caches and cores.
    """
    for _ in range(3):
        function()
    wall: list[float] = []
    processor: list[float] = []
    enabled = gc.isenabled()
    gc.disable()
    try:
        deadline = time.perf_counter() + seconds
        while len(wall) < 5 or time.perf_counter() < deadline:
            begin, begin_cpu = time.perf_counter(), time.thread_time()
            for _ in range(calls):
                function()
            processor.append((time.thread_time() - begin_cpu) / calls)
            wall.append((time.perf_counter() - begin) / calls)
    finally:
        if enabled:
            gc.enable()
    return times(wall, processor) | {"calls": calls}


def times(wall: Sequence[float], processor: Sequence[float]) -> dict[str, float | int]:
    median, low, high = quantiles(wall)
    return {"median_s": median, "low_s": low, "high_s": high, "cpu_s": quantiles(processor)[0], "least_s": min(processor)} | {
        "rounds": len(wall)
    }


def against(limit_s: float, found: dict) -> dict[str, float | bool]:
    """The limit, and whether the least processor time is within it.

    The least, as Python's ``timeit`` advises: what is above it comes from other work on the machine, not from the code.
    """
    return {"limit_s": limit_s, "within_limit": found["least_s"] <= limit_s}


IMPORT = """
import sys, time
import torch
sys.pycache_prefix, sys.dont_write_bytecode = sys.argv[1], False
begin, begin_cpu = time.perf_counter(), time.process_time()
import igva_kernels
print(time.perf_counter() - begin, time.process_time() - begin_cpu, "triton" in sys.modules)
"""


def import_time(repeats: int = 5) -> dict[str, float | int | bool]:
    """What ``import igva_kernels`` takes after ``import torch``, each time in a new process; and whether it imports triton.

    From bytecode, as pip leaves it in an installation. ``from_source_s`` is the one import before, which compiles it.
    """
    with TemporaryDirectory() as folder:
        lines = [
            subprocess.run(
                [sys.executable, "-c", IMPORT, folder], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout.split()
            for _ in range(repeats + 1)
        ]
    (first, *_), lines = lines[0], lines[1:]
    found = times([float(wall) for wall, _, _ in lines], [float(processor) for _, processor, _ in lines])
    triton = any(imported == "True" for _, _, imported in lines)
    return found | against(IMPORT_LIMIT_S, found) | {"from_source_s": float(first), "imports_triton": triton}


class Step:
    """One call of the mix at a small size, with what it needs: ``num_layers`` states of one image.

    Args:
        mode: see :class:`benchmarks.sizes.FuseCase`.
        device: of the tensors.
    """

    def __init__(self, plan: FusionPlan, mode: str, device: torch.device) -> None:
        patches, width = 4, 64
        self.plan, self.mode = plan, mode
        self.states: list[Tensor] = [torch.randn(1, 1 + patches, width, device=device) for _ in range(plan.num_layers + 1)]
        self.weights = torch.full((1, plan.num_groups), 1 / plan.num_groups, device=device)
        self.grad_out = torch.randn(1, patches, plan.num_slots * width, device=device)
        self.leaves: list[Tensor] = []
        if mode != "forward":
            self.leaves = [self.weights.requires_grad_()]
        if mode == "trainable":
            self.leaves += [self.states[layer].requires_grad_() for layer in plan.sources]

    def forward(self, impl: str = "auto") -> Tensor:
        return fuse(self.states, self.plan, self.weights, num_prefix_tokens=1, impl=impl)

    def step(self, impl: str = "auto") -> Sequence[Tensor]:
        """Forward, and backward where something has a gradient."""
        out = self.forward(impl)
        return torch.autograd.grad(out, self.leaves, self.grad_out) if self.leaves else (out,)


@contextmanager
def no_implementation(plan: FusionPlan, like: Step) -> Iterator[str]:
    """The name of an implementation that computes nothing: it returns the same tensors at each call."""
    program = plan.program
    out = torch.zeros_like(like.grad_out)
    means = like.states[0].new_zeros(program.num_weighted_groups, 1, like.grad_out.shape[1], like.states[0].shape[2])
    grad_weights = torch.zeros_like(like.weights, requires_grad=False)
    grads = [torch.zeros_like(like.states[0], requires_grad=False) for _ in program.gradient_classes]
    module = ModuleType("igva_kernels.impl.nothing")

    def fuse_forward(*arguments: object, **options: object) -> tuple[Tensor, Tensor]:
        return out.view_as(out), means  # autograd wants an output of its own at each call

    def fuse_backward(*arguments: object, **options: object) -> tuple[Tensor, list[Tensor]]:
        return grad_weights, grads

    def check_supported(
        states: Sequence[Tensor], weights: Tensor | None, program: MixProgram, num_prefix_tokens: int, *, indices: object = None
    ) -> None:
        return None

    module.__dict__.update(fuse_forward=fuse_forward, fuse_backward=fuse_backward, check_supported=check_supported)
    with mock.patch.dict(sys.modules, {module.__name__: module}), mock.patch.dict(dispatch.MODULES, {"nothing": "nothing"}):
        try:
            yield "nothing"
        finally:
            dispatch.implementation.cache_clear()
