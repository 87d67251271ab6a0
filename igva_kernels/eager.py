"""Eager calls: straight to the implementation, with autograd where it is needed, and without torch's dispatcher.

The operators of :mod:`igva_kernels.ops` are what compilers and exporters see. In eager mode the dispatcher would look at every
one of some two dozen tensors several times; a frozen tower needs none of that, since only the weights have a gradient: the
states then reach autograd as one opaque argument.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from igva_kernels.backward import kept_for_backward, per_source, resolve_backward
from igva_kernels.dispatch import resolve
from igva_kernels.program import MixProgram
from igva_kernels.quick import Found, Signatures, signature_of

_requires_grad = attrgetter("requires_grad")
_num_dispatch_modes = torch._C._len_torch_dispatch_stack
_innermost_transform = torch._C._functorch.peek_interpreter_stack
_tracing_state = torch._C._get_tracing_state

_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether these tensors are just tensors, and nobody records, transforms or fakes what is done to them.

    If not, the operators have to be called: under torch.compile, export, tracing, functorch, with fake tensors, DTensors or a
    dispatch mode.
    """
    return not is_watched() and all(tensor is None or type(tensor) in _PLAIN_TYPES for tensor in tensors)


def is_watched() -> bool:
    """Whether somebody records, transforms or fakes what is done to tensors, whichever they are."""
    return (
        torch.compiler.is_compiling()
        or _num_dispatch_modes() > 0
        or _innermost_transform() is not None
        or _tracing_state() is not None
    )


class _Form(NamedTuple):
    """A call of fuse without its tensors.

    Args:
        weights_need: whether the weights have a gradient.
        has_weights, has_indices: which of them were given.
        keeps_means, keeps_states: what the backward will want, see :func:`igva_kernels.backward.kept_for_backward`.
    """

    program: MixProgram
    num_prefix_tokens: int
    num_tokens: int
    weights_need: bool
    has_weights: bool
    has_indices: bool
    keeps_means: bool
    keeps_states: bool
    impl: str


class _Call(NamedTuple):
    """A call of fuse without its weights: what autograd takes as one opaque argument.

    Args:
        compute: makes the output, and the group means where ``form`` says so.
    """

    form: _Form
    states: Sequence[Tensor]
    indices: Tensor | None
    compute: Callable[[], Sequence[Tensor]]


def fuse(
    states: Sequence[Tensor],
    weights: Tensor | None,
    indices: Tensor | None,
    program: MixProgram,
    num_prefix_tokens: int,
    dtype: torch.dtype | None,
    impl: str,
    *,
    signatures: Signatures | None = None,
    options: tuple = (),
) -> Tensor:
    """The mix of plain tensors, as the operator ``igva::fuse`` would give it; arguments as for that.

    Args:
        signatures: where to keep the call for :func:`fuse_again`, if it can be replayed; ``options`` are its key there.
    """
    module = resolve(impl, states, weights, program, num_prefix_tokens, indices)
    grad_enabled = torch.is_grad_enabled()
    weights_need = grad_enabled and weights is not None and weights.requires_grad
    states_need = grad_enabled and any(map(_requires_grad, states))
    save_means = should_save_means(program, indices, weights_need, states_need)
    keeps_means, keeps_states = kept_for_backward(program, weights_need, states_need, save_means)
    form = _Form(
        program,
        num_prefix_tokens,
        states[0].shape[1],
        weights_need,
        weights is not None,
        indices is not None,
        keeps_means,
        keeps_states,
        impl,
    )

    def compute() -> tuple[Tensor, ...]:
        return module.fuse_forward(states, weights, program, num_prefix_tokens, save_means, indices=indices, dtype=dtype)

    call = _Call(form, states, indices, compute)
    if states_need:
        return _FuseOfTrainable.apply(call, weights, *states)
    if signatures is not None and indices is None and hasattr(module, "recording"):
        call = call._replace(compute=_recorded(call, weights, module, signatures, options))
    return _FuseOfFrozen.apply(call, weights) if weights_need else call.compute()[0]


def fuse_again(signatures: Signatures, hidden_states: Any, weights: Any, options: tuple) -> Tensor | None:
    """The mix, if a call of the same signature was kept by :func:`fuse`; None if not. To be called unless :func:`is_watched`.

    Args:
        hidden_states: anything that the public function takes.
        weights: a tensor, or None; anything else is not found.
    """
    found = signatures.find(hidden_states, weights, options)
    if found is None:
        return None
    prepared, _, addresses = found
    return _replay_of_frozen(found, weights) if prepared.details.weights_need else prepared.replay.run(addresses, weights)[0]


def _recorded(
    call: _Call, weights: Tensor | None, module: ModuleType, signatures: Signatures, options: tuple
) -> Callable[[], Sequence[Tensor]]:
    """``call.compute``, which also keeps what it launches for :func:`fuse_again`."""
    signature = signature_of(call.states, weights, options)

    def compute() -> Sequence[Tensor]:
        with module.recording() as launches:
            outputs = call.compute()
        replay = module.replay_of(launches, call.states, weights, outputs if call.form.keeps_means else outputs[:1])
        if replay is not None:
            signatures.add(signature, replay, call.form)
        return outputs

    return compute


def should_save_means(program: MixProgram, indices: Tensor | None, weights_need: bool, states_need: bool) -> bool:
    """Whether the forward keeps the group means for dL/dw.

    Not for sparse weights, whose gradient needs k rows a token; and not where the backward reads the states anyway.
    """
    return weights_need and indices is None and not (states_need and program.has_norms) and program.worth_saving_means


def _save(
    ctx: Any,
    form: _Form,
    states: Sequence[Tensor],
    weights: Tensor | None,
    indices: Tensor | None,
    outputs: Sequence[Tensor],
) -> None:
    ctx.form = form
    if form.keeps_means and not form.keeps_states and indices is None:
        ctx.save_for_backward(outputs[1], weights)
        return
    saved = [outputs[1] if form.keeps_means else None, weights, indices]
    ctx.save_for_backward(*(tensor for tensor in saved if tensor is not None), *(states if form.keeps_states else ()))


def _gradients(ctx: Any, grad_out: Tensor, needs_weights: bool, needs_states: bool) -> tuple[Tensor | None, list[Tensor]]:
    form: _Form = ctx.form
    saved = list(ctx.saved_tensors)
    means, weights, indices = (saved.pop(0) if has else None for has in (form.keeps_means, form.has_weights, form.has_indices))
    module = resolve_backward(form.impl, grad_out, saved, means, weights, form.program, indices)
    grad_weights, grads = module.fuse_backward(
        grad_out,
        saved,
        means,
        weights,
        form.program,
        form.num_prefix_tokens,
        form.num_tokens,
        needs_weights,
        needs_states,
        indices=indices,
    )
    return grad_weights if grad_weights is None or weights is None else grad_weights.to(weights.dtype), grads


class _OfFrozen(torch.autograd.Function):
    """Only the weights have a gradient: autograd looks at one tensor."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[None, Tensor | None]:
        return None, _gradients(ctx, grad_out, True, False)[0]


class _FuseOfFrozen(_OfFrozen):
    @staticmethod
    def forward(ctx: Any, call: _Call, weights: Tensor) -> Tensor:
        outputs = call.compute()
        _save(ctx, call.form, call.states, weights, call.indices, outputs)
        return outputs[0]


class _ReplayOfFrozen(_OfFrozen):
    @staticmethod
    def forward(ctx: Any, found: Found, weights: Tensor) -> Tensor:
        prepared, states, addresses = found
        outputs = prepared.replay.run(addresses, weights)
        _save(ctx, prepared.details, states, weights, None, outputs)
        return outputs[0]


# Function.apply in Python looks for transforms and dead wrappers of functorch, which takes as long as all of autograd in C++.
# Tensors with a known signature are neither.
_replay_of_frozen = super(torch.autograd.Function, _ReplayOfFrozen).apply


class _FuseOfTrainable(torch.autograd.Function):
    """States have gradients, the weights perhaps."""

    @staticmethod
    def forward(ctx: Any, call: _Call, weights: Tensor | None, *states: Tensor) -> Tensor:
        outputs = call.compute()
        _save(ctx, call.form, call.states, weights, call.indices, outputs)
        return outputs[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        needs_weights, needs_states = ctx.needs_input_grad[1], ctx.needs_input_grad[2:]
        grad_weights, grads = _gradients(ctx, grad_out, needs_weights, True)
        return None, grad_weights, *per_source(grads, ctx.form.program, needs_states)
