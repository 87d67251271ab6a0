"""The mean patch of each group: for towers without a CLS token, whose summary must look at every patch.

CLS summaries need no kernel of their own: they are a mix over one row, see mix_forward.py.

One launch, and a program sees all patches of its columns. The alternatives: partial sums of chunks of patches, added by a
second launch (two kernels of torch follow it for the division and the cast), or by the program that finishes last, which needs
a counter that is zero at the start, an atomic operation, and thus memory that calls on two streams must not share. Here nothing
is kept between calls, and nothing is added in an order that could change. What it costs is width: so that one image makes
enough programs, each takes 64 bytes of a row. IGVA's 4 groups at D = 1024 in 16 bits then make 128 programs of an image, for
the 132 SMs of an H100, and each keeps 48 KB in flight (a group's six layers) where 20 KB hide the latency of memory. 24 layers
of 576 patches are 28 MB, 9 us at its bandwidth. At B = 16 there are 2048 programs, and 64 bytes, two sectors, are still all of
what memory moves at a time. None of this has run on a GPU yet. The order of the sum does not depend on B: an image has the same
summary in every batch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from igva_kernels.impl.triton.launch import Streams, accumulator_of, device_of, elements_per_access, register_limit, warps_of
from igva_kernels.impl.triton.replay import launch_recorded
from igva_kernels.impl.triton.schedule import Schedule

ROWS = 128
"""Patches that one program adds to its sums at a time."""

ACCESSES_PER_ROW = 4
"""128-bit accesses of one program in a row."""

THREADS = 512
"""Threads of a program: one access of each to a layer."""

REGISTERS = 64
"""Registers of a thread at most. Without a limit ptxas takes 32, and keeps one load of the loop in flight where it can keep the
six of a group. Two programs then fit an SM."""


@triton.jit(do_not_specialize=["batch_strides", "num_patches"])
def patch_means_kernel(
    states,  # num_sources x *[B, T, D]
    out,  # *[B, K, D]
    batch_strides,  # the distinct batch strides of the states, in units of VEC elements
    num_patches,  # N
    SCHEDULE: tl.constexpr,  # see schedule.py; one slot per weight column
    STRIDE_OF: tl.constexpr,  # per source, which of the batch strides is its own
    FIRST_ROW: tl.constexpr,  # P
    D: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VEC: tl.constexpr,
):
    """Grid: (tiles of D, K, B).

    Which layers a program reads is decided by a branch a group: in each of them the layers are constants, and their loads are
    under way together. They are not evicted first: the weights follow from the summaries, and the mix then reads the same
    states.
    """
    K: tl.constexpr = len(SCHEDULE.terms)

    image = tl.program_id(2).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    inside = columns // VEC < D // VEC  # [COLUMNS] in units of VEC, see tile_offsets
    for weight in tl.static_range(K):
        if tl.program_id(1) == weight:
            sums = _sums_of_group(
                states,
                batch_strides,
                image,
                columns,
                inside,
                num_patches,
                SCHEDULE.terms[weight][0][0],
                SCHEDULE,
                STRIDE_OF,
                FIRST_ROW,
                D,
                ACC,
                ROWS,
                COLUMNS,
                VEC,
            )
            total = tl.sum(sums, axis=0) * (1.0 / SCHEDULE.sizes[SCHEDULE.terms[weight][0][0]])  # [COLUMNS]
            count = num_patches.to(ACC)
            mean = total / count if ACC == tl.float64 else tl.div_rn(total, count)
            tl.store(out + (image * K + weight) * D + columns, mean.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sums_of_group(
    states,
    batch_strides,
    image,
    columns,
    inside,
    num_patches,
    group: tl.constexpr,
    SCHEDULE: tl.constexpr,
    STRIDE_OF: tl.constexpr,
    FIRST_ROW: tl.constexpr,
    D: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VEC: tl.constexpr,
):
    """[ROWS, COLUMNS]: every ROWS-th patch of all members of ``group``, patch by patch and the members ascending."""
    sums = tl.zeros((ROWS, COLUMNS), dtype=ACC)
    for first in range(0, num_patches, ROWS):
        patches = first + tl.arange(0, ROWS)  # [ROWS]
        offsets = patches[:, None] * D + columns[None, :]  # [ROWS, COLUMNS]
        exists = (patches < num_patches)[:, None] & inside[None, :]  # [ROWS, COLUMNS]
        values = ()
        for source in tl.static_range(len(SCHEDULE.members)):
            for i in tl.static_range(len(SCHEDULE.members[source])):
                if SCHEDULE.members[source][i] == group:
                    state = states[source] + image * batch_strides[STRIDE_OF[source]] * VEC + FIRST_ROW * D
                    values = values + (tl.load(state + offsets, mask=exists, other=0.0),)
        for i in tl.static_range(len(values)):
            sums += values[i].to(ACC)
    return sums


def launch_patch_means(streams: Streams, schedule: Schedule, out: Tensor, num_patches: int, first_row: int) -> None:
    """Fill ``out`` (B, K, D) with the means over a group's layers and all patches, each rounded once."""
    state = streams.states[0]
    batch, _, width = state.shape
    vec = elements_per_access(state.dtype)
    columns = ACCESSES_PER_ROW * vec
    grid = (triton.cdiv(width, columns), len(schedule.terms), batch)
    if 0 in grid:
        return
    with device_of(state):
        launch_recorded(
            patch_means_kernel,
            grid,
            streams.states,
            out,
            streams.batch_strides,
            num_patches,
            SCHEDULE=schedule,
            STRIDE_OF=streams.stride_of,
            FIRST_ROW=first_row,
            D=width,
            ACC=accumulator_of(state.dtype),
            ROWS=ROWS,
            COLUMNS=columns,
            VEC=vec,
            num_warps=warps_of(THREADS),
            **register_limit(REGISTERS),
            enable_fp_fusion=False,  # see tiles.py
        )
