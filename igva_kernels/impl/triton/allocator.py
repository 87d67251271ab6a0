"""The weight allocator as Triton kernels: buffers, and the launches in their order.

The kernels are in ``allocator_forward.py`` and ``allocator_backward.py``, what their buffers hold in
:mod:`igva_kernels.allocator_layout`. Nothing here copies between host and device or synchronises, and all shapes of tiles
follow from shapes, so that both passes can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from igva_kernels.allocator_layout import (
    MATRICES_OF_A_BLOCK,
    PARAMETERS_OF_A_BLOCK,
    AllocatorSizes,
    first_parameter,
    row_matrix,
)
from igva_kernels.impl.triton.allocator_backward import (
    attended_backward_kernel,
    ffn_hidden_backward_kernel,
    head_backward_kernel,
    inputs_backward_kernel,
    members_backward_kernel,
    norm_gradients_kernel,
    query_backward_kernel,
    weight_gradients_kernel,
)
from igva_kernels.impl.triton.allocator_forward import (
    attended_kernel,
    ffn_hidden_kernel,
    head_kernel,
    keys_values_kernel,
    project_inputs_kernel,
    query_kernel,
    sum_kernel,
)
from igva_kernels.impl.triton.allocator_tiles import ProductTile, product_tile
from igva_kernels.impl.triton.launch import device_of, warps_of

GRADIENT_SIDE = 64
"""Rows and columns of the tile of a weight's gradient."""

GRADIENT_ROWS = 32
"""Images that one step of a weight's gradient adds up."""


@dataclass(frozen=True)
class Block:
    """The parameters of one block, in the order of :attr:`AllocatorSizes.parameter_shapes`."""

    in_weight: Tensor
    in_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    ffn_weight1: Tensor
    ffn_bias1: Tensor
    ffn_weight2: Tensor
    ffn_bias2: Tensor
    norm_weight1: Tensor
    norm_bias1: Tensor
    norm_weight2: Tensor
    norm_bias2: Tensor


def check_device(tensor: Tensor) -> str | None:
    """Why the kernels cannot run where this tensor is, or None if they can."""
    if tensor.is_cuda or triton.knobs.runtime.interpret:
        return None
    return f"the parameters are on {tensor.device}, and Triton needs a CUDA or ROCm device"


def allocate_forward(
    summaries: Tensor, instruction_embeds: Tensor, parameters: Sequence[Tensor], num_heads: int, eps: float, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The weights of the groups, and what the backward needs of them.

    Args:
        summaries: (B, K, D), any floating dtype.
        instruction_embeds: (B, E), any floating dtype.
        parameters: contiguous, one 16- or 32-bit dtype, in the order of :attr:`AllocatorSizes.parameter_shapes`.
        num_heads: of the cross-attention.
        eps: of the LayerNorms.
        save: whether the backward will run.

    Returns:
        (B, K) float32; then rows (7 * blocks + 1, B, H) and members (2 * blocks + 1, B*K, H) in the dtype of the parameters,
        probabilities (blocks, B, K, heads) and statistics (2 * blocks, 2, B) in float32, all four empty without ``save``.
    """
    sizes = AllocatorSizes.of(parameters, num_heads)
    blocks, hidden, groups = _blocks(parameters, sizes), sizes.hidden_dim, sizes.num_groups
    batch = summaries.shape[0]
    num_members = batch * groups
    weight = parameters[0]
    sentences, summaries = instruction_embeds.contiguous(), summaries.contiguous()

    rows = weight.new_empty(sizes.num_row_matrices, batch, hidden)
    members = weight.new_empty(sizes.num_member_matrices, num_members, hidden)
    out = weight.new_empty(batch, groups, dtype=torch.float32)
    nothing = weight.new_empty(0, dtype=torch.float32)
    probabilities = statistics = nothing
    if save:
        probabilities = weight.new_empty(sizes.num_blocks, batch, groups, num_heads, dtype=torch.float32)
        statistics = weight.new_empty(2 * sizes.num_blocks, 2, batch, dtype=torch.float32)
    if not batch:
        return out, rows, members, probabilities, statistics

    tile = product_tile(batch, weight.dtype, divisor=sizes.head_dim)
    member_tile = product_tile(num_members, weight.dtype, divisor=sizes.head_dim)
    partials = weight.new_empty(batch, groups, hidden // tile.columns, dtype=torch.float32)
    row, member = rows.unbind(0), members.unbind(0)
    statistic = statistics.unbind(0) if save else (None,) * (2 * sizes.num_blocks)
    probability = probabilities.unbind(0) if save else (None,) * sizes.num_blocks

    with device_of(weight):
        project_inputs_kernel[(hidden // member_tile.columns, _tiles(batch, member_tile) + _tiles(num_members, member_tile))](
            sentences,
            parameters[0],
            parameters[1],
            row[0],
            summaries,
            parameters[2],
            parameters[3],
            member[0],
            batch,
            num_members,
            E=sizes.text_dim,
            D=sizes.vision_dim,
            H=hidden,
            TILE=member_tile,
            num_warps=member_tile.slices,
            num_stages=1,
        )
        keys_values_kernel[(2 * hidden // member_tile.columns, _tiles(num_members, member_tile), len(blocks))](
            members,
            tuple(block.in_weight for block in blocks),
            tuple(block.in_bias for block in blocks),
            num_members,
            H=hidden,
            TILE=member_tile,
            num_warps=member_tile.slices,
            num_stages=1,
        )
        grid = (hidden // tile.columns, _tiles(batch, tile))
        shared = {"H": hidden, "TILE": tile, "num_warps": tile.slices, "num_stages": 1}
        attention_tile = product_tile(batch, weight.dtype, divisor=sizes.head_dim, kind="attention")
        for i, block in enumerate(blocks):
            before = blocks[i - 1] if i else None
            keys, values = member[1 + 2 * i], member[2 + 2 * i]
            query, attended, sum1, normalised1, ffn_hidden, sum2 = row[row_matrix(i, "query") :][:6]
            block_input = row[row_matrix(i - 1, "normalised2")]
            query_kernel[grid](
                row[row_matrix(i - 1, "sum2")] if before else block_input,
                before.norm_weight2 if before else None,
                before.norm_bias2 if before else None,
                block_input if before else None,
                statistic[2 * i - 1] if before else None,
                block.in_weight,
                block.in_bias,
                keys,
                query,
                partials,
                batch,
                K=groups,
                EPS=eps,
                **shared,
            )
            attended_kernel[grid](
                partials,
                values,
                attended if save else None,
                probability[i],
                block.out_weight,
                block.out_bias,
                block_input,
                sum1,
                batch,
                K=groups,
                HEADS=num_heads,
                PARTS=sizes.head_dim // tile.columns,
                **{**shared, "TILE": attention_tile},
            )
            ffn_hidden_kernel[grid](
                sum1,
                block.norm_weight1,
                block.norm_bias1,
                normalised1,
                statistic[2 * i],
                block.ffn_weight1,
                block.ffn_bias1,
                ffn_hidden,
                batch,
                EPS=eps,
                **shared,
            )
            sum_kernel[grid](
                ffn_hidden, block.ffn_weight2, block.ffn_bias2, normalised1, sum2, batch, TRANSPOSED=False, **shared
            )
        last = len(blocks) - 1
        head_kernel[(grid[0] if save else 1, grid[1])](
            row[row_matrix(last, "sum2")],
            blocks[last].norm_weight2,
            blocks[last].norm_bias2,
            row[row_matrix(last, "normalised2")] if save else None,
            statistic[2 * last + 1],
            parameters[-2],
            parameters[-1],
            out,
            batch,
            K=groups,
            EPS=eps,
            NORM_COLUMNS=tile.columns,
            **{**shared, "TILE": tile._replace(columns=max(16, triton.next_power_of_2(groups)))},
        )
    if not save:
        rows = members = weight.new_empty(0)
    return out, rows, members, probabilities, statistics


def allocate_backward(
    grad_out: Tensor,
    summaries: Tensor,
    instruction_embeds: Tensor,
    parameters: Sequence[Tensor],
    out: Tensor,
    rows: Tensor,
    members: Tensor,
    probabilities: Tensor,
    statistics: Tensor,
    num_heads: int,
    needs_summaries: bool,
    needs_embeds: bool,
    needs_parameters: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The vector-Jacobian product of :func:`allocate_forward`.

    Returns:
        The gradients of the summaries and of the embeddings in their dtypes, and one flat buffer with those of all
        parameters, split by :attr:`AllocatorSizes.parameter_offsets`; None for what is not needed.
    """
    sizes = AllocatorSizes.of(parameters, num_heads)
    blocks, hidden, groups = _blocks(parameters, sizes), sizes.hidden_dim, sizes.num_groups
    batch = summaries.shape[0]
    num_members = batch * groups
    weight = parameters[0]
    sentences, summaries, grad_out = instruction_embeds.contiguous(), summaries.contiguous(), grad_out.contiguous()

    grad_rows, grad_members = weight.new_empty(rows.shape), weight.new_empty(members.shape)
    grad_logits = weight.new_empty(batch, groups)
    grad_sentences = sentences.new_empty(sentences.shape) if needs_embeds else None
    grad_summaries = summaries.new_empty(summaries.shape) if needs_summaries else None
    if batch:
        with device_of(weight):
            _backward_through_blocks(
                grad_out,
                blocks,
                parameters[-2],
                out,
                rows.unbind(0),
                members.unbind(0),
                probabilities.unbind(0),
                statistics.unbind(0),
                grad_logits,
                grad_rows.unbind(0),
                grad_members.unbind(0),
                sizes,
            )
            if needs_summaries or needs_parameters:
                tile = product_tile(num_members, weight.dtype, divisor=sizes.head_dim, kind="backward")
                members_backward_kernel[(hidden // tile.columns, _tiles(num_members, tile))](
                    grad_members,
                    tuple(block.in_weight for block in blocks),
                    num_members,
                    H=hidden,
                    TILE=tile,
                    num_warps=tile.slices,
                    num_stages=1,
                )
            if needs_summaries or needs_embeds:
                tile = product_tile(num_members, weight.dtype, divisor=sizes.head_dim, kind="backward")
                columns = max(sizes.text_dim if needs_embeds else 0, sizes.vision_dim if needs_summaries else 0)
                row_tiles = (_tiles(batch, tile) if needs_embeds else 0) + (_tiles(num_members, tile) if needs_summaries else 0)
                inputs_backward_kernel[(triton.cdiv(columns, tile.columns), row_tiles)](
                    grad_rows[0],
                    parameters[0],
                    grad_sentences,
                    grad_members[0],
                    parameters[2],
                    grad_summaries,
                    batch,
                    num_members,
                    E=sizes.text_dim,
                    D=sizes.vision_dim,
                    H=hidden,
                    TILE=tile,
                    num_warps=tile.slices,
                    num_stages=1,
                )
    grad_parameters = None
    if needs_parameters:  # without images too: they are zero then
        grad_parameters = weight.new_empty(sizes.parameter_offsets[-1])
        with device_of(weight):
            _parameter_gradients(
                grad_parameters, sentences, summaries, rows, members, statistics, grad_rows, grad_members, grad_logits, sizes
            )
    return grad_summaries, grad_sentences, grad_parameters


def _backward_through_blocks(
    grad_out: Tensor,
    blocks: Sequence[Block],
    head_weight: Tensor,
    out: Tensor,
    row: Sequence[Tensor],
    member: Sequence[Tensor],
    probability: Sequence[Tensor],
    statistic: Sequence[Tensor],
    grad_logits: Tensor,
    grad_row: Sequence[Tensor],
    grad_member: Sequence[Tensor],
    sizes: AllocatorSizes,
) -> None:
    """The chain: fills the gradients of the logits, of all row matrices, and of keys and values."""
    batch, groups, hidden = grad_out.shape[0], sizes.num_groups, sizes.hidden_dim
    tile = product_tile(batch, head_weight.dtype, divisor=sizes.head_dim, kind="backward")
    grid = (hidden // tile.columns, _tiles(batch, tile))
    shared = {"H": hidden, "TILE": tile, "num_warps": tile.slices, "num_stages": 1}
    partials = head_weight.new_empty(batch, groups, hidden // tile.columns, dtype=torch.float32)
    head_backward_kernel[grid](
        grad_out,
        out,
        head_weight,
        grad_logits,
        grad_row[-1],
        batch,
        H=hidden,
        K=groups,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        GROUPS=triton.next_power_of_2(groups),
        num_warps=warps_of(128),
    )
    for i, block in reversed(list(enumerate(blocks))):
        query, attended, sum1, normalised1, ffn_hidden, sum2, normalised2 = (
            row_matrix(i, name) for name in MATRICES_OF_A_BLOCK
        )
        keys, values = 1 + 2 * i, 2 + 2 * i
        ffn_hidden_backward_kernel[grid](
            grad_row[normalised2],
            row[sum2],
            statistic[2 * i + 1],
            block.norm_weight2,
            grad_row[sum2],
            block.ffn_weight2,
            row[ffn_hidden],
            grad_row[ffn_hidden],
            batch,
            **shared,
        )
        sum_kernel[grid](
            grad_row[ffn_hidden],
            block.ffn_weight1,
            None,
            grad_row[sum2],
            grad_row[normalised1],
            batch,
            TRANSPOSED=True,
            **shared,
        )
        attended_backward_kernel[grid](
            grad_row[normalised1],
            row[sum1],
            statistic[2 * i],
            block.norm_weight1,
            grad_row[sum1],
            block.out_weight,
            member[values],
            grad_row[attended],
            partials,
            batch,
            K=groups,
            **shared,
        )
        query_backward_kernel[grid](
            probability[i],
            partials,
            row[query],
            member[keys],
            grad_row[attended],
            grad_row[query],
            grad_member[keys],
            grad_member[values],
            block.in_weight,
            grad_row[sum1],
            grad_row[row_matrix(i - 1, "normalised2")],
            batch,
            K=groups,
            HEADS=sizes.num_heads,
            PARTS=sizes.head_dim // tile.columns,
            **shared,
        )


def _parameter_gradients(
    grad_parameters: Tensor,
    sentences: Tensor,
    summaries: Tensor,
    rows: Tensor,
    members: Tensor,
    statistics: Tensor,
    grad_rows: Tensor,
    grad_members: Tensor,
    grad_logits: Tensor,
    sizes: AllocatorSizes,
) -> None:
    """Fills the flat buffer: five launches for the linear layers, one for the LayerNorms."""
    hidden, offsets = sizes.hidden_dim, sizes.parameter_offsets
    batch, num_members = rows.shape[1], members.shape[1]
    size_of_a_block = offsets[4 + PARAMETERS_OF_A_BLOCK] - offsets[4]
    in_weight, in_bias, *others = offsets[first_parameter(0) : first_parameter(0) + 8]

    def launch(
        grads: Tensor,
        inputs: Tensor,
        num_rows: int,
        shape: tuple[int, int],
        grad_matrices: tuple[int, ...],
        input_matrices: tuple[int, ...],
        weights: tuple[int, ...],
        biases: tuple[int, ...],
        num_blocks: int = 1,
        of_a_block: tuple[int, int] = (0, 0),
    ) -> None:
        grid = (triton.cdiv(shape[1], GRADIENT_SIDE), triton.cdiv(shape[0], GRADIENT_SIDE), len(weights) * num_blocks)
        weight_gradients_kernel[grid](
            grads,
            inputs,
            grad_parameters,
            num_rows,
            N=shape[0],
            R=shape[1],
            GRADS=grad_matrices,
            INPUTS=input_matrices,
            WEIGHTS=weights,
            BIASES=biases,
            GRADS_OF_A_BLOCK=of_a_block[0],
            INPUTS_OF_A_BLOCK=of_a_block[1],
            PARAMETERS_OF_A_BLOCK=size_of_a_block,
            ROWS=GRADIENT_ROWS,
            SIDE=GRADIENT_SIDE,
            num_warps=warps_of(128),
        )

    launch(  # query, out_proj and both layers of the ffn
        grad_rows,
        rows,
        batch,
        (hidden, hidden),
        tuple(row_matrix(0, name) for name in ("query", "sum1", "ffn_hidden", "sum2")),
        (0, *(row_matrix(0, name) for name in ("attended", "normalised1", "ffn_hidden"))),
        (in_weight, *others[0::2]),
        (in_bias, *others[1::2]),
        sizes.num_blocks,
        (len(MATRICES_OF_A_BLOCK), len(MATRICES_OF_A_BLOCK)),
    )
    launch(  # keys and values
        grad_members,
        members,
        num_members,
        (hidden, hidden),
        (1, 2),
        (0, 0),
        (in_weight + hidden * hidden, in_weight + 2 * hidden * hidden),
        (in_bias + hidden, in_bias + 2 * hidden),
        sizes.num_blocks,
        (2, 0),
    )
    one = ((0,), (0,))
    launch(grad_rows, sentences, batch, (hidden, sizes.text_dim), *one, offsets[0:1], offsets[1:2])
    launch(grad_members, summaries, num_members, (hidden, sizes.vision_dim), *one, offsets[2:3], offsets[3:4])
    launch(grad_logits, rows[-1], batch, (sizes.num_groups, hidden), *one, offsets[-3:-2], offsets[-2:-1])
    columns = 64
    norm_gradients_kernel[(triton.cdiv(hidden, columns), 2 * sizes.num_blocks)](
        grad_rows,
        rows,
        statistics,
        grad_parameters,
        batch,
        H=hidden,
        FIRST=(row_matrix(0, "sum1"), row_matrix(0, "normalised1")),
        SECOND=(row_matrix(0, "sum2"), row_matrix(0, "normalised2")),
        MATRICES_OF_A_BLOCK=len(MATRICES_OF_A_BLOCK),
        FIRST_PARAMETER=offsets[first_parameter(0) + 8],
        PARAMETERS_OF_A_BLOCK=size_of_a_block,
        ROWS=16,
        COLUMNS=columns,
        num_warps=warps_of(128),
    )


def _blocks(parameters: Sequence[Tensor], sizes: AllocatorSizes) -> list[Block]:
    firsts = (first_parameter(block) for block in range(sizes.num_blocks))
    return [Block(*parameters[first : first + PARAMETERS_OF_A_BLOCK]) for first in firsts]


def _tiles(num_rows: int, tile: ProductTile) -> int:
    return triton.cdiv(num_rows, tile.rows)
