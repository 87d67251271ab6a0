"""The mix as Triton kernels, for CUDA and ROCm.

Interface and semantics are those of :mod:`igva_kernels.impl.reference`. ``schedule.py`` turns a program into constants,
``launch.py`` shapes into tiles; each kernel stands with its launcher in a file of its own; this file allocates outputs
and puts them together.

Shapes: B images, T tokens with prefix, P prefix tokens, N = T − P patches, D width, K weights, G groups, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from igva_kernels.impl.reference import accumulation_dtype
from igva_kernels.impl.triton.launch import (
    ACCESS_BYTES,
    Streams,
    elements_per_access,
    flat_tile,
    mix_tile,
    narrow_tile,
    stride_over,
)
from igva_kernels.impl.triton.mix_backward import launch_mix_backward
from igva_kernels.impl.triton.mix_forward import launch_mix_forward
from igva_kernels.impl.triton.patch_sums import launch_patch_sums
from igva_kernels.impl.triton.schedule import (
    Schedule,
    gradient_schedule,
    means_schedule,
    mix_schedule,
    summary_schedule,
)
from igva_kernels.impl.triton.support import MAX_IMAGE_ELEMENTS, check_supported
from igva_kernels.program import MixProgram

__all__ = [
    "check_supported",
    "fuse_backward",
    "fuse_forward",
    "reduce_backward",
    "reduce_forward",
    "summaries_backward",
    "summaries_forward",
]


def fuse_forward(
    states: Sequence[Tensor],
    weights: Tensor | None,
    program: MixProgram,
    num_prefix_tokens: int,
    save_means: bool,
    *,
    indices: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The mix, (B, N, S*D) from states (B, T, D), and the (G_w, B, N, D) means of the weighted groups if asked for."""
    batch, num_tokens, width = states[0].shape
    num_patches = num_tokens - num_prefix_tokens
    weights = None if weights is None else weights.contiguous()
    out = states[0].new_empty(batch, num_patches, len(program.slots) * width)
    means = states[0].new_empty(program.num_weighted_groups, batch, num_patches, width) if save_means else None
    launch_mix_forward(
        Streams.of(states),
        mix_schedule(program),
        weights,
        out,
        means,
        tile=mix_tile(out.dtype, width, weights),
        num_rows=num_patches,
        first_row=num_prefix_tokens,
    )
    return out, out.new_empty(0) if means is None else means


def fuse_backward(
    grad_out: Tensor,
    states: Sequence[Tensor],
    means: Tensor | None,
    weights: Tensor | None,
    program: MixProgram,
    num_prefix_tokens: int,
    num_tokens: int,
    needs_weights: bool,
    needs_states: bool,
    *,
    indices: Tensor | None = None,
) -> tuple[Tensor | None, list[Tensor]]:
    """The vector-Jacobian product of :func:`fuse_forward`: dL/dw, and one dL/dh a gradient class."""
    batch, num_patches, channels = grad_out.shape
    width = channels // len(program.slots)
    weights = None if weights is None else weights.contiguous()
    grad_out = _readable(grad_out)
    vec = elements_per_access(grad_out.dtype)
    tile = mix_tile(grad_out.dtype, width, weights)
    num_rows = num_tokens if needs_states else num_patches
    skipped_rows = num_prefix_tokens if needs_states else 0

    partials = None
    if needs_weights:
        partials = grad_out.new_empty(
            batch, tile.count(num_rows), program.num_weights, dtype=accumulation_dtype(grad_out.dtype)
        )
    grad_states = _empty_states(grad_out, program, (batch, num_tokens, width), grad_out.dtype) if needs_states else None
    launch_mix_backward(
        grad_out,
        (stride_over(grad_out, 0) // vec, width // vec, stride_over(grad_out, 1) // vec),
        gradient_schedule(program, needs_states),
        weights if needs_states else None,
        Streams.of(states) if needs_weights and means is None else None,
        means if needs_weights else None,
        partials,
        grad_states,
        tile=tile,
        batch=batch,
        num_rows=num_rows,
        num_patches=num_patches,
        skipped_rows=skipped_rows,
        first_row=num_prefix_tokens,
    )
    grad_weights = None
    if partials is not None:
        grad_weights = _sum_partials(partials, weights, skipped_rows)
    return grad_weights, list(grad_states or ())


def _sum_partials(partials: Tensor, weights: Tensor, skipped_rows: int) -> Tensor:
    """The sums over tiles, (B, tiles, K), to the shape of the weights, in an order that depends on the shape alone."""
    if weights.ndim == 3:  # a tile is a row: nothing is left to add
        return partials[:, skipped_rows:].contiguous()
    return partials.sum(dim=1) if weights.ndim == 2 else partials.sum(dim=(0, 1))


def reduce_forward(
    states: Sequence[Tensor], program: MixProgram, num_prefix_tokens: int, *, dtype: torch.dtype | None = None
) -> Tensor:
    """The (G, B, N, D) means of all groups of the program."""
    batch, num_tokens, width = states[0].shape
    num_patches = num_tokens - num_prefix_tokens
    means = states[0].new_empty(len(program.groups), batch, num_patches, width)
    if means.numel():
        launch_mix_forward(
            Streams.of(states),
            means_schedule(program),
            None,
            None,
            means,
            tile=flat_tile(means.dtype, width),
            num_rows=num_patches,
            first_row=num_prefix_tokens,
        )
    return means


def reduce_backward(
    grad_means: Tensor,
    program: MixProgram,
    num_prefix_tokens: int,
    num_tokens: int,
    *,
    states: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """The vector-Jacobian product of :func:`reduce_forward`, one (B, T, D) a gradient class."""
    _, batch, num_patches, width = grad_means.shape
    row = width // elements_per_access(grad_means.dtype)
    return _grads_of_plain_means(
        _aligned(grad_means.contiguous()),
        (num_patches * row, batch * num_patches * row, row),  # (G, B, N, D) over image, group, row
        means_schedule(program),
        program,
        (batch, num_tokens, width),
        grad_means.dtype,
        range(num_prefix_tokens, num_tokens),
    )


def summaries_forward(states: Sequence[Tensor], program: MixProgram, num_prefix_tokens: int, summary: str) -> Tensor:
    """One vector for each weight column, (B, K, D): the mean of the CLS rows of its group, or of all its patches."""
    batch, num_tokens, width = states[0].shape
    streams, schedule = Streams.of(states), summary_schedule(program)
    if summary == "mean_patch":
        num_patches = num_tokens - num_prefix_tokens
        sums = launch_patch_sums(streams, schedule, num_patches, num_prefix_tokens).sum(dim=1)
        return (sums / num_patches).to(states[0].dtype)
    summaries = states[0].new_empty(batch, program.num_weights, width)
    launch_mix_forward(
        streams,
        schedule,
        None,
        summaries,  # K slots of one row
        None,
        tile=narrow_tile(summaries.dtype, width),
        num_rows=1,
        first_row=0,
    )
    return summaries


def summaries_backward(
    grad: Tensor, program: MixProgram, num_prefix_tokens: int, num_tokens: int, summary: str
) -> list[Tensor]:
    """The vector-Jacobian product of :func:`summaries_forward`, one (B, T, D) a gradient class."""
    batch, num_columns, width = grad.shape
    dtype, rows = grad.dtype, range(1)
    if summary == "mean_patch":
        rows = range(num_prefix_tokens, num_tokens)
        grad = grad.to(accumulation_dtype(dtype)) / max(len(rows), 1)
    row = width // elements_per_access(dtype)
    return _grads_of_plain_means(
        _aligned(grad.contiguous()),
        (num_columns * row, row, 0),  # (B, K, D) over image, column, and the same row for every patch
        summary_schedule(program),
        program,
        (batch, num_tokens, width),
        dtype,
        rows,
    )


def _grads_of_plain_means(
    grad: Tensor,
    grad_strides: tuple[int, int, int],
    schedule: Schedule,
    program: MixProgram,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    rows: range,
) -> list[Tensor]:
    """One (B, T, D) of ``dtype`` a gradient class, for slots that are plain means of the ``rows`` of the states."""
    grad_states = _empty_states(grad, program, shape, dtype)
    batch, num_tokens, width = shape
    launch_mix_backward(
        grad,
        grad_strides,
        schedule,
        None,
        None,
        None,
        None,
        grad_states,
        tile=flat_tile(dtype, width),
        batch=batch,
        num_rows=num_tokens,
        num_patches=len(rows),
        skipped_rows=rows.start,
        first_row=rows.start,
    )
    return list(grad_states)


def _empty_states(like: Tensor, program: MixProgram, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """One tensor a gradient class. Not views of one buffer: each may be freed as soon as its layer has used it."""
    return tuple(like.new_empty(shape, dtype=dtype) for _ in program.gradient_classes)


def _readable(grad_out: Tensor) -> Tensor:
    """``grad_out`` as it is if 128-bit accesses fit its rows (a slice of a larger gradient often does), else a copy."""
    vec = elements_per_access(grad_out.dtype)
    batch_stride, row_stride = stride_over(grad_out, 0), stride_over(grad_out, 1)
    fits = (
        grad_out.stride(2) == 1
        and batch_stride % vec == 0
        and row_stride % vec == 0
        and row_stride * grad_out.shape[1] < MAX_IMAGE_ELEMENTS
    )
    return _aligned(grad_out if fits else grad_out.contiguous())


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it begins between two 128-bit units."""
    return tensor.clone(memory_format=torch.contiguous_format) if tensor.data_ptr() % ACCESS_BYTES else tensor
