"""What the row kernels share: a row in pieces, its norm, the weights of its token.

A row is held as a tuple of pieces, PIECES x [BLOCK], one access of a thread each (launch.py, ``row_tile``). Several rows
are one flat tuple, row r at ``r * PIECES``, since Triton slices tuples of tensors but not tuples of tuples.
"""

from __future__ import annotations

import triton
import triton.language as tl

from igva_kernels.impl.triton.tiles import add_term, put_at, sum_in_thread


@triton.jit
def load_row(
    pointer,
    exists,  # scalar: where it is false no byte is moved, and the row is zero
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    PIECES: tl.constexpr,
    POLICY: tl.constexpr,
):
    """The D elements at ``pointer``, zero beyond them, PIECES x [BLOCK]."""
    row = ()
    for piece in tl.static_range(PIECES):
        column = piece * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
        # in units of VEC, see tile_offsets; a select and not a product of masks, as Triton 3.9 interprets no mixed ones
        inside = tl.where(exists, column // VEC, D // VEC) < D // VEC  # [BLOCK]
        row = row + (tl.load(pointer + column, mask=inside, other=0.0, eviction_policy=POLICY),)
    return row


@triton.jit
def store_row(pointer, row, D: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, PIECES: tl.constexpr):
    """The first D elements of a row to ``pointer``, in the type that it points to."""
    for piece in tl.static_range(PIECES):
        column = piece * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
        value = row[piece].to(pointer.dtype.element_ty)
        if (piece + 1) * BLOCK <= D:
            tl.store(pointer + column, value)
        else:
            tl.store(pointer + column, value, mask=column // VEC < D // VEC)


@triton.jit
def row_as(row, PIECES: tl.constexpr, TYPE: tl.constexpr):
    """The row in another type."""
    converted = ()
    for piece in tl.static_range(PIECES):
        converted = converted + (row[piece].to(TYPE),)
    return converted


@triton.jit
def put_row(rows, index: tl.constexpr, row, PIECES: tl.constexpr):
    """``rows`` with another one at ``index``."""
    return rows[: index * PIECES] + row + rows[(index + 1) * PIECES :]


@triton.jit
def row_at(rows, index: tl.constexpr, PIECES: tl.constexpr):
    """The row at ``index``."""
    return rows[index * PIECES : (index + 1) * PIECES]


@triton.jit
def pin(tile, PIN: tl.constexpr):
    """The tile, computed here and not later.

    A kernel is one basic block, and LLVM orders its arithmetic from the end: an addition whose result is stored last is
    done last, and until then all that it adds stays in registers, rows by the dozen. An instruction with side effects, as
    which this move is declared, keeps its place among the loads; ptxas then drops the move, and for AMD it is empty.
    """
    if PIN == "ptx":
        if tile.dtype == tl.float64:
            tile = tl.inline_asm_elementwise("mov.b64 $0, $1;", "=d,d", [tile], dtype=tl.float64, is_pure=False, pack=1)
        else:
            tile = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [tile], dtype=tl.float32, is_pure=False, pack=1)
    if PIN == "gcn":
        if tile.dtype == tl.float32:
            tile = tl.inline_asm_elementwise("", "=v,0", [tile], dtype=tl.float32, is_pure=False, pack=1)
    return tile


@triton.jit
def add_row_to_group(
    sums,
    row,
    source: tl.constexpr,
    group: tl.constexpr,
    SCHEDULE: tl.constexpr,
    PIECES: tl.constexpr,
    PIN: tl.constexpr,
):
    """``sums``, G x PIECES x [BLOCK], with the row added to one group; its first member begins the sum."""
    total = row
    if SCHEDULE.first_members[group] != source:
        total = ()
        for piece in tl.static_range(PIECES):
            total = total + (pin(sums[group * PIECES + piece] + row[piece], PIN),)
    return put_row(sums, group, total, PIECES)


@triton.jit
def mean_row(sums, group: tl.constexpr, SCHEDULE: tl.constexpr, PIECES: tl.constexpr):
    """A group's sum times the rounded 1/|g|, as in tiles.py."""
    mean = ()
    for piece in tl.static_range(PIECES):
        mean = mean + (sums[group * PIECES + piece] * (1.0 / SCHEDULE.sizes[group]),)
    return mean


@triton.jit
def add_term_row(total, mean, weight, COLUMN: tl.constexpr, POSITION: tl.constexpr, PIECES: tl.constexpr, PIN: tl.constexpr):
    """:func:`~igva_kernels.impl.triton.tiles.add_term` for a row."""
    sums = ()
    for piece in tl.static_range(PIECES):
        sums = sums + (pin(add_term(total[piece], mean[piece], weight, COLUMN, POSITION), PIN),)
    return sums


@triton.jit
def mean_over_row(row, D: tl.constexpr, PIECES: tl.constexpr):
    """The mean of the D elements, whatever lies beyond them being zero; a scalar."""
    total = row[0]
    for piece in tl.static_range(1, PIECES):
        total += row[piece]
    return tl.sum(total, axis=0) * (1.0 / D)


@triton.jit
def product_of_rows(left, right, PIECES: tl.constexpr):
    """The elementwise product."""
    product = ()
    for piece in tl.static_range(PIECES):
        product = product + (left[piece] * right[piece],)
    return product


@triton.jit
def dot_in_thread(left, right, BLOCK: tl.constexpr, VEC: tl.constexpr, PIECES: tl.constexpr):
    """What each thread has of the scalar product of two rows, [BLOCK // VEC]."""
    total = left[0] * right[0]
    for piece in tl.static_range(1, PIECES):
        total = tl.fma(left[piece], right[piece], total)
    return sum_in_thread(total, BLOCK, VEC)


@triton.jit
def centre_row(row, group: tl.constexpr, SCHEDULE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr):
    """The row less its mean where the norm of ``group`` is a LayerNorm, and as it is for an RMSNorm; zero beyond D."""
    centred = row
    if SCHEDULE.norms[group][0] == "layer":
        mean = mean_over_row(row, D, PIECES)
        centred = ()
        for piece in tl.static_range(PIECES):
            value = row[piece] - mean
            if (piece + 1) * BLOCK > D:
                value = tl.where(piece * BLOCK + tl.arange(0, BLOCK) < D, value, 0.0)
            centred = centred + (value,)
    return centred


@triton.jit
def reciprocal_deviation(centred, group: tl.constexpr, SCHEDULE: tl.constexpr, D: tl.constexpr, PIECES: tl.constexpr):
    """``1 / sqrt(mean(centred²) + eps)`` of a centred row, with the eps of ``group``.

    From deviations, and not from the difference of two moments, which loses its digits where the mean is large.
    """
    return 1.0 / tl.sqrt(mean_over_row(product_of_rows(centred, centred, PIECES), D, PIECES) + SCHEDULE.norms[group][1])


@triton.jit
def scale_row(row, factor, PIECES: tl.constexpr):
    """The row times a scalar."""
    scaled = ()
    for piece in tl.static_range(PIECES):
        scaled = scaled + (row[piece] * factor,)
    return scaled


@triton.jit
def add_scaled_row(total, row, factor, PIECES: tl.constexpr):
    """``total + factor * row``, contracted as in :func:`~igva_kernels.impl.triton.tiles.add_term`."""
    sums = ()
    for piece in tl.static_range(PIECES):
        sums = sums + (tl.fma(row[piece], factor, total[piece]),)
    return sums


@triton.jit
def load_columns(indices, image, token, exists, num_patches, CHOSEN: tl.constexpr):
    """The weight columns that a token names, CHOSEN x scalar; -1, which is no column, for a row that is no token."""
    columns = ()
    for i in tl.static_range(CHOSEN):
        pointer = indices + (image * num_patches + token) * CHOSEN + i
        columns = columns + (tl.load(pointer, mask=exists, other=-1),)
    return columns


@triton.jit
def load_row_weights(
    weights,
    columns,  # CHOSEN x scalar, if SHARING is "sparse"
    image,
    token,
    exists,
    num_patches,
    K: tl.constexpr,
    CHOSEN: tl.constexpr,
    SHARING: tl.constexpr,
    ACC: tl.constexpr,
):
    """The K weights that hold in a row, as scalars; SHARING says who has a row of them, see launch.py.

    Of sparse weights, the values of a column that the token names more than once add up, in their order.
    """
    weight = ()
    if SHARING == "sparse":
        values = ()
        for i in tl.static_range(CHOSEN):
            pointer = weights + (image * num_patches + token) * CHOSEN + i
            values = values + (tl.load(pointer, mask=exists, other=0.0).to(ACC),)
        for column in tl.static_range(K):
            value = tl.where(columns[0] == column, values[0], 0.0)
            for i in tl.static_range(1, CHOSEN):
                value += tl.where(columns[i] == column, values[i], 0.0)
            weight = weight + (value,)
    else:
        for column in tl.static_range(K):
            if SHARING == "all":
                value = tl.load(weights + column)
            else:
                if SHARING == "image":
                    value = tl.load(weights + image * K + column)
                else:  # a row of the backward may be a prefix row, which has no weights
                    pointer = weights + (image * num_patches + token) * K + column
                    value = tl.load(pointer, mask=exists, other=0.0)
            weight = weight + (value.to(ACC),)
    return weight


@triton.jit
def names(columns, column: tl.constexpr, CHOSEN: tl.constexpr):
    """Whether a token names this column; a scalar."""
    named = columns[0] == column
    for i in tl.static_range(1, CHOSEN):
        named = named | (columns[i] == column)
    return named


@triton.jit
def load_values(weights, columns, image, token, num_patches, K: tl.constexpr, CHOSEN: tl.constexpr, ACC: tl.constexpr):
    """The values of sparse weights, CHOSEN x scalar; zero for an index that is no column, whatever stands there."""
    values = ()
    for i in tl.static_range(CHOSEN):
        pointer = weights + (image * num_patches + token) * CHOSEN + i
        values = values + (tl.load(pointer, mask=is_column(columns[i], K), other=0.0).to(ACC),)
    return values


@triton.jit
def is_column(index, K: tl.constexpr):
    """Whether an index is that of a weight column."""
    return (index >= 0) & (index < K)


@triton.jit
def in_order(columns, values, CHOSEN: tl.constexpr):
    """The columns ascending and their values, CHOSEN + CHOSEN scalars; of equal columns the last has the sum, in order.

    So that the sum of a slot runs over the columns, as everywhere, and not over the order in which a token names them.
    """
    for step in tl.static_range(CHOSEN):
        for i in tl.static_range(step % 2, CHOSEN - 1, 2):
            swap = columns[i] > columns[i + 1]
            low, high = tl.where(swap, columns[i + 1], columns[i]), tl.where(swap, columns[i], columns[i + 1])
            first, second = tl.where(swap, values[i + 1], values[i]), tl.where(swap, values[i], values[i + 1])
            columns = put_at(put_at(columns, i, low), i + 1, high)
            values = put_at(put_at(values, i, first), i + 1, second)
    for i in tl.static_range(1, CHOSEN):
        same = columns[i] == columns[i - 1]
        values = put_at(values, i, tl.where(same, values[i - 1] + values[i], values[i]))
        columns = put_at(columns, i - 1, tl.where(same, -1, columns[i - 1]))
    return columns + values


@triton.jit
def load_selected_row(
    states,
    index,  # scalar, the column that is named
    offset,  # of the row in each of the states
    SOURCES: tl.constexpr,  # per column, its source
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    PIECES: tl.constexpr,
):
    """The row of the layer that is named, PIECES x [BLOCK]; zero where the index is no column.

    It keeps its place in the caches: another token of the program's neighbours, or a plain term, may read it again.
    """
    pointer = states[SOURCES[0]]
    for column in tl.static_range(1, K):
        pointer = tl.where(index == column, states[SOURCES[column]], pointer)
    return load_row(pointer + offset, is_column(index, K), D, BLOCK, VEC, PIECES, "")


@triton.jit
def reaches(source: tl.constexpr, columns, exists, SCHEDULE: tl.constexpr, CHOSEN: tl.constexpr):
    """Whether the source takes part in the row: with sparse weights, whether the token names one of its columns.

    The loads of a layer that it does not name are masked off. That is for groups of several layers; of single ones
    the pointers are selected (``load_selected_row``), which takes less than half of the instructions: a row of CLIP-L
    with 4 of its 24 layers, and one more as it is, takes 1250 of them on sm_90, masked 3300. To issue so many takes an
    H100 about as long as to move the bytes.
    """
    reached = exists
    if CHOSEN > 0:
        if len(SCHEDULE.readers[source]) > 0:
            named = names(columns, SCHEDULE.readers[source][0], CHOSEN)
            for i in tl.static_range(1, len(SCHEDULE.readers[source])):
                named = named | names(columns, SCHEDULE.readers[source][i], CHOSEN)
            reached = exists & named
    return reached


@triton.jit
def where_named(mean, columns, column: tl.constexpr, PIECES: tl.constexpr, CHOSEN: tl.constexpr):
    """The mean of a group, or zero where the token does not name it: 0 * inf would be NaN."""
    named = names(columns, column, CHOSEN)
    selected = ()
    for piece in tl.static_range(PIECES):
        selected = selected + (tl.where(named, mean[piece], 0.0),)
    return selected


@triton.jit
def fold_term_rows(
    slots,  # S x PIECES x [BLOCK]
    sums,  # G x PIECES x [BLOCK]
    weight,
    columns,
    source: tl.constexpr,
    SCHEDULE: tl.constexpr,
    PIECES: tl.constexpr,
    CHOSEN: tl.constexpr,
    PIN: tl.constexpr,
):
    """:func:`~igva_kernels.impl.triton.tiles.fold_terms` for rows."""
    for i in tl.static_range(len(SCHEDULE.folds[source])):
        mean = mean_row(sums, SCHEDULE.folds[source][i][1], SCHEDULE, PIECES)
        if CHOSEN > 0:
            if SCHEDULE.folds[source][i][2] >= 0 and SCHEDULE.shares_members[SCHEDULE.folds[source][i][1]]:
                mean = where_named(mean, columns, SCHEDULE.folds[source][i][2], PIECES, CHOSEN)
        total = add_term_row(
            row_at(slots, SCHEDULE.folds[source][i][0], PIECES),
            mean,
            weight,
            SCHEDULE.folds[source][i][2],
            SCHEDULE.folds[source][i][3],
            PIECES,
            PIN,
        )
        slots = put_row(slots, SCHEDULE.folds[source][i][0], total, PIECES)
    return slots
