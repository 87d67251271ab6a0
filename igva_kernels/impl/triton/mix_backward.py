"""The gradients of the mix: to its weights and to its states.

One kernel makes both, since both read the gradient of the output.

Weights: ``dw[k] = sum over tokens of <gradient of the slot of k, mean of the group of k>``, from the saved means or
from the states once more. Each program stores the sum over its tile; torch adds these partial sums in a fixed order. No
atomics, so the bits are the same on every run. A program takes one tile and does not loop over several: its partial
sums are 16 bytes beside the 10 KiB that it reads, the code stays free of loop-carried values, and the number of
programs depends on the shape alone.

States: all members of a group have the same gradient, so one tensor is written per gradient class: five for IGVA's 24
states. The tiles then cover all T rows, and the rows outside the mix (prefix tokens) become zero in the same pass.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from igva_kernels.impl.triton.launch import Streams, Tile, accumulator_of, device_of, sharing_of
from igva_kernels.impl.triton.schedule import Schedule
from igva_kernels.impl.triton.tiles import (
    add_to_groups,
    load_weights,
    mean_of,
    put_at,
    sum_in_thread,
    tile_offsets,
    zero_tiles,
)


# As in the forward: sizes and strides must not trigger a compilation.
@triton.jit(do_not_specialize=["weights", "partials", "batch_strides", "grad_strides", "num_rows", "num_patches"])
def mix_backward_kernel(
    grad_out,  # *gradient of the S slots, (B, N, D) each, with the strides below
    states,  # num_sources x *[B, T, D]; None unless dw is computed from them
    means,  # *[num_weighted_groups, B, N, D]; None unless dw is computed from them
    weights,  # *[K] or *[B, K]; None if K = 0 or only dw is wanted
    partials,  # *[B, num_programs(0), K], sums over the tiles; None unless dw is wanted
    grad_states,  # per gradient class *[B, T, D]; None unless these are wanted
    batch_strides,  # the distinct batch strides of the states, in units of VEC elements
    grad_strides,  # of grad_out over image, slot and row, in units of VEC elements
    num_rows,  # rows that the tiles cover: T if there are grad_states, else N
    num_patches,  # N
    SCHEDULE: tl.constexpr,  # see schedule.py
    STRIDE_OF: tl.constexpr,  # per source, which of the batch strides is its own
    SHARING: tl.constexpr,  # which tokens share a row of weights, see load_weights
    SKIPPED_ROWS: tl.constexpr,  # rows of the tiles before patch 0
    FIRST_ROW: tl.constexpr,  # the row of a state that is patch 0
    D: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    EVICT_FIRST: tl.constexpr,
):
    """Grid: (tiles of one image, B)."""
    S: tl.constexpr = len(SCHEDULE.terms)
    K: tl.constexpr = len(SCHEDULE.columns)
    NUM_WEIGHTED: tl.constexpr = SCHEDULE.num_weighted_groups
    STREAM: tl.constexpr = "evict_first" if EVICT_FIRST else ""

    image = tl.program_id(1).to(tl.int64)
    row_offsets, row_exists = tile_offsets(num_rows, D, BLOCK, VEC)  # [BLOCK], [BLOCK]
    offsets = row_offsets - SKIPPED_ROWS * D  # [BLOCK] counted from patch 0, negative before it
    unit = row_offsets // VEC - SKIPPED_ROWS * (D // VEC)  # [BLOCK] the same in units of VEC, for the mask
    exists = row_exists & (unit >= 0) & (unit < num_patches * (D // VEC))  # [BLOCK]

    # A row stride of its own: a slice of a larger gradient needs no copy, and a stride of 0 gives all rows the same
    # gradient.
    row = offsets // D  # [BLOCK]
    grad_offsets = row * (grad_strides[2] * VEC) + (offsets - row * D)  # [BLOCK]
    grad_slots = ()  # S x [BLOCK] zero outside the patches, and so is all that follows from it
    for slot in tl.static_range(S):
        grad_slot = tl.zeros((BLOCK,), dtype=ACC)
        if grad_states is not None or len(SCHEDULE.terms[slot]) > 0:
            base = grad_out + image * grad_strides[0] * VEC + grad_strides[1].to(tl.int64) * (slot * VEC)
            grad_slot = tl.load(base + grad_offsets, mask=exists, other=0.0).to(ACC)
        grad_slots = grad_slots + (grad_slot,)

    # dL/dw: each thread adds up its own products as soon as a mean is complete, so that many groups hold one register
    # each and not one accumulator. What crosses threads comes last, since no load is moved across its barriers.
    sums_in_threads = zero_tiles(K, (BLOCK // VEC,), ACC)  # K x [BLOCK // VEC]
    if partials is not None:
        if means is not None:
            for group in tl.static_range(NUM_WEIGHTED):
                pointer = means + (group * tl.num_programs(1) + image) * num_patches * D
                mean = tl.load(pointer + offsets, mask=exists, other=0.0).to(ACC)  # [BLOCK]
                sums_in_threads = _add_products(sums_in_threads, grad_slots, mean, group, SCHEDULE, BLOCK, VEC)
        else:
            sums = zero_tiles(len(SCHEDULE.sizes), (BLOCK,), ACC)
            for source in tl.static_range(len(SCHEDULE.reads)):
                if SCHEDULE.reads[source]:
                    state = states[source] + image * batch_strides[STRIDE_OF[source]] * VEC + FIRST_ROW * D
                    value = tl.load(state + offsets, mask=exists, other=0.0, eviction_policy=STREAM)  # [BLOCK]
                    sums = add_to_groups(sums, value.to(ACC), source, SCHEDULE)
                    for i in tl.static_range(len(SCHEDULE.completes[source])):
                        sums_in_threads = _add_products(
                            sums_in_threads,
                            grad_slots,
                            mean_of(sums, SCHEDULE.completes[source][i], SCHEDULE),
                            SCHEDULE.completes[source][i],
                            SCHEDULE,
                            BLOCK,
                            VEC,
                        )

    # dL/dh
    if grad_states is not None:
        weight = ()  # K x scalar
        if weights is not None:
            weight = load_weights(weights, image, K, SHARING, ACC)
        for index in tl.static_range(len(SCHEDULE.classes)):
            grad_state = tl.zeros((BLOCK,), dtype=ACC)  # [BLOCK]
            for i in tl.static_range(len(SCHEDULE.classes[index][0])):
                grad_state += grad_slots[SCHEDULE.classes[index][0][i]]
            for i in tl.static_range(len(SCHEDULE.classes[index][1])):
                grad_state += grad_of_member(grad_slots, weight, SCHEDULE.classes[index][1][i], SCHEDULE)
            target = grad_states[index] + image * num_rows * D
            tl.store(target + row_offsets, grad_state.to(target.dtype.element_ty), mask=row_exists)

    if partials is not None:
        partial = partials + (image * tl.num_programs(0) + tl.program_id(0)) * K
        for column in tl.static_range(K):
            tl.store(partial + column, tl.sum(sums_in_threads[column], axis=0))


@triton.jit
def _add_products(
    sums_in_threads,
    grad_slots,
    mean,
    group: tl.constexpr,
    SCHEDULE: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):
    """The sums of the weight columns of ``group``, once its mean is known."""
    for i in tl.static_range(len(SCHEDULE.uses[group])):
        if SCHEDULE.uses[group][i][1] >= 0:
            product = sum_in_thread(grad_slots[SCHEDULE.uses[group][i][0]] * mean, BLOCK, VEC)
            sums_in_threads = put_at(sums_in_threads, SCHEDULE.uses[group][i][1], product)
    return sums_in_threads


@triton.jit
def grad_of_member(grad_slots, weight, group: tl.constexpr, SCHEDULE: tl.constexpr):
    """The gradient that each member of ``group`` has from it: sum over its slots of ``w * grad_slot / |g|``."""
    grad_mean = tl.zeros_like(grad_slots[0])  # [BLOCK]
    for i in tl.static_range(len(SCHEDULE.uses[group])):
        term = grad_slots[SCHEDULE.uses[group][i][0]]
        if SCHEDULE.uses[group][i][1] >= 0:
            term *= weight[SCHEDULE.uses[group][i][1]]
        grad_mean += term
    return grad_mean * (1.0 / SCHEDULE.sizes[group])


def launch_mix_backward(
    grad_out: Tensor,
    grad_strides: tuple[int, int, int],
    schedule: Schedule,
    weights: Tensor | None,
    streams: Streams | None,
    means: Tensor | None,
    partials: Tensor | None,
    grad_states: tuple[Tensor, ...] | None,
    *,
    tile: Tile,
    batch: int,
    num_rows: int,
    num_patches: int,
    skipped_rows: int,
    first_row: int,
) -> None:
    """Fill ``partials`` (B, tiles, K) and the ``grad_states``, each (B, num_rows, D); either may be None.

    Args:
        grad_out: the gradient of the slots; its strides over image, slot and row are ``grad_strides``, in units of the
            tile's VEC elements.
        streams: the states, or None if dL/dw is not wanted or follows from ``means``.
        num_rows: rows of one image that the tiles cover, of which ``num_patches`` from ``skipped_rows`` on have a
            gradient.
        first_row: the row of a state that belongs to the first row of ``grad_out``.
    """
    grid = (tile.count(num_rows), batch)
    if 0 in grid:
        return
    with device_of(grad_out):
        mix_backward_kernel[grid](
            grad_out,
            None if streams is None else streams.states,
            means,
            weights,
            partials,
            grad_states,
            None if streams is None else streams.batch_strides,
            grad_strides,
            num_rows,
            num_patches,
            SCHEDULE=schedule,
            STRIDE_OF=() if streams is None else streams.stride_of,
            SHARING=sharing_of(weights),
            SKIPPED_ROWS=skipped_rows,
            FIRST_ROW=first_row,
            D=tile.width,
            ACC=accumulator_of(grad_out.dtype, *(state.dtype for state in (streams.states if streams else ()))),
            BLOCK=tile.block,
            VEC=tile.vec,
            EVICT_FIRST=tile.evict_first,
            num_warps=tile.num_warps,
            enable_fp_fusion=False,  # see tiles.py
        )
