"""The machine code of every kernel: 128-bit accesses, each state read once, no spills, no fp64, bounded registers.

The expected accesses of a case are stated here, derived from the plan; the exact numbers and the registers stand in
``budgets.json``. All cases are IGVA on the 24 layers of CLIP-L, with the widths of CLIP-L (1024) and SigLIP-so400m
(1152, not a power of two).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from igva_kernels.plan import FusionPlan

BATCH, PATCHES, PREFIX = 16, 576, 1
SOURCES, GROUPS, SLOTS, CLASSES = 24, 4, 2, 5  # of the plan below; the penultimate layer is a class of its own
PLAN = FusionPlan.igva(num_layers=24, num_groups=4)


@dataclass(frozen=True)
class Case:
    """A launch, and the maps that it reads and writes: 128-bit accesses of a thread, which holds 16 bytes of each map.

    Attributes:
        run: calls the implementation, given the module and the tensors of :func:`tensors`.
        reads: maps read.
        writes: maps written.
        sums: scalars written, the partial sums of dL/dw.
        weights: whether the weights are read, as scalars.
    """

    run: Callable[[Any, dict[str, Any]], object]
    reads: int
    writes: int
    sums: int = 0
    weights: bool = False


def _backward(kernels: Any, t: dict[str, Any], *, dw: bool, dh: bool, means: bool = True, weights: str = "weights") -> None:
    states, saved = ([], t["means"]) if means or not dw else (t["states"], None)
    kernels.fuse_backward(
        t["grad"], states, saved, t[weights], PLAN.program, PREFIX, PREFIX + PATCHES, needs_weights=dw, needs_states=dh
    )


def _summaries(kernels: Any, t: dict[str, Any], summary: str) -> None:
    kernels.summaries_forward(t["states"], PLAN.summary_program, PREFIX, summary)


def _summaries_backward(kernels: Any, t: dict[str, Any], summary: str) -> None:
    kernels.summaries_backward(t["grad_summaries"], PLAN.summary_program, PREFIX, PREFIX + PATCHES, summary)


CASES = {
    "forward": Case(
        lambda k, t: k.fuse_forward(t["states"], t["weights"], PLAN.program, PREFIX, False),
        reads=SOURCES,
        writes=SLOTS,
        weights=True,
    ),
    "forward, means saved": Case(
        lambda k, t: k.fuse_forward(t["states"], t["weights"], PLAN.program, PREFIX, True),
        reads=SOURCES,
        writes=SLOTS + GROUPS,
        weights=True,
    ),
    "forward, weights per token": Case(
        lambda k, t: k.fuse_forward(t["states"], t["token_weights"], PLAN.program, PREFIX, False),
        reads=SOURCES,
        writes=SLOTS,
        weights=True,
    ),
    "group means": Case(lambda k, t: k.reduce_forward(t["states"], PLAN.program, PREFIX), reads=SOURCES, writes=GROUPS),
    "group means, backward": Case(
        lambda k, t: k.reduce_backward(t["means"], PLAN.program, PREFIX, PREFIX + PATCHES), reads=GROUPS, writes=CLASSES
    ),
    # dL/dw needs the gradient of the fused slot alone
    "dw from means": Case(lambda k, t: _backward(k, t, dw=True, dh=False), reads=1 + GROUPS, writes=0, sums=GROUPS),
    "dw from states": Case(
        lambda k, t: _backward(k, t, dw=True, dh=False, means=False), reads=1 + SOURCES, writes=0, sums=GROUPS
    ),
    "dh": Case(lambda k, t: _backward(k, t, dw=False, dh=True), reads=SLOTS, writes=CLASSES, weights=True),
    "dw and dh, from means": Case(
        lambda k, t: _backward(k, t, dw=True, dh=True), reads=SLOTS + GROUPS, writes=CLASSES, sums=GROUPS, weights=True
    ),
    "dw and dh, from states": Case(
        lambda k, t: _backward(k, t, dw=True, dh=True, means=False),
        reads=SLOTS + SOURCES,
        writes=CLASSES,
        sums=GROUPS,
        weights=True,
    ),
    "dw and dh, weights per token": Case(
        lambda k, t: _backward(k, t, dw=True, dh=True, weights="token_weights"),
        reads=SLOTS + GROUPS,
        writes=CLASSES,
        sums=GROUPS,
        weights=True,
    ),
    "cls summaries": Case(lambda k, t: _summaries(k, t, "cls"), reads=SOURCES, writes=GROUPS),
    "cls summaries, backward": Case(lambda k, t: _summaries_backward(k, t, "cls"), reads=GROUPS, writes=GROUPS),
    # its partial sums of ROWS patches are float32 scalars, one a thread and group
    "patch summaries": Case(lambda k, t: _summaries(k, t, "mean_patch"), reads=SOURCES, writes=0, sums=GROUPS),
    "patch summaries, backward": Case(lambda k, t: _summaries_backward(k, t, "mean_patch"), reads=GROUPS, writes=GROUPS),
}

# The gradient of the mean patch arrives in float32, so a thread with 8 elements reads it with two accesses of 128 bits.
READS_FLOAT32 = "patch summaries, backward"

# Everything in bfloat16 on each target. Other dtypes and widths take the same code with other constants: one target,
# and the cases that differ most, keep the folder under three minutes.
BROAD = ["forward", "forward, means saved", "group means", "dw from means", "dw and dh, from states", "patch summaries"]
MATRIX = [
    *((case, target, torch.bfloat16, 1024) for case in CASES for target in ("sm_80", "sm_90", "sm_100", "gfx942")),
    *((case, "sm_90", torch.float32, 1024) for case in BROAD),
    *((case, "sm_90", torch.bfloat16, 1152) for case in (*BROAD, "forward, weights per token")),
    *((case, "sm_90", torch.float16, 1024) for case in ("forward", "dw from means")),
]


def tensors(dtype: torch.dtype, width: int, batch: int = BATCH, patches: int = PATCHES, offset: int = 0) -> dict[str, Any]:
    """What the cases take: address space only, as nothing is ever written to it. ``offset`` misaligns the states."""
    tokens = PREFIX + patches
    return {
        "states": [
            torch.empty(offset + batch * tokens * width, dtype=dtype)[offset:].view(batch, tokens, width)
            for _ in range(SOURCES)
        ],
        "weights": torch.empty(batch, GROUPS),
        "token_weights": torch.empty(batch, patches, GROUPS),
        "means": torch.empty(GROUPS, batch, patches, width, dtype=dtype),
        "grad": torch.empty(batch, patches, SLOTS * width, dtype=dtype),
        "grad_summaries": torch.empty(batch, GROUPS, width, dtype=dtype),
    }


@pytest.fixture(scope="session")
def record(machine_code) -> Callable[..., Any]:
    """The launch of a case, recorded instead of executed."""
    import igva_kernels.impl.triton as kernels
    from igva_kernels.impl.triton import mix_backward, mix_forward, patch_sums

    def record(case: str, target: str, inputs: dict[str, Any]) -> Any:
        warp = machine_code.TARGETS[target].warp_size
        with machine_code.recorded_launches(mix_forward, mix_backward, patch_sums, warp_size=warp) as launches:
            CASES[case].run(kernels, inputs)
        (launch,) = launches  # one pass is one launch
        return launch

    return record


@pytest.mark.parametrize(
    ("case", "target", "dtype", "width"), MATRIX, ids=lambda value: str(value).removeprefix("torch.").replace(",", "")
)
def test_machine_code_stays_within_its_budget(machine_code, record, budgets, case, target, dtype, width) -> None:
    code = machine_code.compile_launch(record(case, target, tensors(dtype, width)), target)

    reads = CASES[case].reads * (2 if dtype.itemsize == 2 and case == READS_FLOAT32 else 1)
    if target == "gfx942" and CASES[case].weights:
        # LLVM may load the four weights of an image with one wide load, or through the scalar unit
        assert code.wide_loads - reads in (0, 1)
        assert code.narrow_loads <= GROUPS
    else:
        assert code.wide_loads == reads
        assert code.narrow_loads == (GROUPS if CASES[case].weights else 0)
    assert code.wide_stores == CASES[case].writes
    assert code.narrow_stores == CASES[case].sums
    assert code.spills == 0
    assert code.float64 == 0
    budgets.check(f"{case} | {target} | {str(dtype).removeprefix('torch.')} | {width}", code.as_dict())


def test_a_misaligned_state_breaks_the_budget(machine_code, record, budgets) -> None:
    """The check bites: without the 16-byte alignment that check_supported demands there is no wide load left."""
    launch = record("forward", "sm_90", tensors(torch.bfloat16, 1024, offset=1))
    code = machine_code.compile_launch(launch, "sm_90")
    assert code.wide_loads == 0
    with pytest.raises(AssertionError, match="budget"):
        type(budgets)(budgets.recorded, update=False).check("forward | sm_90 | bfloat16 | 1024", code.as_dict())


def test_float64_states_use_float64_arithmetic(machine_code, record) -> None:
    """The count of fp64 instructions is not blind: gradcheck needs them, 16- and 32-bit inputs must have none."""
    code = machine_code.compile_launch(record("forward", "sm_90", tensors(torch.float64, 1024)), "sm_90")
    assert code.float64 > 0
    assert (code.wide_loads, code.wide_stores, code.spills) == (SOURCES, SLOTS, 0)


def test_states_are_evicted_first_only_when_asked(machine_code, record) -> None:
    launch = record("forward", "sm_90", tensors(torch.bfloat16, 1024))
    assert launch.kwargs["EVICT_FIRST"]
    kept = replace(launch, kwargs={**launch.kwargs, "EVICT_FIRST": False})
    assert machine_code.compile_launch(launch, "sm_90").evict_first
    assert not machine_code.compile_launch(kept, "sm_90").evict_first


@pytest.mark.parametrize("case", CASES)
def test_other_sizes_reuse_the_compiled_kernel(machine_code, record, case) -> None:
    """A change of B or N must not compile in mid-run; 1 and multiples of 16 are what Triton would specialise on."""
    keys = {
        machine_code.compilation_key(record(case, "sm_90", tensors(torch.bfloat16, 1024, batch, patches)), "sm_90")
        for batch, patches in ((1, 1), (2, 3), (16, 576), (3, 1024))
    }
    assert len(keys) == 1
