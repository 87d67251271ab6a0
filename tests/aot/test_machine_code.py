"""The machine code of every kernel: 128-bit accesses, each state read once, no spills, no fp64, bounded registers.

The expected accesses of a case are stated here, derived from the plan; the exact numbers and the registers stand in
``budgets.json``. The plans are those of CLIP-L's 24 layers, the widths those of CLIP-L (1024) and SigLIP-so400m (1152,
not a power of two).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from igva_kernels.output_norm import OutputNorm
from igva_kernels.plan import FusionPlan, Mean, Weighted
from igva_kernels.program import Norm

BATCH, PATCHES, PREFIX = 16, 576, 1
CHOSEN = 4  # layers that a token names, of sparse weights

IGVA = FusionPlan.igva(num_layers=24, num_groups=4)  # 24 sources, 5 gradient classes: the penultimate layer is its own
LAYERS = tuple((layer,) for layer in range(1, 25))
TGIF = FusionPlan(24, (Weighted(LAYERS, plus=-2),))  # 24 groups of one layer, and one that is added as it is
VIP_LLAVA = FusionPlan.vip_llava(24)
NORMALISED = FusionPlan(24, (Mean(tuple(range(1, 25)), norm=Norm("layer")),))


@dataclass(frozen=True)
class Case:
    """A launch, and the maps that it reads and writes: 128-bit accesses of a thread, which holds 16 bytes of each map.

    Attributes:
        run: calls the implementation, given the module and the tensors of :func:`tensors`.
        reads: maps read.
        writes: maps written.
        sums: scalars written, the partial sums of dL/dw.
        scalars: scalars read: the weights, and the columns of sparse ones.
        plan: what is mixed.
        wide_reads: how many of ``reads`` are float32 whatever the states are, two accesses of a thread.
        wide_writes: the same of ``writes``.
    """

    run: Callable[[Any, dict[str, Any]], object]
    reads: int
    writes: int
    sums: int = 0
    scalars: int = 0
    plan: FusionPlan = IGVA
    wide_reads: int = 0
    wide_writes: int = 0


def _forward(kernels: Any, t: dict[str, Any], weights: str | None = "weights", save: bool = False) -> None:
    indices = t["indices"] if weights == "values" else None
    program = t["plan"].program
    kernels.fuse_forward(t["states"], t[weights] if weights else None, program, PREFIX, save, indices=indices)


def _backward(kernels: Any, t: dict[str, Any], *, dw: bool, dh: bool, means: bool = True, weights: str = "weights") -> None:
    states, saved = ([], t["means"]) if means or not dw else (t["states"], None)
    indices = t["indices"] if weights == "values" else None
    kernels.fuse_backward(
        t["grad"],
        states,
        saved,
        t[weights],
        t["plan"].program,
        PREFIX,
        PREFIX + PATCHES,
        needs_weights=dw,
        needs_states=dh,
        indices=indices,
    )


def _normalised_output(
    kernels: Any, t: dict[str, Any], weights: str = "weights", means: bool = False, mixed: bool = False
) -> None:
    indices = t["indices"] if weights == "values" else None
    norm, own = OutputNorm(t["channels"], t["channels"]), t[weights] if t["plan"].num_groups else None
    kernels.normalised_forward(t["states"], own, norm, t["plan"].program, PREFIX, means, mixed, indices=indices)


def _normalised_backward(kernels: Any, t: dict[str, Any]) -> None:
    program = t["plan"].program
    kernels.fuse_backward(t["grad"], t["states"], None, None, program, PREFIX, PREFIX + PATCHES, False, True)


def _summaries(kernels: Any, t: dict[str, Any], summary: str) -> None:
    kernels.summaries_forward(t["states"], t["plan"].summary_program, PREFIX, summary)


def _summaries_backward(kernels: Any, t: dict[str, Any], summary: str) -> None:
    kernels.summaries_backward(t["grad_summaries"], t["plan"].summary_program, PREFIX, PREFIX + PATCHES, summary)


CASES = {
    "forward": Case(_forward, reads=24, writes=2, scalars=4),
    "forward, means saved": Case(lambda k, t: _forward(k, t, save=True), reads=24, writes=2 + 4, scalars=4),
    "forward, weights per token": Case(lambda k, t: _forward(k, t, "token_weights"), reads=24, writes=2, scalars=4),
    "group means": Case(lambda k, t: k.reduce_forward(t["states"], IGVA.program, PREFIX), reads=24, writes=4),
    "group means in float32": Case(
        lambda k, t: k.reduce_forward(t["states"], IGVA.program, PREFIX, dtype=torch.float32),
        reads=24,
        writes=4,
        wide_writes=4,
    ),
    "mix of float32 means": Case(
        lambda k, t: k.fuse_forward(t["wide_means"], t["weights"], IGVA.mix_program, 0, False, dtype=t["states"][0].dtype),
        reads=4 + 1,
        writes=2,
        scalars=4,
        wide_reads=4,
    ),
    "group means, backward": Case(
        lambda k, t: k.reduce_backward(t["means"], IGVA.program, PREFIX, PREFIX + PATCHES), reads=4, writes=5
    ),
    # dL/dw needs the gradient of the fused slot alone
    "dw from means": Case(lambda k, t: _backward(k, t, dw=True, dh=False), reads=1 + 4, writes=0, sums=4),
    "dw from states": Case(lambda k, t: _backward(k, t, dw=True, dh=False, means=False), reads=1 + 24, writes=0, sums=4),
    "dh": Case(lambda k, t: _backward(k, t, dw=False, dh=True), reads=2, writes=5, scalars=4),
    "dw and dh, from means": Case(lambda k, t: _backward(k, t, dw=True, dh=True), reads=2 + 4, writes=5, sums=4, scalars=4),
    "dw and dh, from states": Case(
        lambda k, t: _backward(k, t, dw=True, dh=True, means=False), reads=2 + 24, writes=5, sums=4, scalars=4
    ),
    "dw and dh, weights per token": Case(
        lambda k, t: _backward(k, t, dw=True, dh=True, weights="token_weights"), reads=2 + 4, writes=5, sums=4, scalars=4
    ),
    "dw and dh from states, weights per token": Case(
        lambda k, t: _backward(k, t, dw=True, dh=True, means=False, weights="token_weights"),
        reads=2 + 24,
        writes=5,
        sums=4,
        scalars=4,
    ),
    "layers, forward": Case(_forward, reads=24, writes=1, scalars=24, plan=TGIF),
    "layers, dw and dh": Case(
        lambda k, t: _backward(k, t, dw=True, dh=True, means=False), reads=1 + 24, writes=24, sums=24, scalars=24, plan=TGIF
    ),
    # the layers that a token names, and the one that is added as it is
    "sparse, forward": Case(lambda k, t: _forward(k, t, "values"), reads=CHOSEN + 1, writes=1, scalars=2 * CHOSEN, plan=TGIF),
    "sparse, dw": Case(
        lambda k, t: _backward(k, t, dw=True, dh=False, means=False, weights="values"),
        reads=1 + CHOSEN,
        writes=0,
        sums=CHOSEN,
        scalars=CHOSEN,
        plan=TGIF,
    ),
    "sparse, dw and dh": Case(
        lambda k, t: _backward(k, t, dw=True, dh=True, means=False, weights="values"),
        reads=1 + CHOSEN,
        writes=24,
        sums=CHOSEN,
        scalars=2 * CHOSEN,
        plan=TGIF,
    ),
    # of groups the loads are in the code for every layer; those that a token does not name are masked off when it runs
    "sparse groups, forward": Case(lambda k, t: _forward(k, t, "values"), reads=24, writes=2, scalars=2 * CHOSEN),
    "normalised, forward": Case(lambda k, t: _forward(k, t, None), reads=24, writes=1, plan=NORMALISED),
    "normalised, dh": Case(_normalised_backward, reads=1 + 24, writes=24, plan=NORMALISED),
    # the parameters of the norm are S maps each; mean and 1/deviation of a row are scalars
    "layers, norm behind": Case(_normalised_output, reads=24 + 2, writes=1, scalars=24, plan=TGIF),
    "layers, norm behind, for training": Case(
        lambda k, t: _normalised_output(k, t, mixed=True), reads=24 + 2, writes=2, sums=2, scalars=24, plan=TGIF
    ),
    "copies, norm behind": Case(_normalised_output, reads=5 + 10, writes=5, plan=VIP_LLAVA),
    "copies, norm behind, for training": Case(
        lambda k, t: _normalised_output(k, t, mixed=True), reads=5 + 10, writes=5 + 5, sums=2, plan=VIP_LLAVA
    ),
    "groups, norm behind, means saved": Case(
        lambda k, t: _normalised_output(k, t, means=True, mixed=True), reads=24 + 4, writes=2 + 2 + 4, sums=2, scalars=4
    ),
    "sparse, norm behind": Case(
        lambda k, t: _normalised_output(k, t, "values"), reads=CHOSEN + 1 + 2, writes=1, scalars=2 * CHOSEN, plan=TGIF
    ),
    "cls summaries": Case(lambda k, t: _summaries(k, t, "cls"), reads=24, writes=4),
    "cls summaries, backward": Case(lambda k, t: _summaries_backward(k, t, "cls"), reads=4, writes=4),
    # a loop over the patches; what is left of them is one column a thread, and a store for each group
    "patch summaries": Case(lambda k, t: _summaries(k, t, "mean_patch"), reads=24, writes=0, sums=4),
    # the gradient of the mean patch arrives in float32
    "patch summaries, backward": Case(lambda k, t: _summaries_backward(k, t, "mean_patch"), reads=4, writes=4, wide_reads=4),
}

# Everything in bfloat16 on each target, those beside sm_90 and gfx942 in the slow tier. Other dtypes and widths take the same
# code with other constants: one target, and the cases that differ most, keep the folder under five minutes.
SLOW_TARGETS = ("sm_80", "sm_100")
BROAD = ["forward", "forward, means saved", "group means", "dw from means", "dw and dh, from states", "patch summaries"]
MATRIX = [
    *((case, target, torch.bfloat16, 1024) for case in CASES for target in ("sm_90", "gfx942")),
    *(pytest.param(case, target, torch.bfloat16, 1024, marks=pytest.mark.slow) for case in CASES for target in SLOW_TARGETS),
    *((case, "sm_90", torch.float32, 1024) for case in BROAD),
    *((case, "sm_90", torch.bfloat16, 1152) for case in (*BROAD, "forward, weights per token", "sparse, forward")),
    *(("copies, norm behind, for training", "sm_90", *other) for other in ((torch.float32, 1024), (torch.bfloat16, 1152))),
    *((case, "sm_90", torch.float16, 1024) for case in ("forward", "dw from means")),
]


def tensors(
    plan: FusionPlan, dtype: torch.dtype, width: int, batch: int = BATCH, patches: int = PATCHES, offset: int = 0
) -> dict[str, Any]:
    """What the cases take: address space only, as nothing is ever written to it. ``offset`` misaligns the states."""
    tokens, columns = PREFIX + patches, plan.num_groups
    return {
        "plan": plan,
        "states": [
            torch.empty(offset + batch * tokens * width, dtype=dtype)[offset:].view(batch, tokens, width) for _ in plan.sources
        ],
        "weights": torch.empty(batch, columns),
        "token_weights": torch.empty(batch, patches, columns),
        "values": torch.empty(batch, patches, CHOSEN),
        "indices": torch.empty(batch, patches, CHOSEN, dtype=torch.int64),
        "means": torch.empty(len(plan.program.groups), batch, patches, width, dtype=dtype),
        "wide_means": [
            *(torch.empty(batch, patches, width) for _ in plan.program.groups),
            *(torch.empty(batch, tokens, width, dtype=dtype)[:, PREFIX:] for _ in plan.program.copied_sources),
        ],
        "channels": torch.empty(plan.num_slots * width, dtype=dtype),
        "grad": torch.empty(batch, patches, plan.num_slots * width, dtype=dtype),
        "grad_summaries": torch.empty(batch, columns, width, dtype=dtype),
    }


@pytest.fixture(scope="session")
def record(machine_code) -> Callable[..., Any]:
    """The launch of a case, recorded instead of executed."""
    import igva_kernels.impl.triton as kernels
    from igva_kernels.impl.triton import mix_backward, mix_forward, norm_forward, patch_means, row_backward, row_forward

    modules = (mix_forward, mix_backward, row_forward, row_backward, norm_forward, patch_means)

    def record(case: str, target: str, inputs: dict[str, Any]) -> Any:
        warp = machine_code.TARGETS[target].warp_size
        with machine_code.recorded_launches(*modules, warp_size=warp) as launches:
            CASES[case].run(kernels, inputs)
        (launch,) = launches  # one pass is one launch
        return launch

    return record


@pytest.mark.parametrize(
    ("case", "target", "dtype", "width"), MATRIX, ids=lambda value: str(value).removeprefix("torch.").replace(",", "")
)
def test_machine_code_stays_within_its_budget(machine_code, record, budgets, case, target, dtype, width) -> None:
    expected = CASES[case]
    launch = record(case, target, tensors(expected.plan, dtype, width))
    code = machine_code.compile_launch(launch, target)

    pieces = launch.kwargs.get("PIECES", 1)  # of a row; a flat tile is one
    narrow = dtype.itemsize == 2  # so that a float32 map takes two accesses of a thread
    reads = pieces * (expected.reads + narrow * expected.wide_reads)
    writes = pieces * (expected.writes + narrow * expected.wide_writes)
    if target == "gfx942":  # LLVM loads and stores some scalars together, or loads them through the scalar unit
        assert 0 <= code.wide_loads - reads <= expected.scalars // 2
        assert code.narrow_loads <= expected.scalars
        assert 0 <= code.wide_stores - writes <= expected.sums // 2
        assert code.narrow_stores <= expected.sums
    else:
        assert (code.wide_loads, code.narrow_loads) == (reads, expected.scalars)
        assert (code.wide_stores, code.narrow_stores) == (writes, expected.sums)
    assert code.spills == 0
    assert code.float64 == 0
    budgets.check(f"{case} | {target} | {str(dtype).removeprefix('torch.')} | {width}", code.as_dict())


def test_a_misaligned_state_breaks_the_budget(machine_code, record, budgets) -> None:
    """The check bites: without the 16-byte alignment that check_supported demands there is no wide load left."""
    launch = record("forward", "sm_90", tensors(IGVA, torch.bfloat16, 1024, offset=1))
    code = machine_code.compile_launch(launch, "sm_90")
    assert code.wide_loads == 0
    with pytest.raises(AssertionError, match="budget"):
        type(budgets)(budgets.recorded, update=False).check("forward | sm_90 | bfloat16 | 1024", code.as_dict())


def test_float64_states_use_float64_arithmetic(machine_code, record) -> None:
    """The count of fp64 instructions is not blind: gradcheck needs them, 16- and 32-bit inputs must have none."""
    code = machine_code.compile_launch(record("forward", "sm_90", tensors(IGVA, torch.float64, 1024)), "sm_90")
    assert code.float64 > 0
    assert (code.wide_loads, code.wide_stores, code.spills) == (24, 2, 0)


def test_states_are_evicted_first_only_when_asked(machine_code, record) -> None:
    launch = record("forward", "sm_90", tensors(IGVA, torch.bfloat16, 1024))
    assert launch.kwargs["EVICT_FIRST"]
    kept = replace(launch, kwargs={**launch.kwargs, "EVICT_FIRST": False})
    assert machine_code.compile_launch(launch, "sm_90").evict_first
    assert not machine_code.compile_launch(kept, "sm_90").evict_first


@pytest.mark.parametrize("case", CASES)
def test_other_sizes_reuse_the_compiled_kernel(machine_code, record, case) -> None:
    """A change of B or N must not compile in mid-run; 1 and multiples of 16 are what Triton would specialise on."""
    keys = {
        machine_code.compilation_key(
            record(case, "sm_90", tensors(CASES[case].plan, torch.bfloat16, 1024, batch, patches)), "sm_90"
        )
        for batch, patches in ((1, 1), (2, 3), (16, 576), (3, 1024))
    }
    assert len(keys) == 1


def test_one_pass_has_the_arithmetic_of_two(machine_code, record) -> None:
    """Float32 means are mixed to the bits of one pass: no sum or product is contracted that two passes would round.

    A thread of 8 elements adds 20 times, scales the 4 sums, weighs the first mean and contracts the other three, where the
    kernel says so.
    """

    def operations(case: str) -> dict[str, int]:
        launch = record(case, "sm_90", tensors(IGVA, torch.bfloat16, 1024))
        listing, _ = machine_code.disassemble(machine_code.compile_kernel(launch, "sm_90").asm["cubin"])
        return {name: len(re.findall(rf"\s{name}\s", listing)) for name in ("FADD", "FMUL", "FFMA")}

    assert operations("forward") == {"FADD": 8 * 20, "FMUL": 8 * (4 + 1), "FFMA": 8 * 3}
    assert operations("group means in float32") == {"FADD": 8 * 20, "FMUL": 8 * 4, "FFMA": 0}
    assert operations("mix of float32 means") == {"FADD": 0, "FMUL": 8 * 1, "FFMA": 8 * 3}
