"""The kernels of the mix under launch settings other than those that the library chose.

Triton is imported on first use, as in the library.
"""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .machine_code import aot_tools, read_nvidia
from .roofline import KernelCode
from .sizes import FuseCase, FuseInputs, Tower, make_inputs

if TYPE_CHECKING:
    from igva_kernels.impl.triton.launch import Tile

FORWARDS = ("forward", "forward, means saved")
BACKWARDS = ("dw", "dw and dh")
PASSES = (*FORWARDS, *BACKWARDS)
"""The launches whose settings are compared, by their names in :data:`benchmarks.machine_code.KERNELS`."""

WORKERS = 14
"""Processes that compile at once, at most."""


@dataclass(frozen=True)
class LaunchSetting:
    """How a kernel with a flat tile is launched.

    Args:
        num_warps: warps of a program.
        elements: of each map, in a thread; a multiple of a 128-bit access.
        evict_first: whether the states are streamed past L2. The backward reads means, which have no such hint.
    """

    num_warps: int
    elements: int
    evict_first: bool

    @property
    def name(self) -> str:
        hint = "evict_first" if self.evict_first else "default eviction"
        return f"{self.num_warps} warps x {self.elements} elements, {hint}"

    def tile(self, tower: Tower, dtype: torch.dtype) -> Tile:
        """The tile of a program."""
        from igva_kernels.impl.triton.launch import WARP, Tile, elements_per_access

        return Tile(
            block=self.num_warps * WARP * self.elements,
            vec=elements_per_access(dtype),
            num_warps=self.num_warps,
            width=tower.vision_dim,
            evict_first=self.evict_first,
        )


def shipped_setting(dtype: torch.dtype) -> LaunchSetting:
    """What the library launches with."""
    from igva_kernels.impl.triton import launch

    elements = launch.ACCESSES * launch.elements_per_access(dtype)
    return LaunchSetting(launch.warps_of(launch.FLAT_THREADS), elements, launch.EVICT_FIRST)


def settings_of(name: str, dtype: torch.dtype) -> list[LaunchSetting]:
    """The settings that are compared for a pass, the shipped one first."""
    from igva_kernels.impl.triton.launch import elements_per_access

    shipped, access = shipped_setting(dtype), elements_per_access(dtype)
    if name in BACKWARDS:
        others = [LaunchSetting(warps, access, shipped.evict_first) for warps in (2, 4, 8)]
    else:
        others = [
            LaunchSetting(warps, accesses * access, hint)
            for warps in (1, 2, 4, 8)
            for accesses in (1, 2)
            for hint in (True, False)
        ]
    return [shipped, *(setting for setting in others if setting != shipped)]


def run_pass(
    name: str, tower: Tower, tile: Tile, inputs: FuseInputs, means: Tensor | None = None, *, fill: float | None = None
) -> dict[str, Tensor]:
    """Launch one pass of stage 2 and return its results by name.

    Args:
        name: one of :data:`PASSES`.
        tile: a flat one; for ``"forward"`` also a row tile, which another kernel takes.
        inputs: the states (B, T, D), the weights (B, K) and the gradient of the output (B, N, 2D).
        means: (K, B, N, D), saved by the forward; the backward alone needs them.
        fill: what the results hold before the launch. None leaves them as they were allocated.
    """
    from igva_kernels.impl.triton import mix_backward, mix_forward, row_forward
    from igva_kernels.impl.triton.launch import Streams
    from igva_kernels.impl.triton.schedule import gradient_schedule, mix_schedule

    plan = tower.plan()
    program = plan.program
    states = [inputs.hidden_states[layer].detach() for layer in plan.sources]
    weights, grad = inputs.weights.detach(), inputs.cotangent
    batch, num_tokens, width = states[0].shape
    prefix, num_patches, vec = tower.num_prefix_tokens, tower.num_patches, tile.vec

    def empty(*shape: int, dtype: torch.dtype = grad.dtype) -> Tensor:
        result = grad.new_empty(shape, dtype=dtype)
        return result if fill is None else result.fill_(fill)

    if name in FORWARDS:
        out = empty(batch, num_patches, len(program.slots) * width)
        saved = empty(program.num_weighted_groups, batch, num_patches, width) if name == "forward, means saved" else None
        streams, schedule = Streams.of(states, vec), mix_schedule(program)
        place = {"tile": tile, "num_rows": num_patches, "first_row": prefix}
        if tile.pieces:
            row_forward.launch_row_forward(streams, schedule, weights, None, out, saved, selected=None, **place)
        else:
            mix_forward.launch_mix_forward(streams, schedule, weights, out, saved, **place)
        return {"output": out} | ({} if saved is None else {"means": saved})

    with_states = name == "dw and dh"
    num_rows = num_tokens if with_states else num_patches
    partials = empty(batch, tile.count(num_rows), program.num_weights, dtype=torch.float32)
    grads = tuple(empty(batch, num_tokens, width) for _ in program.gradient_classes) if with_states else None
    mix_backward.launch_mix_backward(
        grad,
        (grad.stride(0) // vec if batch > 1 else 0, width // vec, grad.stride(1) // vec),
        gradient_schedule(program, False, with_states),
        weights if with_states else None,
        None,
        means,
        partials,
        grads,
        tile=tile,
        batch=batch,
        num_rows=num_rows,
        num_patches=num_patches,
        skipped_rows=prefix if with_states else 0,
        first_row=prefix,
    )
    of_states = {f"grad_states[{index}]": each for index, each in enumerate(grads or ())}
    return {"grad_weights": partials.sum(dim=1)} | of_states


def row_tile_of(tower: Tower, dtype: torch.dtype) -> Tile:
    """The tile that the library would take if a token had weights of its own."""
    from igva_kernels.impl.triton.launch import accumulation_of, elements_per_access, row_tile
    from igva_kernels.impl.triton.schedule import mix_schedule

    schedule = mix_schedule(tower.plan().program)
    held = sum(len(terms) > 0 for terms in schedule.terms) + schedule.open_groups + 1
    return row_tile(elements_per_access(dtype), tower.vision_dim, accumulation_of(dtype), held)


# ---- compiling ahead ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compiled:
    """The machine code of a pass under a setting.

    Args:
        code: what the time model knows of it.
        spills: instructions that put registers into local memory or take them back.
    """

    code: KernelCode
    spills: int


@dataclass(frozen=True)
class Wanted:
    """A kernel to compile."""

    name: str
    tower: Tower
    dtype: torch.dtype
    setting: LaunchSetting
    target: str


def compile_setting(wanted: Wanted) -> Compiled | str:
    """Compile one kernel into Triton's cache on disk, where a later launch finds it; needs no GPU. The text of an error."""
    from igva_kernels.impl.triton import mix_backward, mix_forward

    try:
        aot = aot_tools()
        case = FuseCase(wanted.tower, 1, wanted.dtype)
        means = None
        if wanted.name in BACKWARDS:
            shape = (wanted.tower.num_groups, 1, wanted.tower.num_patches, wanted.tower.vision_dim)
            means = torch.empty(shape, dtype=wanted.dtype)
        inputs = make_inputs(case, torch.device("cpu"), 0)
        with aot.recorded_launches(mix_forward, mix_backward, warp_size=32) as launches:
            run_pass(wanted.name, wanted.tower, wanted.setting.tile(wanted.tower, wanted.dtype), inputs, means)
        (launch,) = launches
        compiled = aot.compile_kernel(launch, wanted.target)
        listing, usage = aot.disassemble(compiled.asm["cubin"])
        code = KernelCode(
            **read_nvidia(listing, usage),
            threads=wanted.setting.num_warps * 32,
            warp_size=32,
            programs_per_image=launch.grid[0],
            shared_bytes=compiled.metadata.shared,
        )
        return Compiled(code, len(re.findall(r"\s(?:LDL|STL)\b", listing)))
    except Exception as error:  # of ptxas, of Triton: a setting that cannot be compiled is a result
        return f"{type(error).__name__}: {error}"


def compile_all(wanted: Iterable[Wanted]) -> dict[Wanted, Compiled | str]:
    """:func:`compile_setting` of all, side by side."""
    wanted = list(wanted)
    workers = min(WORKERS, os.cpu_count() or 1, max(1, len(wanted)))
    context = multiprocessing.get_context("spawn")  # a fork would inherit the CUDA context
    with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return dict(zip(wanted, pool.map(compile_setting, wanted), strict=True))


def can_compile_ahead(target: str) -> bool:
    """Whether the helpers of ``tests/aot`` know a target, such as ``"sm_90"``, of NVIDIA."""
    return target.startswith("sm_") and target in aot_tools().TARGETS
