"""Calls of ``fuse`` that repeat: what the first one found out is not found out again.

On a GPU the host's work for one call (checks of two dozen tensors, the choice of an implementation, Triton's binding of the
arguments) takes longer than the kernel on one image; on a CPU it is a tenth of the call. All of it follows from the *signature*
of the call: the plan, the options, and of each tensor the type, dtype, device, shape, strides and whether it requires a
gradient. The first call of a signature takes the long way and records its launch; later ones compare signatures, which torch
does for all tensors in a few microseconds (the tensor guards of torch.compile), and launch.

Only for frozen towers: where the states need gradients, autograd has to see each of them anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import itemgetter, or_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from igva_kernels.plan import FusionPlan

_guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
TensorGuards: Any = getattr(_guards, "TensorGuards", None)
"""Private to torch; without it each call takes the long way."""

_address_of = Tensor.data_ptr
_is_grad_enabled = torch.is_grad_enabled
_is_inference = torch.is_inference_mode_enabled

ALIGNMENT = 16
"""Bytes. Recorded kernels make accesses of this width."""

MAX_SIGNATURES = 64
"""Signatures kept of one plan: more than the batch sizes of any training or serving loop that repeats."""


class Prepared(NamedTuple):
    """What is known of one signature.

    Attributes:
        guards: whether tensors have this signature.
        replay: makes the recorded call, see ``Replay`` in :mod:`igva_kernels.impl.triton.replay` and
            :mod:`igva_kernels.impl.native.replay`.
        details: whatever the caller wants back with it.
    """

    guards: Any
    replay: Any
    details: Any


def signatures_of(plan: FusionPlan) -> Signatures:
    """The prepared calls of this plan, kept with it."""
    signatures = plan.memo.get("signatures")
    if signatures is None:
        signatures = plan.memo.setdefault("signatures", Signatures(plan))
    return signatures


Found = tuple[Prepared, tuple[Tensor, ...], tuple[int, ...]]
"""A prepared call, the states that it reads now, and their addresses."""


class Signature(NamedTuple):
    """What a call is known by.

    Attributes:
        key: what is looked up.
        guards: whether other tensors agree in all the rest.
    """

    key: tuple
    guards: Any


def signature_of(states: Sequence[Tensor], weights: Tensor | None, options: tuple) -> Signature | None:
    """The signature of a call of plain tensors, or None if it cannot be replayed."""
    if TensorGuards is None or reduce(or_, map(_address_of, states)) % ALIGNMENT:
        return None
    tensors, learns = _with_weights(states, weights)
    guards = TensorGuards(
        *tensors,
        dynamic_dims_sizes=[list(tensor.shape) for tensor in tensors],
        dynamic_dims_strides=[list(tensor.stride()) for tensor in tensors],
    )
    return Signature(_key(tensors, learns, options), guards)


def _with_weights(states: Sequence[Tensor], weights: Tensor | None) -> tuple[Sequence[Tensor], bool]:
    """The tensors that guards look at, and whether the weights have a gradient in this call."""
    if weights is None:
        return states, False
    if not weights.requires_grad:
        return (*states, weights), False
    if _is_grad_enabled():
        return (*states, weights), True
    # Without grad mode nobody listens, and guards made of a tensor that requires a gradient would never hold.
    return (*states, weights.detach()), False


def _key(tensors: Sequence[Tensor], learns: bool, options: tuple) -> tuple:
    return options, tensors[0].shape, len(tensors), learns, _is_inference()


class Signatures:
    """The prepared calls of one plan."""

    __slots__ = ("_num_states", "_pick", "_prepared")

    def __init__(self, plan: FusionPlan) -> None:
        self._num_states = plan.num_layers + 1
        first, *others = plan.sources
        # With one index itemgetter gives no tuple.
        self._pick = itemgetter(first, *others) if others else lambda states: (states[first],)
        self._prepared: dict[tuple, Prepared] = {}

    def find(self, hidden_states: Any, weights: Any, options: tuple) -> Found | None:
        """A prepared call; None where the long way has to be taken.

        Args:
            hidden_states, weights: anything that the public function takes.
        """
        if not isinstance(hidden_states, (tuple, list)) or len(hidden_states) != self._num_states:
            return None
        states = self._pick(hidden_states)
        if not isinstance(states[0], Tensor) or not (weights is None or isinstance(weights, Tensor)):
            return None
        tensors, learns = _with_weights(states, weights)
        prepared = self._prepared.get(_key(tensors, learns, options))
        if prepared is None or not prepared.replay.can_run() or not prepared.guards.check(*tensors):
            return None
        addresses = tuple(map(_address_of, states))
        return None if reduce(or_, addresses) % ALIGNMENT else (prepared, states, addresses)

    def add(self, signature: Signature | None, replay: Any, details: Any) -> None:
        """Keep a recorded call under its signature; the oldest gives way."""
        if signature is None:
            return
        while len(self._prepared) >= MAX_SIGNATURES:
            self._prepared.pop(next(iter(self._prepared)))
        self._prepared[signature.key] = Prepared(signature.guards, replay, details)
