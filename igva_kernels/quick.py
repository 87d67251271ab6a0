"""Calls of ``fuse`` that repeat: what the first one found out is not found out again.

On a GPU the host's work for one call (checks of two dozen tensors, the choice of an implementation, Triton's binding of the
arguments) takes longer than the kernel on one image. All of it follows from the *signature* of the call: the plan, the options,
and of each tensor the type, dtype, device, shape, strides and whether it requires a gradient. The first call of a signature
takes the long way and records its launch; later ones compare signatures, which torch does for all tensors in a few microseconds
(the tensor guards of torch.compile), and launch.

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

ALIGNMENT = 16
"""Bytes. Recorded kernels make accesses of this width."""

MAX_SIGNATURES = 64
"""Signatures kept of one plan: more than the batch sizes of any training or serving loop that repeats."""


class Prepared(NamedTuple):
    """What is known of one signature.

    Attributes:
        guards: whether tensors have this signature.
        replay: launches the recorded kernel, see :class:`igva_kernels.impl.triton.replay.Replay`.
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


def key_of(state: Tensor, weights: Tensor | None, options: tuple) -> tuple:
    """What of a signature is looked up; the guards compare the rest."""
    learns = weights is not None and weights.requires_grad
    return options, state.shape, learns, torch.is_grad_enabled(), torch.is_inference_mode_enabled()


class Signatures:
    """The prepared calls of one plan."""

    def __init__(self, plan: FusionPlan) -> None:
        self._num_states = plan.num_layers + 1
        first, *others = plan.sources
        # With one index itemgetter gives no tuple.
        self._pick = itemgetter(first, *others) if others else lambda states: (states[first],)
        self._prepared: dict[tuple, Prepared] = {}

    def find(
        self, hidden_states: Any, weights: Tensor | None, options: tuple
    ) -> tuple[Prepared, tuple[Tensor, ...], tuple[int, ...]] | None:
        """A prepared call, its states and their addresses; None where the long way has to be taken."""
        if not self._prepared or not isinstance(hidden_states, (tuple, list)) or len(hidden_states) != self._num_states:
            return None
        states = self._pick(hidden_states)
        if not isinstance(states[0], Tensor):
            return None
        prepared = self._prepared.get(key_of(states[0], weights, options))
        if prepared is None or not prepared.replay.can_run():
            return None
        if not (prepared.guards.check(*states) if weights is None else prepared.guards.check(*states, weights)):
            return None
        addresses = tuple(map(Tensor.data_ptr, states))
        return None if reduce(or_, addresses) % ALIGNMENT else (prepared, states, addresses)

    def add(self, key: tuple, states: Sequence[Tensor], weights: Tensor | None, replay: Any, details: Any) -> None:
        """Keep a recorded call of plain tensors under its :func:`key_of`; the oldest gives way."""
        if TensorGuards is None or reduce(or_, map(Tensor.data_ptr, states)) % ALIGNMENT:
            return
        tensors = [*states] if weights is None else [*states, weights]
        guards = TensorGuards(
            *tensors,
            dynamic_dims_sizes=[list(tensor.shape) for tensor in tensors],
            dynamic_dims_strides=[list(tensor.stride()) for tensor in tensors],
        )
        while len(self._prepared) >= MAX_SIGNATURES:
            self._prepared.pop(next(iter(self._prepared)))
        self._prepared[key] = Prepared(guards, replay, details)
