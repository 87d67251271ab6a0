"""The gate before every clock: a variant whose results are wrong gets no speed.

The reference is the official formulation in float64, a few images at a time. The rule is that of the library's tests: the
largest error is at most twice the largest error of the official formulation in the same dtype, plus a few roundings of the
result's scale. dL/dw is a sum over all N*D elements: in float32 another order moves it by up to about sqrt(N*D) roundings
(eager torch sums pairwise, compiled code one after the other), 1e-4 of its scale; a missing layer would be a tenth of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .peers import official_fuse
from .sizes import FuseCase, FuseInputs

IMAGES_AT_ONCE = 4
"""Images of one float64 chunk: 25 maps of CLIP-L/336 with their gradients are 0.5 GB for each image."""

SLACK = 4
"""Roundings of the result's largest value, for results that the official formulation rounds luckily."""

Variant = Callable[[FuseInputs], Tensor]


class WrongResult(RuntimeError):
    """A variant's output or gradient is not that of the formula."""


@dataclass
class Results:
    """What one call of a case computes: the output and, by mode, the gradients."""

    output: Tensor
    grad_weights: Tensor | None = None
    grad_states: tuple[Tensor, ...] = ()

    def named(self) -> dict[str, Tensor]:
        tensors = {"output": self.output}
        if self.grad_weights is not None:
            tensors["grad_weights"] = self.grad_weights
        return tensors | {f"grad_states[{index}]": grad for index, grad in enumerate(self.grad_states)}


def run(case: FuseCase, variant: Variant, inputs: FuseInputs) -> Results:
    """One call of a variant: what is checked, and what is timed where the case is not the backward alone."""
    if case.mode == "forward":
        with torch.no_grad():
            return Results(variant(inputs))
    output = variant(inputs)
    grads = torch.autograd.grad(output, leaves(case, inputs), inputs.cotangent)
    if inputs.weights is None:
        return Results(output, None, grads)
    return Results(output, grads[0], grads[1:])


def backward_of(case: FuseCase, variant: Variant, inputs: FuseInputs) -> Callable[[], tuple[Tensor, ...]]:
    """The backward alone as a call that can be repeated: the forward runs here, once, and its graph is kept."""
    output = variant(inputs)
    return partial(torch.autograd.grad, output, leaves(case, inputs), inputs.cotangent, retain_graph=True)


def leaves(case: FuseCase, inputs: FuseInputs) -> list[Tensor]:
    """What a case differentiates by: the weights, if any, then the hidden states that are read."""
    weights = [] if inputs.weights is None else [inputs.weights]
    if not case.trains_states:
        return weights
    return weights + [inputs.hidden_states[layer] for layer in case.tower.plan(case.stage).sources]


def official(case: FuseCase) -> Variant:
    """The official formulation as a variant of a case."""
    tower = case.tower
    base = tower.num_layers - 1

    def variant(inputs: FuseInputs) -> Tensor:
        return official_fuse(inputs.hidden_states, tower.groups, base, inputs.weights, tower.num_prefix_tokens)

    return variant


def require_correct(case: FuseCase, variant: Variant, inputs: FuseInputs) -> None:
    """Compare every element of a variant's results with the formula.

    Raises:
        WrongResult: names the result, its error and what was allowed.
    """
    actual = run(case, variant, inputs).named()
    eager = run(case, official(case), inputs).named()
    worst: dict[str, list[float]] = {name: [0.0, 0.0, 0.0] for name in eager}  # our error, eager's error, scale
    for first in range(0, case.batch, IMAGES_AT_ONCE):
        images = slice(first, first + IMAGES_AT_ONCE)
        exact = run(case, official(case), _in_float64(inputs, images)).named()
        for name, expected in exact.items():
            if name not in actual or actual[name][images].shape != expected.shape:
                raise WrongResult(f"{case.name}: {name} is missing or has the wrong shape")
            errors = (_distance(actual[name][images], expected), _distance(eager[name][images], expected))
            sizes = (*errors, expected.abs().max().item())
            worst[name] = [max(pair) for pair in zip(worst[name], sizes, strict=True)]
    terms = case.tower.num_patches * case.tower.vision_dim
    for name, (error, eager_error, scale) in worst.items():
        allowed = 2 * eager_error + SLACK * torch.finfo(case.dtype).eps * scale
        if name == "grad_weights":
            allowed += math.sqrt(terms) * torch.finfo(torch.float32).eps * scale
        if not error <= allowed:  # also refuses NaN
            raise WrongResult(f"{case.name}: {name} is off by {error:.3e}, allowed {allowed:.3e} (scale {scale:.3e})")


def _distance(actual: Tensor, expected: Tensor) -> float:
    distance = (actual.detach().double() - expected).abs().max().item()
    return distance if distance == distance else float("inf")


def _in_float64(inputs: FuseInputs, images: slice) -> FuseInputs:
    def convert(tensor: Tensor) -> Tensor:
        return tensor.detach()[images].double().requires_grad_(tensor.requires_grad)

    weights = None if inputs.weights is None else convert(inputs.weights)
    return FuseInputs([convert(state) for state in inputs.hidden_states], weights, inputs.cotangent[images].double())
