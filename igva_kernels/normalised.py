"""The mix with a norm behind it: eager calls, and the operators ``igva::fuse_normalised`` and ``igva::output_norm_backward``.

Apart from :mod:`igva_kernels.eager` and :mod:`igva_kernels.ops`, whose calls without a norm pay nothing for it. The backward is
that of the norm, then that of the mix; see :mod:`igva_kernels.impl.output_norm` for what is kept, and why.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from igva_kernels import eager
from igva_kernels.backward import kept_for_backward, per_source, resolve_backward
from igva_kernels.dispatch import resolve
from igva_kernels.impl import output_norm, reference
from igva_kernels.output_norm import OutputNorm
from igva_kernels.program import MixProgram, decode_program


def fuse(
    states: list[Tensor],
    weights: Tensor | None,
    indices: Tensor | None,
    norm: OutputNorm,
    program: MixProgram,
    num_prefix_tokens: int,
    dtype: torch.dtype | None,
    impl: str,
) -> Tensor:
    """The mix of checked arguments, normalised: (B, N, S*D) in the dtype of the norm's parameters.

    Args:
        dtype: of the mix without a norm; None for that of the states.
    """
    grad_enabled = torch.is_grad_enabled()
    weights_need = grad_enabled and weights is not None and weights.requires_grad
    states_need = grad_enabled and any(state.requires_grad for state in states)
    norm_needs = grad_enabled and any(each is not None and each.requires_grad for each in norm[:2])
    save_means = eager.should_save_means(program, indices, weights_need, states_need)
    save_mixed = weights_need or states_need or norm_needs
    if not eager.is_plain(weights, indices, norm.weight, norm.bias, *states):
        return torch.ops.igva.fuse_normalised(
            states,
            weights,
            indices,
            *norm,
            program.encode(),
            num_prefix_tokens,
            save_means,
            save_mixed,
            dtype,
            impl,
        )[0]
    keeps = kept_for_backward(program, weights_need, states_need, save_means)
    call = _Call(states, indices, norm, program, num_prefix_tokens, save_means, save_mixed, *keeps, dtype, impl)
    if save_mixed:
        return _FuseNormalised.apply(call, weights, norm.weight, norm.bias, *(states if states_need else ()))
    return _forward(call, weights)[0]


class _Call(NamedTuple):
    """A call of :func:`fuse` without its weights; ``keeps_means`` and ``keeps_states`` as in :mod:`igva_kernels.eager`."""

    states: Sequence[Tensor]
    indices: Tensor | None
    norm: OutputNorm
    program: MixProgram
    num_prefix_tokens: int
    save_means: bool
    save_mixed: bool
    keeps_means: bool
    keeps_states: bool
    dtype: torch.dtype | None
    impl: str


def _forward(call: _Call, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    module = resolve(call.impl, call.states, weights, call.program, call.num_prefix_tokens, call.indices)
    with torch.no_grad():
        return module.normalised_forward(
            call.states,
            weights,
            call.norm,
            call.program,
            call.num_prefix_tokens,
            call.save_means,
            call.save_mixed,
            indices=call.indices,
            dtype=call.dtype,
        )


class _FuseNormalised(torch.autograd.Function):
    """States are given here only if some of them needs a gradient, so that autograd looks at few tensors if none does."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, weights: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, *states: Tensor
    ) -> Tensor:
        out, means, mixed, statistics = _forward(call, weights)
        # without what save_for_backward keeps, and what nobody needs
        ctx.call = call._replace(states=(), norm=call.norm._replace(weight=None, bias=None))
        ctx.num_tokens = call.states[0].shape[1]
        ctx.mix_dtype = call.states[0].dtype if call.dtype is None else call.dtype
        kept = (means if call.keeps_means else None, weights, norm_weight, norm_bias)
        ctx.has = tuple(tensor is not None for tensor in kept)
        states = tuple(call.states) if call.keeps_states else ()
        ctx.save_for_backward(mixed, statistics, *(tensor for tensor in kept if tensor is not None), *states)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        needs_weights, needs_states = ctx.needs_input_grad[1], ctx.needs_input_grad[4:]
        mixed, statistics, *saved = ctx.saved_tensors
        means, weights, norm_weight, norm_bias = (saved.pop(0) if has else None for has in ctx.has)
        norm = call.norm._replace(weight=norm_weight, bias=norm_bias)
        needs_mixed = needs_weights or any(needs_states)
        needs = (needs_mixed, *ctx.needs_input_grad[2:4])
        grad_mixed, *grads_norm = _norm_backward(call.impl, grad_out, mixed, statistics, norm, needs)
        if grad_mixed is None:
            return None, None, *grads_norm, *(None for _ in needs_states)
        grad_mixed = grad_mixed.to(ctx.mix_dtype)
        module = resolve_backward(call.impl, grad_mixed, saved, means, weights, call.program, call.indices)
        grad_weights, grads = module.fuse_backward(
            grad_mixed,
            saved,
            means,
            weights,
            call.program,
            call.num_prefix_tokens,
            ctx.num_tokens,
            needs_weights,
            any(needs_states),
            indices=call.indices,
        )
        grad_weights = None if grad_weights is None or weights is None else grad_weights.to(weights.dtype)
        return None, grad_weights, *grads_norm, *per_source(grads, call.program, needs_states)


def _norm_backward(
    impl: str, grad_out: Tensor, mixed: Tensor, statistics: Tensor, norm: OutputNorm, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dL/d(mix, weight, bias); only the reference has a form of its own, see :mod:`igva_kernels.impl.output_norm`."""
    backward = reference.output_norm_backward if impl == "reference" else output_norm.output_norm_backward
    return backward(grad_out, mixed, statistics, norm, needs)


# ---- operators ----------------------------------------------------------------------------------------------------------

torch.library.define(
    "igva::fuse_normalised",
    "(Tensor[] states, Tensor? weights, Tensor? indices, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, "
    "str norm_kind, int[] plan, int num_prefix_tokens, bool save_means, bool save_mixed, ScalarType? dtype, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "igva::output_norm_backward",
    "(Tensor grad_out, Tensor mixed, Tensor statistics, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, "
    "str norm_kind, bool needs_mixed, bool needs_weight, bool needs_bias, str impl) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("igva::fuse_normalised", "default")
def _fuse_normalised(
    states: Sequence[Tensor],
    weights: Tensor | None,
    indices: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    norm_kind: str,
    plan: Sequence[int],
    num_prefix_tokens: int,
    save_means: bool,
    save_mixed: bool,
    dtype: torch.dtype | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    norm = OutputNorm(norm_weight, norm_bias, norm_eps, norm_kind)  # type: ignore[arg-type]  # a schema knows only str
    call = _Call(
        states, indices, norm, decode_program(plan), num_prefix_tokens, save_means, save_mixed, False, False, dtype, impl
    )
    return _forward(call, weights)


@torch.library.register_fake("igva::fuse_normalised")
def _fuse_normalised_fake(
    states: Sequence[Tensor],
    weights: Tensor | None,
    indices: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    norm_kind: str,
    plan: Sequence[int],
    num_prefix_tokens: int,
    save_means: bool,
    save_mixed: bool,
    dtype: torch.dtype | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    program = decode_program(plan)
    batch, tokens, width = states[0].shape
    num_patches = tokens - num_prefix_tokens
    dtype = states[0].dtype if dtype is None else dtype
    out_dtype = OutputNorm(norm_weight, norm_bias).dtype_of(dtype)
    shape = (batch, num_patches, len(program.slots) * width)
    means = (program.num_weighted_groups, batch, num_patches, width) if save_means else (0,)
    statistics = (2 if norm_kind == "layer" else 1, batch, num_patches, 1) if save_mixed else (0,)
    return (
        states[0].new_empty(shape, dtype=out_dtype),
        states[0].new_empty(means, dtype=dtype),
        states[0].new_empty(shape if save_mixed else (0,), dtype=out_dtype),
        states[0].new_empty(statistics, dtype=reference.accumulation_dtype(states[0].dtype)),
    )


@torch.library.impl("igva::output_norm_backward", "default")
def _output_norm_backward(
    grad_out: Tensor,
    mixed: Tensor,
    statistics: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    norm_kind: str,
    needs_mixed: bool,
    needs_weight: bool,
    needs_bias: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    norm = OutputNorm(norm_weight, norm_bias, norm_eps, norm_kind)  # type: ignore[arg-type]  # a schema knows only str
    with torch.no_grad():
        grads = _norm_backward(impl, grad_out, mixed, statistics, norm, (needs_mixed, needs_weight, needs_bias))
    likes = (mixed if each is None else each for each in (mixed, norm_weight, norm_bias))
    to_mixed, to_weight, to_bias = (
        like.new_empty(0) if grad is None else grad for grad, like in zip(grads, likes, strict=True)
    )
    return to_mixed, to_weight, to_bias


@torch.library.register_fake("igva::output_norm_backward")
def _output_norm_backward_fake(
    grad_out: Tensor,
    mixed: Tensor,
    statistics: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    norm_kind: str,
    needs_mixed: bool,
    needs_weight: bool,
    needs_bias: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    def like(tensor: Tensor | None, needed: bool) -> Tensor:
        if tensor is None:
            return mixed.new_empty(0)
        return tensor.new_empty(tensor.shape if needed else (0,))

    return like(mixed, needs_mixed), like(norm_weight, needs_weight), like(norm_bias, needs_bias)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    states, weights, indices, norm_weight, norm_bias, *ctx.norm, plan, num_prefix_tokens, save_means, _, dtype, impl = inputs
    ctx.set_materialize_grads(False)
    ctx.plan, ctx.num_prefix_tokens, ctx.impl = plan, num_prefix_tokens, impl
    ctx.num_tokens = states[0].shape[1]
    ctx.mix_dtype = states[0].dtype if dtype is None else dtype
    weights_need = weights is not None and weights.requires_grad
    states_need = any(state.requires_grad for state in states)
    keeps_means, keeps_states = kept_for_backward(decode_program(plan), weights_need, states_need, save_means)
    _, means, mixed, statistics = output
    kept = (means if keeps_means else None, weights, indices, norm_weight, norm_bias)
    ctx.has = tuple(tensor is not None for tensor in kept)
    states = states if keeps_states else ()
    ctx.save_for_backward(mixed, statistics, *(tensor for tensor in kept if tensor is not None), *states)


def _vjp(ctx: Any, grad_out: Tensor | None, *_others: Tensor | None) -> tuple:
    needs_states, needs_weights, _, needs_norm_weight, needs_norm_bias, *_ = ctx.needs_input_grad
    if grad_out is None:
        return [None] * len(needs_states), *(None,) * 12
    mixed, statistics, *saved = ctx.saved_tensors
    means, weights, indices, norm_weight, norm_bias = (saved.pop(0) if has else None for has in ctx.has)
    needs_mixed = needs_weights or any(needs_states)
    grad_mixed, grad_norm_weight, grad_norm_bias = torch.ops.igva.output_norm_backward(
        grad_out,
        mixed,
        statistics,
        norm_weight,
        norm_bias,
        *ctx.norm,
        needs_mixed,
        needs_norm_weight,
        needs_norm_bias,
        ctx.impl,
    )
    program = decode_program(ctx.plan)
    grad_weights: Tensor | None = None
    grads: list[Tensor] = []
    if needs_mixed:
        grad_weights, grads = torch.ops.igva.fuse_backward(
            grad_mixed.to(ctx.mix_dtype),
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
    return (
        per_source(grads, program, needs_states),
        grad_weights.to(weights.dtype) if needs_weights and grad_weights is not None and weights is not None else None,
        None,
        grad_norm_weight if needs_norm_weight else None,
        grad_norm_bias if needs_norm_bias else None,
        *(None,) * 8,
    )


torch.library.register_autograd("igva::fuse_normalised", _vjp, setup_context=_setup_context)
