"""The backward of the weight allocator: 9 + 4 launches a block, 25 for the four blocks of IGVA.

The way back through the blocks is a chain again, of four products a block with the weights read along their columns. The
gradients of the weights do not belong to it: once the chain is through, inputs and output gradients of all layers lie at
equal distances, and one launch makes those of all blocks. It is bound by writing them, 54 MB in 16 bit.

All sums are float32 and in an order that depends on the shapes alone; nothing is atomic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from igva_kernels.impl.triton.allocator_tiles import (
    first_step,
    head_products,
    load_members,
    load_probabilities,
    load_tile,
    load_weights,
    mix_members,
    multiply,
    norm_backward_product,
    plain_product,
    score_gradients,
    step_index,
    store_head_products,
    store_tile,
    zero_product,
)


@triton.jit(do_not_specialize=["num_rows"])
def head_backward_kernel(
    grad_out,  # *[B, K] float32
    out,  # *[B, K] float32: the weights of the groups
    weight,  # *[K, H]
    grad_logits,  # *[B, K], written
    grad_input,  # *[B, H], written
    num_rows,  # B
    H: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,  # K up to the next power of two
):
    """Grid: (column tiles, row tiles). Softmax and head."""
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)  # [M]
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)  # [C]
    groups = tl.arange(0, GROUPS)  # [G]
    probability = load_tile(out, rows, num_rows, groups, K)  # [M, G]
    grad = load_tile(grad_out, rows, num_rows, groups, K)
    logits = probability * (grad - tl.sum(probability * grad, axis=1)[:, None])  # [M, G]
    if tl.program_id(0) == 0:
        store_tile(grad_logits, logits, rows, num_rows, groups, K)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for group in tl.static_range(K):
        share = tl.sum(tl.where((groups == group)[None, :], logits, 0.0), axis=1)  # [M]
        row = tl.load(weight + group * H + columns, mask=columns < H, other=0.0).to(tl.float32)  # [C]
        total += share[:, None] * row[None, :]
    store_tile(grad_input, total, rows, num_rows, columns, H)


@triton.jit(do_not_specialize=["num_rows", "statistics"])
def ffn_hidden_backward_kernel(
    grad,  # *[B, H], of LayerNorm 2's output
    source,  # *[B, H], LayerNorm 2's input
    statistics,  # *[2, B]
    norm_weight,  # *[H]
    grad_source,  # *[B, H], written
    weight,  # *[H, H], of ffn.2
    hidden,  # *[B, H], the output of the ReLU
    grad_hidden,  # *[B, H], written: of the ReLU's input
    num_rows,  # B
    H: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid: (column tiles, row tiles). LayerNorm 2, ffn.2 and the ReLU."""
    rows = tl.program_id(1) * TILE.rows + tl.arange(0, TILE.rows)  # [M]
    columns = tl.program_id(0) * TILE.columns + tl.arange(0, TILE.columns)  # [C]
    active = load_tile(hidden, rows, num_rows, columns, H) > 0.0  # [M, C]
    product = norm_backward_product(
        grad, source, statistics, norm_weight, weight, grad_source, rows, num_rows, columns, H, TILE
    )
    store_tile(grad_hidden, tl.where(active, product, 0.0), rows, num_rows, columns, H)


@triton.jit(do_not_specialize=["num_rows", "statistics"])
def attended_backward_kernel(
    grad,  # *[B, H], of LayerNorm 1's output
    source,  # *[B, H], LayerNorm 1's input
    statistics,  # *[2, B]
    norm_weight,  # *[H]
    grad_source,  # *[B, H], written
    weight,  # *[H, H], of out_proj
    values,  # *[B*K, H]
    grad_attended,  # *[B, H], written
    partials,  # *[B, K, column tiles], written: the gradient times the values
    num_rows,  # B
    H: tl.constexpr,
    K: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid: (column tiles, row tiles). LayerNorm 1 and out_proj."""
    rows = tl.program_id(1) * TILE.rows + tl.arange(0, TILE.rows)  # [M]
    columns = tl.program_id(0) * TILE.columns + tl.arange(0, TILE.columns)  # [C]
    product = norm_backward_product(
        grad, source, statistics, norm_weight, weight, grad_source, rows, num_rows, columns, H, TILE
    )
    rounded = product.to(grad_attended.dtype.element_ty)  # [M, C]
    store_tile(grad_attended, rounded, rows, num_rows, columns, H)
    store_head_products(partials, rounded.to(tl.float32), values, rows, num_rows, columns, H, K)


@triton.jit(do_not_specialize=["num_rows", "probabilities"])
def query_backward_kernel(
    probabilities,  # *[B, K, HEADS]
    partials,  # *[B, K, HEADS*PARTS]
    query,  # *[B, H]
    keys,  # *[B*K, H]
    grad_attended,  # *[B, H]
    grad_query,  # *[B, H], written
    grad_keys,  # *[B*K, H], written
    grad_values,  # *[B*K, H], written
    weight,  # *[3H, H], of which the first H rows are the query's
    residual,  # *[B, H], the gradient that comes around the attention
    out,  # *[B, H], written: of the block's input
    num_rows,  # B
    H: tl.constexpr,
    K: tl.constexpr,
    HEADS: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid: (column tiles, row tiles). The attention and the query's projection."""
    HEAD_DIM: tl.constexpr = H // HEADS
    SCALE: tl.constexpr = HEAD_DIM**-0.5
    STEP: tl.constexpr = TILE.slices * TILE.depth
    rows = tl.program_id(1) * TILE.rows + tl.arange(0, TILE.rows)  # [M]
    columns = tl.program_id(0) * TILE.columns + tl.arange(0, TILE.columns)  # [C]
    index = step_index(TILE)  # [S, Q]
    product = zero_product(TILE)  # [S, M, C]
    weights = load_weights(weight, columns, index, H, H, True)  # [S, Q, C]
    around = load_tile(residual, rows, num_rows, columns, H)  # [M, C]
    for start in range(0, H, STEP):
        heads = (start + tl.arange(0, TILE.slices) * TILE.depth) // HEAD_DIM  # [S]: no slice crosses two heads
        loaded = load_members(keys, rows, num_rows, start + index, H, K)
        attention = load_probabilities(probabilities, rows, num_rows, heads, K, HEADS)
        grads = score_gradients(attention, head_products(partials, rows, num_rows, heads, K, HEADS, PARTS), SCALE)
        mixed = mix_members(keys, loaded, grads, rows, num_rows, start + index, H, K)  # [S, M, Q]
        following = load_weights(weight, columns, start + STEP + index, H, H, True)
        product = multiply(mixed, weights, product)
        weights = following

    store_tile(out, tl.sum(product, axis=0) + around, rows, num_rows, columns, H)

    # each program keeps the gradients of query, keys and values in its own columns
    heads = tl.program_id(0) * TILE.columns // HEAD_DIM + tl.arange(0, 1)  # [1]
    attention = load_probabilities(probabilities, rows, num_rows, heads, K, HEADS)  # K x [1, M]
    grads = score_gradients(attention, head_products(partials, rows, num_rows, heads, K, HEADS, PARTS), SCALE)
    own_query = load_tile(query, rows, num_rows, columns, H)  # [M, C]
    own_attended = load_tile(grad_attended, rows, num_rows, columns, H)
    M: tl.constexpr = TILE.rows
    C: tl.constexpr = TILE.columns
    own = tl.zeros((M, C), dtype=tl.float32)
    for group in tl.static_range(K):
        grad_score = tl.sum(grads[group], axis=0)[:, None]  # [M, 1]
        member = rows * K + group  # [M]
        own += grad_score * load_tile(keys, member, num_rows * K, columns, H)
        store_tile(grad_keys, grad_score * own_query, member, num_rows * K, columns, H)
        probability = tl.sum(attention[group], axis=0)[:, None]  # [M, 1]
        store_tile(grad_values, probability * own_attended, member, num_rows * K, columns, H)
    store_tile(grad_query, own, rows, num_rows, columns, H)


@triton.jit(do_not_specialize=["num_members"])
def members_backward_kernel(
    grads,  # *[1 + 2*blocks, B*K, H]: writes the first matrix, reads those of keys and values after it
    weights,  # blocks x *[3H, H]
    num_members,  # B*K
    H: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid: (column tiles, row tiles). Keys and values of all blocks."""
    rows = tl.program_id(1) * TILE.rows + tl.arange(0, TILE.rows)  # [M]
    columns = tl.program_id(0) * TILE.columns + tl.arange(0, TILE.columns)  # [C]
    matrix_size = num_members.to(tl.int64) * H
    M: tl.constexpr = TILE.rows
    C: tl.constexpr = TILE.columns
    total = tl.zeros((M, C), dtype=tl.float32)
    for block in tl.static_range(len(weights)):
        for i in range(2):
            grad = grads + (1 + 2 * block + i) * matrix_size
            weight = weights[block] + (1 + i) * (H * H)
            first = first_step(grad, weight, rows, num_members, columns, H, H, True, TILE)
            total += plain_product(first, grad, weight, rows, num_members, columns, H, H, True, TILE)
    store_tile(grads, total, rows, num_members, columns, H)


@triton.jit(do_not_specialize=["num_sentences", "num_members"])
def inputs_backward_kernel(
    grad_query,  # *[B, H]
    sentence_weight,  # *[H, E]
    grad_sentences,  # *[B, E], or None
    grad_members,  # *[B*K, H]
    cls_weight,  # *[H, D]
    grad_summaries,  # *[B*K, D], or None
    num_sentences,  # B
    num_members,  # B*K
    E: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid: (column tiles of the wider input, row tiles of the sentences and then of the summaries)."""
    columns = tl.program_id(0) * TILE.columns + tl.arange(0, TILE.columns)  # [C]
    sentence_tiles = 0
    if grad_sentences is not None:
        sentence_tiles = tl.cdiv(num_sentences, TILE.rows)
        if tl.program_id(1) < sentence_tiles:
            rows = tl.program_id(1) * TILE.rows + tl.arange(0, TILE.rows)  # [M]
            first = first_step(grad_query, sentence_weight, rows, num_sentences, columns, E, H, True, TILE)
            product = plain_product(first, grad_query, sentence_weight, rows, num_sentences, columns, E, H, True, TILE)
            store_tile(grad_sentences, product, rows, num_sentences, columns, E)
    if grad_summaries is not None:
        if tl.program_id(1) >= sentence_tiles:
            rows = (tl.program_id(1) - sentence_tiles) * TILE.rows + tl.arange(0, TILE.rows)  # [M]
            first = first_step(grad_members, cls_weight, rows, num_members, columns, D, H, True, TILE)
            product = plain_product(first, grad_members, cls_weight, rows, num_members, columns, D, H, True, TILE)
            store_tile(grad_summaries, product, rows, num_members, columns, D)


@triton.jit(do_not_specialize=["num_rows"])
def weight_gradients_kernel(
    grads,  # *[..., B, N]: gradients of the outputs of linear layers
    inputs,  # *[..., B, R]: their inputs
    parameters,  # flat, written: the gradients of weights and biases
    num_rows,  # B
    N: tl.constexpr,
    R: tl.constexpr,
    GRADS: tl.constexpr,  # per layer of a block, the index of its matrix in the first block
    INPUTS: tl.constexpr,
    WEIGHTS: tl.constexpr,  # per layer of a block, where its weight begins in the first block
    BIASES: tl.constexpr,
    GRADS_OF_A_BLOCK: tl.constexpr,  # matrices
    INPUTS_OF_A_BLOCK: tl.constexpr,
    PARAMETERS_OF_A_BLOCK: tl.constexpr,  # elements
    ROWS: tl.constexpr,
    SIDE: tl.constexpr,  # of the square tile of a weight
):
    """Grid: (tiles of R, tiles of N, layers of all blocks)."""
    layer = tl.program_id(2) % len(GRADS)
    block = (tl.program_id(2) // len(GRADS)).to(tl.int64)
    grad_matrix, input_matrix, weight, bias = GRADS[0], INPUTS[0], WEIGHTS[0], BIASES[0]
    for i in tl.static_range(1, len(GRADS)):
        grad_matrix = tl.where(layer == i, GRADS[i], grad_matrix)
        input_matrix = tl.where(layer == i, INPUTS[i], input_matrix)
        weight = tl.where(layer == i, WEIGHTS[i], weight)
        bias = tl.where(layer == i, BIASES[i], bias)
    grads += (block * GRADS_OF_A_BLOCK + grad_matrix) * num_rows * N
    inputs += (block * INPUTS_OF_A_BLOCK + input_matrix) * num_rows * R
    parameters += block * PARAMETERS_OF_A_BLOCK

    outputs = tl.program_id(1) * SIDE + tl.arange(0, SIDE)  # [SIDE] rows of the weight
    columns = tl.program_id(0) * SIDE + tl.arange(0, SIDE)  # [SIDE]
    product = tl.zeros((SIDE, SIDE), dtype=tl.float32)
    sums = tl.zeros((SIDE,), dtype=tl.float32)
    for start in range(0, num_rows, ROWS):
        rows = start + tl.arange(0, ROWS)  # [ROWS]
        grad = load_tile(grads, rows, num_rows, outputs, N)  # [ROWS, SIDE]
        value = load_tile(inputs, rows, num_rows, columns, R)
        sums += tl.sum(grad, axis=0)
        element = parameters.dtype.element_ty
        product = tl.dot(tl.trans(grad.to(element)), value.to(element), product, input_precision="ieee")
    store_tile(parameters + weight, product, outputs, N, columns, R)
    if tl.program_id(0) == 0:
        tl.store(parameters + bias + outputs, sums.to(parameters.dtype.element_ty), mask=outputs < N)


@triton.jit(do_not_specialize=["num_rows", "statistics"])
def norm_gradients_kernel(
    grads,  # *[row matrices, B, H]
    matrices,  # *[row matrices, B, H]
    statistics,  # *[2*blocks, 2, B]
    parameters,  # flat, written
    num_rows,  # B
    H: tl.constexpr,
    FIRST: tl.constexpr,  # the matrices of the sum before and of the output of LayerNorm 1 of the first block
    SECOND: tl.constexpr,  # the same for LayerNorm 2
    MATRICES_OF_A_BLOCK: tl.constexpr,
    FIRST_PARAMETER: tl.constexpr,  # where the weight of LayerNorm 1 of the first block begins; its bias, 2 follow
    PARAMETERS_OF_A_BLOCK: tl.constexpr,  # elements
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Grid: (column tiles, LayerNorms)."""
    norm = tl.program_id(1)
    block = (norm // 2).to(tl.int64)
    is_second = norm % 2
    matrix = tl.where(is_second == 1, SECOND[0], FIRST[0]) + block * MATRICES_OF_A_BLOCK
    grad_matrix = tl.where(is_second == 1, SECOND[1], FIRST[1]) + block * MATRICES_OF_A_BLOCK
    matrices += matrix * num_rows * H
    grads += grad_matrix * num_rows * H
    statistics += norm * 2 * num_rows
    parameters += FIRST_PARAMETER + block * PARAMETERS_OF_A_BLOCK + is_second * (2 * H)

    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)  # [C]
    grad_weight = tl.zeros((COLUMNS,), dtype=tl.float32)
    grad_bias = tl.zeros((COLUMNS,), dtype=tl.float32)
    for start in range(0, num_rows, ROWS):
        rows = start + tl.arange(0, ROWS)  # [M]
        mean = tl.load(statistics + rows, mask=rows < num_rows, other=0.0)
        scale = tl.load(statistics + num_rows + rows, mask=rows < num_rows, other=0.0)
        grad = load_tile(grads, rows, num_rows, columns, H)  # [M, C]
        value = load_tile(matrices, rows, num_rows, columns, H)
        grad_weight += tl.sum(grad * (value - mean[:, None]) * scale[:, None], axis=0)
        grad_bias += tl.sum(grad, axis=0)
    element = parameters.dtype.element_ty
    tl.store(parameters + columns, grad_weight.to(element), mask=columns < H)
    tl.store(parameters + H + columns, grad_bias.to(element), mask=columns < H)
