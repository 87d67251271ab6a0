"""The forward of the weight allocator: 3 + 4 launches a block, 19 for the four blocks of IGVA.

| launch | product | weights, 16 bit | on the way in | on the way out |
|---|---|---|---|---|
| inputs | sentence_proj, cls_proj | 1.5 + 2 MiB | cast | |
| keys and values | 2 per block, all blocks at once | 16 MiB | | |
| query, a block | Wq | 2 MiB | LayerNorm 2 of the block before | products of query and keys |
| attended, a block | out_proj | 2 MiB | softmax, mean of the values | + query |
| ffn hidden, a block | ffn.0 | 2 MiB | LayerNorm 1 | ReLU |
| ffn sum, a block | ffn.2 | 2 MiB | | + normalised rows |
| head | linear | | LayerNorm 2 | softmax |

(Sizes for a hidden width of 1024.) Together 54 MB of 16-bit weights, read once: 18 us at 3 TB/s. The chain of 19 dependent
launches is the rest. The alternative, torch.addmm for the products and a fused kernel for each attention and each sum with
its LayerNorm, moves the same weights in 36 launches (2 + 4 for the inputs, keys and values, 7 a block, 2 for the head), and in
more where cuBLAS splits the reduction of so few rows and adds up in a second kernel; each begins to read its weights when the
one before has ended and the rows are there.

Here the attention costs no launch: the products of query and keys are summed in the query's program, tile by tile, and what
remains of the softmax is repeated by each program that wants it.

The weights may be 16 bit; all sums are float32. Query, keys, values, attention output, ReLU and LayerNorm outputs are rounded
to the type of the weights where the stock module rounds them; scores, probabilities and logits are not, and each of the two
sums of a block is rounded once instead of twice.
"""

from __future__ import annotations

import triton
import triton.language as tl

from igva_kernels.impl.triton.allocator_tiles import (
    first_step,
    head_products,
    load_columns,
    load_members,
    load_own,
    load_tile,
    load_weights,
    mix_members,
    multiply,
    normalised_product,
    plain_product,
    softmax_over_groups,
    step_index,
    store_head_products,
    store_normalised,
    store_tile,
    zero_product,
)


# Numbers of rows change from batch to batch and must not compile anew, nor must the places that follow from them inside a
# buffer: the statistics and probabilities of a block begin at 16 bytes for some batches and not for others.
@triton.jit(do_not_specialize=["num_sentences", "num_members"])
def project_inputs_kernel(
    sentences,  # *[B, E]
    sentence_weight,  # *[H, E]
    sentence_bias,  # *[H]
    query,  # *[B, H]
    summaries,  # *[B*K, D]
    cls_weight,  # *[H, D]
    cls_bias,  # *[H]
    members,  # *[B*K, H]
    num_sentences,  # B
    num_members,  # B*K
    E: tl.constexpr,
    D: tl.constexpr,
    H: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid: (column tiles, row tiles of the sentences and then of the summaries)."""
    columns = tl.program_id(0) * TILE.columns + tl.arange(0, TILE.columns)  # [C]
    sentence_tiles = tl.cdiv(num_sentences, TILE.rows)
    if tl.program_id(1) < sentence_tiles:
        rows = tl.program_id(1) * TILE.rows + tl.arange(0, TILE.rows)  # [M]
        first_sentences = first_step(sentences, sentence_weight, rows, num_sentences, columns, H, E, False, TILE)
        bias = load_columns(sentence_bias, rows, columns, H)
        product = plain_product(first_sentences, sentences, sentence_weight, rows, num_sentences, columns, H, E, False, TILE)
        store_tile(query, product + bias, rows, num_sentences, columns, H)
    else:
        rows = (tl.program_id(1) - sentence_tiles) * TILE.rows + tl.arange(0, TILE.rows)  # [M]
        first_summaries = first_step(summaries, cls_weight, rows, num_members, columns, H, D, False, TILE)
        bias = load_columns(cls_bias, rows, columns, H)
        product = plain_product(first_summaries, summaries, cls_weight, rows, num_members, columns, H, D, False, TILE)
        store_tile(members, product + bias, rows, num_members, columns, H)


@triton.jit(do_not_specialize=["num_members"])
def keys_values_kernel(
    members,  # *[1 + 2*blocks, B*K, H]: reads the first matrix, writes keys and values of the blocks after it
    weights,  # blocks x *[3H, H]: query, key, value
    biases,  # blocks x *[3H]
    num_members,  # B*K
    H: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid: (column tiles of keys and values, row tiles, blocks)."""
    block = tl.program_id(2)
    weight = weights[0]
    bias = biases[0]
    for i in tl.static_range(1, len(weights)):
        if block == i:
            weight = weights[i]
            bias = biases[i]
    begin = tl.program_id(0) * TILE.columns  # a tile belongs to the keys or to the values, as its width divides H
    is_value = begin // H
    rows = tl.program_id(1) * TILE.rows + tl.arange(0, TILE.rows)  # [M]
    columns = begin - is_value * H + tl.arange(0, TILE.columns)  # [C]
    weight += (1 + is_value) * (H * H)
    first = first_step(members, weight, rows, num_members, columns, H, H, False, TILE)
    shift = load_columns(bias + (1 + is_value) * H, rows, columns, H)  # [M, C]
    product = plain_product(first, members, weight, rows, num_members, columns, H, H, False, TILE)
    out = members + (1 + 2 * block + is_value).to(tl.int64) * num_members * H
    store_tile(out, product + shift, rows, num_members, columns, H)


@triton.jit(do_not_specialize=["num_rows", "statistics"])
def query_kernel(
    source,  # *[B, H]: the block's input, before LayerNorm 2 of the block before if there is one
    norm_weight,  # *[H]; None for the first block, whose input is not normalised
    norm_bias,  # *[H] or None
    normalised,  # *[B, H], written, or None
    statistics,  # *[2, B], written, or None
    weight,  # *[3H, H], of which the first H rows are the query's
    bias,  # *[3H]
    keys,  # *[B*K, H]
    query,  # *[B, H]
    partials,  # *[B, K, column tiles]: query times keys
    num_rows,  # B
    H: tl.constexpr,
    K: tl.constexpr,
    EPS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid: (column tiles, row tiles)."""
    rows = tl.program_id(1) * TILE.rows + tl.arange(0, TILE.rows)  # [M]
    columns = tl.program_id(0) * TILE.columns + tl.arange(0, TILE.columns)  # [C]
    first = first_step(source, weight, rows, num_rows, columns, H, H, False, TILE)
    shift = load_columns(bias, rows, columns, H)  # [M, C]
    if norm_weight is not None:
        own = load_own(source, norm_weight, norm_bias, rows, num_rows, columns, H)
        product, mean, scale = normalised_product(
            first, source, norm_weight, norm_bias, weight, rows, num_rows, columns, H, H, EPS, TILE
        )
        store_normalised(normalised, statistics, own, mean, scale, rows, num_rows, columns, H)
    else:
        product = plain_product(first, source, weight, rows, num_rows, columns, H, H, False, TILE)
    rounded = (product + shift).to(query.dtype.element_ty)  # [M, C]
    store_tile(query, rounded, rows, num_rows, columns, H)
    store_head_products(partials, rounded.to(tl.float32), keys, rows, num_rows, columns, H, K)


@triton.jit(do_not_specialize=["num_rows", "probabilities"])
def attended_kernel(
    partials,  # *[B, K, HEADS*PARTS]
    values,  # *[B*K, H]
    attended,  # *[B, H], written, or None
    probabilities,  # *[B, K, HEADS], written, or None with it: only the backward wants them
    weight,  # *[H, H]
    bias,  # *[H]
    residual,  # *[B, H]
    out,  # *[B, H]: the projected attention plus the residual
    num_rows,  # B
    H: tl.constexpr,
    K: tl.constexpr,
    HEADS: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid: (column tiles, row tiles)."""
    HEAD_DIM: tl.constexpr = H // HEADS
    SCALE: tl.constexpr = HEAD_DIM**-0.5
    STEP: tl.constexpr = TILE.slices * TILE.depth
    rows = tl.program_id(1) * TILE.rows + tl.arange(0, TILE.rows)  # [M]
    columns = tl.program_id(0) * TILE.columns + tl.arange(0, TILE.columns)  # [C]
    index = step_index(TILE)  # [S, Q]
    product = zero_product(TILE)  # [S, M, C]
    weights = load_weights(weight, columns, index, H, H, False)  # [S, Q, C]
    for start in range(0, H, STEP):
        heads = (start + tl.arange(0, TILE.slices) * TILE.depth) // HEAD_DIM  # [S]: no slice crosses two heads
        loaded = load_members(values, rows, num_rows, start + index, H, K)
        shares = softmax_over_groups(head_products(partials, rows, num_rows, heads, K, HEADS, PARTS), SCALE)
        mixed = mix_members(values, loaded, shares, rows, num_rows, start + index, H, K)  # [S, M, Q]
        following = load_weights(weight, columns, start + STEP + index, H, H, False)
        product = multiply(mixed, weights, product)
        weights = following
    total = tl.sum(product, axis=0) + load_columns(bias, rows, columns, H)  # [M, C]
    store_tile(out, total + load_tile(residual, rows, num_rows, columns, H), rows, num_rows, columns, H)

    if attended is not None:  # each program keeps its own columns, and the first of a head its attention
        head = tl.program_id(0) * TILE.columns // HEAD_DIM
        heads = head + tl.arange(0, 1)  # [1]
        shares = softmax_over_groups(head_products(partials, rows, num_rows, heads, K, HEADS, PARTS), SCALE)
        M: tl.constexpr = TILE.rows
        C: tl.constexpr = TILE.columns
        own = tl.zeros((M, C), dtype=tl.float32)
        for group in tl.static_range(K):
            probability = tl.sum(shares[group], axis=0)  # [M]
            own += probability[:, None] * load_tile(values, rows * K + group, num_rows * K, columns, H)
            if tl.program_id(0) * TILE.columns == head * HEAD_DIM:
                tl.store(probabilities + (rows * K + group) * HEADS + head, probability, mask=rows < num_rows)
        store_tile(attended, own, rows, num_rows, columns, H)


@triton.jit(do_not_specialize=["num_rows", "statistics"])
def ffn_hidden_kernel(
    source,  # *[B, H], before LayerNorm 1
    norm_weight,  # *[H]
    norm_bias,  # *[H]
    normalised,  # *[B, H], written
    statistics,  # *[2, B], written, or None
    weight,  # *[H, H]
    bias,  # *[H]
    out,  # *[B, H]
    num_rows,  # B
    H: tl.constexpr,
    EPS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid: (column tiles, row tiles)."""
    rows = tl.program_id(1) * TILE.rows + tl.arange(0, TILE.rows)  # [M]
    columns = tl.program_id(0) * TILE.columns + tl.arange(0, TILE.columns)  # [C]
    first = first_step(source, weight, rows, num_rows, columns, H, H, False, TILE)
    shift = load_columns(bias, rows, columns, H)  # [M, C]
    own = load_own(source, norm_weight, norm_bias, rows, num_rows, columns, H)
    product, mean, scale = normalised_product(
        first, source, norm_weight, norm_bias, weight, rows, num_rows, columns, H, H, EPS, TILE
    )
    store_normalised(normalised, statistics, own, mean, scale, rows, num_rows, columns, H)
    store_tile(out, tl.maximum(product + shift, 0.0), rows, num_rows, columns, H)


@triton.jit(do_not_specialize=["num_rows"])
def sum_kernel(
    matrix,  # *[B, H]
    weight,  # *[H, H]
    bias,  # *[H] or None
    residual,  # *[B, H]
    out,  # *[B, H]: the product, plus the bias, plus the residual
    num_rows,  # B
    H: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid: (column tiles, row tiles). The second layer of the ffn, and the way back through the first."""
    rows = tl.program_id(1) * TILE.rows + tl.arange(0, TILE.rows)  # [M]
    columns = tl.program_id(0) * TILE.columns + tl.arange(0, TILE.columns)  # [C]
    first = first_step(matrix, weight, rows, num_rows, columns, H, H, TRANSPOSED, TILE)
    around = load_tile(residual, rows, num_rows, columns, H)  # [M, C]
    if bias is not None:
        around += load_columns(bias, rows, columns, H)
    product = plain_product(first, matrix, weight, rows, num_rows, columns, H, H, TRANSPOSED, TILE)
    store_tile(out, product + around, rows, num_rows, columns, H)


@triton.jit(do_not_specialize=["num_rows", "statistics"])
def head_kernel(
    source,  # *[B, H], before LayerNorm 2 of the last block
    norm_weight,  # *[H]
    norm_bias,  # *[H]
    normalised,  # *[B, H], written, or None
    statistics,  # *[2, B], written, or None
    weight,  # *[K, H]
    bias,  # *[K]
    out,  # *[B, K] float32: the weights of the groups
    num_rows,  # B
    H: tl.constexpr,
    K: tl.constexpr,
    EPS: tl.constexpr,
    TILE: tl.constexpr,  # its columns hold all K
    NORM_COLUMNS: tl.constexpr,
):
    """Grid: (1, row tiles), with the normalised rows wanted (column tiles of NORM_COLUMNS, row tiles)."""
    rows = tl.program_id(1) * TILE.rows + tl.arange(0, TILE.rows)  # [M]
    columns = tl.arange(0, TILE.columns)  # [C]
    norm_columns = tl.program_id(0) * NORM_COLUMNS + tl.arange(0, NORM_COLUMNS)
    first = first_step(source, weight, rows, num_rows, columns, K, H, False, TILE)
    shift = load_columns(bias, rows, columns, K)  # [M, C]
    own = load_own(source, norm_weight, norm_bias, rows, num_rows, norm_columns, H)
    product, mean, scale = normalised_product(
        first, source, norm_weight, norm_bias, weight, rows, num_rows, columns, K, H, EPS, TILE
    )
    if normalised is not None:
        store_normalised(normalised, statistics, own, mean, scale, rows, num_rows, norm_columns, H)
    if tl.program_id(0) == 0:
        logits = tl.where((columns < K)[None, :], product + shift, float("-inf"))  # [M, C]
        exponentials = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        store_tile(out, exponentials / tl.sum(exponentials, axis=1)[:, None], rows, num_rows, columns, K)
