"""What the kernels share: the tile of a program, the weights that hold in it, sums over groups.

Two shapes of tile. A *flat* tile is BLOCK consecutive elements of one image, wherever its rows begin and end, so that
no lane is wasted on a D that is not a power of two. A *row* tile is one row, D elements in a BLOCK of the next power of
two: for weights per token, which are then scalars of the program, and whose gradient is then the sum of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_offsets(num_rows, D: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """Offsets of this program's tile among the ``num_rows * D`` elements of one image, and which of them exist.

    The bound is compared in units of VEC, the elements of a 128-bit access: the mask is then constant over each unit
    whatever ``num_rows`` is, and the compiler sees it. With ``offsets < num_rows * D`` all accesses fall apart into
    single elements, unless ``num_rows * D`` happens to be known as a multiple of 16.
    """
    lane = tl.arange(0, BLOCK)  # [BLOCK]
    offsets = tl.program_id(0) * TILE + lane  # [BLOCK] int32: support.py bounds the elements of an image
    exists = offsets // VEC < num_rows * (D // VEC)  # [BLOCK]
    if TILE < BLOCK:
        exists = exists & (lane // VEC < TILE // VEC)
    return offsets, exists


@triton.jit
def load_weights(weights, image, token, num_patches, K: tl.constexpr, SHARING: tl.constexpr, ACC: tl.constexpr):
    """The K weights that hold in this tile, as scalars. SHARING says who has a row of weights, see launch.py."""
    values = ()
    for column in tl.static_range(K):
        if SHARING == "all":
            value = tl.load(weights + column)
        elif SHARING == "image":
            value = tl.load(weights + image * K + column)
        else:  # a row tile of the backward may be a prefix row, which has no weights
            value = tl.load(weights + (image * num_patches + token) * K + column, mask=token >= 0, other=0.0)
        values = values + (value.to(ACC),)
    return values


@triton.jit
def zero_tiles(COUNT: tl.constexpr, SHAPE: tl.constexpr, ACC: tl.constexpr):
    """COUNT accumulators, COUNT x [SHAPE]."""
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros(SHAPE, dtype=ACC),)
    return tiles


@triton.jit
def add_to_groups(sums, value, source: tl.constexpr, SCHEDULE: tl.constexpr):
    """``sums`` with ``value`` added to each group of ``source``. Triton's tuples are values, so a new one is built."""
    for i in tl.static_range(len(SCHEDULE.members[source])):
        sums = _add_at(sums, SCHEDULE.members[source][i], value)
    return sums


@triton.jit
def _add_at(tiles, index: tl.constexpr, value):
    return tiles[:index] + (tiles[index] + value,) + tiles[index + 1 :]


@triton.jit
def means_of_sums(sums, SCHEDULE: tl.constexpr):
    """Group sums times the rounded 1/|g|: a division would cost some eight instructions an element."""
    means = ()
    for group in tl.static_range(len(SCHEDULE.sizes)):
        means = means + (sums[group] * (1.0 / SCHEDULE.sizes[group]),)
    return means
