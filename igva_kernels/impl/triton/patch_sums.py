"""The mean patch of each group: for towers without a CLS token, whose summary must look at every patch.

CLS summaries need no kernel of their own: they are a mix over one row, see mix_forward.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from igva_kernels.impl.reference import accumulation_dtype
from igva_kernels.impl.triton.launch import Streams, accumulator_of, device_of, elements_per_access, warps_of
from igva_kernels.impl.triton.schedule import Schedule
from igva_kernels.impl.triton.tiles import add_to_groups, mean_of, zero_tiles

ROWS = 16
"""Patches that one program adds up. The partial sums, K float32 rows for 16 rows of each state, are 2% of the bytes
read for K = 4 groups of 6 16-bit states; at B = 1, N = 729, D = 1152 there are still 414 programs."""

ACCESSES_PER_ROW = 16
"""128-bit accesses of one program in a row: 256 consecutive bytes, which is as good as a whole row to the memory, and a
divisor of the usual widths (128 16-bit columns of 768, 1024, 1152)."""


@triton.jit(do_not_specialize=["batch_strides", "num_patches"])
def patch_sums_kernel(
    states,  # num_sources x *[B, T, D]
    partials,  # *[B, num_programs(1), K, D]
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
    """Grid: (tiles of D, chunks of N, B).

    A tile of ROWS patches, and no loop over them: of the loads in a loop ptxas keeps one in flight, of these four to
    eight. They are not evicted first: the weights follow from the summaries, and the mix then reads the same states.
    """
    K: tl.constexpr = len(SCHEDULE.terms)

    image = tl.program_id(2).to(tl.int64)
    patches = tl.program_id(1) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    inside = columns // VEC < D // VEC  # [COLUMNS] in units of VEC, see tile_offsets
    offsets = patches[:, None] * D + columns[None, :]  # [ROWS, COLUMNS]
    exists = (patches < num_patches)[:, None] & inside[None, :]  # [ROWS, COLUMNS]

    sums = zero_tiles(len(SCHEDULE.sizes), (ROWS, COLUMNS), ACC)  # G x [ROWS, COLUMNS]
    for source in tl.static_range(len(SCHEDULE.members)):
        if len(SCHEDULE.members[source]) > 0:
            state = states[source] + image * batch_strides[STRIDE_OF[source]] * VEC + FIRST_ROW * D
            value = tl.load(state + offsets, mask=exists, other=0.0)  # [ROWS, COLUMNS]
            sums = add_to_groups(sums, value.to(ACC), source, SCHEDULE)

    chunk = partials + (image * tl.num_programs(1) + tl.program_id(1)) * (K * D)
    for weight in tl.static_range(K):
        total = tl.sum(mean_of(sums, SCHEDULE.terms[weight][0][0], SCHEDULE), axis=0)  # [COLUMNS]
        tl.store(chunk + weight * D + columns, total, mask=inside)


def launch_patch_sums(streams: Streams, schedule: Schedule, num_patches: int, first_row: int) -> Tensor:
    """The group means summed over chunks of patches, (B, chunks, K, D) in the accumulation dtype."""
    state = streams.states[0]
    batch, _, width = state.shape
    vec = elements_per_access(state.dtype)
    columns, chunks = ACCESSES_PER_ROW * vec, triton.cdiv(num_patches, ROWS)
    partials = state.new_empty(batch, chunks, len(schedule.terms), width, dtype=accumulation_dtype(state.dtype))
    if partials.numel():
        with device_of(state):
            patch_sums_kernel[(triton.cdiv(width, columns), chunks, batch)](
                streams.states,
                partials,
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
                num_warps=warps_of(ROWS * ACCESSES_PER_ROW),
                enable_fp_fusion=False,  # see tiles.py
            )
    return partials
