"""Summaries of states that go on to be mixed, for towers that are trained.

The weights depend on the summaries, so a hidden state has two gradients: one from the mix, which fills the patches of one map a
group, and one from the summaries, which is a single row of it. Were they two inputs of autograd, it would make a map of zeros
for that row and add it to the other, for each of some two dozen states. So the states pass *through* the node that takes the
summaries: in the backward it gets the maps from the mix, which nobody else holds, and adds its row to them in place.

Shapes: B images, T tokens with prefix, P prefix tokens, D width, K weighted groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from igva_kernels.impl.reference import accumulation_dtype, summary_groups
from igva_kernels.program import MixProgram


def summaries_and_states(
    states: Sequence[Tensor], program: MixProgram, num_prefix_tokens: int, summary: str, module: ModuleType
) -> tuple[Tensor, list[Tensor]]:
    """The (B, K, D) summaries, and the states (B, T, D) again, through which the gradient of both flows.

    The states that are returned must go to one consumer only, that keeps no gradient of theirs: it is changed in place.
    """
    summaries, *passed = _PassingSummaries.apply((program, num_prefix_tokens, summary, module), *states)
    return summaries, passed


class _PassingSummaries(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: tuple[MixProgram, int, str, ModuleType], *states: Tensor) -> tuple[Tensor, ...]:
        program, num_prefix_tokens, summary, module = call
        ctx.call = program, num_prefix_tokens, summary
        ctx.shape, ctx.dtype = states[0].shape, states[0].dtype
        ctx.set_materialize_grads(False)
        return module.summaries_forward(states, program, num_prefix_tokens, summary), *states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *maps: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, *maps
        program, num_prefix_tokens, summary = ctx.call
        rows = _row_of_each_class(grad, program, 1 if summary == "cls" else ctx.shape[1] - num_prefix_tokens)
        place = slice(0, 1) if summary == "cls" else slice(num_prefix_tokens, None)
        total: list[Tensor | None] = []
        class_of_map: dict[Tensor, int] = {}  # tensors hash by identity: the members of a group come with one map
        for source, incoming in enumerate(maps):
            wanted = ctx.needs_input_grad[1 + source]
            gradient_class = program.class_of_source[source]
            if not wanted:
                total.append(None)
                continue
            if incoming is None:  # the mix does not read this state
                incoming = grad.new_zeros(ctx.shape, dtype=ctx.dtype)
            elif class_of_map.get(incoming) == gradient_class:
                total.append(incoming)
                continue
            elif incoming in class_of_map or 0 in incoming.stride():
                incoming = incoming.contiguous().clone()
            class_of_map[incoming] = gradient_class
            incoming[:, place] += rows[gradient_class]
            total.append(incoming)
        return None, *total


def _row_of_each_class(grad: Tensor, program: MixProgram, num_averaged_rows: int) -> list[Tensor]:
    """For each gradient class the (B, 1, D) that each of its averaged rows gets."""
    wide = grad.to(accumulation_dtype(grad.dtype))
    group_of_column = summary_groups(program)
    rows = []
    for _, groups in program.gradient_classes:
        row = torch.zeros_like(wide[:, :1])
        for column, group in enumerate(group_of_column):
            if group in groups:
                row.add_(wide[:, column : column + 1], alpha=1.0 / (len(program.groups[group]) * num_averaged_rows))
        rows.append(row)
    return rows
