"""The forward of multi-scale deformable attention: every corner of every sample is one row of the value, read as it lies."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from igva_kernels.impl.deformable_reference import accumulation_dtype
from igva_kernels.impl.triton.deformable_geometry import attention_tile, channels_of, corner_rows, extent_of, extents_of, locate
from igva_kernels.impl.triton.launch import accumulator_of, device_of


# The images of a detector differ in size, and no instruction gets better by knowing one. What is left to specialise on is
# the alignment of value and output.
@triton.jit(do_not_specialize=["locations", "weights", "num_queries", "num_cells"])
def attention_forward_kernel(
    value,  # *[B, S, H, C]
    locations,  # *[B, Q, H, L, P, 2]
    weights,  # *[B, Q, H, L, P]
    out,  # *[B, Q, H, C]
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
    """Grid: (tiles of Q, H, B). The queries of a tile are neighbours, and so, mostly, are the cells that they look at: half of
    the rows that they read are in the L1 cache already."""
    LEVELS: tl.constexpr = len(heights)

    image = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1)
    queries = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    exists = queries < num_queries
    channels, in_head = channels_of(CHANNELS, BLOCK, VEC)  # [BLOCK]
    rows = queries * HEADS + head  # [ROWS] int32: deformable.py bounds the elements of an image
    locations += image * num_queries * (HEADS * LEVELS * POINTS * 2)
    weights += image * num_queries * (HEADS * LEVELS * POINTS)
    cells = value + (image * num_cells * HEADS + head) * CHANNELS

    total = tl.zeros((ROWS, BLOCK), dtype=ACC)
    for level in tl.static_range(LEVELS):
        height, width = extent_of(heights, widths, level)
        for point in range(POINTS):
            sample = rows * (LEVELS * POINTS) + (level * POINTS + point)  # [ROWS]
            x, y, inside = locate(locations, sample, exists, height, width, ACC)
            weight = tl.load(weights + sample, mask=inside, other=0.0).to(ACC)
            left, top = tl.floor(x), tl.floor(y)
            right, down = x - left, y - top
            column, row = left.to(tl.int32), top.to(tl.int32)
            for corner in tl.static_range(4):
                share = (down if corner // 2 else 1 - down) * (right if corner % 2 else 1 - right)
                cell, on_map = corner_rows(row + corner // 2, column + corner % 2, inside, height, width)
                corners = tl.load(
                    cells + (cell * (HEADS * CHANNELS))[:, None] + channels[None, :],
                    mask=on_map[:, None] & in_head[None, :],
                    other=0.0,
                )
                total += (weight * share)[:, None] * corners.to(ACC)
        cells += height.to(tl.int64) * width * (HEADS * CHANNELS)

    out += image * num_queries * (HEADS * CHANNELS)
    tl.store(
        out + (rows * CHANNELS)[:, None] + channels[None, :],
        total.to(out.dtype.element_ty),
        mask=exists[:, None] & in_head[None, :],
    )


def launch_attention_forward(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor, out: Tensor
) -> None:
    """Fill ``out`` (B, Q, H*C). All tensors are contiguous."""
    batch, num_cells, heads, channels = value.shape
    num_queries, points = locations.shape[1], locations.shape[4]
    tile = attention_tile(channels, value.dtype)
    grid = (triton.cdiv(num_queries, tile.rows), heads, batch)
    if 0 in grid:
        return
    with device_of(value):
        attention_forward_kernel[grid](
            value,
            locations,
            weights,
            out,
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
