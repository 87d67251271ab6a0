"""The mix of a plan in one pass: every state read once, every output written once.

The same kernel makes the slots of ``fuse``, the group means that its backward wants, the means of ``reduce_groups``,
and the CLS summaries, which are a mix of K plain means over the first row of each image.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from igva_kernels.impl.triton.launch import Streams, Tile, accumulator_of, device_of, sharing_of
from igva_kernels.impl.triton.replay import launch_recorded
from igva_kernels.impl.triton.schedule import Schedule
from igva_kernels.impl.triton.tiles import (
    add_to_groups,
    fold_terms,
    load_weights,
    mean_of,
    put_at,
    tile_offsets,
    zero_tiles,
)


# Sizes and strides change from batch to batch, and no instruction gets better by knowing their values (see
# tile_offsets), so they must not trigger a compilation in mid-run. What is left to specialise on is the alignment of
# the streamed pointers.
@triton.jit(do_not_specialize=["weights", "batch_strides", "num_rows"])
def mix_forward_kernel(
    states,  # num_sources x *[B, T, D]
    weights,  # *[K] or *[B, K]; None if K = 0
    out,  # *[B, N, S*D]; None if no slot is wanted
    means,  # *[NUM_MEANS, B, N, D]; None if NUM_MEANS = 0
    batch_strides,  # the distinct batch strides of the states, in units of VEC elements
    num_rows,  # N
    SCHEDULE: tl.constexpr,  # see schedule.py
    STRIDE_OF: tl.constexpr,  # per source, which of the batch strides is its own
    NUM_MEANS: tl.constexpr,  # so many of the group means are stored as well, beginning with the weighted ones
    SHARING: tl.constexpr,  # which tokens share a row of weights, see load_weights
    FIRST_ROW: tl.constexpr,  # the row of a state that becomes row 0 of the outputs: P for patches
    D: tl.constexpr,
    ACC: tl.constexpr,  # type of all arithmetic: float32, or float64 for float64 states
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    EVICT_FIRST: tl.constexpr,
):
    """Grid: (tiles of one image, B)."""
    S: tl.constexpr = len(SCHEDULE.terms)
    K: tl.constexpr = len(SCHEDULE.columns)
    STREAM: tl.constexpr = "evict_first" if EVICT_FIRST else ""

    image = tl.program_id(1).to(tl.int64)  # whatever it multiplies is int64: a batch may pass 2**31 elements
    offsets, exists = tile_offsets(num_rows, D, BLOCK, VEC)  # [BLOCK], [BLOCK]
    weight = ()  # K x scalar
    if weights is not None:
        weight = load_weights(weights, image, K, SHARING, ACC)

    # A stride in units of VEC makes the row address a multiple of VEC by construction, and every load 128 bits wide. No
    # load waits for another, and no store stands between them: ptxas keeps a dozen in flight. A sum goes into its slots
    # as soon as its turn has come, so that 24 groups of one layer do not hold 24 accumulators.
    slots = zero_tiles(S, (BLOCK,), ACC)  # S x [BLOCK]
    sums = zero_tiles(len(SCHEDULE.sizes), (BLOCK,), ACC)  # G x [BLOCK]
    for source in tl.static_range(len(SCHEDULE.reads)):
        if SCHEDULE.reads[source]:
            state = states[source] + image * batch_strides[STRIDE_OF[source]] * VEC + FIRST_ROW * D
            value = tl.load(state + offsets, mask=exists, other=0.0, eviction_policy=STREAM)  # [BLOCK]
            for i in tl.static_range(len(SCHEDULE.copies[source])):
                slots = put_at(slots, SCHEDULE.copies[source][i], value)  # never converted: a copy keeps every bit
            sums = add_to_groups(sums, value.to(ACC), source, SCHEDULE)
            if out is not None:
                slots = fold_terms(slots, sums, weight, source, SCHEDULE)

    if out is not None:
        # Row n of the output begins at n*S*D, not n*D. In this form the compiler still sees that the rest is contiguous.
        slot_offsets = (offsets // D) * ((S - 1) * D) + offsets  # [BLOCK]
        for slot in tl.static_range(S):
            target = out + image * num_rows * (S * D) + slot * D
            tl.store(target + slot_offsets, slots[slot].to(out.dtype.element_ty), mask=exists)
    for group in tl.static_range(NUM_MEANS):
        mean = means + (group * tl.num_programs(1) + image) * num_rows * D
        tl.store(mean + offsets, mean_of(sums, group, SCHEDULE).to(means.dtype.element_ty), mask=exists)


def launch_mix_forward(
    streams: Streams,
    schedule: Schedule,
    weights: Tensor | None,
    out: Tensor | None,
    means: Tensor | None,
    *,
    tile: Tile,
    num_rows: int,
    first_row: int,
) -> None:
    """Fill ``out`` (B, num_rows, S*D) and ``means`` (any number of groups, B, num_rows, D); either may be None.

    Row 0 of the outputs is row ``first_row`` of the states. ``weights`` are (K,) or (B, K), contiguous.
    """
    state = streams.states[0]
    grid = (tile.count(num_rows), state.shape[0])
    if 0 in grid:
        return
    with device_of(state):
        launch_recorded(
            mix_forward_kernel,
            grid,
            streams.states,
            weights,
            out,
            means,
            streams.batch_strides,
            num_rows,
            SCHEDULE=schedule,
            STRIDE_OF=streams.stride_of,
            NUM_MEANS=0 if means is None else means.shape[0],
            SHARING=sharing_of(weights),
            FIRST_ROW=first_row,
            D=tile.width,
            ACC=accumulator_of(*(state.dtype for state in streams.states)),
            BLOCK=tile.block,
            VEC=tile.vec,
            EVICT_FIRST=tile.evict_first,
            num_warps=tile.num_warps,
            enable_fp_fusion=False,  # see tiles.py
        )
