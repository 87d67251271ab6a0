"""What the time model has to know of a compiled kernel, from its machine code: no GPU is needed.

The launches are recorded and compiled by the helpers of ``tests/aot``, which alone know Triton's internals; triton is
imported on first use.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from types import ModuleType
from typing import Any

import torch

from igva_kernels import FusionPlan, Norm, OutputNorm
from igva_kernels.program import MixProgram

from .machine import ROOT
from .roofline import KernelCode, Traffic, backward_traffic, forward_traffic, normalised_forward_traffic
from .sizes import CLIP_L_336, DINOV2_L_518, SIGLIP_SO400M_384, Tower

FILE = ROOT / "benchmarks" / "machine_code.json"
"""What ``python -m benchmarks.predict --compile`` writes."""

TOWERS = {tower.name: tower for tower in (CLIP_L_336, SIGLIP_SO400M_384, DINOV2_L_518)}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
TARGETS = ("sm_80", "sm_90", "gfx942")


@dataclass(frozen=True)
class Kernel:
    """A launch of the library.

    Args:
        run: makes it, given the Triton implementation, the plan, P, T and :func:`tensors`.
        traffic: its least bytes, of the program, the bytes of one map and T / N.
        plan: IGVA's by default.
        by_row: whether a program works on one row. Such code is long and slow to compile, so it is recorded for one size alone.
    """

    run: Callable[[ModuleType, FusionPlan, int, int, dict[str, Any]], object]
    traffic: Callable[[MixProgram, int, float], Traffic]
    plan: Callable[[Tower], FusionPlan] = Tower.plan
    by_row: bool = False


def _forward(save_means: bool, weights: str = "weights", indices: str | None = None) -> Callable[..., object]:
    return lambda kernels, plan, prefix, tokens, t: kernels.fuse_forward(
        t["states"], t[weights], plan.program, prefix, save_means, indices=None if indices is None else t[indices]
    )


def _normalised_forward(save_mixed: bool) -> Callable[..., object]:
    return lambda kernels, plan, prefix, tokens, t: kernels.normalised_forward(
        t["states"], t["weights"] if plan.num_groups else None, OutputNorm(t["channels"], t["channels"]), plan.program, prefix,
        False, save_mixed,
    )  # fmt: skip


def _backward(weights: bool, states: bool) -> Callable[..., object]:
    return lambda kernels, plan, prefix, tokens, t: kernels.fuse_backward(
        t["grad"], [], t["means"] if weights else None, t["weights"], plan.program, prefix, tokens,
        needs_weights=weights, needs_states=states,
    )  # fmt: skip


def _backward_bytes(weights: bool, states: bool) -> Callable[[MixProgram, int, float], Traffic]:
    return lambda program, map_bytes, ratio: backward_traffic(
        program, map_bytes, weights=weights, states=states, saved_means=True, token_ratio=ratio
    )


CHOSEN = 3
"""Layers of a token with sparse weights."""


def _tgif(tower: Tower) -> FusionPlan:
    return FusionPlan.tgif(tower.num_layers)


def _normalised(tower: Tower) -> FusionPlan:
    return FusionPlan.scalar_mix(tower.num_layers, norm=Norm("layer"))


def _vip_llava(tower: Tower) -> FusionPlan:
    return FusionPlan.vip_llava(tower.num_layers)


def _sparse(tower: Tower) -> FusionPlan:
    return FusionPlan.mixture_of_layers(tower.num_layers)


KERNELS = {
    "forward": Kernel(_forward(False), lambda program, map_bytes, _: forward_traffic(program, map_bytes)),
    "forward, means saved": Kernel(
        _forward(True), lambda program, map_bytes, _: forward_traffic(program, map_bytes, save_means=True)
    ),
    "forward, weights per token": Kernel(
        _forward(False, "token_weights"), lambda program, map_bytes, _: forward_traffic(program, map_bytes), by_row=True
    ),
    "group means": Kernel(
        lambda kernels, plan, prefix, tokens, t: kernels.reduce_forward(t["states"], plan.program, prefix),
        lambda program, map_bytes, _: Traffic(program.num_sources, len(program.groups), map_bytes),
    ),
    "dw": Kernel(_backward(True, False), _backward_bytes(True, False)),
    "dh": Kernel(_backward(False, True), _backward_bytes(False, True)),
    "dw and dh": Kernel(_backward(True, True), _backward_bytes(True, True)),
    "patch summaries": Kernel(
        lambda kernels, plan, prefix, tokens, t: kernels.summaries_forward(
            t["states"], plan.summary_program, prefix, "mean_patch"
        ),
        lambda program, map_bytes, _: Traffic(program.num_sources, 0, map_bytes),
    ),
    "forward, a weight a layer": Kernel(
        _forward(False), lambda program, map_bytes, _: forward_traffic(program, map_bytes), _tgif
    ),
    "forward, normalised layers": Kernel(
        _forward(False, "shared_weights"), lambda program, map_bytes, _: forward_traffic(program, map_bytes), _normalised, True
    ),
    "forward, a weight a layer, norm behind": Kernel(
        _normalised_forward(False), lambda program, map_bytes, _: normalised_forward_traffic(program, map_bytes), _tgif, True
    ),
    "forward, copies, norm behind, mix saved": Kernel(
        _normalised_forward(True),
        lambda program, map_bytes, _: normalised_forward_traffic(program, map_bytes, training=True),
        _vip_llava,
        True,
    ),
    "forward, sparse": Kernel(
        _forward(False, "values", "indices"), lambda program, map_bytes, _: Traffic(CHOSEN, 1, map_bytes), _sparse, True
    ),
}
"""The launches of a forward and a backward, by name; in all of them a map is read or written once."""


def combinations(
    kernels: Iterable[str], towers: Iterable[Tower], dtypes: Iterable[torch.dtype]
) -> Iterator[tuple[str, Tower, torch.dtype]]:
    """Those of the given kernels, towers and dtypes that are recorded."""
    for tower, kernel, dtype in product(towers, kernels, dtypes):
        if not KERNELS[kernel].by_row or (tower, dtype) == (CLIP_L_336, torch.bfloat16):
            yield kernel, tower, dtype


def tensors(plan: FusionPlan, tower: Tower, dtype: torch.dtype, batch: int) -> dict[str, Any]:
    """What the launches take: address space only, as nothing is ever written to it."""
    map_shape = (batch, tower.num_patches, tower.vision_dim)
    program = plan.program
    chosen_shape = (batch, tower.num_patches, CHOSEN)
    state_shape = (batch, tower.num_tokens, tower.vision_dim)
    return {
        "states": [torch.empty(state_shape, dtype=dtype) for _ in range(program.num_sources)],
        "weights": torch.empty(batch, plan.num_groups),
        "shared_weights": torch.empty(plan.num_groups),
        "token_weights": torch.empty(batch, tower.num_patches, plan.num_groups),
        "values": torch.empty(chosen_shape),
        "indices": torch.empty(chosen_shape, dtype=torch.int64),
        "means": torch.empty(program.num_weighted_groups, *map_shape, dtype=dtype),
        "channels": torch.empty(len(program.slots) * tower.vision_dim, dtype=dtype),
        "grad": torch.empty(*map_shape[:2], len(program.slots) * tower.vision_dim, dtype=dtype),
    }


def compile_kernel(name: str, tower: Tower, dtype: torch.dtype, target: str) -> KernelCode:
    """Compile the kernel behind a name for one of :data:`TARGETS` and read its code.

    Raises:
        RuntimeError: the call made more than one launch.
    """
    import igva_kernels.impl.triton as kernels

    aot = aot_tools()
    modules = [
        importlib.import_module(f"{kernels.__name__}.{module.name}") for module in pkgutil.iter_modules(kernels.__path__)
    ]
    batch = 2
    plan = KERNELS[name].plan(tower)
    prefix, tokens = tower.num_prefix_tokens, tower.num_tokens
    with aot.recorded_launches(*modules, warp_size=aot.TARGETS[target].warp_size) as launches:
        KERNELS[name].run(kernels, plan, prefix, tokens, tensors(plan, tower, dtype, batch))
    if len(launches) != 1:
        raise RuntimeError(f"{name}: {len(launches)} launches, expected one")
    (launch,) = launches
    programs = 1
    for size in launch.grid:
        programs *= size
    compiled = aot.compile_kernel(launch, target)
    warp_size = aot.TARGETS[target].warp_size
    if target.startswith("gfx"):
        found = read_amd(compiled.asm["amdgcn"])
    else:
        found = read_nvidia(*aot.disassemble(compiled.asm["cubin"]))
    return KernelCode(
        **found, threads=compiled.metadata.num_warps * warp_size, warp_size=warp_size, programs_per_image=programs // batch
    )


def key(kernel: str, tower: Tower, dtype: torch.dtype, target: str) -> str:
    """The name of a compiled kernel in :data:`FILE`."""
    return f"{kernel} | {tower.name} | {str(dtype).removeprefix('torch.')} | {target}"


@cache
def aot_tools() -> ModuleType:
    """``tests/aot/machine_code.py``, which is on no import path."""
    spec = importlib.util.spec_from_file_location("aot_machine_code", ROOT / "tests" / "aot" / "machine_code.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def read_nvidia(listing: str, usage: str) -> dict[str, Any]:
    """Counts from a listing of ``cuobjdump -sass`` and its line of resources."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*);", listing)
    waiting: list[set[int]] = []  # the registers that each load under way will fill
    deepest = loads = instructions = 0
    loops = False
    for address, text in lines:
        name, _, operands = text.partition(" ")
        if name == "NOP":
            continue
        instructions += 1
        if name.startswith("BRA"):
            target = re.search(r"0x([0-9a-f]+)", operands)
            if target and int(target.group(1), 16) == int(address, 16):
                instructions -= 1  # the endless jump behind the code, which nothing reaches
            elif target and int(target.group(1), 16) < int(address, 16):
                loops = True
        mentioned = {int(number) for number in re.findall(r"\bR(\d+)", operands)}
        waiting = [filled for filled in waiting if not filled & mentioned]  # whoever mentions a register waits for it
        if name.startswith("LDG") and ".128" in name:
            loads += 1
            first = int(re.match(r"\s*R(\d+)", operands).group(1))
            waiting.append(set(range(first, first + 4)))
            deepest = max(deepest, len(waiting))
    return {
        "instructions": instructions,
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "loads_in_flight": deepest,
        "loads": loads,
        "loops": loops,
    }


def read_amd(assembly: str) -> dict[str, Any]:
    """Counts from the assembly that LLVM emits. Scalar instructions have an issue slot of their own and are not counted."""
    waiting = deepest = loads = instructions = 0
    loops = False
    labels: set[str] = set()
    for line in assembly.splitlines():
        label = re.match(r"(\.\w+):", line)
        if label:
            labels.add(label.group(1))
        text = line.split(";")[0].split()
        if not text:
            continue
        name = text[0]
        if re.match(r"(v_|global_|buffer_|flat_|ds_)", name):
            instructions += 1
        if re.match(r"(global|buffer)_load_", name):
            waiting += 1
            deepest = max(deepest, waiting)
            loads += name.endswith("dwordx4")
        elif name == "s_waitcnt":
            allowed = re.search(r"vmcnt\((\d+)\)", line)
            if allowed:
                waiting = min(waiting, int(allowed.group(1)))
        elif name.startswith(("s_cbranch", "s_branch")) and text[-1] in labels:
            loops = True
    return {
        "instructions": instructions,
        "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", assembly).group(1)),
        "loads_in_flight": deepest,
        "loads": loads,
        "loops": loops,
    }
