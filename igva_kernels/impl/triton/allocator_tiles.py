"""What the allocator's kernels share: products of few rows with a weight matrix, LayerNorm and attention on the way in.

The work is skinny: B or B*K rows against weights that are read once, so a program owns a strip of output columns and all
rows of one row tile, and a launch lasts about as long as its longest chain of dependent instructions. The reduction is
therefore spread over the warps: a step takes ``slices * depth`` of its elements, each warp multiplies a slice of its own
on the tensor cores (a batched ``tl.dot``), and one sum over the slices at the end puts them together, in a fixed order.
With 16-bit weights, up to 16 rows and a hidden width of 1024 one step is the whole reduction, all loads are in flight
at once, and those of the weights do not wait for the LayerNorm before them.

Tiles: S slices · M rows · C columns · Q depth, the elements of a slice in a step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from igva_kernels.impl.triton import launch

THREADS = 256
"""Threads of a program of a product."""

STEP_ELEMENTS = {"forward": 2**14, "attention": 2**13, "backward": 2**12}
"""Elements of the rows that a step holds for 16-bit weights, 64, 32 and 16 a thread. Twice as many spill registers on one
target or another (tests/aot): the attention has the members of all groups in flight, the backward a strip of weights that
is twice as wide."""


class ProductTile(NamedTuple):
    """The tile of one program of a product.

    Attributes:
        slices: S, one warp each.
        rows: M.
        columns: C.
        depth: Q.
    """

    slices: int
    rows: int
    columns: int
    depth: int


def product_tile(num_rows: int, dtype: torch.dtype, *, divisor: int, kind: str = "forward") -> ProductTile:
    """The tile for so many rows. It follows from the shape alone, in three steps: up to 16, up to 32, and more rows.

    Args:
        num_rows: rows of the product.
        dtype: of the weights.
        divisor: what columns and depth must divide, beside being powers of two: no tile crosses two heads.
        kind: a key of :data:`STEP_ELEMENTS`. The backward reads the weights along their columns, where 32 of 16 bit make
            the 64 bytes that memory fetches.
    """
    rows = 16 if num_rows <= 16 else 32 if num_rows <= 32 or dtype == torch.float32 else 64
    slices = THREADS // launch.WARP
    elements = STEP_ELEMENTS[kind]
    if dtype == torch.float32:
        elements //= 4  # no tensor cores: the operands of fused multiply-adds are registers, and twice as large
    if launch.WARP == 64:
        elements //= 2  # gfx942 has 64 KiB of shared memory
    largest = divisor & -divisor  # the largest power of two that divides it
    return ProductTile(
        slices=slices,
        rows=rows,
        columns=min(32 if kind == "backward" or rows == 64 else 16, largest),
        depth=min(max(elements // (slices * rows), 16), largest),
    )


# ---- products -----------------------------------------------------------------------------------------------------------


@triton.jit
def step_index(TILE: tl.constexpr):
    """The elements of the reduction in the first step, [S, Q]."""
    return tl.arange(0, TILE.slices)[:, None] * TILE.depth + tl.arange(0, TILE.depth)[None, :]


@triton.jit
def load_rows(matrix, rows, num_rows, index, R: tl.constexpr):
    """Elements ``index`` [S, Q] of the ``rows`` [M] of a matrix of R columns, [S, M, Q] in float32; 0 outside of it."""
    exists = (rows < num_rows)[None, :, None] & (index < R)[:, None, :]  # [S, M, Q]
    return tl.load(matrix + rows[None, :, None] * R + index[:, None, :], mask=exists, other=0.0).to(tl.float32)


@triton.jit
def load_vector(vector, index, R: tl.constexpr):
    """Elements ``index`` [S, Q] of a vector of R, [S, 1, Q] in float32; 0 outside of it."""
    return tl.load(vector + index, mask=index < R, other=0.0).to(tl.float32)[:, None, :]


@triton.jit
def load_weights(weight, columns, index, N: tl.constexpr, R: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The strip [S, Q, C] of a weight for the ``columns`` [C] of the product, 0 outside of it.

    The weight is (N, R), as nn.Linear keeps it; for the way back (TRANSPOSED) the product reduces its rows: (R, N).
    """
    exists = (index < R)[:, :, None] & (columns < N)[None, None, :]  # [S, Q, C]
    if TRANSPOSED:
        offsets = index[:, :, None] * N + columns[None, None, :]
    else:
        offsets = columns[None, None, :] * R + index[:, :, None]
    return tl.load(weight + offsets, mask=exists, other=0.0)


@triton.jit
def zero_product(TILE: tl.constexpr):
    """[S, M, C]"""
    return zeros(TILE.slices, TILE.rows, TILE.columns)


@triton.jit
def zeros(S: tl.constexpr, M: tl.constexpr, C: tl.constexpr):
    """[S, M, C]. The attributes of a constexpr are plain numbers, and a tuple of those is no shape to Triton 3.6."""
    return tl.zeros((S, M, C), dtype=tl.float32)


@triton.jit
def multiply(values, weights, product):
    """``product`` [S, M, C] plus float32 ``values`` [S, M, Q] times ``weights`` [S, Q, C], in the type of the weights."""
    return tl.dot(values.to(weights.dtype), weights, product, input_precision="ieee")


@triton.jit
def plain_product(
    matrix, weight, rows, num_rows, columns, N: tl.constexpr, R: tl.constexpr, TRANSPOSED: tl.constexpr, TILE: tl.constexpr
):
    """``matrix @ weight.T`` (TRANSPOSED: ``matrix @ weight``) in the tile, [M, C] in float32."""
    index = step_index(TILE)  # [S, Q]
    product = zero_product(TILE)  # [S, M, C]
    STEP: tl.constexpr = TILE.slices * TILE.depth
    weights = load_weights(weight, columns, index, N, R, TRANSPOSED)  # [S, Q, C]
    for start in range(0, R, STEP):
        values = load_rows(matrix, rows, num_rows, start + index, R)  # [S, M, Q]
        following = load_weights(weight, columns, start + STEP + index, N, R, TRANSPOSED)  # none after the last step
        product = multiply(values, weights, product)
        weights = following
    return tl.sum(product, axis=0)


@triton.jit
def add_bias(product, bias, columns, N: tl.constexpr):
    return product + tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_tile(matrix, rows, num_rows, columns, N: tl.constexpr):
    """[M, C] of a matrix of N columns, in float32."""
    exists = (rows < num_rows)[:, None] & (columns < N)[None, :]
    return tl.load(matrix + rows[:, None] * N + columns[None, :], mask=exists, other=0.0).to(tl.float32)


@triton.jit
def store_tile(matrix, values, rows, num_rows, columns, N: tl.constexpr):
    """[M, C] into a matrix of N columns, rounded to its type."""
    exists = (rows < num_rows)[:, None] & (columns < N)[None, :]
    tl.store(matrix + rows[:, None] * N + columns[None, :], values.to(matrix.dtype.element_ty), mask=exists)


# ---- LayerNorm ----------------------------------------------------------------------------------------------------------


@triton.jit
def row_statistics(matrix, rows, num_rows, H: tl.constexpr, EPS: tl.constexpr, TILE: tl.constexpr):
    """Mean and 1 / standard deviation of whole rows, [M] each. Step by step, each with its own mean (Chan et al.)."""
    index = step_index(TILE)  # [S, Q]
    STEP: tl.constexpr = TILE.slices * TILE.depth
    M: tl.constexpr = TILE.rows
    mean = tl.zeros((M,), dtype=tl.float32)
    squares = tl.zeros((M,), dtype=tl.float32)
    for start in range(0, H, STEP):
        values = load_rows(matrix, rows, num_rows, start + index, H)  # [S, M, Q]
        count = tl.minimum(H - start, STEP).to(tl.float32)
        step_mean = tl.sum(tl.sum(values, axis=2), axis=0) / count  # [M]
        deviation = tl.where((start + index < H)[:, None, :], values - step_mean[None, :, None], 0.0)  # [S, M, Q]
        squares += tl.sum(tl.sum(deviation * deviation, axis=2), axis=0)
        shift = step_mean - mean
        share = count / (start + count)
        squares += shift * shift * (start * share)
        mean += shift * share
    return mean, 1.0 / tl.sqrt(squares / H + EPS)


@triton.jit
def normalised_product(
    matrix,
    norm_weight,
    norm_bias,
    weight,
    rows,
    num_rows,
    columns,
    N: tl.constexpr,
    H: tl.constexpr,
    EPS: tl.constexpr,
    TILE: tl.constexpr,
):
    """``LayerNorm(matrix) @ weight.T`` in the tile, [M, C] in float32, and mean and 1 / deviation of the rows, [M]."""
    index = step_index(TILE)  # [S, Q]
    product = zero_product(TILE)  # [S, M, C]
    STEP: tl.constexpr = TILE.slices * TILE.depth
    weights = load_weights(weight, columns, index, N, H, False)  # [S, Q, C], on their way during the statistics
    mean, scale = row_statistics(matrix, rows, num_rows, H, EPS, TILE)
    for start in range(0, H, STEP):
        values = load_rows(matrix, rows, num_rows, start + index, H)  # [S, M, Q]
        values = (values - mean[None, :, None]) * scale[None, :, None]
        values = values * load_vector(norm_weight, start + index, H) + load_vector(norm_bias, start + index, H)
        following = load_weights(weight, columns, start + STEP + index, N, H, False)
        product = multiply(values, weights, product)
        weights = following
    return tl.sum(product, axis=0), mean, scale


@triton.jit
def store_normalised(
    normalised, statistics, matrix, norm_weight, norm_bias, mean, scale, rows, num_rows, columns, H: tl.constexpr
):
    """Each program keeps the normalised rows in its own columns, and the first one the statistics (2, B)."""
    values = (load_tile(matrix, rows, num_rows, columns, H) - mean[:, None]) * scale[:, None]  # [M, C]
    gain = tl.load(norm_weight + columns, mask=columns < H, other=0.0).to(tl.float32)
    offset = tl.load(norm_bias + columns, mask=columns < H, other=0.0).to(tl.float32)
    store_tile(normalised, values * gain[None, :] + offset[None, :], rows, num_rows, columns, H)
    if statistics is not None:
        if tl.program_id(0) == 0:
            tl.store(statistics + rows, mean, mask=rows < num_rows)
            tl.store(statistics + num_rows + rows, scale, mask=rows < num_rows)


@triton.jit
def norm_backward(grad, values, gain, mean, scale, mean_grad, mean_product):
    """The gradient of a LayerNorm's input, of any shape: ``values`` is that input, ``grad`` the gradient of its output."""
    return scale * (grad * gain - mean_grad - (values - mean) * scale * mean_product)


@triton.jit
def load_statistics(statistics, rows, num_rows):
    """Mean and 1 / deviation of the rows, [M] each."""
    mean = tl.load(statistics + rows, mask=rows < num_rows, other=0.0)
    return mean, tl.load(statistics + num_rows + rows, mask=rows < num_rows, other=0.0)


@triton.jit
def norm_backward_means(grad, matrix, norm_weight, mean, scale, rows, num_rows, H: tl.constexpr, TILE: tl.constexpr):
    """What the gradient of a LayerNorm needs of whole rows, [M] each: the means of ``grad * gain`` and of that times the
    normalised rows."""
    index = step_index(TILE)  # [S, Q]
    M: tl.constexpr = TILE.rows
    mean_grad = tl.zeros((M,), dtype=tl.float32)
    mean_product = tl.zeros((M,), dtype=tl.float32)
    for start in range(0, H, TILE.slices * TILE.depth):
        grads = load_rows(grad, rows, num_rows, start + index, H) * load_vector(norm_weight, start + index, H)
        values = load_rows(matrix, rows, num_rows, start + index, H)  # [S, M, Q]
        normalised = (values - mean[None, :, None]) * scale[None, :, None]
        mean_grad += tl.sum(tl.sum(grads, axis=2), axis=0)
        mean_product += tl.sum(tl.sum(grads * normalised, axis=2), axis=0)
    return mean_grad / H, mean_product / H


@triton.jit
def norm_backward_product(
    grad,
    matrix,
    statistics,
    norm_weight,
    weight,
    grad_matrix,
    rows,
    num_rows,
    columns,
    H: tl.constexpr,
    TILE: tl.constexpr,
):
    """``d @ weight`` in the tile, [M, C] in float32, with d the gradient of a LayerNorm's input ``matrix``.

    Each program keeps d in its own columns, in ``grad_matrix``.
    """
    index = step_index(TILE)  # [S, Q]
    product = zero_product(TILE)  # [S, M, C]
    STEP: tl.constexpr = TILE.slices * TILE.depth
    weights = load_weights(weight, columns, index, H, H, True)  # [S, Q, C]
    mean, scale = load_statistics(statistics, rows, num_rows)
    mean_grad, mean_product = norm_backward_means(grad, matrix, norm_weight, mean, scale, rows, num_rows, H, TILE)
    for start in range(0, H, STEP):
        values = norm_backward(
            load_rows(grad, rows, num_rows, start + index, H),
            load_rows(matrix, rows, num_rows, start + index, H),
            load_vector(norm_weight, start + index, H),
            mean[None, :, None],
            scale[None, :, None],
            mean_grad[None, :, None],
            mean_product[None, :, None],
        )  # [S, M, Q]
        following = load_weights(weight, columns, start + STEP + index, H, H, True)
        product = multiply(values, weights, product)
        weights = following
    own = norm_backward(
        load_tile(grad, rows, num_rows, columns, H),
        load_tile(matrix, rows, num_rows, columns, H),
        tl.load(norm_weight + columns, mask=columns < H, other=0.0).to(tl.float32)[None, :],
        mean[:, None],
        scale[:, None],
        mean_grad[:, None],
        mean_product[:, None],
    )  # [M, C]
    store_tile(grad_matrix, own, rows, num_rows, columns, H)
    return tl.sum(product, axis=0)


# ---- attention ----------------------------------------------------------------------------------------------------------


@triton.jit
def store_head_products(partials, values, members, rows, num_rows, columns, H: tl.constexpr, K: tl.constexpr):
    """Products of ``values`` [M, C] with the K members of each row, summed over this program's columns alone.

    ``members`` is (B*K, H); ``partials`` is (B, K, H / C). No tile of columns crosses two heads.
    """
    for group in tl.static_range(K):
        member = load_tile(members, rows * K + group, num_rows * K, columns, H)  # [M, C]
        offsets = (rows * K + group) * tl.num_programs(0) + tl.program_id(0)
        tl.store(partials + offsets, tl.sum(values * member, axis=1), mask=rows < num_rows)


@triton.jit
def head_product(partials, rows, num_rows, heads, group, K: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr):
    """The products that :func:`store_head_products` left, PARTS a head, for the ``heads`` [S] of the rows, [S, M]."""
    BLOCK: tl.constexpr = triton.next_power_of_2(PARTS)
    part = tl.arange(0, BLOCK)  # [P]
    offsets = ((rows * K + group) * (HEADS * PARTS))[None, :, None] + heads[:, None, None] * PARTS + part[None, None, :]
    exists = (rows < num_rows)[None, :, None] & (heads < HEADS)[:, None, None] & (part < PARTS)[None, None, :]
    return tl.sum(tl.load(partials + offsets, mask=exists, other=0.0), axis=2)


@triton.jit
def softmax_over_groups(
    partials, rows, num_rows, heads, SCALE: tl.constexpr, K: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr
):
    """Largest score and sum of the exponentials over the K groups, [S, M] each."""
    largest = SCALE * head_product(partials, rows, num_rows, heads, 0, K, HEADS, PARTS)  # [S, M]
    for group in tl.static_range(1, K):
        largest = tl.maximum(largest, SCALE * head_product(partials, rows, num_rows, heads, group, K, HEADS, PARTS))
    total = tl.zeros_like(largest)
    for group in tl.static_range(K):
        total += tl.exp(SCALE * head_product(partials, rows, num_rows, heads, group, K, HEADS, PARTS) - largest)
    return largest, total


@triton.jit
def load_probability(probabilities, rows, num_rows, heads, group, K: tl.constexpr, HEADS: tl.constexpr):
    """The attention of the ``heads`` [S] to one group, [S, M], from (B, K, heads)."""
    offsets = ((rows * K + group) * HEADS)[None, :] + heads[:, None]
    exists = (rows < num_rows)[None, :] & (heads < HEADS)[:, None]
    return tl.load(probabilities + offsets, mask=exists, other=0.0)


@triton.jit
def expected_product(probabilities, partials, rows, num_rows, heads, K: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr):
    """The mean of the head products under the attention, [S, M]: what the softmax's gradient subtracts."""
    total = load_probability(probabilities, rows, num_rows, heads, 0, K, HEADS) * head_product(
        partials, rows, num_rows, heads, 0, K, HEADS, PARTS
    )
    for group in tl.static_range(1, K):
        total += load_probability(probabilities, rows, num_rows, heads, group, K, HEADS) * head_product(
            partials, rows, num_rows, heads, group, K, HEADS, PARTS
        )
    return total
