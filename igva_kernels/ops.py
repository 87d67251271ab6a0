"""The operators: schemas, fake tensors, autograd. What torch.compile, export and autograd see of this library.

Each operator is opaque and hands its tensors to one of the implementations in :mod:`igva_kernels.impl`; none of them is
imported before it is used, and triton only by its own. ``plan`` is the ``int[]`` of :meth:`MixProgram.encode`; ``states`` are
the hidden states that the program reads, each (B, T, D).

The gradient of the states is one tensor a *gradient class* (all layers of one group share theirs), so that the backward
writes five maps for IGVA's 24 layers. Gradients of gradients are not defined.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from igva_kernels.backward import kept_for_backward, per_source, resolve_backward
from igva_kernels.dispatch import resolve
from igva_kernels.program import MixProgram, decode_program

torch.library.define(
    "igva::fuse",
    "(Tensor[] states, Tensor? weights, Tensor? indices, int[] plan, int num_prefix_tokens, bool save_means, "
    "ScalarType? dtype, str impl) -> (Tensor, Tensor)",
)
torch.library.define(
    "igva::fuse_backward",
    "(Tensor grad_out, Tensor[] states, Tensor? means, Tensor? weights, Tensor? indices, int[] plan, int num_prefix_tokens, "
    "SymInt num_tokens, bool needs_weights, bool needs_states, str impl) -> (Tensor, Tensor[])",
)
torch.library.define(
    "igva::reduce_groups",
    "(Tensor[] states, int[] plan, int num_prefix_tokens, ScalarType? dtype, str impl) -> Tensor",
)
torch.library.define(
    "igva::reduce_groups_backward",
    "(Tensor grad_means, Tensor[] states, int[] plan, int num_prefix_tokens, SymInt num_tokens, str impl) -> Tensor[]",
)
torch.library.define(
    "igva::group_summaries",
    "(Tensor[] states, int[] plan, int num_prefix_tokens, str summary, str impl) -> Tensor",
)
torch.library.define(
    "igva::group_summaries_backward",
    "(Tensor grad, int[] plan, int num_prefix_tokens, SymInt num_tokens, str summary, str impl) -> Tensor[]",
)


# ---- fuse ---------------------------------------------------------------------------------------------------------------


@torch.library.impl("igva::fuse", "default")
def _fuse(
    states: Sequence[Tensor],
    weights: Tensor | None,
    indices: Tensor | None,
    plan: Sequence[int],
    num_prefix_tokens: int,
    save_means: bool,
    dtype: torch.dtype | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    program = decode_program(plan)
    module = resolve(impl, states, weights, program, num_prefix_tokens, indices)
    with torch.no_grad():
        return module.fuse_forward(states, weights, program, num_prefix_tokens, save_means, indices=indices, dtype=dtype)


@torch.library.register_fake("igva::fuse")
def _fuse_fake(
    states: Sequence[Tensor],
    weights: Tensor | None,
    indices: Tensor | None,
    plan: Sequence[int],
    num_prefix_tokens: int,
    save_means: bool,
    dtype: torch.dtype | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    program = decode_program(plan)
    batch, tokens, width = states[0].shape
    num_patches = tokens - num_prefix_tokens
    dtype = states[0].dtype if dtype is None else dtype
    out = states[0].new_empty(batch, num_patches, len(program.slots) * width, dtype=dtype)
    means = (program.num_weighted_groups, batch, num_patches, width) if save_means else (0,)
    return out, states[0].new_empty(means, dtype=dtype)


@torch.library.impl("igva::fuse_backward", "default")
def _fuse_backward(
    grad_out: Tensor,
    states: Sequence[Tensor],
    means: Tensor | None,
    weights: Tensor | None,
    indices: Tensor | None,
    plan: Sequence[int],
    num_prefix_tokens: int,
    num_tokens: int,
    needs_weights: bool,
    needs_states: bool,
    impl: str,
) -> tuple[Tensor, list[Tensor]]:
    program = decode_program(plan)
    module = resolve_backward(impl, grad_out, states, means, weights, program, indices)
    with torch.no_grad():
        grad_weights, grad_states = module.fuse_backward(
            grad_out,
            states,
            means,
            weights,
            program,
            num_prefix_tokens,
            num_tokens,
            needs_weights,
            needs_states,
            indices=indices,
        )
    return grad_out.new_empty(0) if grad_weights is None else grad_weights, list(grad_states)


@torch.library.register_fake("igva::fuse_backward")
def _fuse_backward_fake(
    grad_out: Tensor,
    states: Sequence[Tensor],
    means: Tensor | None,
    weights: Tensor | None,
    indices: Tensor | None,
    plan: Sequence[int],
    num_prefix_tokens: int,
    num_tokens: int,
    needs_weights: bool,
    needs_states: bool,
    impl: str,
) -> tuple[Tensor, list[Tensor]]:
    program = decode_program(plan)
    wide = torch.float64 if grad_out.dtype == torch.float64 else torch.float32
    grad_weights = grad_out.new_empty(0)
    if needs_weights and weights is not None:
        grad_weights = weights.new_empty(weights.shape, dtype=wide)
    width = grad_out.shape[2] // len(program.slots)
    return grad_weights, _empty_grads(grad_out, program, num_tokens, width) if needs_states else []


def _fuse_setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    states, weights, indices, plan, num_prefix_tokens, save_means, _dtype, impl = inputs
    ctx.set_materialize_grads(False)
    ctx.plan, ctx.num_prefix_tokens, ctx.impl = plan, num_prefix_tokens, impl
    ctx.num_tokens = states[0].shape[1]
    # (ctx.needs_input_grad is still flat here: one entry a state.)
    weights_need = weights is not None and weights.requires_grad
    states_need = any(state.requires_grad for state in states)
    keeps_means, keeps_states = kept_for_backward(decode_program(plan), weights_need, states_need, save_means)
    ctx.has = (keeps_means, weights is not None, indices is not None)
    saved = [output[1] if keeps_means else None, weights, indices]
    ctx.save_for_backward(*(tensor for tensor in saved if tensor is not None), *(states if keeps_states else ()))


def _fuse_vjp(ctx: Any, grad_out: Tensor | None, _grad_means: Tensor | None) -> tuple:
    needs_states, needs_weights = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
    nothing = [None] * len(needs_states), *(None,) * 7
    if grad_out is None:
        return nothing
    saved = list(ctx.saved_tensors)
    means, weights, indices = (saved.pop(0) if has else None for has in ctx.has)
    grad_weights, grads = torch.ops.igva.fuse_backward(
        grad_out,
        saved,
        means,
        weights,
        indices,
        ctx.plan,
        ctx.num_prefix_tokens,
        ctx.num_tokens,
        needs_weights,
        any(needs_states),
        ctx.impl,
    )
    grad_weights = grad_weights.to(weights.dtype) if needs_weights and weights is not None else None
    return per_source(grads, decode_program(ctx.plan), needs_states), grad_weights, *(None,) * 6


torch.library.register_autograd("igva::fuse", _fuse_vjp, setup_context=_fuse_setup_context)


# ---- reduce_groups ------------------------------------------------------------------------------------------------------


@torch.library.impl("igva::reduce_groups", "default")
def _reduce_groups(
    states: Sequence[Tensor], plan: Sequence[int], num_prefix_tokens: int, dtype: torch.dtype | None, impl: str
) -> Tensor:
    program = decode_program(plan)
    module = resolve(impl, states, None, program, num_prefix_tokens)
    with torch.no_grad():
        return module.reduce_forward(states, program, num_prefix_tokens, dtype=dtype)


@torch.library.register_fake("igva::reduce_groups")
def _reduce_groups_fake(
    states: Sequence[Tensor], plan: Sequence[int], num_prefix_tokens: int, dtype: torch.dtype | None, impl: str
) -> Tensor:
    batch, tokens, width = states[0].shape
    shape = (len(decode_program(plan).groups), batch, tokens - num_prefix_tokens, width)
    return states[0].new_empty(shape, dtype=states[0].dtype if dtype is None else dtype)


@torch.library.impl("igva::reduce_groups_backward", "default")
def _reduce_groups_backward(
    grad_means: Tensor,
    states: Sequence[Tensor],
    plan: Sequence[int],
    num_prefix_tokens: int,
    num_tokens: int,
    impl: str,
) -> list[Tensor]:
    program = decode_program(plan)
    grad_means = grad_means.contiguous()
    module = resolve(impl, list(states or grad_means.unbind(0)), None, program, 0)  # asked with the maps whose form is given
    with torch.no_grad():
        return list(module.reduce_backward(grad_means, program, num_prefix_tokens, num_tokens, states=states or None))


@torch.library.register_fake("igva::reduce_groups_backward")
def _reduce_groups_backward_fake(
    grad_means: Tensor,
    states: Sequence[Tensor],
    plan: Sequence[int],
    num_prefix_tokens: int,
    num_tokens: int,
    impl: str,
) -> list[Tensor]:
    return _empty_grads(grad_means[0], decode_program(plan), num_tokens, grad_means.shape[3])


def _reduce_groups_setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    states, ctx.plan, ctx.num_prefix_tokens, _dtype, ctx.impl = inputs
    ctx.num_tokens = states[0].shape[1]
    ctx.save_for_backward(*(states if decode_program(ctx.plan).has_norms else ()))


def _reduce_groups_vjp(ctx: Any, grad_means: Tensor) -> tuple:
    grads = torch.ops.igva.reduce_groups_backward(
        grad_means, list(ctx.saved_tensors), ctx.plan, ctx.num_prefix_tokens, ctx.num_tokens, ctx.impl
    )
    return per_source(grads, decode_program(ctx.plan), ctx.needs_input_grad[0]), None, None, None, None


torch.library.register_autograd("igva::reduce_groups", _reduce_groups_vjp, setup_context=_reduce_groups_setup_context)


# ---- group_summaries ----------------------------------------------------------------------------------------------------


@torch.library.impl("igva::group_summaries", "default")
def _group_summaries(states: Sequence[Tensor], plan: Sequence[int], num_prefix_tokens: int, summary: str, impl: str) -> Tensor:
    program = decode_program(plan)
    module = resolve(impl, states, None, program, num_prefix_tokens)
    with torch.no_grad():
        return module.summaries_forward(states, program, num_prefix_tokens, summary)


@torch.library.register_fake("igva::group_summaries")
def _group_summaries_fake(
    states: Sequence[Tensor], plan: Sequence[int], num_prefix_tokens: int, summary: str, impl: str
) -> Tensor:
    batch, _, width = states[0].shape
    return states[0].new_empty(batch, decode_program(plan).num_weights, width)


@torch.library.impl("igva::group_summaries_backward", "default")
def _group_summaries_backward(
    grad: Tensor, plan: Sequence[int], num_prefix_tokens: int, num_tokens: int, summary: str, impl: str
) -> list[Tensor]:
    program = decode_program(plan)
    grad = grad.contiguous()
    module = resolve(impl, [grad], None, program, 0)
    with torch.no_grad():
        return list(module.summaries_backward(grad, program, num_prefix_tokens, num_tokens, summary))


@torch.library.register_fake("igva::group_summaries_backward")
def _group_summaries_backward_fake(
    grad: Tensor, plan: Sequence[int], num_prefix_tokens: int, num_tokens: int, summary: str, impl: str
) -> list[Tensor]:
    return _empty_grads(grad, decode_program(plan), num_tokens, grad.shape[2])


def _group_summaries_setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    states, ctx.plan, ctx.num_prefix_tokens, ctx.summary, ctx.impl = inputs
    ctx.num_tokens = states[0].shape[1]


def _group_summaries_vjp(ctx: Any, grad: Tensor) -> tuple:
    grads = torch.ops.igva.group_summaries_backward(
        grad, ctx.plan, ctx.num_prefix_tokens, ctx.num_tokens, ctx.summary, ctx.impl
    )
    return per_source(grads, decode_program(ctx.plan), ctx.needs_input_grad[0]), None, None, None, None


torch.library.register_autograd("igva::group_summaries", _group_summaries_vjp, setup_context=_group_summaries_setup_context)


# ---- shared -------------------------------------------------------------------------------------------------------------


def _empty_grads(like: Tensor, program: MixProgram, num_tokens: int, width: int) -> list[Tensor]:
    return [like.new_empty(like.shape[0], num_tokens, width) for _ in program.gradient_classes]
