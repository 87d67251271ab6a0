"""The machine code of the allocator's kernels: tensor cores, 128-bit loads of the weights, no spills, shared memory that fits.

IGVA's sizes: four blocks of 1024, four groups and heads. Eight images are one row tile of sixteen; more rows take larger
tiles and are in the slow tier. Budgets are in ``budgets_allocator.json``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from igva_kernels.allocator_layout import AllocatorSizes

BUDGETS = Path(__file__).with_name("budgets_allocator.json")

SIZES = AllocatorSizes(num_groups=4, vision_dim=1024, text_dim=768, hidden_dim=1024, num_blocks=4, num_heads=4)

SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
"""Bytes that one program may have."""

# Kernel, and which of its launches, in the order of a forward and a backward: those of a block are alike, but for the first
# query, whose input is not normalised, and the sum, which the backward reads along the columns.
PRODUCTS = {
    "inputs": ("project_inputs_kernel", 0),
    "keys and values": ("keys_values_kernel", 0),
    "first query": ("query_kernel", 0),
    "query": ("query_kernel", 1),
    "attended": ("attended_kernel", 0),
    "ffn hidden": ("ffn_hidden_kernel", 0),
    "ffn sum": ("sum_kernel", 0),
    "head": ("head_kernel", 0),
    "ffn hidden, backward": ("ffn_hidden_backward_kernel", 0),
    "ffn sum, backward": ("sum_kernel", -1),
    "attended, backward": ("attended_backward_kernel", 0),
    "query, backward": ("query_backward_kernel", 0),
    "keys and values, backward": ("members_backward_kernel", 0),
    "inputs, backward": ("inputs_backward_kernel", 0),
    "gradients of weights": ("weight_gradients_kernel", 0),
}
OTHERS = {"head, backward": ("head_backward_kernel", 0), "gradients of norms": ("norm_gradients_kernel", 0)}
KERNELS = {**PRODUCTS, **OTHERS}

# The widest on registers or shared memory, for every target; all on sm_90. The rest is in the slow tier.
WIDEST = ["keys and values", "attended", "ffn hidden", "query, backward", "gradients of weights"]
MATRIX = [
    *((case, "sm_90", torch.bfloat16, 8) for case in KERNELS),
    *((case, target, torch.bfloat16, 8) for case in WIDEST for target in ("sm_80", "sm_100", "gfx942")),
]
SLOW_MATRIX = [
    *((case, target, torch.bfloat16, 8) for case in KERNELS for target in ("sm_80", "sm_100", "gfx942") if case not in WIDEST),
    *((case, target, torch.bfloat16, 100) for case in KERNELS for target in ("sm_80", "sm_90")),
    *((case, "sm_90", torch.bfloat16, 24) for case in KERNELS),
    *((case, "sm_90", torch.float16, 8) for case in ("attended", "ffn hidden")),
    *((case, "sm_90", torch.float32, batch) for case in KERNELS for batch in (8, 100)),
]


@pytest.fixture(scope="module")
def record(machine_code) -> Callable[..., list[Any]]:
    """The launches of a forward and a backward, recorded instead of executed. ``offset`` misaligns the parameters."""
    from igva_kernels.impl.triton import allocator

    def record(target: str, dtype: torch.dtype, batch: int, offset: int = 0) -> list[Any]:
        parameters = []
        for shape in SIZES.parameter_shapes:  # address space only, as nothing is ever written to it
            numel = torch.Size(shape).numel()
            parameters.append(torch.empty(offset + numel, dtype=dtype)[offset:].view(shape))
        summaries = torch.empty(batch, SIZES.num_groups, SIZES.vision_dim, dtype=dtype)
        embeds = torch.empty(batch, SIZES.text_dim)
        warp = machine_code.TARGETS[target].warp_size
        with machine_code.recorded_launches(allocator, warp_size=warp) as launches:
            saved = allocator.allocate_forward(summaries, embeds, parameters, SIZES.num_heads, 1e-5, True)
            grad_out = torch.empty(batch, SIZES.num_groups)
            needs = (True, True, True)
            allocator.allocate_backward(grad_out, summaries, embeds, parameters, *saved, SIZES.num_heads, *needs)
        return launches

    return record


def launch_of(launches: list[Any], case: str) -> Any:
    kernel, which = KERNELS[case]
    return [launch for launch in launches if launch.kernel.__name__ == kernel][which]


def check(machine_code: Any, record: Any, budgets: Any, case: str, target: str, dtype: torch.dtype, batch: int) -> None:
    launch = launch_of(record(target, dtype, batch), case)
    code = machine_code.compile_launch(launch, target)
    compiled = machine_code.compile_kernel(launch, target)  # from Triton's cache
    if target.startswith("gfx"):
        tensor_cores = len(re.findall(r"^\s+v_mfma_", compiled.asm["amdgcn"], re.MULTILINE))
    else:
        # HMMA, from sm_90 on HGMMA and from sm_100 on UTCHMMA
        tensor_cores = len(re.findall(r"\s[A-Z]*HG?MMA\b", machine_code.disassemble(compiled.asm["cubin"])[0]))
    # The products of 16 warps have 128 registers a thread; Triton 3.9 keeps two words of one beside them.
    assert code.spills <= (0 if budgets.pinned else 2)
    assert code.float64 == 0
    assert compiled.metadata.shared <= SHARED_MEMORY[target]
    if case in PRODUCTS:
        assert (tensor_cores > 0) == (dtype.itemsize == 2)
        if "TILE" in launch.kwargs:
            # of one step: the weights, read along their rows in the forward and their columns in the backward, and the rows
            assert code.wide_loads >= strip_accesses(launch, dtype)
    numbers = {**code.as_dict(), "tensor_cores": tensor_cores, "shared_memory": compiled.metadata.shared}
    budgets.check(f"{case} | {target} | {str(dtype).removeprefix('torch.')} | B={batch}", numbers)


def strip_accesses(launch: Any, dtype: torch.dtype) -> int:
    """The 128-bit loads that a thread needs for the weights of one step, at least one."""
    tile = launch.kwargs["TILE"]
    threads = launch.kwargs["num_warps"] * (256 // tile.slices)
    return max(1, tile.slices * tile.depth * tile.columns * dtype.itemsize // (16 * threads))


def names(value: object) -> str:
    return str(value).removeprefix("torch.").replace(",", "")


@pytest.mark.parametrize(("case", "target", "dtype", "batch"), MATRIX, ids=names)
def test_machine_code_stays_within_its_budget(machine_code, record, budgets, case, target, dtype, batch) -> None:
    check(machine_code, record, budgets, case, target, dtype, batch)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "target", "dtype", "batch"), SLOW_MATRIX, ids=names)
def test_machine_code_of_the_rest(machine_code, record, budgets, case, target, dtype, batch) -> None:
    check(machine_code, record, budgets, case, target, dtype, batch)


def test_misaligned_weights_break_the_budget(machine_code, record) -> None:
    """The check bites: the wide loads that are left are those of the rows."""
    launches = record("sm_90", torch.bfloat16, 8), record("sm_90", torch.bfloat16, 8, offset=1)
    aligned, misaligned = (machine_code.compile_launch(launch_of(each, "ffn sum"), "sm_90") for each in launches)
    strip = strip_accesses(launch_of(launches[0], "ffn sum"), torch.bfloat16)
    assert aligned.wide_loads - misaligned.wide_loads >= strip


def test_launch_counts(record) -> None:
    launches = record("sm_90", torch.bfloat16, 8)
    backward = [launch.kernel.__name__ for launch in launches].index("head_backward_kernel")
    assert (backward, len(launches) - backward) == (19, 25)


@pytest.mark.parametrize("batches", [(5, 6, 8), (17, 31, 32), (33, 100, 256)])
def test_other_batches_reuse_the_compiled_kernels(machine_code, record, batches) -> None:
    """Row tiles come in three sizes; within one of them a change of B compiles nothing."""
    keys = [
        {f"{launch.kernel.__name__} {machine_code.compilation_key(launch, 'sm_90')}" for launch in record_of}
        for record_of in (record("sm_90", torch.bfloat16, batch) for batch in batches)
    ]
    assert keys[0] == keys[1] == keys[2]


def test_a_step_is_the_whole_reduction_for_few_images(record) -> None:
    """All weights of a program are on their way before anything waits: up to sixteen images in 16 bit."""
    launch = launch_of(record("sm_90", torch.bfloat16, 16), "ffn hidden")
    tile = launch.kwargs["TILE"]
    assert tile.slices * tile.depth == SIZES.hidden_dim
    assert launch.grid == (64, 1)
