"""The mix written once more, from the plan's slots alone, and how far rounding may move its results.

Nothing here is shared with the library but the plan. Gradients come from autograd.

The bound on the error of an element is the first order of the standard analysis of rounding (Higham, Accuracy and Stability of
Numerical Algorithms, chapter 3): a sum of n products is off by at most ``(n + 1) * u * sum |products|``, u the unit roundoff
of the arithmetic, in whatever order it is taken. ``sum |products|`` is the same formula on absolute values. Plain torch in
the dtype of the arithmetic may be off by as much. So this is the yardstick of the other tests, torch's own error plus a
tolerance, with the most that torch's error can be in the place of what it happens to be: over ten thousand cases nothing may
depend on luck.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from fuzz.cases import Case
from fuzz.inputs import Inputs
from torch import Tensor

from igva_kernels import Layer, Mean, Norm

Normalise = Callable[[Tensor, int, Norm | None], Tensor]
"""A hidden state (B, N, D), its layer and the norm of the group, to the member of the group."""


@dataclass
class Results:
    """Output (B, N, S*D) and gradients, of the values of the weights and of every layer that is read; all float64."""

    out: Tensor
    grad_values: Tensor | None
    grad_states: dict[int, Tensor]


def exact_results(case: Case, inputs: Inputs) -> Results:
    """The results in float64."""
    return _differentiate(case, inputs.patches, inputs.values, inputs, inputs.grad_out.double(), _normalise)


def magnitudes(case: Case, inputs: Inputs) -> Results:
    """``sum |products|`` of every element of every result."""
    states = inputs.patches

    def normalise_magnitude(magnitude: Tensor, layer: int, norm: Norm | None) -> Tensor:
        """Its value bounds the terms of the norm, its gradient those of the norm's gradient
        ``r * (g - mean(g) - x * mean(g * x))``, where x is the result and r the factor."""
        if norm is None:
            return magnitude
        state = states[layer]
        centred = state - state.mean(-1, keepdim=True) if norm.kind == "layer" else state
        factor = (centred.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
        shift = magnitude.mean(-1, keepdim=True) if norm.kind == "layer" else 0
        result = ((magnitude + shift) * factor).detach()
        return factor * (magnitude + shift + result * (magnitude * result).mean(-1, keepdim=True))

    absolute = {layer: state.abs() for layer, state in states.items()}
    values = None if inputs.values is None else inputs.values.abs()
    return _differentiate(case, absolute, values, inputs, inputs.grad_out.double().abs(), normalise_magnitude)


def _dense_weights(values: Tensor, indices: Tensor | None, case: Case) -> Tensor:
    """Weights of any form as (B, N, K). An index outside of the K columns is padding."""
    shape = (case.batch, case.patches, case.plan.num_groups)
    if indices is not None:
        inside = (indices >= 0) & (indices < case.plan.num_groups)
        return values.new_zeros(shape).scatter_add(2, indices.long() * inside, values * inside)
    return (values if values.ndim != 2 else values[:, None]).expand(shape)


def _group_mean(states: dict[int, Tensor], layers: Sequence[int], norm: Norm | None, normalise: Normalise) -> Tensor:
    """The mean of a group, (B, N, D)."""
    return sum(normalise(states[layer], layer, norm) for layer in layers) / len(layers)


def _mix(case: Case, states: dict[int, Tensor], weights: Tensor | None, normalise: Normalise) -> Tensor:
    slots, column = [], 0
    for slot in case.plan.slots:
        if isinstance(slot, Layer):
            slots.append(states[slot.index])
        elif isinstance(slot, Mean):
            slots.append(_group_mean(states, slot.layers, slot.norm, normalise))
        else:
            total = 0 if slot.plus is None else states[slot.plus]
            for group in slot.groups:
                total = total + weights[..., column, None] * _group_mean(states, group, slot.norm, normalise)
                column += 1
            slots.append(total)
    return torch.cat(slots, dim=-1)


def _normalise(state: Tensor, layer: int, norm: Norm | None) -> Tensor:
    if norm is None:
        return state
    centred = state - state.mean(-1, keepdim=True) if norm.kind == "layer" else state
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()


def _differentiate(
    case: Case, states: dict[int, Tensor], values: Tensor | None, inputs: Inputs, grad_out: Tensor, normalise: Normalise
) -> Results:
    leaves = {layer: state.detach().requires_grad_() for layer, state in states.items()}
    weights = None
    if values is not None:
        values = values.detach().double().requires_grad_()
        weights = _dense_weights(values, inputs.indices, case)
    out = _mix(case, leaves, weights, normalise)
    wanted = [*leaves.values(), *(() if values is None else (values,))]
    grads = list(torch.autograd.grad(out, wanted, grad_out))
    grad_values = grads.pop() if values is not None else None
    return Results(out.detach(), grad_values, dict(zip(leaves, grads, strict=True)))
