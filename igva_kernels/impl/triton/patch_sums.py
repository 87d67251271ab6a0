"""The mean patch of each group: for towers without a CLS token, whose summary must look at every patch.

CLS summaries need no kernel of their own: they are a mix over one row, see mix_forward.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from igva_kernels.impl.reference import accumulation_dtype
from igva_kernels.impl.triton.launch import Streams, accumulator_of, device_of, narrow_tile
from igva_kernels.impl.triton.schedule import Schedule
from igva_kernels.impl.triton.tiles import add_to_groups, means_of_sums, zero_tiles

ROWS_PER_PROGRAM = 16
"""Patches that one program adds up. At B = 1, N = 729, D = 1152 that makes 230 programs, enough for all SMs; the
partial sums (K float32 rows for 16 rows of each state) are then 2% of the bytes that are read for K = 4 groups of 6."""


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
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):
    """Grid: (tiles of D, chunks of N, B). Each program walks down ROWS patches with a tile of the columns."""
    K: tl.constexpr = len(SCHEDULE.terms)

    image = tl.program_id(2).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = columns // VEC < D // VEC  # [BLOCK] in units of VEC, see tile_offsets
    first_patch = tl.program_id(1) * ROWS

    sums = zero_tiles(len(SCHEDULE.sizes), BLOCK, ACC)  # G x [BLOCK]
    for step in range(ROWS):
        patch = first_patch + step
        exists = inside & (patch < num_patches)  # [BLOCK]
        for source in tl.static_range(len(SCHEDULE.members)):
            if len(SCHEDULE.members[source]) > 0:
                state = states[source] + image * batch_strides[STRIDE_OF[source]] * VEC + FIRST_ROW * D
                value = tl.load(state + patch * D + columns, mask=exists, other=0.0).to(ACC)  # [BLOCK]
                sums = add_to_groups(sums, value, source, SCHEDULE)

    means = means_of_sums(sums, SCHEDULE)  # G x [BLOCK]
    chunk = partials + (image * tl.num_programs(1) + tl.program_id(1)) * (K * D)
    for column in tl.static_range(K):
        tl.store(chunk + column * D + columns, means[SCHEDULE.terms[column][0][0]], mask=inside)


def launch_patch_sums(streams: Streams, schedule: Schedule, num_patches: int, first_row: int) -> Tensor:
    """The group means summed over chunks of patches, (B, chunks, K, D) in the accumulation dtype."""
    state = streams.states[0]
    batch, _, width = state.shape
    tile = narrow_tile(state.dtype, width)  # 256 16-bit columns: few idle lanes for D = 768, 1024, 1152
    chunks = triton.cdiv(num_patches, ROWS_PER_PROGRAM)
    partials = state.new_empty(batch, chunks, len(schedule.terms), width, dtype=accumulation_dtype(state.dtype))
    if partials.numel():
        with device_of(state):
            patch_sums_kernel[(tile.count(1), chunks, batch)](
                streams.states,
                partials,
                streams.batch_strides,
                num_patches,
                SCHEDULE=schedule,
                STRIDE_OF=streams.stride_of,
                FIRST_ROW=first_row,
                D=width,
                ACC=accumulator_of(state.dtype),
                ROWS=ROWS_PER_PROGRAM,
                BLOCK=tile.block,
                VEC=tile.vec,
                num_warps=tile.num_warps,
            )
    return partials
