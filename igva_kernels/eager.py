"""Eager calls: straight to the implementation, with autograd where it is needed, and without torch's dispatcher.

The operators of :mod:`igva_kernels.ops` are what compilers and exporters see. In eager mode the dispatcher would look at every
one of some two dozen tensors several times; a frozen tower needs none of that, since only the weights have a gradient: the
states then reach autograd as one opaque argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from igva_kernels.backward import kept_for_backward, per_source, resolve_backward, worth_saving_means
from igva_kernels.dispatch import resolve
from igva_kernels.program import MixProgram

_requires_grad = attrgetter("requires_grad")
_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether these tensors are just tensors, and nobody records, transforms or fakes what is done to them.

    If not, the operators have to be called: under torch.compile, export, tracing, functorch, with fake tensors, DTensors or a
    dispatch mode.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or any(tensor is not None and type(tensor) not in _PLAIN_TYPES for tensor in tensors)
    )


class _Call(NamedTuple):
    """One call of fuse beside its weights."""

    states: Sequence[Tensor]
    indices: Tensor | None
    program: MixProgram
    num_prefix_tokens: int
    save_means: bool
    dtype: torch.dtype | None
    impl: str
    module: ModuleType

    def run(self, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.module.fuse_forward(
            self.states,
            weights,
            self.program,
            self.num_prefix_tokens,
            self.save_means,
            indices=self.indices,
            dtype=self.dtype,
        )


def fuse(
    states: Sequence[Tensor],
    weights: Tensor | None,
    indices: Tensor | None,
    program: MixProgram,
    num_prefix_tokens: int,
    dtype: torch.dtype | None,
    impl: str,
) -> Tensor:
    """The mix of plain tensors, as the operator ``igva::fuse`` would give it; arguments as for that."""
    module = resolve(impl, states, weights, program, num_prefix_tokens, indices)
    grad_enabled = torch.is_grad_enabled()
    weights_need = grad_enabled and weights is not None and weights.requires_grad
    states_need = grad_enabled and any(map(_requires_grad, states))
    save_means = should_save_means(program, indices, weights_need, states_need)
    call = _Call(states, indices, program, num_prefix_tokens, save_means, dtype, impl, module)
    if states_need:
        return _FuseOfTrainable.apply(call, weights, *states)
    if weights_need:
        return _FuseOfFrozen.apply(call, weights)
    return call.run(weights)[0]


def should_save_means(program: MixProgram, indices: Tensor | None, weights_need: bool, states_need: bool) -> bool:
    """Whether the forward keeps the group means for dL/dw.

    Not for sparse weights, whose gradient needs k rows a token; and not where the backward reads the states anyway.
    """
    return weights_need and indices is None and not (states_need and program.has_norms) and worth_saving_means(program)


def _save(ctx: Any, call: _Call, weights: Tensor | None, means: Tensor, states_need: bool) -> None:
    weights_need = weights is not None and weights.requires_grad
    keeps_means, keeps_states = kept_for_backward(call.program, weights_need, states_need, call.save_means)
    ctx.call = call._replace(states=())
    ctx.num_tokens = call.states[0].shape[1]
    ctx.has = (keeps_means, weights is not None)
    saved = [means if keeps_means else None, weights]
    ctx.save_for_backward(*(tensor for tensor in saved if tensor is not None), *(call.states if keeps_states else ()))


def _gradients(ctx: Any, grad_out: Tensor, needs_weights: bool, needs_states: bool) -> tuple[Tensor | None, list[Tensor]]:
    call: _Call = ctx.call
    saved = list(ctx.saved_tensors)
    means, weights = (saved.pop(0) if has else None for has in ctx.has)
    module = resolve_backward(call.impl, grad_out, saved, means, weights, call.program, call.indices)
    grad_weights, grads = module.fuse_backward(
        grad_out,
        saved,
        means,
        weights,
        call.program,
        call.num_prefix_tokens,
        ctx.num_tokens,
        needs_weights,
        needs_states,
        indices=call.indices,
    )
    return grad_weights if grad_weights is None or weights is None else grad_weights.to(weights.dtype), grads


class _FuseOfFrozen(torch.autograd.Function):
    """Only the weights have a gradient: autograd looks at one tensor."""

    @staticmethod
    def forward(ctx: Any, call: _Call, weights: Tensor) -> Tensor:
        out, means = call.run(weights)
        _save(ctx, call, weights, means, states_need=False)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[None, Tensor | None]:
        return None, _gradients(ctx, grad_out, True, False)[0]


class _FuseOfTrainable(torch.autograd.Function):
    """States have gradients, the weights perhaps."""

    @staticmethod
    def forward(ctx: Any, call: _Call, weights: Tensor | None, *states: Tensor) -> Tensor:
        out, means = call.run(weights)
        _save(ctx, call, weights, means, states_need=True)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        needs_weights, needs_states = ctx.needs_input_grad[1], ctx.needs_input_grad[2:]
        grad_weights, grads = _gradients(ctx, grad_out, needs_weights, True)
        return None, grad_weights, *per_source(grads, ctx.call.program, needs_states)
