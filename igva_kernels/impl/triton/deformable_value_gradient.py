"""The gradient of the value as a gather: each cell sums what was read from it, in an order that the locations fix.

A sample touches four cells, and which ones follows from the cell to its upper left. So the samples are sorted by that one, the
*base*, each once; and a cell finds what touched it under four bases, in two rows of two neighbours, whose samples lie in one
piece. Bases begin one row above and one column before the map: there are (H_l + 1)*(W_l + 1) of them in a level.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from igva_kernels.impl.triton.deformable_geometry import attention_tile, channels_of, extent_of, extents_of, locate
from igva_kernels.impl.triton.launch import THREADS, accumulator_of, device_of, warps_of

SAMPLES = 4
"""Samples of a cell that a program reads at a time. A program's loop runs to the end of its longest cell, and every turn waits
for two loads in sequence; MMFuser's cells have 8 samples in a row of bases on average, two turns."""


def num_bases(spatial_shapes: Sequence[tuple[int, int]]) -> int:
    """Bases of all levels of one head of one image."""
    return sum((height + 1) * (width + 1) for height, width in spatial_shapes)


@triton.jit(do_not_specialize=["locations", "num_samples", "bases"])
def sort_keys_kernel(
    locations,  # *[B, Q, H, L, P, 2]
    keys,  # *[B, Q, H, L, P]
    heights,  # L x H_l, floats: see extents_of
    widths,  # L x W_l
    num_samples,  # of one image
    bases,  # of one head
    HEADS: tl.constexpr,
    POINTS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (tiles of the samples of an image, B). The key is (image, head, base); what is outside comes after all of them."""
    LEVELS: tl.constexpr = len(heights)

    image = tl.program_id(1).to(tl.int64)
    samples = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    exists = samples < num_samples
    level_of = samples // POINTS % LEVELS
    head = samples // (LEVELS * POINTS) % HEADS

    height, width = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
    first, passed = tl.zeros((BLOCK,), tl.int32), 0
    for level in tl.static_range(LEVELS):
        level_height, level_width = extent_of(heights, widths, level)
        height = tl.where(level_of == level, level_height, height)
        width = tl.where(level_of == level, level_width, width)
        first = tl.where(level_of == level, passed, first)
        passed += (level_height + 1) * (level_width + 1)

    x, y, inside = locate(locations + image * num_samples * 2, samples, exists, height, width, ACC)
    row, column = tl.floor(y).to(tl.int32), tl.floor(x).to(tl.int32)
    base = (image * HEADS + head) * bases + first + (row + 1) * (width + 1) + (column + 1)
    last = tl.num_programs(1) * HEADS * bases
    tl.store(keys + image * num_samples + samples, tl.where(inside, base, last).to(tl.int32), mask=exists)


@triton.jit(do_not_specialize=["locations", "weights", "order", "starts", "num_cells", "bases"])
def value_gradient_kernel(
    grad_out,  # *[B, Q, H, C]
    locations,  # *[B, Q, H, L, P, 2]
    weights,  # *[B, Q, H, L, P]
    order,  # *[B*Q*H*L*P], the samples sorted by base
    starts,  # *[B*H*bases + 1], where those of each base begin
    grad_value,  # *[B, S, H, C]
    heights,  # L x H_l, floats: see extents_of
    widths,  # L x W_l
    num_cells,  # S
    bases,  # of one head
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    POINTS: tl.constexpr,
    ACC: tl.constexpr,
    CELLS: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):
    """Grid: (tiles of S, H, B)."""
    LEVELS: tl.constexpr = len(heights)

    image = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1)
    cells = tl.program_id(0) * CELLS + tl.arange(0, CELLS)  # [CELLS]
    exists = cells < num_cells
    channels, in_head = channels_of(CHANNELS, BLOCK, VEC)  # [BLOCK]

    height, width = tl.zeros((CELLS,), tl.int32), tl.zeros((CELLS,), tl.int32)
    first_cell, first_base = tl.zeros((CELLS,), tl.int32), tl.zeros((CELLS,), tl.int32)
    passed_cells, passed_bases = 0, 0
    for level in tl.static_range(LEVELS):
        level_height, level_width = extent_of(heights, widths, level)
        beyond = cells >= passed_cells
        height, width = tl.where(beyond, level_height, height), tl.where(beyond, level_width, width)
        first_cell, first_base = tl.where(beyond, passed_cells, first_cell), tl.where(beyond, passed_bases, first_base)
        passed_cells += level_height * level_width
        passed_bases += (level_height + 1) * (level_width + 1)
    row, column = (cells - first_cell) // width, (cells - first_cell) % width
    base = (image * HEADS + head) * bases + first_base + row * (width + 1) + column  # [CELLS], of the cell's upper left

    total = tl.zeros((CELLS, SAMPLES, BLOCK), dtype=ACC)
    for below in tl.static_range(2):  # the samples above the cell, then those below it
        begin = tl.load(starts + base + below * (width + 1), mask=exists, other=0)  # [CELLS]
        end = tl.load(starts + base + below * (width + 1) + 2, mask=exists, other=0)
        longest = tl.max(end - begin, axis=0)
        for step in range(0, longest, SAMPLES):
            position = begin[:, None] + step + tl.arange(0, SAMPLES)[None, :]  # [CELLS, SAMPLES]
            taken = position < end[:, None]
            sample = tl.load(order + position, mask=taken, other=0)
            x, y, inside = locate(locations, sample, taken, height[:, None], width[:, None], ACC)
            weight = tl.load(weights + sample, mask=inside, other=0.0).to(ACC)
            share = weight * (1 - tl.abs(x - column[:, None].to(ACC))) * (1 - tl.abs(y - row[:, None].to(ACC)))
            query = (sample.to(tl.int32) // (HEADS * LEVELS * POINTS)).to(tl.int64)  # of all images
            grad = tl.load(
                grad_out + ((query * HEADS + head) * CHANNELS)[:, :, None] + channels[None, None, :],
                mask=taken[:, :, None] & in_head[None, None, :],
                other=0.0,
            )
            total += tl.where(inside, share, 0.0)[:, :, None] * grad.to(ACC)

    grad_value += (image * num_cells * HEADS + head) * CHANNELS
    tl.store(
        grad_value + (cells * (HEADS * CHANNELS))[:, None] + channels[None, :],
        tl.sum(total, axis=1).to(grad_value.dtype.element_ty),
        mask=exists[:, None] & in_head[None, :],
    )


def launch_value_gradient(
    grad_out: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    grad_value: Tensor,
    dtype: torch.dtype,
) -> None:
    """Fill ``grad_value`` (B, S, H, C), with arithmetic in ``dtype``. All tensors are contiguous."""
    batch, num_cells, heads, channels = grad_value.shape
    if not grad_value.numel():
        return
    if not grad_out.numel():
        grad_value.zero_()
        return
    points, bases = locations.shape[4], num_bases(spatial_shapes)
    heights, widths = extents_of(spatial_shapes)
    num_samples = weights[0].numel()
    keys = weights.new_empty(weights.shape, dtype=torch.int32)
    tile = attention_tile(channels, grad_out.dtype)
    num_read = min(SAMPLES, tile.rows)
    num_summed = tile.rows // num_read
    with device_of(grad_out):
        sort_keys_kernel[(triton.cdiv(num_samples, THREADS), batch)](
            locations,
            keys,
            heights,
            widths,
            num_samples,
            bases,
            HEADS=heads,
            POINTS=points,
            ACC=accumulator_of(dtype),
            BLOCK=THREADS,
            num_warps=warps_of(THREADS),
        )
        sorted_keys, order = keys.flatten().sort(stable=True)
        every_base = torch.arange(batch * heads * bases + 1, dtype=torch.int32, device=keys.device)
        starts = torch.searchsorted(sorted_keys, every_base, out_int32=True)
        value_gradient_kernel[(triton.cdiv(num_cells, num_summed), heads, batch)](
            grad_out,
            locations,
            weights,
            order,
            starts,
            grad_value,
            heights,
            widths,
            num_cells,
            bases,
            HEADS=heads,
            CHANNELS=channels,
            POINTS=points,
            ACC=accumulator_of(dtype),
            CELLS=num_summed,
            SAMPLES=num_read,
            BLOCK=tile.block,
            VEC=tile.vec,
            num_warps=tile.num_warps,
        )
