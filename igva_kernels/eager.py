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

from igva_kernels.backward import kept_for_backward, per_source, resolve_backward, worth_saving_means
from igva_kernels.dispatch import resolve
from igva_kernels.program import MixProgram
from igva_kernels.quick import Signatures, key_of

_requires_grad = attrgetter("requires_grad")
_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})

Forward = Callable[["_Call", Tensor | None], tuple[Tensor, ...]]
"""Computes the output, and the group means where the form of the call says so."""


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


class _Form(NamedTuple):
    """A call of fuse without its tensors.

    Args:
        keeps_means, keeps_states: what the backward will want, see :func:`igva_kernels.backward.kept_for_backward`.
        forward: computes it.
    """

    program: MixProgram
    num_prefix_tokens: int
    num_tokens: int
    keeps_means: bool
    keeps_states: bool
    dtype: torch.dtype | None
    impl: str
    forward: Forward


class _Call(NamedTuple):
    """A call of fuse without its weights."""

    form: _Form
    states: Sequence[Tensor]
    indices: Tensor | None
    addresses: tuple[int, ...]


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

    def forward(call: _Call, weights: Tensor | None) -> tuple[Tensor, ...]:
        return module.fuse_forward(
            call.states, weights, program, num_prefix_tokens, save_means, indices=call.indices, dtype=dtype
        )

    keeps_means, keeps_states = kept_for_backward(program, weights_need, states_need, save_means)
    num_tokens = states[0].shape[1]
    form = _Form(program, num_prefix_tokens, num_tokens, keeps_means, keeps_states, dtype, impl, forward)
    if signatures is not None and indices is None and not states_need and hasattr(module, "recording"):
        form = form._replace(forward=_recorded(form, module, signatures, key_of(states[0], weights, options)))
    call = _Call(form, states, indices, ())
    if states_need:
        return _FuseOfTrainable.apply(call, weights, *states)
    return _run(call, weights, weights_need)


def fuse_again(signatures: Signatures, hidden_states: Any, weights: Any, options: tuple) -> Tensor | None:
    """The mix, if a call of the same signature was kept by :func:`fuse`; None if not. To be called where :func:`is_plain`.

    Args:
        hidden_states: anything that the public function takes.
        weights: a tensor, or None; anything else is not found.
    """
    if not (weights is None or isinstance(weights, Tensor)):
        return None
    found = signatures.find(hidden_states, weights, options)
    if found is None:
        return None
    prepared, states, addresses = found
    weights_need = weights is not None and weights.requires_grad and torch.is_grad_enabled()
    return _run(_Call(prepared.details, states, None, addresses), weights, weights_need)


def _recorded(form: _Form, module: ModuleType, signatures: Signatures, key: tuple) -> Forward:
    """The forward of ``form``, which also keeps what it launches for :func:`fuse_again`."""

    def forward(call: _Call, weights: Tensor | None) -> tuple[Tensor, ...]:
        with module.recording() as launches:
            outputs = form.forward(call, weights)
        replay = module.replay_of(launches, call.states, weights, outputs if form.keeps_means else outputs[:1])
        if replay is not None:
            signatures.add(key, call.states, weights, replay, form._replace(forward=_replayed(replay)))
        return outputs

    return forward


def _replayed(replay: Any) -> Forward:
    def forward(call: _Call, weights: Tensor | None) -> tuple[Tensor, ...]:
        return replay.run(call.addresses, weights)

    return forward


def _run(call: _Call, weights: Tensor | None, weights_need: bool) -> Tensor:
    return _FuseOfFrozen.apply(call, weights) if weights_need else call.form.forward(call, weights)[0]


def should_save_means(program: MixProgram, indices: Tensor | None, weights_need: bool, states_need: bool) -> bool:
    """Whether the forward keeps the group means for dL/dw.

    Not for sparse weights, whose gradient needs k rows a token; and not where the backward reads the states anyway.
    """
    return weights_need and indices is None and not (states_need and program.has_norms) and worth_saving_means(program)


def _save(ctx: Any, call: _Call, weights: Tensor | None, outputs: tuple[Tensor, ...]) -> None:
    form = call.form
    ctx.form, ctx.indices, ctx.has_weights = form, call.indices, weights is not None
    means = outputs[1:2] if form.keeps_means else ()
    ctx.save_for_backward(*means, *(() if weights is None else (weights,)), *(call.states if form.keeps_states else ()))


def _gradients(ctx: Any, grad_out: Tensor, needs_weights: bool, needs_states: bool) -> tuple[Tensor | None, list[Tensor]]:
    form: _Form = ctx.form
    saved = list(ctx.saved_tensors)
    means, weights = (saved.pop(0) if has else None for has in (form.keeps_means, ctx.has_weights))
    module = resolve_backward(form.impl, grad_out, saved, means, weights, form.program, ctx.indices)
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
        indices=ctx.indices,
    )
    return grad_weights if grad_weights is None or weights is None else grad_weights.to(weights.dtype), grads


class _FuseOfFrozen(torch.autograd.Function):
    """Only the weights have a gradient: autograd looks at one tensor."""

    @staticmethod
    def forward(ctx: Any, call: _Call, weights: Tensor) -> Tensor:
        outputs = call.form.forward(call, weights)
        _save(ctx, call, weights, outputs)
        return outputs[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[None, Tensor | None]:
        return None, _gradients(ctx, grad_out, True, False)[0]


class _FuseOfTrainable(torch.autograd.Function):
    """States have gradients, the weights perhaps."""

    @staticmethod
    def forward(ctx: Any, call: _Call, weights: Tensor | None, *states: Tensor) -> Tensor:
        outputs = call.form.forward(call, weights)
        _save(ctx, call, weights, outputs)
        return outputs[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        needs_weights, needs_states = ctx.needs_input_grad[1], ctx.needs_input_grad[2:]
        grad_weights, grads = _gradients(ctx, grad_out, needs_weights, True)
        return None, grad_weights, *per_source(grads, ctx.form.program, needs_states)
