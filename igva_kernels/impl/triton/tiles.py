"""What the kernels share: the tile of a program, the weights that hold in it, sums over groups.

Two shapes of tile. A *flat* tile is BLOCK consecutive elements of one image, wherever its rows begin and end, so that
no lane is wasted on a D that is not a power of two. A *row* tile is one row, see row_tiles.py: for weights per token,
which are then scalars of the program, and for norms, which are sums over the row.

The kernels of the mix are compiled without contraction (``enable_fp_fusion=False``) and say ``tl.fma`` where they want
it. Which of two products of a sum the compiler would contract depends on what surrounds them and, from Triton 3.10 on,
on another default; and the group means of ``reduce_groups`` in float32, mixed by ``mix``, are to be bitwise what ``fuse``
makes of the states in one pass.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_offsets(num_rows, D: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """Offsets of this program's flat tile among the ``num_rows * D`` elements of one image, and which of them exist.

    The bound is compared in units of VEC, the elements of a 128-bit access: the mask is then constant over each unit
    whatever ``num_rows`` is, and the compiler sees it. With ``offsets < num_rows * D`` all accesses fall apart into
    single elements, unless ``num_rows * D`` happens to be known as a multiple of 16.
    """
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK] int32: support.py bounds the elements of an image
    return offsets, offsets // VEC < num_rows * (D // VEC)


@triton.jit
def load_weights(weights, image, K: tl.constexpr, SHARING: tl.constexpr, ACC: tl.constexpr):
    """The K weights that hold in a flat tile, as scalars. SHARING says who has a row of weights, see launch.py."""
    values = ()
    for column in tl.static_range(K):
        if SHARING == "all":
            value = tl.load(weights + column)
        else:
            value = tl.load(weights + image * K + column)
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
def put_at(tiles, index: tl.constexpr, value):
    """``tiles`` with another one at ``index``. Triton's tuples are values, so a new one is built."""
    return tiles[:index] + (value,) + tiles[index + 1 :]


@triton.jit
def add_to_groups(sums, value, source: tl.constexpr, SCHEDULE: tl.constexpr):
    """``sums`` with ``value`` added to each group of ``source``; the first member of a group begins its sum."""
    for i in tl.static_range(len(SCHEDULE.members[source])):
        if SCHEDULE.first_members[SCHEDULE.members[source][i]] == source:
            sums = put_at(sums, SCHEDULE.members[source][i], value)
        else:
            sums = put_at(sums, SCHEDULE.members[source][i], sums[SCHEDULE.members[source][i]] + value)
    return sums


@triton.jit
def mean_of(sums, group: tl.constexpr, SCHEDULE: tl.constexpr):
    """A group's sum times the rounded 1/|g|: a division would cost some eight instructions an element."""
    return sums[group] * (1.0 / SCHEDULE.sizes[group])


@triton.jit
def add_term(total, mean, weight, COLUMN: tl.constexpr, POSITION: tl.constexpr):
    """The sum of a slot with its next term, ``weight[COLUMN] * mean`` or, for the column PLAIN, ``mean``."""
    if COLUMN >= 0:
        if POSITION == 0:
            total = mean * weight[COLUMN]
        else:
            total = tl.fma(mean, weight[COLUMN], total)
    else:
        if POSITION == 0:
            total = mean
        else:
            total += mean
    return total


@triton.jit
def fold_terms(slots, sums, weight, source: tl.constexpr, SCHEDULE: tl.constexpr):
    """``slots`` with the terms whose turn comes once ``source`` is added to its groups."""
    for i in tl.static_range(len(SCHEDULE.folds[source])):
        total = add_term(
            slots[SCHEDULE.folds[source][i][0]],
            mean_of(sums, SCHEDULE.folds[source][i][1], SCHEDULE),
            weight,
            SCHEDULE.folds[source][i][2],
            SCHEDULE.folds[source][i][3],
        )
        slots = put_at(slots, SCHEDULE.folds[source][i][0], total)
    return slots


@triton.jit
def sum_in_thread(tile, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """[BLOCK] to [BLOCK // VEC]: the VEC elements of each thread added up, which moves nothing between threads."""
    return tl.sum(tl.reshape(tile, (BLOCK // VEC, VEC)), axis=1)
