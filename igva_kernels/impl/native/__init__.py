"""Compiled C for a CPU: one pass over the states at the bandwidth of memory, in 16-bit types as well.

Plain torch needs a pass of its own for every conversion and every sum; :file:`mix.c` does all of them in registers. It is built
at first use where a C compiler is found (:mod:`~igva_kernels.impl.native.build`); where none is, plain torch runs. The work is
spread over as many threads as ``torch.get_num_threads()`` says, and the result has the same bits whatever that is.

The interface is that of the other implementations; see the reference for arguments and shapes. Summaries are plain torch: those
of the CLS token move next to nothing, and those of all patches are one reduction a state, which torch does well.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import addressof, byref, c_int64, c_void_p

import torch
from torch import Tensor

from igva_kernels.impl.cpu import summaries_backward, summaries_forward
from igva_kernels.impl.native.build import library, why_unavailable
from igva_kernels.impl.native.replay import Launch, recorder, recording, replay_of
from igva_kernels.impl.native.structs import (
    TYPES,
    Backward,
    BackwardLayout,
    Classes,
    Forward,
    ForwardLayout,
    Map,
    Shape,
    Weights,
    backward_layout,
    forward_layout,
    maps,
    norm_of_row,
    reduction_layout,
)
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

# Shapes: B images, T tokens with prefix, P prefix tokens, N = T − P patches, D width, K weights, G groups, S slots.

CHUNK_ELEMENTS = 1 << 13
"""Elements of a chunk, over all sums that are open in it: 32 KiB of float32. Runs of eight rows of 1024 keep the prefetchers of
two dozen streams busy; the sums stay in the nearest caches."""

BYTES_PER_THREAD = 1 << 17
"""Least bytes that are worth another thread: waking it costs what reading them does."""

STEP = 16
"""Rows in scratch are padded to whole steps of mix.c."""


def check_supported(
    states: Sequence[Tensor],
    weights: Tensor | None,
    program: MixProgram,
    num_prefix_tokens: int,
    *,
    indices: Tensor | None = None,
) -> str | None:
    """None where this implementation can run these tensors, else the reason why not."""
    first = states[0]
    if first.device.type != "cpu":
        return f"it runs on a CPU, and the hidden states are on {first.device}"
    for state in states:
        if state.dtype not in TYPES:
            return f"it has float32, bfloat16 and float16, and the hidden states are {state.dtype}"
        if not state.is_contiguous() and state.stride(2) != 1 and state.shape[2] > 1:
            return f"the channels of a token must be contiguous, and the strides of a state are {state.stride()}"
    return why_unavailable()


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
    """The mix: ``states`` of (B, T, D) to (B, N, S*D), and the (G_w, B, N, D) means of the weighted groups if asked for."""
    batch, tokens, width = states[0].shape
    rows = tokens - num_prefix_tokens
    dtype = states[0].dtype if dtype is None else dtype
    out = states[0].new_empty((batch, rows, len(program.slots) * width), dtype=dtype)
    num_means = program.num_weighted_groups if save_means else 0
    means = states[0].new_empty((num_means, batch, rows, width) if save_means else (0,), dtype=dtype)
    factors = _Factors(weights, indices, program.num_weights)
    _run_forward(states, factors, forward_layout(program), num_prefix_tokens, out, means, num_means)
    return out, means


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

    The row of a token is complete in scratch before any of it is stored, so that the norm moves nothing but its result.
    """
    batch, tokens, width = states[0].shape
    rows = tokens - num_prefix_tokens
    dtype = states[0].dtype if dtype is None else dtype
    shape = (batch, rows, len(program.slots) * width)
    out = states[0].new_empty(shape, dtype=norm.dtype_of(dtype))
    mixed = out.new_empty(shape if save_mixed else (0,))
    kept = statistics_of(norm) if save_mixed else 0
    statistics = out.new_empty((kept, batch, rows, 1) if save_mixed else (0,), dtype=torch.float32)
    num_means = program.num_weighted_groups if save_means else 0
    means = out.new_empty((num_means, batch, rows, width) if save_means else (0,), dtype=dtype)
    parameters = [None if each is None else each.detach().to(torch.float32).contiguous() for each in norm[:2]]
    of_norm = (
        norm_of_row(norm),
        *(None if each is None else each.data_ptr() for each in parameters),
        mixed.data_ptr() if save_mixed else None,
        statistics[0].data_ptr() if kept == 2 else None,
        statistics[-1].data_ptr() if kept else None,
    )
    factors = _Factors(weights, indices, program.num_weights)
    _run_forward(states, factors, forward_layout(program), num_prefix_tokens, out, means, num_means, of_norm)
    return out, means, mixed, statistics


def reduce_forward(
    states: Sequence[Tensor], program: MixProgram, num_prefix_tokens: int, *, dtype: torch.dtype | None = None
) -> Tensor:
    """The (G, B, N, D) means of all groups of the program, in ``dtype`` (None: that of the states)."""
    batch, tokens, width = states[0].shape
    num_means = len(program.groups)
    means = states[0].new_empty((num_means, batch, tokens - num_prefix_tokens, width), dtype=dtype)
    layout = forward_layout(program, only_means=True)
    _run_forward(states, _Factors(None, None, 0), layout, num_prefix_tokens, None, means, num_means)
    return means


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
    """The vector-Jacobian product of :func:`fuse_forward`: dL/dw in float32, and one dL/dh a gradient class.

    dL/dw needs the group means: the saved ``means`` where the forward kept them, else they are summed again from ``states``.
    Sums over the D channels of a token run in float32, those over tokens in float64.
    """
    batch, _, channels = grad_out.shape
    width = channels // len(program.slots)
    if grad_out.stride(2) != 1:
        grad_out = grad_out.contiguous()
    needs_weights = needs_weights and weights is not None
    sources: Sequence[Tensor] = () if not needs_weights else states if means is None else means.unbind(0)
    grads = [grad_out.new_empty(batch, num_tokens, width) for _ in program.gradient_classes] if needs_states else []
    grad_weights = _run_backward(
        backward_layout(program, needs_weights, means is not None, needs_states),
        grad_out[..., :width],
        width * grad_out.element_size(),
        sources,
        num_prefix_tokens if means is None else 0,
        _Factors(weights, indices, program.num_weights),
        needs_weights,
        grads,
        states,
        num_prefix_tokens,
    )
    return grad_weights, grads


def reduce_backward(
    grad_means: Tensor,
    program: MixProgram,
    num_prefix_tokens: int,
    num_tokens: int,
    *,
    states: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """The vector-Jacobian product of :func:`reduce_forward`, one (B, T, D) a gradient class."""
    num_groups, batch, _, width = grad_means.shape
    if grad_means.stride(3) != 1:
        grad_means = grad_means.contiguous()
    grads = [grad_means.new_empty(batch, num_tokens, width) for _ in program.gradient_classes]
    if num_groups == 0:
        for grad in grads:
            grad.zero_()
        return grads
    slot_stride = grad_means.stride(0) * grad_means.element_size()
    layout = reduction_layout(program)
    factors = _Factors(None, None, 0)
    _run_backward(layout, grad_means[0], slot_stride, (), 0, factors, False, grads, states or (), num_prefix_tokens)
    return grads


# ---- calls into mix.c -------------------------------------------------------------------------------------------------


def _run_forward(
    states: Sequence[Tensor],
    factors: _Factors,
    layout: ForwardLayout,
    num_prefix_tokens: int,
    out: Tensor | None,
    means: Tensor,
    num_means: int,
    of_norm: tuple = (),
) -> None:
    """Fill ``out`` and ``means``, and what else ``of_norm``, the last fields of ``struct forward``, points to."""
    patches = states[layout.members[0] if layout.members else 0][:, num_prefix_tokens:]  # copied ones may be narrower
    if patches.numel() == 0:
        return
    num_bytes = len(states) * patches.numel() * patches.element_size()
    sums = layout.num_slots if of_norm else layout.num_mixed  # a norm wants copies in scratch as well
    shape, scratch = _shape(patches, num_bytes, sums=sums, once=2, for_each=layout.num_slots)
    sources = maps(states, num_prefix_tokens)
    job = Forward(
        shape,
        layout.groups,
        factors.struct(shape.rows),
        TYPES[patches.dtype],
        TYPES[states[layout.copied[0]].dtype] if layout.copied else 0,
        TYPES[means.dtype if out is None else out.dtype],
        TYPES[means.dtype],
        layout.num_slots,
        num_means,
        addressof(layout.mixed_slot),
        addressof(layout.copy_start),
        addressof(layout.copy_source),
        addressof(layout.copy_slot),
        sources.buffer_info()[0],
        None if out is None else out.data_ptr(),
        means.data_ptr(),
        *of_norm,
    )
    library().igva_forward(byref(job))
    if recorder.is_recording:
        recorder.add(Launch(job, sources, layout, scratch.numel(), torch.get_num_threads()))
    del scratch  # alive until here: the job holds its address


def _run_backward(
    layout: BackwardLayout,
    cotangent: Tensor,
    slot_stride: int,
    sources: Sequence[Tensor],
    first_row: int,
    factors: _Factors,
    needs_weights: bool,
    grads: Sequence[Tensor],
    states: Sequence[Tensor],
    num_prefix_tokens: int,
) -> Tensor | None:
    """Fill the gradients of the classes, and return that of the weights if it is needed.

    Args:
        cotangent: (B, N, D), of slot 0.
        slot_stride: bytes from the cotangent of a slot to that of the next.
        sources: the members of the groups; their patches begin at ``first_row``.
        grads: one (B, T, D) a class; their patches begin at ``num_prefix_tokens``, as do those of the states.
        states: of all sources, if there are norms.
    """
    batch, rows, width = cotangent.shape
    weights = factors.weights if needs_weights else None
    grad_weights = None if weights is None else weights.new_empty(weights.shape)
    if cotangent.numel() == 0:
        for grad in grads:
            grad.zero_()
        return None if grad_weights is None else grad_weights.zero_()
    num_bytes = (layout.num_slots + len(sources) + len(grads)) * batch * rows * width * cotangent.element_size()
    shape, scratch = _shape(cotangent, num_bytes, sums=1, once=layout.num_slots + 3, for_each=0)
    chunks = -(-rows // shape.rows_per_chunk)
    per_token = grad_weights is not None and grad_weights.ndim == 3
    partials = None
    if grad_weights is not None and not per_token:
        partials = grad_weights.new_empty(batch * chunks, factors.num_columns, dtype=torch.float64)
    of_sources, of_grads = maps(sources, first_row), maps(grads, num_prefix_tokens)
    of_classes = maps([states[source] for source in layout.class_sources], num_prefix_tokens)
    state_type = TYPES[states[0].dtype] if layout.class_sources else 0
    job = Backward(
        shape,
        layout.groups,
        Classes(len(grads), *layout.class_addresses, of_classes.buffer_info()[0], state_type),
        factors.struct(rows),
        TYPES[cotangent.dtype],
        TYPES[sources[0].dtype if sources else cotangent.dtype],
        layout.num_slots,
        num_prefix_tokens,
        addressof(layout.needed),
        Map(*maps([cotangent], 0)),
        slot_stride,
        of_sources.buffer_info()[0],
        of_grads.buffer_info()[0],
        None if partials is None else partials.data_ptr(),
        grad_weights.data_ptr() if grad_weights is not None and per_token else None,
    )
    library().igva_backward(byref(job))
    if grad_weights is not None and partials is not None:
        sizes = (c_int64(batch), c_int64(chunks), c_int64(factors.num_columns), c_int64(grad_weights.ndim == 1))
        library().igva_sum_partials(c_void_p(partials.data_ptr()), *sizes, c_void_p(grad_weights.data_ptr()))
    del scratch  # alive until here: the job holds its address
    return grad_weights


def _shape(like: Tensor, num_bytes: int, *, sums: int, once: int, for_each: int) -> tuple[Shape, Tensor]:
    """``struct shape`` and the scratch to which it points.

    Args:
        like: a (B, N, D) map.
        num_bytes: that the call moves.
        sums: how many of a chunk's rows are summed at the same time.
        once, for_each: rows of scratch that a thread needs, once and for each row of a chunk.
    """
    batch, rows, width = like.shape
    rows_per_chunk = min(rows, max(1, CHUNK_ELEMENTS // (width * max(1, sums))))
    chunks = batch * -(-rows // rows_per_chunk)
    threads = max(1, min(torch.get_num_threads(), chunks, num_bytes // BYTES_PER_THREAD))
    size = (once + for_each * rows_per_chunk) * (-(-width // STEP) * STEP)
    scratch = like.new_empty(threads * size, dtype=torch.float32)
    return Shape(batch, rows, width, rows_per_chunk, threads, 0, scratch.data_ptr(), size), scratch


class _Factors:
    """Weights as mix.c reads them; they must live as long as their struct is used.

    Args:
        weights: (K,), (B, K) or (B, N, K); with ``indices`` the values (B, N, k); None for none.
        indices: (B, N, k), or None.
        num_columns: K.
    """

    def __init__(self, weights: Tensor | None, indices: Tensor | None, num_columns: int) -> None:
        self.weights = None if weights is None else weights.detach().to(torch.float32).contiguous()
        self.num_columns = num_columns
        self._indices = None if indices is None else indices.to(torch.int64).contiguous()

    def struct(self, rows: int) -> Weights:
        """``struct weights``."""
        weights, indices = self.weights, self._indices
        if weights is None:
            return Weights(None, 0, 0, self.num_columns, 0, None)
        count = weights.shape[-1]
        image_stride, row_stride = {1: (0, 0), 2: (count, 0), 3: (rows * count, count)}[weights.ndim]
        columns = None if indices is None else indices.data_ptr()
        return Weights(weights.data_ptr(), image_stride, row_stride, self.num_columns, count, columns)
