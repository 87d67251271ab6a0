"""What a repeated call consists of, piece by piece: what is torch's, what is Triton's, and what is left for this library.

A call that repeats compares the signature of its tensors (:mod:`igva_kernels.quick`), allocates, launches, and with a frozen
tower makes a node of autograd. Most of that is code of torch and of Triton, and no arrangement of ours can make it cheaper;
measured alone, in the same run and by the same clock, it is the floor of the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from igva_kernels.quick import signatures_of

from .host import Step


def pieces_of(step: Step) -> dict[str, Callable[[], object]]:
    """The pieces of ``step.forward``, each to be called again and again.

    Args:
        step: of inference or with a frozen tower; it is called twice, and the second call must repeat the first.

    Raises:
        RuntimeError: the calls of this step are not replayed here: no Triton kernels run its tensors.
    """
    step.forward()
    signatures = signatures_of(step.plan)
    found = signatures.find(step.states, step.weights, (1, "auto"))
    if found is None:
        raise RuntimeError("the call was not recorded, so there is no replay to take apart; see igva_kernels/quick.py")
    prepared, states, addresses = found
    tensors = (*states, step.weights)
    replay = prepared.replay
    if not hasattr(replay, "_launch"):  # one of the compiled CPU kernels
        raise RuntimeError("no Triton kernel runs these tensors, so there is no replay to take apart")
    launched: list[tuple] = []
    with mock.patch.object(replay, "_launch", lambda *arguments: launched.append(arguments)):
        outputs = replay.run(addresses, step.weights)  # kept, so that the addresses in the arguments stay valid
    forms = [form for _, *form in replay._outputs]

    def allocate() -> list[Tensor]:
        return [replay._empty(*form) for form in forms]

    def find() -> object:
        return signatures.find(step.states, step.weights, (1, "auto"))

    pieces: dict[str, Callable[[], object]] = {
        "calling a function that does nothing": lambda: None,
        "torch: comparing 25 tensors with their signature": lambda: prepared.guards.check(*tensors),
        "torch: the addresses of 24 tensors": lambda: tuple(map(Tensor.data_ptr, states)),
        f"torch: allocating {len(outputs)} output{'s' * (len(outputs) > 1)}": allocate,
        "Triton: the launcher, with its arguments ready": lambda: replay._launch(*launched[0]),
        "ours: finding the recorded call, with torch's part in it": find,
        "ours: the replay, with torch's and Triton's part in it": lambda: replay.run(addresses, step.weights),
    }
    if step.mode == "frozen":
        means = outputs[1]
        call = (found, means)
        pieces["torch: Function.apply of a node that saves two tensors"] = lambda: _Floor.apply(call, step.weights)
        pieces["torch: the same without the part of Function.apply in Python"] = lambda: _apply_floor(call, step.weights)
    return pieces


class _Floor(torch.autograd.Function):
    """A node that does nothing but what each node of this form must do; the new tensor that it returns is an empty one."""

    @staticmethod
    def forward(ctx: Any, call: tuple[object, Tensor], weights: Tensor) -> Tensor:
        ctx.save_for_backward(call[1], weights)
        return weights.new_empty(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


_apply_floor = super(torch.autograd.Function, _Floor).apply
