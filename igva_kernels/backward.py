"""What a backward pass needs and gives, whether torch's operators call it or eager autograd does."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

from igva_kernels.dispatch import resolve
from igva_kernels.program import MixProgram


def kept_for_backward(program: MixProgram, weights_need: bool, states_need: bool, save_means: bool) -> tuple[bool, bool]:
    """Whether the backward needs the group means, and whether it needs the states.

    dL/dh is linear in the weights alone, unless a norm makes it depend on the values. Only dL/dw needs the means, or the
    states to sum them from again.
    """
    keeps_means = weights_need and save_means
    keeps_states = (weights_need and not save_means) or (states_need and program.has_norms)
    return keeps_means, keeps_states


def resolve_backward(
    impl: str,
    grad_out: Tensor,
    states: Sequence[Tensor],
    means: Tensor | None,
    weights: Tensor | None,
    program: MixProgram,
    indices: Tensor | None,
) -> ModuleType:
    """The implementation of the backward: asked with the maps that it will read."""
    maps = list(states or (() if means is None else means.unbind(0)))
    if not maps:  # where nothing had to be saved, an empty map of the gradients' shape stands for what will be written
        maps = [grad_out.new_empty(0, grad_out.shape[1], grad_out.shape[2] // len(program.slots))]
    return resolve(impl, maps, weights, program, 0, indices)


def per_source(grads: Sequence[Tensor], program: MixProgram, needed: Sequence[bool]) -> list[Tensor | None]:
    """The gradient of each source: all members of a class get the same tensor."""
    if not grads:
        return [None] * len(needed)
    classes = program.class_of_source
    return [grads[classes[source]] if need else None for source, need in enumerate(needed)]
