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


EARLY_MEMBERS = tl.constexpr(4)
"""Members of a row that are loaded ahead of their weights, in 16 registers each; the others wait."""


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
    """The tile for so many rows. It follows from the shape alone: up to 16, up to 32, or more rows.

    Args:
        num_rows: rows of the product.
        dtype: of the weights.
        divisor: what columns and depth must divide, beside being powers of two: no tile crosses two heads.
        kind: a key of :data:`STEP_ELEMENTS`. The backward reads the weights along their columns, where 32 of 16 bit make
            the 64 bytes that memory fetches.
    """
    rows = 16 if num_rows <= 16 else 32
    if num_rows > 32 and kind != "backward" and dtype != torch.float32:
        rows = 64
    slices = THREADS // launch.WARP
    elements = STEP_ELEMENTS[kind]
    if dtype == torch.float32:
        elements //= 4  # no tensor cores: the operands of fused multiply-adds are registers, and twice as large
    if launch.WARP == 64:
        elements //= 2  # gfx942 has 64 KiB of shared memory
    if rows == 64:
        elements //= 2  # the sums of the product are as many registers as the step then saves
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
    """Elements ``index`` [S, Q] of the ``rows`` [M] of a matrix of R columns, [S, M, Q]; 0 outside of it."""
    exists = (rows < num_rows)[None, :, None] & (index < R)[:, None, :]  # [S, M, Q]
    return tl.load(matrix + rows[None, :, None] * R + index[:, None, :], mask=exists, other=0.0)


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
def first_step(
    matrix,
    weight,
    rows,
    num_rows,
    columns,
    N: tl.constexpr,
    R: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Weights [S, Q, C] and rows [S, M, Q] of the first step. A kernel loads them before all else: the weights come from
    memory, and what waits for a smaller load, behind a barrier, would keep them waiting too."""
    index = step_index(TILE)  # [S, Q]
    weights = load_weights(weight, columns, index, N, R, TRANSPOSED)
    return weights, load_rows(matrix, rows, num_rows, index, R)


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
    first,
    matrix,
    weight,
    rows,
    num_rows,
    columns,
    N: tl.constexpr,
    R: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TILE: tl.constexpr,
):
    """``matrix @ weight.T`` (TRANSPOSED: ``matrix @ weight``) in the tile, [M, C] in float32, from its :func:`first_step`."""
    index = step_index(TILE)  # [S, Q]
    product = zero_product(TILE)  # [S, M, C]
    STEP: tl.constexpr = TILE.slices * TILE.depth
    weights, first_rows = first
    if R <= STEP:
        product = multiply(first_rows.to(tl.float32), weights, product)
    else:
        for start in range(0, R, STEP):
            values = load_rows(matrix, rows, num_rows, start + index, R).to(tl.float32)  # [S, M, Q]
            following = load_weights(weight, columns, start + STEP + index, N, R, TRANSPOSED)  # none after the last step
            product = multiply(values, weights, product)
            weights = following
    return tl.sum(product, axis=0)


@triton.jit
def load_columns(vector, rows, columns, N: tl.constexpr):
    """Elements ``columns`` [C] of a vector of N for each of the ``rows`` [M], [M, C] in float32; 0 outside of it.

    A tile like those that it is added to.
    """
    exists = (rows >= 0)[:, None] & (columns < N)[None, :]
    return tl.load(vector + rows[:, None] * 0 + columns[None, :], mask=exists, other=0.0).to(tl.float32)


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
def step_statistics(values, exists, count):
    """Mean and sum of squared deviations of one step of the rows, [M] each; ``exists`` [S, 1, Q] holds ``count`` elements."""
    mean = tl.sum(tl.sum(values, axis=2), axis=0) / count  # [M]
    deviation = tl.where(exists, values - mean[None, :, None], 0.0)  # [S, M, Q]
    return mean, tl.sum(tl.sum(deviation * deviation, axis=2), axis=0)


@triton.jit
def row_statistics(first, matrix, rows, num_rows, H: tl.constexpr, EPS: tl.constexpr, TILE: tl.constexpr):
    """Mean and 1 / standard deviation of whole rows, [M] each. Step by step, each with its own mean (Chan et al.).

    ``first`` are the elements of the first step.
    """
    index = step_index(TILE)  # [S, Q]
    STEP: tl.constexpr = TILE.slices * TILE.depth
    mean, squares = step_statistics(first.to(tl.float32), (index < H)[:, None, :], min(H, STEP))
    for start in range(STEP, H, STEP):
        values = load_rows(matrix, rows, num_rows, start + index, H).to(tl.float32)  # [S, M, Q]
        count = tl.minimum(H - start, STEP).to(tl.float32)
        step_mean, step_squares = step_statistics(values, (start + index < H)[:, None, :], count)
        shift = step_mean - mean
        share = count / (start + count)
        squares += step_squares + shift * shift * (start * share)
        mean += shift * share
    return mean, 1.0 / tl.sqrt(squares / H + EPS)


@triton.jit
def normalised_product(
    first,
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
    """``LayerNorm(matrix) @ weight.T`` in the tile, [M, C] in float32, from the :func:`first_step` of the rows as they are.

    And mean and 1 / deviation of the rows, [M] each.
    """
    index = step_index(TILE)  # [S, Q]
    product = zero_product(TILE)  # [S, M, C]
    STEP: tl.constexpr = TILE.slices * TILE.depth
    weights, first_rows = first
    gain = load_vector(norm_weight, index, H)  # [S, 1, Q]
    offset = load_vector(norm_bias, index, H)
    mean, scale = row_statistics(first_rows, matrix, rows, num_rows, H, EPS, TILE)
    if H <= STEP:
        values = (first_rows.to(tl.float32) - mean[None, :, None]) * scale[None, :, None] * gain + offset
        product = multiply(values, weights, product)
    else:
        for start in range(0, H, STEP):
            values = load_rows(matrix, rows, num_rows, start + index, H).to(tl.float32)  # [S, M, Q]
            values = (values - mean[None, :, None]) * scale[None, :, None] * gain + offset
            following = load_weights(weight, columns, start + STEP + index, N, H, False)
            gain = load_vector(norm_weight, start + STEP + index, H)
            offset = load_vector(norm_bias, start + STEP + index, H)
            product = multiply(values, weights, product)
            weights = following
    return tl.sum(product, axis=0), mean, scale


@triton.jit
def load_own(matrix, norm_weight, norm_bias, rows, num_rows, columns, H: tl.constexpr):
    """What :func:`store_normalised` wants, loaded before the product, so that nothing waits for it after."""
    values = load_tile(matrix, rows, num_rows, columns, H)  # [M, C]
    return values, load_columns(norm_weight, rows, columns, H), load_columns(norm_bias, rows, columns, H)


@triton.jit
def store_normalised(normalised, statistics, own, mean, scale, rows, num_rows, columns, H: tl.constexpr):
    """Each program keeps the normalised rows in its own columns, and the first one the statistics (2, B)."""
    values, gain, offset = own
    values = (values - mean[:, None]) * scale[:, None] * gain + offset  # [M, C]
    store_tile(normalised, values, rows, num_rows, columns, H)
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
        grads = load_rows(grad, rows, num_rows, start + index, H).to(tl.float32) * load_vector(norm_weight, start + index, H)
        values = load_rows(matrix, rows, num_rows, start + index, H).to(tl.float32)  # [S, M, Q]
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
    own_grad = load_tile(grad, rows, num_rows, columns, H)  # [M, C]
    own_values = load_tile(matrix, rows, num_rows, columns, H)
    own_gain = load_columns(norm_weight, rows, columns, H)
    mean, scale = load_statistics(statistics, rows, num_rows)
    mean_grad, mean_product = norm_backward_means(grad, matrix, norm_weight, mean, scale, rows, num_rows, H, TILE)
    for start in range(0, H, STEP):
        values = norm_backward(
            load_rows(grad, rows, num_rows, start + index, H).to(tl.float32),
            load_rows(matrix, rows, num_rows, start + index, H).to(tl.float32),
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
        own_grad, own_values, own_gain, mean[:, None], scale[:, None], mean_grad[:, None], mean_product[:, None]
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
def head_products(partials, rows, num_rows, heads, K: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr):
    """What :func:`store_head_products` left, PARTS a head, summed for the ``heads`` [S] of the rows: K x [S, M]."""
    BLOCK: tl.constexpr = triton.next_power_of_2(PARTS)
    part = tl.arange(0, BLOCK)  # [P]
    exists = (rows < num_rows)[None, :, None] & (heads < HEADS)[:, None, None] & (part < PARTS)[None, None, :]
    offsets = heads[:, None, None] * PARTS + part[None, None, :]
    products = ()
    for group in tl.static_range(K):
        row = ((rows * K + group) * (HEADS * PARTS))[None, :, None]
        products = products + (tl.sum(tl.load(partials + row + offsets, mask=exists, other=0.0), axis=2),)
    return products


@triton.jit
def softmax_over_groups(products, SCALE: tl.constexpr):
    """The attention to each group, K x [S, M], from the products of query and keys."""
    largest = products[0]
    for group in tl.static_range(1, len(products)):
        largest = tl.maximum(largest, products[group])
    exponentials = ()
    total = tl.zeros_like(largest)
    for group in tl.static_range(len(products)):
        exponential = tl.exp(SCALE * (products[group] - largest))
        exponentials = exponentials + (exponential,)
        total += exponential
    probabilities = ()
    for group in tl.static_range(len(products)):
        probabilities = probabilities + (exponentials[group] / total,)
    return probabilities


@triton.jit
def load_probabilities(probabilities, rows, num_rows, heads, K: tl.constexpr, HEADS: tl.constexpr):
    """The attention of the ``heads`` [S] to each group, K x [S, M], from (B, K, heads)."""
    exists = (rows < num_rows)[None, :] & (heads < HEADS)[:, None]
    loaded = ()
    for group in tl.static_range(K):
        offsets = ((rows * K + group) * HEADS)[None, :] + heads[:, None]
        loaded = loaded + (tl.load(probabilities + offsets, mask=exists, other=0.0),)
    return loaded


@triton.jit
def score_gradients(probabilities, products, SCALE: tl.constexpr):
    """The gradient of query times key for each group, K x [S, M], from the products of dL/do and the values."""
    expected = probabilities[0] * products[0]
    for group in tl.static_range(1, len(products)):
        expected += probabilities[group] * products[group]
    grads = ()
    for group in tl.static_range(len(products)):
        grads = grads + (SCALE * probabilities[group] * (products[group] - expected),)
    return grads


@triton.jit
def load_members(members, rows, num_rows, index, H: tl.constexpr, K: tl.constexpr):
    """Elements ``index`` [S, Q] of the first members of each row, at most :data:`EARLY_MEMBERS` x [S, M, Q], unconverted.

    Loaded before the attention to them is known, so that no load waits behind the barriers of its sums.
    """
    loaded = ()
    for group in tl.static_range(min(K, EARLY_MEMBERS)):
        loaded = loaded + (load_rows(members, rows * K + group, num_rows * K, index, H),)
    return loaded


@triton.jit
def mix_members(members, loaded, shares, rows, num_rows, index, H: tl.constexpr, K: tl.constexpr):
    """The members of each row, weighed by ``shares``, K x [S, M]: elements ``index`` [S, Q], [S, M, Q] in float32.

    The first of them are ``loaded`` already.
    """
    mixed = shares[0][:, :, None] * loaded[0].to(tl.float32)
    for group in tl.static_range(1, K):
        if group < len(loaded):
            member = loaded[group]
        else:
            member = load_rows(members, rows * K + group, num_rows * K, index, H)
        mixed += shares[group][:, :, None] * member.to(tl.float32)
    return mixed
