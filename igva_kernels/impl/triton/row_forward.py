"""The mix of a plan, one row a program: for weights per token, dense or sparse, and for norms before the mean.

As mix_forward.py otherwise: every state read once, and with sparse weights only if the token names it; every output
written once; the same terms in the same order.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from igva_kernels.impl.triton import launch
from igva_kernels.impl.triton.launch import Streams, Tile, accumulator_of, device_of, sharing_of
from igva_kernels.impl.triton.replay import launch_recorded
from igva_kernels.impl.triton.row_tiles import (
    add_row_to_group,
    add_scaled_row,
    centre_row,
    fold_term_rows,
    in_order,
    load_columns,
    load_row,
    load_row_weights,
    load_selected_row,
    load_values,
    mean_row,
    put_row,
    reaches,
    reciprocal_deviation,
    row_as,
    row_at,
    scale_row,
    store_row,
)
from igva_kernels.impl.triton.schedule import Schedule, Selection
from igva_kernels.impl.triton.tiles import zero_tiles


@triton.jit
def mix_row(
    states,
    weights,
    indices,
    batch_strides,
    image,
    token,
    num_rows,
    WANTED: tl.constexpr,  # whether the slots are, and not the sums of the groups alone
    SCHEDULE: tl.constexpr,
    STRIDE_OF: tl.constexpr,
    SHARING: tl.constexpr,
    CHOSEN: tl.constexpr,
    SELECTED: tl.constexpr,
    SELECTED_SLOT: tl.constexpr,
    SELECTED_GROUP: tl.constexpr,
    FIRST_ROW: tl.constexpr,
    D: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    PIECES: tl.constexpr,
    EVICT_FIRST: tl.constexpr,
    PIN: tl.constexpr,
):
    """A row of every slot and the sum of every group, (S + G) x PIECES x [BLOCK]; arguments as for the kernels.

    Slots that copy are in the type of their source, all else in ACC.
    """
    S: tl.constexpr = len(SCHEDULE.terms)
    G: tl.constexpr = len(SCHEDULE.sizes)
    K: tl.constexpr = len(SCHEDULE.columns)
    STREAM: tl.constexpr = "evict_first" if EVICT_FIRST else ""

    exists = token >= 0  # all rows of the forward do
    columns = ()  # CHOSEN x scalar
    if indices is not None:
        columns = load_columns(indices, image, token, exists, num_rows, CHOSEN)
    weight = ()  # K x scalar
    if weights is not None and len(SELECTED) == 0:
        weight = load_row_weights(weights, columns, image, token, exists, num_rows, K, CHOSEN, SHARING, ACC)

    slots = zero_tiles(S * PIECES, (BLOCK,), ACC)  # S x PIECES x [BLOCK]
    sums = zero_tiles(G * PIECES, (BLOCK,), ACC)  # G x PIECES x [BLOCK]
    if len(SELECTED) > 0:
        offset = image * batch_strides[0] * VEC + (FIRST_ROW + token) * D
        values = load_values(weights, columns, image, token, num_rows, len(SELECTED), CHOSEN, ACC)
        ordered = in_order(columns, values, CHOSEN)
        total = zero_tiles(PIECES, (BLOCK,), ACC)  # PIECES x [BLOCK]
        for i in tl.static_range(CHOSEN):
            row = load_selected_row(states, ordered[i], offset, SELECTED, len(SELECTED), D, BLOCK, VEC, PIECES)
            row = row_as(row, PIECES, ACC)
            if len(SCHEDULE.norms[SELECTED_GROUP]) > 0:
                centred = centre_row(row, SELECTED_GROUP, SCHEDULE, D, BLOCK, PIECES)
                row = scale_row(centred, reciprocal_deviation(centred, SELECTED_GROUP, SCHEDULE, D, PIECES), PIECES)
            total = add_scaled_row(total, row, ordered[CHOSEN + i], PIECES)
        slots = put_row(slots, SELECTED_SLOT, total, PIECES)
    for source in tl.static_range(len(SCHEDULE.reads)):
        if SCHEDULE.reads[source]:
            state = states[source] + image * batch_strides[STRIDE_OF[source]] * VEC + (FIRST_ROW + token) * D
            reached = reaches(source, columns, exists, SCHEDULE, CHOSEN)
            stored = load_row(state, reached, D, BLOCK, VEC, PIECES, STREAM)  # PIECES x [BLOCK]
            for i in tl.static_range(len(SCHEDULE.copies[source])):
                slots = put_row(slots, SCHEDULE.copies[source][i], stored, PIECES)  # never converted
            row = row_as(stored, PIECES, ACC)
            for i in tl.static_range(len(SCHEDULE.members[source])):
                member = row
                if len(SCHEDULE.norms[SCHEDULE.members[source][i]]) > 0:
                    centred = centre_row(row, SCHEDULE.members[source][i], SCHEDULE, D, BLOCK, PIECES)
                    factor = reciprocal_deviation(centred, SCHEDULE.members[source][i], SCHEDULE, D, PIECES)
                    member = scale_row(centred, factor, PIECES)
                sums = add_row_to_group(sums, member, source, SCHEDULE.members[source][i], SCHEDULE, PIECES, PIN)
            if WANTED:
                slots = fold_term_rows(slots, sums, weight, columns, source, SCHEDULE, PIECES, CHOSEN, PIN)
    return slots + sums


@triton.jit(do_not_specialize=["weights", "indices", "batch_strides", "num_rows"])
def row_forward_kernel(
    states,  # num_sources x *[B, T, D]
    weights,  # *[K], *[B, K], *[B, N, K] or *[B, N, CHOSEN]; None if K = 0
    indices,  # *[B, N, CHOSEN]; None unless the weights are sparse
    out,  # *[B, N, S*D]; None if no slot is wanted
    means,  # *[NUM_MEANS, B, N, D]; None if NUM_MEANS = 0
    batch_strides,  # the distinct batch strides of the states, in units of VEC elements
    num_rows,  # N
    SCHEDULE: tl.constexpr,  # see schedule.py
    STRIDE_OF: tl.constexpr,  # per source, which of the batch strides is its own
    NUM_MEANS: tl.constexpr,  # so many of the group means are stored as well, beginning with the weighted ones
    SHARING: tl.constexpr,  # which tokens share a row of weights, see load_row_weights
    CHOSEN: tl.constexpr,  # k of sparse weights, else 0
    SELECTED: tl.constexpr,  # per column of sparse weights, its source, where rows are selected; see schedule.py
    SELECTED_SLOT: tl.constexpr,
    SELECTED_GROUP: tl.constexpr,
    FIRST_ROW: tl.constexpr,  # the row of a state that becomes row 0 of the outputs: P for patches
    D: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    PIECES: tl.constexpr,
    EVICT_FIRST: tl.constexpr,
    PIN: tl.constexpr,  # see pin
):
    """Grid: (N, B)."""
    S: tl.constexpr = len(SCHEDULE.terms)

    token = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    rows = mix_row(
        states,
        weights,
        indices,
        batch_strides,
        image,
        token,
        num_rows,
        out is not None,
        SCHEDULE,
        STRIDE_OF,
        SHARING,
        CHOSEN,
        SELECTED,
        SELECTED_SLOT,
        SELECTED_GROUP,
        FIRST_ROW,
        D,
        ACC,
        BLOCK,
        VEC,
        PIECES,
        EVICT_FIRST,
        PIN,
    )
    if out is not None:
        target = out + (image * num_rows + token) * (S * D)
        for slot in tl.static_range(S):
            store_row(target + slot * D, row_at(rows, slot, PIECES), D, BLOCK, VEC, PIECES)
    for group in tl.static_range(NUM_MEANS):
        target = means + ((group * tl.num_programs(1) + image) * num_rows + token) * D
        store_row(target, mean_row(rows[S * PIECES :], group, SCHEDULE, PIECES), D, BLOCK, VEC, PIECES)


def launch_row_forward(
    streams: Streams,
    schedule: Schedule,
    weights: Tensor | None,
    indices: Tensor | None,
    out: Tensor | None,
    means: Tensor | None,
    *,
    selected: Selection | None,
    tile: Tile,
    num_rows: int,
    first_row: int,
) -> None:
    """Fill ``out`` (B, num_rows, S*D) and ``means`` (any number of groups, B, num_rows, D); either may be None.

    Row 0 of the outputs is row ``first_row`` of the states. ``weights`` and ``indices`` are contiguous. With
    ``selected``, rows that a token names are selected by their pointer.
    """
    state = streams.states[0]
    grid = (tile.count(num_rows), state.shape[0])
    if 0 in grid:
        return
    with device_of(state):
        launch_recorded(
            row_forward_kernel,
            grid,
            streams.states,
            weights,
            indices,
            out,
            means,
            streams.batch_strides,
            num_rows,
            **row_constants(streams, weights, indices, means, schedule, selected, tile, first_row),
        )


def row_constants(
    streams: Streams,
    weights: Tensor | None,
    indices: Tensor | None,
    means: Tensor | None,
    schedule: Schedule,
    selected: Selection | None,
    tile: Tile,
    first_row: int,
) -> dict[str, Any]:
    """What the kernels that mix row by row are compiled for; arguments as for :func:`launch_row_forward`."""
    return {
        "SCHEDULE": schedule if selected is None else selected.forward,
        "STRIDE_OF": streams.stride_of,
        "NUM_MEANS": 0 if means is None else means.shape[0],
        "SHARING": sharing_of(weights, indices),
        "CHOSEN": 0 if indices is None else indices.shape[2],
        "SELECTED": () if selected is None else selected.sources,
        "SELECTED_SLOT": 0 if selected is None else selected.slot,
        "SELECTED_GROUP": 0 if selected is None else selected.group,
        "FIRST_ROW": first_row,
        "D": tile.width,
        "ACC": accumulator_of(*(state.dtype for state in streams.states)),
        "BLOCK": tile.block,
        "VEC": tile.vec,
        "PIECES": tile.pieces,
        "EVICT_FIRST": tile.evict_first,
        "PIN": launch.pinning(),
        "num_warps": tile.num_warps,
        "enable_fp_fusion": False,  # see tiles.py
    }
