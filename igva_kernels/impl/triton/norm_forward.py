"""The mix of a plan with a norm behind it: one program holds all S*D channels of a token, normalises and stores them.

As row_forward.py, whose rows it takes; what a norm of its own would read and write again never leaves the registers. Its
parameters, S*D each, are read by every program, from L2.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from igva_kernels.impl.triton.launch import Streams, Tile, device_of
from igva_kernels.impl.triton.replay import launch_recorded
from igva_kernels.impl.triton.row_forward import mix_row, row_constants
from igva_kernels.impl.triton.row_tiles import (
    load_row,
    mean_over_row,
    mean_row,
    product_of_rows,
    row_as,
    row_at,
    scale_row,
    store_row,
)
from igva_kernels.impl.triton.schedule import Schedule, Selection
from igva_kernels.output_norm import OutputNorm


@triton.jit
def centre_rows(rows, mean, D: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr, S: tl.constexpr):
    """S rows less their common mean, S x PIECES x [BLOCK]; zero beyond D."""
    centred = ()
    for slot in tl.static_range(S):
        for piece in tl.static_range(PIECES):
            value = rows[slot * PIECES + piece] - mean
            if (piece + 1) * BLOCK > D:
                value = tl.where(piece * BLOCK + tl.arange(0, BLOCK) < D, value, 0.0)
            centred = centred + (value,)
    return centred


@triton.jit(do_not_specialize=["weights", "indices", "statistics", "batch_strides", "num_rows"])
def normalised_forward_kernel(
    states,  # num_sources x *[B, T, D]
    weights,  # *[K], *[B, K], *[B, N, K] or *[B, N, CHOSEN]; None if K = 0
    indices,  # *[B, N, CHOSEN]; None unless the weights are sparse
    norm_weight,  # *[S*D], or None
    norm_bias,  # *[S*D], or None
    out,  # *[B, N, S*D]
    means,  # *[NUM_MEANS, B, N, D]; None if NUM_MEANS = 0
    mixed,  # *[B, N, S*D], the rows before the norm; None if nobody needs them
    statistics,  # *[2, B, N], mean and 1/deviation, or without the mean *[1, B, N]; None with mixed
    batch_strides,  # the distinct batch strides of the states, in units of VEC elements
    num_rows,  # N
    KIND: tl.constexpr,  # "layer" or "rms"
    EPS: tl.constexpr,
    SCHEDULE: tl.constexpr,  # this and what follows as in row_forward.py
    STRIDE_OF: tl.constexpr,
    NUM_MEANS: tl.constexpr,
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
        True,
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
    for group in tl.static_range(NUM_MEANS):
        target = means + ((group * tl.num_programs(1) + image) * num_rows + token) * D
        store_row(target, mean_row(rows[S * PIECES :], group, SCHEDULE, PIECES), D, BLOCK, VEC, PIECES)

    row = row_as(rows[: S * PIECES], S * PIECES, ACC)
    first = (image * num_rows + token) * (S * D)
    if mixed is not None:
        for slot in tl.static_range(S):
            store_row(mixed + first + slot * D, row_at(row, slot, PIECES), D, BLOCK, VEC, PIECES)
    if KIND == "layer":
        mean = mean_over_row(row, S * D, S * PIECES)
        row = centre_rows(row, mean, D, BLOCK, PIECES, S)
        if mixed is not None:
            tl.store(statistics + image * num_rows + token, mean)
    # from deviations, as in row_tiles.py
    factor = 1.0 / tl.sqrt(mean_over_row(product_of_rows(row, row, S * PIECES), S * D, S * PIECES) + EPS)
    if mixed is not None:
        place = image if KIND == "rms" else tl.num_programs(1) + image
        tl.store(statistics + place * num_rows + token, factor)

    for slot in tl.static_range(S):
        normalised = scale_row(row_at(row, slot, PIECES), factor, PIECES)
        if norm_weight is not None:
            weight = row_as(load_row(norm_weight + slot * D, token >= 0, D, BLOCK, VEC, PIECES, ""), PIECES, ACC)
            normalised = product_of_rows(normalised, weight, PIECES)
        if norm_bias is not None:
            bias = row_as(load_row(norm_bias + slot * D, token >= 0, D, BLOCK, VEC, PIECES, ""), PIECES, ACC)
            shifted = ()
            for piece in tl.static_range(PIECES):
                shifted = shifted + (normalised[piece] + bias[piece],)
            normalised = shifted
        store_row(out + first + slot * D, normalised, D, BLOCK, VEC, PIECES)


def launch_normalised_forward(
    streams: Streams,
    schedule: Schedule,
    weights: Tensor | None,
    indices: Tensor | None,
    norm: OutputNorm,
    out: Tensor,
    means: Tensor | None,
    mixed: Tensor | None,
    statistics: Tensor | None,
    *,
    selected: Selection | None,
    tile: Tile,
    num_rows: int,
    first_row: int,
) -> None:
    """Fill ``out`` (B, num_rows, S*D) and, where they are given, ``means``, ``mixed`` (like out) and ``statistics``.

    Arguments as for :func:`~igva_kernels.impl.triton.row_forward.launch_row_forward`. The parameters of ``norm`` are
    contiguous and begin at multiples of 16 bytes.
    """
    state = streams.states[0]
    grid = (tile.count(num_rows), state.shape[0])
    if 0 in grid:
        return
    with device_of(state):
        launch_recorded(
            normalised_forward_kernel,
            grid,
            streams.states,
            weights,
            indices,
            norm.weight,
            norm.bias,
            out,
            means,
            mixed,
            statistics,
            streams.batch_strides,
            num_rows,
            KIND=norm.kind,
            EPS=norm.eps,
            **row_constants(streams, weights, indices, means, schedule, selected, tile, first_row),
        )
