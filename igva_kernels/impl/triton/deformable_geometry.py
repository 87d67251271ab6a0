"""What the kernels of multi-scale deformable attention share: tiles, and where a sampling location lies.

A tile is ROWS heads of a query (or cells) by BLOCK channels. A location (x, y) in [0, 1] is the point (x*W - 1/2, y*H - 1/2)
between the centres of the cells, which stand at the integers; cells beyond the map are zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from igva_kernels.impl.triton.launch import MAX_THREADS, THREADS, elements_per_access, warps_of


class AttentionTile(NamedTuple):
    """What one program works on.

    Attributes:
        rows: heads of queries, a power of two.
        block: channels that it holds, a power of two; those beyond the channels of a head are masked off.
        vec: elements of one access: 16 bytes, or less where the channels are no multiple of that.
        num_warps: so that a thread holds ``vec`` channels of one row.
    """

    rows: int
    block: int
    vec: int
    num_warps: int


def attention_tile(channels: int, dtype: torch.dtype) -> AttentionTile:
    """The tile for heads of so many channels: 128 threads with one access each, or one row where that is more."""
    vec = elements_per_access(dtype)
    while channels % vec:
        vec //= 2
    block = triton.next_power_of_2(channels)
    rows = max(1, THREADS * vec // block)
    return AttentionTile(rows, block, vec, warps_of(min(rows * block // vec, MAX_THREADS)))


def extents_of(spatial_shapes: Sequence[tuple[int, int]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The heights and the widths of the levels as floats, exact up to 2**24.

    Triton compiles anew for an integer that is 1 or a multiple of 16, and inside of a tuple it does so whatever
    ``do_not_specialize`` says; the images of a detector differ in size.
    """
    return tuple(float(height) for height, _ in spatial_shapes), tuple(float(width) for _, width in spatial_shapes)


@triton.jit
def extent_of(heights, widths, level: tl.constexpr):
    """Height and width of a level as integers again."""
    return tl.cast(heights[level], tl.int32), tl.cast(widths[level], tl.int32)


@triton.jit
def locate(locations, sample, exists, height, width, ACC: tl.constexpr):
    """The point between the cells, and whether it is less than one cell outside of the map, which NaN is not.

    Where it is further outside the point is the first cell, of which nothing may be read.
    """
    x = tl.load(locations + sample * 2, mask=exists, other=0.0).to(ACC) * width.to(ACC) - 0.5
    y = tl.load(locations + sample * 2 + 1, mask=exists, other=0.0).to(ACC) * height.to(ACC) - 0.5
    inside = exists & (x > -1) & (x < width) & (y > -1) & (y < height)
    return tl.where(inside, x, 0.0), tl.where(inside, y, 0.0), inside


@triton.jit
def corner_rows(row, column, inside, height, width):
    """The cells (row, column) as rows of their level, and which of them are on the map."""
    on_map = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return row * width + column, on_map


@triton.jit
def channels_of(CHANNELS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """The channels of a tile and which of them exist, compared in units of VEC so that accesses stay whole."""
    channels = tl.arange(0, BLOCK)
    return channels, channels // VEC < CHANNELS // VEC
