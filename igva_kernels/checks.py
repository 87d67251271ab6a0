"""What the public functions ask of their arguments.

Shapes: B images · T tokens with prefix · P prefix tokens · N = T − P patches · D vision width · L encoder layers · K groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from igva_kernels.dispatch import MODULES
from igva_kernels.plan import FusionPlan


def select_states(
    hidden_states: Sequence[Tensor | None] | Tensor, plan: FusionPlan, sources: Sequence[int], num_prefix_tokens: int
) -> list[Tensor]:
    """The hidden states that are read, checked.

    Raises:
        TypeError, ValueError: as :func:`igva_kernels.fuse`.
    """
    if isinstance(hidden_states, Tensor):
        if hidden_states.ndim != 4:
            raise ValueError(
                "hidden_states must be a sequence of (B, T, D) tensors or one stacked (L+1, B, T, D) tensor, "
                f"got a tensor of shape {tuple(hidden_states.shape)}"
            )
        hidden_states = hidden_states.unbind(0)
    expected = plan.num_layers + 1
    if len(hidden_states) != expected:
        raise ValueError(
            f"hidden_states has {len(hidden_states)} entries, but a plan for {plan.num_layers} layers needs {expected} "
            f"(h_0, the embedding output, to h_{plan.num_layers}); make the plan with the tower's num_hidden_layers"
        )
    states: list[Tensor] = []
    for layer in sources:
        state = hidden_states[layer]
        if state is None:
            raise ValueError(f"hidden_states[{layer}] is None, but the plan reads the layers {list(sources)}")
        states.append(state)
    check_same(states, sources, "hidden_states[{}]")
    check_prefix(num_prefix_tokens, states[0].shape[1])
    return states


def check_prefix(num_prefix_tokens: int, num_tokens: int) -> None:
    """P is an int that leaves at least one patch."""
    if not isinstance(num_prefix_tokens, int) or isinstance(num_prefix_tokens, bool):
        raise TypeError(f"num_prefix_tokens must be an int, got {num_prefix_tokens!r}")
    if not 0 <= num_prefix_tokens < num_tokens:
        raise ValueError(
            f"num_prefix_tokens={num_prefix_tokens} leaves no patch of {num_tokens} tokens; "
            "it counts the CLS and register tokens before the patches"
        )


def check_same(states: Sequence[Tensor], numbers: Sequence[int], name: str) -> None:
    """All states are (B, T, D) tensors that agree; ``name`` is a template for their numbers, filled only for an error."""
    first = states[0]
    if not isinstance(first, Tensor):
        raise TypeError(f"{name.format(numbers[0])} must be a tensor, got {type(first).__name__}")
    if first.ndim != 3:
        raise ValueError(f"{name.format(numbers[0])} must have the shape (B, T, D), got {tuple(first.shape)}")
    if not first.is_floating_point():
        raise TypeError(f"{name.format(numbers[0])} must be floating point, got {first.dtype}")
    shape, dtype, device = first.shape, first.dtype, first.device
    for index, state in enumerate(states):
        if not isinstance(state, Tensor):
            raise TypeError(f"{name.format(numbers[index])} must be a tensor, got {type(state).__name__}")
        if state.dtype != dtype or state.device != device or state.shape != shape:
            raise ValueError(
                f"all states must agree in shape, dtype and device: {name.format(numbers[0])} is {tuple(shape)} {dtype} on "
                f"{device}, {name.format(numbers[index])} is {tuple(state.shape)} {state.dtype} on {state.device}"
            )


def check_weights(
    weights: Tensor | None, indices: Tensor | None, plan: FusionPlan, state: Tensor, num_prefix_tokens: int
) -> None:
    """The weights fit the plan and the states: (K,), (B, K), (B, N, K), or with ``indices`` both (B, N, k)."""
    num_groups = plan.num_groups
    if weights is None:
        if num_groups:
            raise ValueError(
                f"weights is None, but the plan has {num_groups} weighted groups; pass (K,), (B, K) or (B, N, K), "
                "or use FusionPlan.igva_average for the plain mean"
            )
        return
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights must be a tensor, SparseWeights or None, got {type(weights).__name__}")
    if not num_groups:
        raise ValueError(f"weights of shape {tuple(weights.shape)} given, but the plan has no weighted slot; pass None")
    if not weights.is_floating_point():
        raise TypeError(f"weights must be floating point, got {weights.dtype}")
    if weights.device != state.device:
        raise ValueError(f"weights is on {weights.device}, the hidden states on {state.device}; move one of them")
    batch, num_patches = state.shape[0], state.shape[1] - num_prefix_tokens
    if indices is not None:
        _check_indices(weights, indices, (batch, num_patches))
        return
    allowed = ((num_groups,), (batch, num_groups), (batch, num_patches, num_groups))
    # Shapes of one length alone are compared: a tuple's ``in`` holds B against K, which pins the batch of an exported graph.
    if not 1 <= weights.ndim <= 3 or tuple(weights.shape) != allowed[weights.ndim - 1]:
        raise ValueError(
            f"weights has the shape {tuple(weights.shape)}, expected (K,) = {allowed[0]}, (B, K) = {allowed[1]} "
            f"or (B, N, K) = {allowed[2]}"
        )


def _check_indices(values: Tensor, indices: Tensor, leading: tuple[int, int]) -> None:
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int32, torch.int64):
        got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"weights.indices must be an int32 or int64 tensor, got {got}")
    if values.ndim != 3 or tuple(values.shape[:2]) != leading or values.shape[2] < 1:
        raise ValueError(f"weights.values has the shape {tuple(values.shape)}, expected (B, N, k) = {(*leading, 'k >= 1')}")
    if indices.shape != values.shape or indices.device != values.device:
        raise ValueError(
            f"weights.indices is {tuple(indices.shape)} on {indices.device}, weights.values {tuple(values.shape)} on "
            f"{values.device}; they must agree"
        )


def check_plan(plan: FusionPlan) -> None:
    if not isinstance(plan, FusionPlan):
        raise TypeError(f"plan must be a FusionPlan, got {type(plan).__name__}; make one with FusionPlan.igva(...)")


def check_impl(impl: str) -> None:
    if impl != "auto" and impl not in MODULES:
        raise ValueError(f"impl must be one of 'auto', {', '.join(map(repr, MODULES))}, got {impl!r}")


def check_summarised(plan: FusionPlan, summary: str, num_prefix_tokens: int) -> None:
    """The plan has groups to summarise, and the tower has what the summary is made of."""
    check_plan(plan)
    if plan.num_groups == 0:
        raise ValueError("plan has no weighted groups, so there is nothing to summarise; use FusionPlan.igva(...)")
    if summary not in ("cls", "mean_patch"):
        raise ValueError(f"summary must be 'cls' or 'mean_patch', got {summary!r}")
    if summary == "cls" and num_prefix_tokens < 1:
        raise ValueError('summary="cls" needs num_prefix_tokens >= 1: this tower has no CLS token; use summary="mean_patch"')


def check_means_dtype(means_dtype: torch.dtype | None, dtype: torch.dtype) -> None:
    """Group means are kept in the dtype of the states, or in that of the sums."""
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    if means_dtype not in (None, dtype, accumulation):
        raise ValueError(f"means_dtype={means_dtype} for states in {dtype}; use None (as the states) or {accumulation}")


def check_group_means(means: Sequence[Tensor], copies: Sequence[Tensor], dtype: torch.dtype, plan: FusionPlan) -> list[Tensor]:
    """The maps that ``plan.mix_program`` reads, checked: the means of one dtype, the copies of ``dtype``."""
    program = plan.program
    if len(means) != len(program.groups) or len(copies) != len(program.copied_sources):
        raise ValueError(
            f"group_means holds {len(means)} means and {len(copies)} copies, but the plan has "
            f"{len(program.groups)} groups and copies {len(program.copied_sources)} layers; "
            "reduce with the plan that you mix with"
        )
    if means:
        check_same(means, range(len(means)), "group_means.means[{}]")
        check_means_dtype(means[0].dtype, dtype)
    if copies:
        check_same(copies, range(len(copies)), "group_means.copies[{}]")
        if copies[0].dtype != dtype:
            raise ValueError(f"group_means.copies are {copies[0].dtype}, expected group_means.dtype = {dtype}")
    if means and copies and (means[0].shape != copies[0].shape or means[0].device != copies[0].device):
        raise ValueError(
            f"group_means.means are {tuple(means[0].shape)} on {means[0].device}, group_means.copies "
            f"{tuple(copies[0].shape)} on {copies[0].device}; they must agree"
        )
    return [*means, *copies]
