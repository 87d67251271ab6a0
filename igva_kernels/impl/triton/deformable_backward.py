"""The gradients of locations and weights, and, where atomic additions are asked for, that of the value."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from igva_kernels.impl.deformable_reference import accumulation_dtype
from igva_kernels.impl.triton.deformable_geometry import attention_tile, channels_of, corner_rows, extent_of, extents_of, locate
from igva_kernels.impl.triton.launch import accumulator_of, device_of


@triton.jit
def _product_with_corner(
    cells,
    grad_value,
    grad,
    share,
    row,
    column,
    inside,
    height,
    width,
    channels,
    in_head,
    PITCH: tl.constexpr,
    ACC: tl.constexpr,
):
    """The output's gradient times one corner's rows, [ROWS]; ``share`` of it is added to the gradient of the value."""
    cell, on_map = corner_rows(row, column, inside, height, width)
    offsets = (cell * PITCH)[:, None] + channels[None, :]
    mask = on_map[:, None] & in_head[None, :]
    if grad_value is not None:
        tl.atomic_add(grad_value + offsets, share[:, None] * grad, mask=mask, sem="relaxed")
    return tl.sum(tl.load(cells + offsets, mask=mask, other=0.0).to(ACC) * grad, axis=1)


@triton.jit(do_not_specialize=["locations", "weights", "num_queries", "num_cells"])
def attention_backward_kernel(
    grad_out,  # *[B, Q, H, C]
    value,  # *[B, S, H, C]
    locations,  # *[B, Q, H, L, P, 2]
    weights,  # *[B, Q, H, L, P]
    grad_value,  # *[B, S, H, C] in ACC, zero; None if it is not wanted here
    grad_locations,  # *[B, Q, H, L, P, 2]; None if not wanted
    grad_weights,  # *[B, Q, H, L, P]; None if not wanted
    heights,  # L x H_l, floats: see extents_of
    widths,  # L x W_l
    num_queries,  # Q
    num_cells,  # S
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    POINTS: tl.constexpr,
    ACC: tl.constexpr,  # type of all arithmetic
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):
    """Grid: (tiles of Q, H, B), as in the forward. All that a location and a weight need is in their own program."""
    LEVELS: tl.constexpr = len(heights)

    image = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1)
    queries = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    exists = queries < num_queries
    channels, in_head = channels_of(CHANNELS, BLOCK, VEC)  # [BLOCK]
    rows = queries * HEADS + head  # [ROWS] int32: deformable.py bounds the elements of an image
    first_sample = image * num_queries * (HEADS * LEVELS * POINTS)
    grad_out += image * num_queries * (HEADS * CHANNELS)
    grad = tl.load(
        grad_out + (rows * CHANNELS)[:, None] + channels[None, :], mask=exists[:, None] & in_head[None, :], other=0.0
    ).to(ACC)  # [ROWS, BLOCK]

    first_cell = (image * num_cells * HEADS + head) * CHANNELS
    for level in tl.static_range(LEVELS):
        height, width = extent_of(heights, widths, level)
        cells = value + first_cell
        grad_cells = grad_value
        if grad_value is not None:
            grad_cells += first_cell
        for point in range(POINTS):
            sample = first_sample + rows * (LEVELS * POINTS) + (level * POINTS + point)  # [ROWS]
            x, y, inside = locate(locations, sample, exists, height, width, ACC)
            weight = tl.load(weights + sample, mask=inside, other=0.0).to(ACC)
            left, top = tl.floor(x), tl.floor(y)
            right, down = x - left, y - top
            column, row = left.to(tl.int32), top.to(tl.int32)

            products = ()  # 4 x [ROWS]: upper left, upper right, lower left, lower right
            for corner in tl.static_range(4):
                share = weight * (down if corner // 2 else 1 - down) * (right if corner % 2 else 1 - right)
                product = _product_with_corner(
                    cells,
                    grad_cells,
                    grad,
                    share,
                    row + corner // 2,
                    column + corner % 2,
                    inside,
                    height,
                    width,
                    channels,
                    in_head,
                    PITCH=HEADS * CHANNELS,
                    ACC=ACC,
                )
                products = products + (product,)

            upper, lower = products[1] - products[0], products[3] - products[2]
            if grad_locations is not None:
                by_x = upper + down * (lower - upper)
                left_side, right_side = products[2] - products[0], products[3] - products[1]
                by_y = left_side + right * (right_side - left_side)
                kind = grad_locations.dtype.element_ty
                tl.store(grad_locations + sample * 2, (weight * by_x * width.to(ACC)).to(kind), mask=exists)
                tl.store(grad_locations + sample * 2 + 1, (weight * by_y * height.to(ACC)).to(kind), mask=exists)
            if grad_weights is not None:
                on_top, below = products[0] + right * upper, products[2] + right * lower
                interpolated = on_top + down * (below - on_top)
                tl.store(grad_weights + sample, interpolated.to(grad_weights.dtype.element_ty), mask=exists)
        first_cell += height.to(tl.int64) * width * (HEADS * CHANNELS)


def launch_attention_backward(
    grad_out: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    grad_value: Tensor | None,
    grad_locations: Tensor | None,
    grad_weights: Tensor | None,
) -> None:
    """Fill ``grad_locations`` and ``grad_weights`` and add to ``grad_value``, a zero (B, S, H, C) in the type of the
    arithmetic; each may be None. All tensors are contiguous."""
    batch, num_cells, heads, channels = value.shape
    num_queries, points = locations.shape[1], locations.shape[4]
    tile = attention_tile(channels, value.dtype)
    grid = (triton.cdiv(num_queries, tile.rows), heads, batch)
    if 0 in grid:
        return
    with device_of(value):
        attention_backward_kernel[grid](
            grad_out,
            value,
            locations,
            weights,
            grad_value,
            grad_locations,
            grad_weights,
            *extents_of(spatial_shapes),
            num_queries,
            num_cells,
            HEADS=heads,
            CHANNELS=channels,
            POINTS=points,
            ACC=accumulator_of(accumulation_dtype(value, locations, weights)),
            ROWS=tile.rows,
            BLOCK=tile.block,
            VEC=tile.vec,
            num_warps=tile.num_warps,
        )
