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
from fuzz.cases import Case, NormBehind
from fuzz.inputs import Inputs
from torch import Tensor

from igva_kernels import Layer, Mean, Norm

Normalise = Callable[[Tensor, int, Norm | None], Tensor]
"""A hidden state (B, N, D), its layer and the norm of the group, to the member of the group."""


@dataclass
class Results:
    """Output (B, N, S*D) and gradients: of the values of the weights, of every layer that is read, and by name of the
    parameters of the norm behind; all float64."""

    out: Tensor
    grad_values: Tensor | None
    grad_states: dict[int, Tensor]
    grad_norm: dict[str, Tensor]


def exact_results(case: Case, inputs: Inputs) -> Results:
    """The results in float64."""
    parameters = inputs.norm_parameters
    return _differentiate(
        case, inputs.patches, inputs.values, parameters, inputs, inputs.grad_out.double(), _normalise, _normalise_output
    )


def magnitudes(case: Case, inputs: Inputs) -> Results:
    """``sum |products|`` of every element of every result."""
    states = inputs.patches

    def normalise_magnitude(magnitude: Tensor, layer: int, norm: Norm | None) -> Tensor:
        return magnitude if norm is None else _norm_magnitude(magnitude, states[layer], norm)

    exact_mix = _mixed(case, states, inputs.values, inputs)

    def normalise_output_magnitude(magnitude: Tensor, norm: NormBehind, parameters: dict[str, Tensor]) -> Tensor:
        """As for a hidden state; the norm behind is taken where the exact mix is."""
        normalised = _norm_magnitude(magnitude, exact_mix, norm)
        return normalised * parameters.get("weight", 1) + parameters.get("bias", 0)

    absolute = {layer: state.abs() for layer, state in states.items()}
    values = None if inputs.values is None else inputs.values.abs()
    parameters = {name: parameter.abs() for name, parameter in inputs.norm_parameters.items()}
    grad_out = inputs.grad_out.double().abs()
    return _differentiate(case, absolute, values, parameters, inputs, grad_out, normalise_magnitude, normalise_output_magnitude)


def _norm_magnitude(magnitude: Tensor, value: Tensor, norm: Norm | NormBehind) -> Tensor:
    """Its value bounds the terms of the norm at ``value``, its gradient those of the norm's gradient
    ``r * (g - mean(g) - x * mean(g * x))``, where x is the result and r the factor."""
    centred = value - value.mean(-1, keepdim=True) if norm.kind == "layer" else value
    factor = (centred.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    shift = magnitude.mean(-1, keepdim=True) if norm.kind == "layer" else 0
    result = ((magnitude + shift) * factor).detach()
    return factor * (magnitude + shift + result * (magnitude * result).mean(-1, keepdim=True))


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


def _normalise(state: Tensor, layer: int, norm: Norm | NormBehind | None) -> Tensor:
    if norm is None:
        return state
    centred = state - state.mean(-1, keepdim=True) if norm.kind == "layer" else state
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()


def _normalise_output(mixed: Tensor, norm: NormBehind, parameters: dict[str, Tensor]) -> Tensor:
    return _normalise(mixed, -1, norm) * parameters.get("weight", 1) + parameters.get("bias", 0)


def _mixed(case: Case, states: dict[int, Tensor], values: Tensor | None, inputs: Inputs) -> Tensor:
    """The exact mix before the norm behind it."""
    weights = None if values is None else _dense_weights(values.detach().double(), inputs.indices, case)
    return _mix(case, states, weights, _normalise)


def _differentiate(
    case: Case,
    states: dict[int, Tensor],
    values: Tensor | None,
    parameters: dict[str, Tensor],
    inputs: Inputs,
    grad_out: Tensor,
    normalise: Normalise,
    normalise_output: Callable[[Tensor, NormBehind, dict[str, Tensor]], Tensor],
) -> Results:
    leaves = {layer: state.detach().requires_grad_() for layer, state in states.items()}
    parameters = {name: parameter.detach().double().requires_grad_() for name, parameter in parameters.items()}
    weights = None
    if values is not None:
        values = values.detach().double().requires_grad_()
        weights = _dense_weights(values, inputs.indices, case)
    out = _mix(case, leaves, weights, normalise)
    if case.norm is not None:
        out = normalise_output(out, case.norm, parameters)
    wanted = [*leaves.values(), *parameters.values(), *(() if values is None else (values,))]
    grads = list(torch.autograd.grad(out, wanted, grad_out))
    grad_values = grads.pop() if values is not None else None
    grad_norm = dict(zip(parameters, grads[len(leaves) :], strict=True))
    return Results(out.detach(), grad_values, dict(zip(leaves, grads[: len(leaves)], strict=True)), grad_norm)
