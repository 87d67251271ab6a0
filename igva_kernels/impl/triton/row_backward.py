"""The gradients of the mix, one row a program: for weights per token, dense or sparse, and for norms before the mean.

Weights: as in mix_backward.py, but a row is a token, so that weights per token have their gradient from one program
and nothing is left to add. Of sparse weights, each value gets the product of its own column.

States: a source that a norm touches has a gradient of its own. With the statistics of the row, which are computed again
from the state that is read anyway, and ``g`` the gradient of the normalised row ``x``, it is ``(g - mean(g) - x *
mean(g * x)) / deviation`` for a LayerNorm, and the same without ``mean(g)`` for an RMSNorm. All other sources share
theirs by gradient class, as in mix_backward.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from igva_kernels.impl.triton import launch
from igva_kernels.impl.triton.launch import Streams, Tile, accumulator_of, device_of, sharing_of
from igva_kernels.impl.triton.row_tiles import (
    centre_row,
    dot_in_thread,
    load_columns,
    load_row,
    load_row_weights,
    load_selected_row,
    mean_over_row,
    names,
    pin,
    product_of_rows,
    reaches,
    reciprocal_deviation,
    row_as,
    row_at,
    scale_row,
    store_row,
)
from igva_kernels.impl.triton.schedule import Schedule, Selection
from igva_kernels.impl.triton.tiles import put_at, zero_tiles


@triton.jit(do_not_specialize=["weights", "indices", "partials", "batch_strides", "grad_strides", "num_rows", "num_patches"])
def row_backward_kernel(
    grad_out,  # *gradient of the S slots, (B, N, D) each, with the strides below
    states,  # num_sources x *[B, T, D]; None unless dw or the gradient of a norm is computed from them
    means,  # *[num_weighted_groups, B, N, D]; None unless dw is computed from them
    weights,  # *[K], *[B, K], *[B, N, K] or *[B, N, CHOSEN]; None if K = 0 or only dw is wanted
    indices,  # *[B, N, CHOSEN]; None unless the weights are sparse
    partials,  # *[B, N, K] or *[B, N, CHOSEN], dw of each token; None unless dw is wanted
    grad_states,  # per gradient class *[B, T, D]; None unless these are wanted
    batch_strides,  # the distinct batch strides of the states, in units of VEC elements
    grad_strides,  # of grad_out over image, slot and row, in units of VEC elements
    num_rows,  # rows of the grid: T if there are grad_states, else N
    num_patches,  # N
    SCHEDULE: tl.constexpr,  # see schedule.py
    STRIDE_OF: tl.constexpr,  # per source, which of the batch strides is its own
    SHARING: tl.constexpr,  # which tokens share a row of weights, see load_row_weights
    CHOSEN: tl.constexpr,  # k of sparse weights, else 0
    SELECTED: tl.constexpr,  # per column of sparse weights, its source, where rows are selected; see schedule.py
    SELECTED_SLOT: tl.constexpr,
    SELECTED_GROUP: tl.constexpr,
    SKIPPED_ROWS: tl.constexpr,  # rows of the grid before patch 0
    FIRST_ROW: tl.constexpr,  # the row of a state that is patch 0
    D: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    PIECES: tl.constexpr,
    EVICT_FIRST: tl.constexpr,
    PIN: tl.constexpr,  # see pin
):
    """Grid: (rows, B)."""
    S: tl.constexpr = len(SCHEDULE.terms)
    K: tl.constexpr = len(SCHEDULE.columns)
    NUM_WEIGHTED: tl.constexpr = SCHEDULE.num_weighted_groups
    STREAM: tl.constexpr = "evict_first" if EVICT_FIRST else ""

    row_index = tl.program_id(0)
    token = row_index - SKIPPED_ROWS
    image = tl.program_id(1).to(tl.int64)
    exists = token >= 0  # else a prefix row: nothing is read for it, and its gradient is zero
    columns = ()  # CHOSEN x scalar
    if indices is not None:
        columns = load_columns(indices, image, token, exists, num_patches, CHOSEN)
    weight = ()  # K x scalar
    if weights is not None:
        weight = load_row_weights(weights, columns, image, token, exists, num_patches, K, CHOSEN, SHARING, ACC)

    grad_slots = ()  # S x PIECES x [BLOCK]
    grad_row = grad_out + image * grad_strides[0] * VEC + token * (grad_strides[2] * VEC)
    for slot in tl.static_range(S):
        wanted = exists
        if grad_states is None and len(SCHEDULE.terms[slot]) == 0:
            grad_slots = grad_slots + zero_tiles(PIECES, (BLOCK,), ACC)
        else:
            pointer = grad_row + grad_strides[1].to(tl.int64) * (slot * VEC)
            grad_slots = grad_slots + row_as(load_row(pointer, wanted, D, BLOCK, VEC, PIECES, ""), PIECES, ACC)

    sums_in_threads = zero_tiles(K, (BLOCK // VEC,), ACC)  # K x [BLOCK // VEC]
    if partials is not None and means is not None:
        for group in tl.static_range(NUM_WEIGHTED):
            pointer = means + ((group * tl.num_programs(1) + image) * num_patches + token) * D
            reached = exists
            if CHOSEN > 0:
                reached = exists & _names_group(columns, group, SCHEDULE, CHOSEN)
            mean = row_as(load_row(pointer, reached, D, BLOCK, VEC, PIECES, ""), PIECES, ACC)
            sums_in_threads = _add_products(sums_in_threads, grad_slots, mean, group, SCHEDULE, BLOCK, VEC, PIECES, PIN)

    if len(SELECTED) > 0:
        offset = image * batch_strides[0] * VEC + (FIRST_ROW + token) * D
        sums_in_threads = ()  # CHOSEN x [BLOCK // VEC]
        for i in tl.static_range(CHOSEN):
            row = load_selected_row(states, columns[i], offset, SELECTED, len(SELECTED), D, BLOCK, VEC, PIECES)
            row = row_as(row, PIECES, ACC)
            if len(SCHEDULE.norms[SELECTED_GROUP]) > 0:
                centred = centre_row(row, SELECTED_GROUP, SCHEDULE, D, BLOCK, PIECES)
                row = scale_row(centred, reciprocal_deviation(centred, SELECTED_GROUP, SCHEDULE, D, PIECES), PIECES)
            product = dot_in_thread(row_at(grad_slots, SELECTED_SLOT, PIECES), row, BLOCK, VEC, PIECES)
            sums_in_threads = sums_in_threads + (pin(product, PIN),)

    if states is not None:
        for source in tl.static_range(len(SCHEDULE.reads)):
            if SCHEDULE.reads[source]:
                state = states[source] + image * batch_strides[STRIDE_OF[source]] * VEC + (FIRST_ROW + token) * D
                reached = reaches(source, columns, exists, SCHEDULE, CHOSEN)
                row = row_as(load_row(state, reached, D, BLOCK, VEC, PIECES, STREAM), PIECES, ACC)
                grad_state = zero_tiles(PIECES, (BLOCK,), ACC)  # PIECES x [BLOCK]
                if SCHEDULE.own_class[source] >= 0:
                    grad_state = _grad_of_copies(grad_slots, SCHEDULE.own_class[source], SCHEDULE, PIECES, BLOCK, ACC)
                for i in tl.static_range(len(SCHEDULE.members[source])):
                    member, factor = row, 1.0
                    if len(SCHEDULE.norms[SCHEDULE.members[source][i]]) > 0:
                        centred = centre_row(row, SCHEDULE.members[source][i], SCHEDULE, D, BLOCK, PIECES)
                        factor = reciprocal_deviation(centred, SCHEDULE.members[source][i], SCHEDULE, D, PIECES)
                        member = scale_row(centred, factor, PIECES)
                    if partials is not None and means is None:
                        sums_in_threads = _add_products(
                            sums_in_threads,
                            grad_slots,
                            member,
                            SCHEDULE.members[source][i],
                            SCHEDULE,
                            BLOCK,
                            VEC,
                            PIECES,
                            PIN,
                        )
                    if grad_states is not None and SCHEDULE.own_class[source] >= 0:
                        grad_member = _grad_of_member(grad_slots, weight, SCHEDULE.members[source][i], SCHEDULE, PIECES)
                        if len(SCHEDULE.norms[SCHEDULE.members[source][i]]) > 0:
                            grad_member = _through_norm(
                                grad_member,
                                member,
                                factor,
                                exists,
                                SCHEDULE.members[source][i],
                                SCHEDULE,
                                D,
                                PIECES,
                            )
                        grad_state = _add_rows(grad_state, grad_member, PIECES)
                if grad_states is not None and SCHEDULE.own_class[source] >= 0:
                    target = grad_states[SCHEDULE.own_class[source]] + (image * num_rows + row_index) * D
                    store_row(target, grad_state, D, BLOCK, VEC, PIECES)

    if grad_states is not None:
        for index in tl.static_range(len(SCHEDULE.classes)):
            if not SCHEDULE.owned_classes[index]:
                grad_state = _grad_of_copies(grad_slots, index, SCHEDULE, PIECES, BLOCK, ACC)
                for i in tl.static_range(len(SCHEDULE.classes[index][1])):
                    grad_member = _grad_of_member(grad_slots, weight, SCHEDULE.classes[index][1][i], SCHEDULE, PIECES)
                    grad_state = _add_rows(grad_state, grad_member, PIECES)
                target = grad_states[index] + (image * num_rows + row_index) * D
                store_row(target, grad_state, D, BLOCK, VEC, PIECES)

    if partials is not None and len(SELECTED) > 0:
        for i in tl.static_range(CHOSEN):
            value = tl.sum(sums_in_threads[i], axis=0)
            tl.store(partials + (image * num_patches + token) * CHOSEN + i, value, mask=exists)
    if partials is not None and len(SELECTED) == 0:
        products = ()  # K x scalar
        for column in tl.static_range(K):
            product = tl.sum(sums_in_threads[column], axis=0)
            if means is None:  # else the mean was divided when it was stored
                product *= 1.0 / SCHEDULE.sizes[SCHEDULE.columns[column][1]]
            products = products + (product,)
        if CHOSEN == 0:
            for column in tl.static_range(K):
                tl.store(partials + (image * num_patches + token) * K + column, products[column], mask=exists)
        else:
            for i in tl.static_range(CHOSEN):
                value = tl.where(columns[i] == 0, products[0], 0.0)
                for column in tl.static_range(1, K):
                    value = tl.where(columns[i] == column, products[column], value)
                tl.store(partials + (image * num_patches + token) * CHOSEN + i, value, mask=exists)


@triton.jit
def _names_group(columns, group: tl.constexpr, SCHEDULE: tl.constexpr, CHOSEN: tl.constexpr):
    """Whether a token names a column of the group."""
    named = columns[0] < -1  # no column is: false
    for i in tl.static_range(len(SCHEDULE.uses[group])):
        if SCHEDULE.uses[group][i][1] >= 0:
            named = named | names(columns, SCHEDULE.uses[group][i][1], CHOSEN)
    return named


@triton.jit
def _add_products(
    sums_in_threads,
    grad_slots,
    row,
    group: tl.constexpr,
    SCHEDULE: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    PIECES: tl.constexpr,
    PIN: tl.constexpr,
):
    """The sums of the weight columns of ``group`` with the product of a member, or of its mean."""
    for i in tl.static_range(len(SCHEDULE.uses[group])):
        if SCHEDULE.uses[group][i][1] >= 0:
            grad_slot = row_at(grad_slots, SCHEDULE.uses[group][i][0], PIECES)
            total = sums_in_threads[SCHEDULE.uses[group][i][1]] + dot_in_thread(grad_slot, row, BLOCK, VEC, PIECES)
            sums_in_threads = put_at(sums_in_threads, SCHEDULE.uses[group][i][1], pin(total, PIN))
    return sums_in_threads


@triton.jit
def _grad_of_copies(
    grad_slots,
    gradient_class: tl.constexpr,
    SCHEDULE: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """The gradient of a source from the slots that copy it."""
    total = ()
    for piece in tl.static_range(PIECES):
        value = tl.zeros((BLOCK,), dtype=ACC)
        for i in tl.static_range(len(SCHEDULE.classes[gradient_class][0])):
            value += grad_slots[SCHEDULE.classes[gradient_class][0][i] * PIECES + piece]
        total = total + (value,)
    return total


@triton.jit
def _grad_of_member(grad_slots, weight, group: tl.constexpr, SCHEDULE: tl.constexpr, PIECES: tl.constexpr):
    """The gradient that each member of ``group`` has from it, before the norm: as in mix_backward.py."""
    total = ()
    for piece in tl.static_range(PIECES):
        grad_mean = tl.zeros_like(grad_slots[0])
        for i in tl.static_range(len(SCHEDULE.uses[group])):
            term = grad_slots[SCHEDULE.uses[group][i][0] * PIECES + piece]
            if SCHEDULE.uses[group][i][1] >= 0:
                term *= weight[SCHEDULE.uses[group][i][1]]
            grad_mean += term
        total = total + (grad_mean * (1.0 / SCHEDULE.sizes[group]),)
    return total


@triton.jit
def _through_norm(
    grad,  # PIECES x [BLOCK], of the normalised row
    normalised,  # PIECES x [BLOCK]
    factor,  # scalar, 1 / deviation
    exists,
    group: tl.constexpr,
    SCHEDULE: tl.constexpr,
    D: tl.constexpr,
    PIECES: tl.constexpr,
):
    """The gradient of the row that was normalised. It is not zero beyond D, where nothing is stored."""
    along = mean_over_row(product_of_rows(grad, normalised, PIECES), D, PIECES)
    mean = 0.0
    if SCHEDULE.norms[group][0] == "layer":
        mean = mean_over_row(grad, D, PIECES)
    total = ()
    for piece in tl.static_range(PIECES):
        value = (grad[piece] - mean - normalised[piece] * along) * factor
        total = total + (tl.where(exists, value, 0.0),)  # without eps, the deviation of a prefix row is 1 / 0
    return total


@triton.jit
def _add_rows(left, right, PIECES: tl.constexpr):
    total = ()
    for piece in tl.static_range(PIECES):
        total = total + (left[piece] + right[piece],)
    return total


def launch_row_backward(
    grad_out: Tensor,
    grad_strides: tuple[int, int, int],
    schedule: Schedule,
    weights: Tensor | None,
    indices: Tensor | None,
    streams: Streams | None,
    means: Tensor | None,
    partials: Tensor | None,
    grad_states: tuple[Tensor, ...] | None,
    *,
    selected: Selection | None,
    tile: Tile,
    batch: int,
    num_rows: int,
    num_patches: int,
    skipped_rows: int,
    first_row: int,
) -> None:
    """Fill ``partials``, dL/dw of each token, (B, N, K) or for sparse weights (B, N, k), and the ``grad_states``.

    Arguments as for :func:`~igva_kernels.impl.triton.mix_backward.launch_mix_backward`; ``streams`` are needed for dL/dw
    without ``means``, and wherever a norm's gradient is wanted. With ``selected``, dL/dw reads only the rows that a token
    names.
    """
    grid = (tile.count(num_rows), batch)
    if 0 in grid:
        return
    with device_of(grad_out):
        row_backward_kernel[grid](
            grad_out,
            None if streams is None else streams.states,
            means,
            weights,
            indices,
            partials,
            grad_states,
            None if streams is None else streams.batch_strides,
            grad_strides,
            num_rows,
            num_patches,
            SCHEDULE=schedule if selected is None else selected.with_states if grad_states else selected.only_weights,
            STRIDE_OF=() if streams is None else streams.stride_of,
            SHARING=sharing_of(weights, indices),
            CHOSEN=0 if indices is None else indices.shape[2],
            SELECTED=() if selected is None else selected.sources,
            SELECTED_SLOT=0 if selected is None else selected.slot,
            SELECTED_GROUP=0 if selected is None else selected.group,
            SKIPPED_ROWS=skipped_rows,
            FIRST_ROW=first_row,
            D=tile.width,
            ACC=accumulator_of(grad_out.dtype, *(state.dtype for state in (streams.states if streams else ()))),
            BLOCK=tile.block,
            VEC=tile.vec,
            PIECES=tile.pieces,
            EVICT_FIRST=tile.evict_first,
            PIN=launch.pinning(),
            num_warps=tile.num_warps,
            enable_fp_fusion=False,  # see tiles.py
        )
