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

from igva_kernels.impl.output_norm import normalise
from igva_kernels.impl.reference import accumulation_dtype
from igva_kernels.impl.triton.launch import (
    ACCESS_BYTES,
    Streams,
    accumulation_of,
    common_access,
    elements_per_access,
    flat_tile,
    narrow_tile,
    normalised_tile,
    row_tile,
    stride_over,
)
from igva_kernels.impl.triton.mix_backward import launch_mix_backward
from igva_kernels.impl.triton.mix_forward import launch_mix_forward
from igva_kernels.impl.triton.norm_forward import launch_normalised_forward
from igva_kernels.impl.triton.patch_means import launch_patch_means
from igva_kernels.impl.triton.replay import recording, replay_of
from igva_kernels.impl.triton.row_backward import launch_row_backward
from igva_kernels.impl.triton.row_forward import launch_row_forward
from igva_kernels.impl.triton.schedule import (
    Schedule,
    Selection,
    gradient_schedule,
    means_schedule,
    mix_schedule,
    selection,
    summary_schedule,
)
from igva_kernels.impl.triton.support import MAX_IMAGE_ELEMENTS, check_supported
from igva_kernels.output_norm import OutputNorm, statistics_of
from igva_kernels.program import MixProgram

__all__ = [
    "check_supported",
    "fuse_backward",
    "fuse_forward",
    "normalised_forward",
    "recording",
    "reduce_backward",
    "reduce_forward",
    "replay_of",
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
    """The mix, (B, N, S*D) from states (B, T, D), and the (G_w, B, N, D) means of the weighted groups if asked for.

    Both in ``dtype``, or in that of the states. With sparse weights, ``weights`` (B, N, k) at the columns ``indices``
    (B, N, k), a state is read where a token names it, and the mean of a group where a token does not name it is
    arbitrary: the backward does not read it there.
    """
    batch, num_tokens, width = states[0].shape
    num_patches = num_tokens - num_prefix_tokens
    dtype = states[0].dtype if dtype is None else dtype
    out = states[0].new_empty(batch, num_patches, len(program.slots) * width, dtype=dtype)
    means = None
    if save_means:
        means = states[0].new_empty(program.num_weighted_groups, batch, num_patches, width, dtype=dtype)
    _launch_forward(states, program, mix_schedule(program), weights, indices, out, means, num_patches, num_prefix_tokens)
    return out, out.new_empty(0) if means is None else means


def normalised_forward(
    states: Sequence[Tensor],
    weights: Tensor | None,
    norm: OutputNorm,
    program: MixProgram,
    num_prefix_tokens: int,
    save_means: bool,
    save_mixed: bool,
    *,
    indices: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`fuse_forward` with a norm behind it; arguments and results as for the reference.

    In one launch where a program can hold the S*D channels of a token (:func:`normalised_tile`). Else, and nowhere else, in
    two steps with the same arithmetic: the mix in the accumulation dtype, and torch's norm of that map.
    """
    batch, num_tokens, width = states[0].shape
    num_patches = num_tokens - num_prefix_tokens
    dtype = states[0].dtype if dtype is None else dtype
    schedule = mix_schedule(program)
    accumulation = accumulation_of(*(state.dtype for state in states))
    shape = (batch, num_patches, len(program.slots) * width)
    out_dtype = norm.dtype_of(dtype)
    num_means = program.num_weighted_groups if save_means else 0
    # The tile is one where means are kept and where they could be: it sets the order in which a row is summed, and training and
    # inference are to agree in every bit.
    may_save_means = save_means or (indices is None and program.worth_saving_means)
    vec = common_access(states, width, out_dtype, *((dtype,) if may_save_means else ()))
    # All slots, the sums of the groups that wait, and the row at hand; the compiler keeps means for the end as well.
    held = len(schedule.terms) + schedule.open_groups + 1 + may_save_means * program.num_weighted_groups
    tile = normalised_tile(vec, width, accumulation, held)
    if tile is None:
        return _normalised_in_two_steps(
            states, weights, norm, program, num_prefix_tokens, save_means, save_mixed, indices=indices, dtype=dtype
        )
    out = states[0].new_empty(shape, dtype=out_dtype)
    mixed = out.new_empty(shape) if save_mixed else None
    statistics = out.new_empty((statistics_of(norm), *shape[:2], 1), dtype=accumulation) if save_mixed else None
    means = None
    if save_means:
        means = out.new_empty((num_means, batch, num_patches, width), dtype=dtype)
    streams = Streams.of(states, vec)
    launch_normalised_forward(
        streams,
        schedule,
        None if weights is None else weights.contiguous(),
        None if indices is None else indices.contiguous(),
        norm._replace(weight=_parameter(norm.weight), bias=_parameter(norm.bias)),
        out,
        means,
        mixed,
        statistics,
        selected=_selection(program, streams, indices) if means is None else None,
        tile=tile,
        num_rows=num_patches,
        first_row=num_prefix_tokens,
    )
    nothing = out.new_empty(0)
    return (
        out,
        out.new_empty(0, dtype=dtype) if means is None else means,
        nothing if mixed is None else mixed,
        out.new_empty(0, dtype=accumulation) if statistics is None else statistics,
    )


def _normalised_in_two_steps(
    states: Sequence[Tensor],
    weights: Tensor | None,
    norm: OutputNorm,
    program: MixProgram,
    num_prefix_tokens: int,
    save_means: bool,
    save_mixed: bool,
    *,
    indices: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The mix as a map in the accumulation dtype, and torch's norm of it: for rows that no program can hold."""
    wide = accumulation_of(*(state.dtype for state in states))
    rows, means = fuse_forward(states, weights, program, num_prefix_tokens, save_means, indices=indices, dtype=wide)
    normalised, of_rows = normalise(rows, norm)
    out = normalised.to(norm.dtype_of(dtype))
    if not save_mixed:
        return out, means.to(dtype), out.new_empty(0), out.new_empty(0, dtype=wide)
    return out, means.to(dtype), rows.to(out.dtype), torch.stack(of_rows)


def _parameter(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else _aligned(parameter.detach().contiguous())


def _launch_forward(
    states: Sequence[Tensor],
    program: MixProgram,
    schedule: Schedule,
    weights: Tensor | None,
    indices: Tensor | None,
    out: Tensor | None,
    means: Tensor | None,
    num_rows: int,
    first_row: int,
) -> None:
    """Flat tiles where the weights are those of an image and no row has a norm, else row tiles."""
    width = states[0].shape[2]
    vec = common_access(states, width, *(result.dtype for result in (out, means) if result is not None))
    streams = Streams.of(states, vec)
    weights = None if weights is None else weights.contiguous()
    if not (schedule.has_norms or (weights is not None and weights.ndim == 3)):
        tile = flat_tile(vec, width)
        launch_mix_forward(streams, schedule, weights, out, means, tile=tile, num_rows=num_rows, first_row=first_row)
        return
    # The sums of the slots, those of the groups that wait, and the row at hand. Copies and finished means are as good as
    # stored.
    held = sum(len(terms) > 0 for terms in schedule.terms) + schedule.open_groups + 1
    launch_row_forward(
        streams,
        schedule,
        weights,
        None if indices is None else indices.contiguous(),
        out,
        means,
        selected=_selection(program, streams, indices) if means is None else None,
        tile=row_tile(vec, width, accumulation_of(*(state.dtype for state in states)), held),
        num_rows=num_rows,
        first_row=first_row,
    )


def _selection(program: MixProgram, streams: Streams, indices: Tensor | None) -> Selection | None:
    """How sparse weights select the rows that they name: pointers of one type, at one offset."""
    selected = None if indices is None else selection(program)
    if selected is None or len(streams.batch_strides) > 1:
        return None
    return selected if len({streams.states[source].dtype for source in selected.sources}) == 1 else None


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
    means = means if needs_weights else None
    schedule = gradient_schedule(program, needs_weights and means is None, needs_states)
    sources = states if (needs_weights and means is None) or (needs_states and schedule.has_norms) else ()
    maps = [*sources, *(() if means is None else (means,))]
    vec = common_access(sources, width, grad_out.dtype, *(each.dtype for each in maps))
    grad_out = _readable(grad_out, vec)
    grad_states = _empty_states(grad_out, program, (batch, num_tokens, width), grad_out.dtype) if needs_states else None
    partials = _launch_backward(
        grad_out,
        (stride_over(grad_out, 0) // vec, width // vec, stride_over(grad_out, 1) // vec),
        program,
        schedule,
        weights,
        indices,
        Streams.of(sources, vec) if sources else None,
        means,
        grad_states,
        vec=vec,
        batch=batch,
        width=width,
        num_rows=num_tokens if needs_states else num_patches,
        num_patches=num_patches,
        skipped_rows=num_prefix_tokens if needs_states else 0,
        first_row=num_prefix_tokens,
        needs_weights=needs_weights,
    )
    if partials is None:
        return None, list(grad_states or ())
    # sums over tiles or tokens, (B, many, K), in an order that depends on the shape alone
    if weights.ndim < 3:
        partials = partials.sum(dim=1) if weights.ndim == 2 else partials.sum(dim=(0, 1))
    return partials, list(grad_states or ())


def _launch_backward(
    grad_out: Tensor,
    grad_strides: tuple[int, int, int],
    program: MixProgram,
    schedule: Schedule,
    weights: Tensor | None,
    indices: Tensor | None,
    streams: Streams | None,
    means: Tensor | None,
    grad_states: tuple[Tensor, ...] | None,
    *,
    vec: int,
    batch: int,
    width: int,
    num_rows: int,
    num_patches: int,
    skipped_rows: int,
    first_row: int,
    needs_weights: bool,
) -> Tensor | None:
    """Fill ``grad_states`` and return dL/dw of each tile or token, (B, tiles or N, K or k); either may be None.

    The shape of the tiles is chosen as in the forward. A norm that is only in the saved means needs no row.
    """
    accumulation = accumulation_of(grad_out.dtype, *(state.dtype for state in (streams.states if streams else ())))
    per_token = weights is not None and weights.ndim == 3
    rows = per_token or (schedule.has_norms and streams is not None)
    if rows:
        # the gradients of the slots, a state, its normalised row and its gradient
        tile = row_tile(vec, width, accumulation, len(schedule.terms) + (3 if schedule.has_norms else 2))
    else:
        tile = flat_tile(vec, width)
    partials = None
    if needs_weights:
        columns = len(schedule.columns) if indices is None else indices.shape[2]
        partials = grad_out.new_empty(batch, num_patches if rows else tile.count(num_rows), columns, dtype=accumulation)
    weights = weights.contiguous() if weights is not None and grad_states is not None else None
    shape = {
        "tile": tile,
        "batch": batch,
        "num_rows": num_rows,
        "num_patches": num_patches,
        "skipped_rows": skipped_rows,
        "first_row": first_row,
    }
    if rows:
        indices = None if indices is None else indices.contiguous()
        # where a norm's gradient is wanted, the rows of all layers are at hand
        selects = needs_weights and means is None and not (schedule.has_norms and grad_states is not None)
        launch_row_backward(
            grad_out,
            grad_strides,
            schedule,
            weights,
            indices,
            streams,
            means,
            partials,
            grad_states,
            selected=_selection(program, streams, indices) if selects else None,
            **shape,
        )
    else:
        launch_mix_backward(grad_out, grad_strides, schedule, weights, streams, means, partials, grad_states, **shape)
    return partials


def reduce_forward(
    states: Sequence[Tensor], program: MixProgram, num_prefix_tokens: int, *, dtype: torch.dtype | None = None
) -> Tensor:
    """The (G, B, N, D) means of all groups of the program, in ``dtype`` or that of the states."""
    batch, num_tokens, width = states[0].shape
    num_patches = num_tokens - num_prefix_tokens
    dtype = states[0].dtype if dtype is None else dtype
    means = states[0].new_empty(len(program.groups), batch, num_patches, width, dtype=dtype)
    if means.numel():
        _launch_forward(states, program, means_schedule(program), None, None, None, means, num_patches, num_prefix_tokens)
    return means


def reduce_backward(
    grad_means: Tensor,
    program: MixProgram,
    num_prefix_tokens: int,
    num_tokens: int,
    *,
    states: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """The vector-Jacobian product of :func:`reduce_forward`, one (B, T, D) a gradient class.

    ``states`` are needed where the program has norms.
    """
    _, batch, num_patches, width = grad_means.shape
    schedule = means_schedule(program)
    sources = states if states is not None and schedule.has_norms else ()
    vec = common_access(sources, width, grad_means.dtype)
    row = width // vec
    grad_states = _empty_states(grad_means, program, (batch, num_tokens, width), grad_means.dtype)
    _launch_backward(
        _aligned(grad_means.contiguous()),
        (num_patches * row, batch * num_patches * row, row),  # (G, B, N, D) over image, group, row
        program,
        schedule,
        None,
        None,
        Streams.of(sources, vec) if sources else None,
        None,
        grad_states,
        vec=vec,
        batch=batch,
        width=width,
        num_rows=num_tokens,
        num_patches=num_patches,
        skipped_rows=num_prefix_tokens,
        first_row=num_prefix_tokens,
        needs_weights=False,
    )
    return list(grad_states)


def summaries_forward(states: Sequence[Tensor], program: MixProgram, num_prefix_tokens: int, summary: str) -> Tensor:
    """One vector for each weight column, (B, K, D): the mean of the CLS rows of its group, or of all its patches."""
    batch, num_tokens, width = states[0].shape
    vec = elements_per_access(states[0].dtype)
    streams, schedule = Streams.of(states, vec), summary_schedule(program)
    summaries = states[0].new_empty(batch, program.num_weights, width)
    if summary == "mean_patch":
        launch_patch_means(streams, schedule, summaries, num_tokens - num_prefix_tokens, num_prefix_tokens)
        return summaries
    launch_mix_forward(
        streams,
        schedule,
        None,
        summaries,  # K slots of one row
        None,
        tile=narrow_tile(vec, width),
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
    vec = elements_per_access(dtype)
    row = width // vec
    grad_states = _empty_states(grad, program, (batch, num_tokens, width), dtype)
    _launch_backward(
        _aligned(grad.contiguous()),
        (num_columns * row, row, 0),  # (B, K, D) over image, column, and the same row for every patch
        program,
        summary_schedule(program),
        None,
        None,
        None,
        None,
        grad_states,
        vec=vec,
        batch=batch,
        width=width,
        num_rows=num_tokens,
        num_patches=len(rows),
        skipped_rows=rows.start,
        first_row=rows.start,
        needs_weights=False,
    )
    return list(grad_states)


def _empty_states(like: Tensor, program: MixProgram, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """One tensor a gradient class. Not views of one buffer: each may be freed as soon as its layer has used it."""
    return tuple(like.new_empty(shape, dtype=dtype) for _ in program.gradient_classes)


def _readable(grad_out: Tensor, vec: int) -> Tensor:
    """``grad_out`` as it is if 128-bit accesses fit its rows (a slice of a larger gradient often does), else a copy."""
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
