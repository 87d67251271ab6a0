"""The public functions: check the arguments, then call the operator.

Shapes: B images · T tokens with prefix · P prefix tokens · N = T − P patches · D vision width · L encoder layers (h_0 … h_L are
L + 1 hidden states) · K groups · S slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from igva_kernels import ops
from igva_kernels.plan import FusionPlan
from igva_kernels.program import MixProgram

Implementation = Literal["auto", "triton", "torch", "reference"]
Summary = Literal["cls", "mean_patch"]
HiddenStates = Sequence[Tensor | None] | Tensor


@dataclass(frozen=True)
class GroupMeans:
    """What :func:`reduce_groups` keeps of the hidden states: all that :func:`mix` needs.

    Args:
        means: one (B, N, D) map for each distinct group of the plan, the weighted ones first (``plan.program.groups``).
        copies: one (B, N, D) view for each distinct layer that the plan copies, ascending.
        summaries: (B, K, D), one vector for each weighted group; None for a plan without weighted groups.
    """

    means: tuple[Tensor, ...]
    copies: tuple[Tensor, ...]
    summaries: Tensor | None


def fuse(
    hidden_states: HiddenStates,
    plan: FusionPlan,
    weights: Tensor | None = None,
    *,
    num_prefix_tokens: int,
    impl: Implementation = "auto",
) -> Tensor:
    """Mix the layers of a tower in one pass: each hidden state is read once, the output written once.

    ``out[b, n, s*D:(s+1)*D]`` is slot s of the plan at patch n: a copied layer, a mean, or ``sum_k w[b, k] * mean(group k)``
    (IGVA, arXiv 2501.08443: F_fused and its concatenation with the penultimate layer). Prefix tokens (CLS, registers) are
    dropped. Sums run in float32 (float64 for float64 states), layers of a group ascending, and are rounded once.

    Where only the weights need a gradient (frozen tower) and K <= half of the layers read, the K group means are kept for the
    backward and the hidden states are not. Where the states need one, all layers of a group get the same tensor.

    Args:
        hidden_states: the L + 1 hidden states as Hugging Face gives them, each (B, T, D) of one floating dtype on one device;
            entries that the plan does not read may be None. A stacked (L + 1, B, T, D) tensor is taken as its views.
        plan: which layers feed which slot.
        weights: (K,) shared, (B, K) per image or (B, N, K) per token, any floating dtype; None for a plan without weighted
            slots.
        num_prefix_tokens: P, the tokens before the patches: 1 for CLIP, 0 for SigLIP, 1 + registers for DINOv2.
        impl: ``"auto"`` takes the Triton kernels where they can run, else plain torch; a named implementation never gives way.

    Returns:
        (B, N, S*D) in the dtype of the hidden states, contiguous.

    Raises:
        TypeError: an argument of a wrong type, hidden states or weights that are not floating point.
        ValueError: a wrong number of hidden states, a layer that the plan reads is None, shapes, dtypes or devices that differ,
            weights missing, superfluous or of a wrong shape, ``impl`` unknown or unable to run this input.
    """
    _check_plan(plan)
    states = _states_of(hidden_states, plan, plan.sources, num_prefix_tokens)
    _check_impl(impl)
    _check_weights(weights, plan, states[0], num_prefix_tokens)
    return _run_fuse(states, weights, plan.program, num_prefix_tokens, impl)


def group_summaries(
    hidden_states: HiddenStates,
    plan: FusionPlan,
    *,
    num_prefix_tokens: int,
    summary: Summary = "cls",
    impl: Implementation = "auto",
) -> Tensor:
    """One vector for each weighted group, from which the weights are computed before the maps are mixed.

    Args:
        hidden_states: as for :func:`fuse`; only the layers of the weighted groups are read.
        plan: a plan with at least one weighted slot.
        num_prefix_tokens: P; must be at least 1 for ``summary="cls"``.
        summary: ``"cls"``, the mean of token 0 over the group's layers (the paper's F_k^cls), or ``"mean_patch"``, the mean of
            all patches, for towers without a CLS token (SigLIP).

    Returns:
        (B, K, D) in the dtype of the hidden states.

    Raises:
        ValueError: as :func:`fuse`; also a plan without weighted groups, an unknown ``summary``, or ``"cls"`` without a
            prefix token.
    """
    _check_plan(plan)
    if plan.num_groups == 0:
        raise ValueError("plan has no weighted groups, so there is nothing to summarise; use FusionPlan.igva(...)")
    _check_summary(summary, num_prefix_tokens)
    states = _states_of(hidden_states, plan, plan.summary_sources, num_prefix_tokens)
    _check_impl(impl)
    return torch.ops.igva.group_summaries(states, plan.summary_program.encode(), num_prefix_tokens, summary, impl)


def reduce_groups(
    hidden_states: HiddenStates,
    plan: FusionPlan,
    *,
    num_prefix_tokens: int,
    summary: Summary = "cls",
    impl: Implementation = "auto",
) -> GroupMeans:
    """The first of two steps: the group means, which do not depend on the weights.

    ``mix(reduce_groups(h, plan, ...), plan, weights)`` equals ``fuse(h, plan, weights, ...)`` up to the rounding of the means
    to the dtype of the hidden states. Use it where one set of images meets several instructions.

    Args, Raises: as for :func:`fuse` and :func:`group_summaries`.
    """
    _check_plan(plan)
    states = _states_of(hidden_states, plan, plan.sources, num_prefix_tokens)
    _check_impl(impl)
    program = plan.program
    means = torch.ops.igva.reduce_groups(states, program.encode(), num_prefix_tokens, impl)
    summaries = None
    if plan.num_groups:
        summaries = group_summaries(hidden_states, plan, num_prefix_tokens=num_prefix_tokens, summary=summary, impl=impl)
    copies = tuple(states[source][:, num_prefix_tokens:] for source in program.copied_sources)
    return GroupMeans(means.unbind(0), copies, summaries)


def mix(group_means: GroupMeans, plan: FusionPlan, weights: Tensor | None = None, *, impl: Implementation = "auto") -> Tensor:
    """The second of two steps: the slots of the plan from finished group means.

    Args:
        group_means: the result of :func:`reduce_groups` for the same plan.
        plan, weights, impl: as for :func:`fuse`.

    Returns:
        (B, N, S*D), contiguous.

    Raises:
        ValueError: ``group_means`` does not fit the plan; weights and ``impl`` as for :func:`fuse`.
    """
    _check_plan(plan)
    program = plan.program
    if len(group_means.means) != len(program.groups) or len(group_means.copies) != len(program.copied_sources):
        raise ValueError(
            f"group_means holds {len(group_means.means)} means and {len(group_means.copies)} copies, but the plan has "
            f"{len(program.groups)} groups and copies {len(program.copied_sources)} layers; "
            "reduce with the plan that you mix with"
        )
    states = [*group_means.means, *group_means.copies]
    _check_same(states, range(len(states)), "map {} of group_means")
    _check_impl(impl)
    _check_weights(weights, plan, states[0], 0)
    return _run_fuse(states, weights, plan.mix_program, 0, impl)


# ---- checks -------------------------------------------------------------------------------------------------------------


def _run_fuse(states: list[Tensor], weights: Tensor | None, program: MixProgram, num_prefix_tokens: int, impl: str) -> Tensor:
    # Keeping the means costs a write and a read of K maps and saves the states: 35 map passes for forward and backward
    # instead of 51 at L = 24, K = 4. Above half of the sources it would cost more than it saves.
    save_means = (
        torch.is_grad_enabled()
        and weights is not None
        and weights.requires_grad
        and not any(state.requires_grad for state in states)
        and 2 * program.num_weighted_groups <= program.num_sources
    )
    out, _ = torch.ops.igva.fuse(states, weights, program.encode(), num_prefix_tokens, save_means, impl)
    return out


def _states_of(hidden_states: HiddenStates, plan: FusionPlan, sources: Sequence[int], num_prefix_tokens: int) -> list[Tensor]:
    """The states that are read, checked."""
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
    _check_same(states, sources, "hidden_states[{}]")
    num_tokens = states[0].shape[1]
    if not isinstance(num_prefix_tokens, int) or isinstance(num_prefix_tokens, bool):
        raise TypeError(f"num_prefix_tokens must be an int, got {num_prefix_tokens!r}")
    if not 0 <= num_prefix_tokens < num_tokens:
        raise ValueError(
            f"num_prefix_tokens={num_prefix_tokens} leaves no patch of {num_tokens} tokens; "
            "it counts the CLS and register tokens before the patches"
        )
    return states


def _check_same(states: Sequence[Tensor], numbers: Sequence[int], name: str) -> None:
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


def _check_weights(weights: Tensor | None, plan: FusionPlan, state: Tensor, num_prefix_tokens: int) -> None:
    num_groups = plan.num_groups
    if weights is None:
        if num_groups:
            raise ValueError(
                f"weights is None, but the plan has {num_groups} weighted groups; pass (K,), (B, K) or (B, N, K), "
                "or use FusionPlan.igva_average for the plain mean"
            )
        return
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights must be a tensor or None, got {type(weights).__name__}")
    if not num_groups:
        raise ValueError(f"weights of shape {tuple(weights.shape)} given, but the plan has no weighted slot; pass None")
    if not weights.is_floating_point():
        raise TypeError(f"weights must be floating point, got {weights.dtype}")
    if weights.device != state.device:
        raise ValueError(f"weights is on {weights.device}, the hidden states on {state.device}; move one of them")
    batch, num_patches = state.shape[0], state.shape[1] - num_prefix_tokens
    allowed = ((num_groups,), (batch, num_groups), (batch, num_patches, num_groups))
    if tuple(weights.shape) not in allowed:
        raise ValueError(
            f"weights has the shape {tuple(weights.shape)}, expected (K,) = {allowed[0]}, (B, K) = {allowed[1]} "
            f"or (B, N, K) = {allowed[2]}"
        )


def _check_plan(plan: FusionPlan) -> None:
    if not isinstance(plan, FusionPlan):
        raise TypeError(f"plan must be a FusionPlan, got {type(plan).__name__}; make one with FusionPlan.igva(...)")


def _check_impl(impl: str) -> None:
    if impl != "auto" and impl not in ops.MODULES:
        raise ValueError(f"impl must be one of 'auto', {', '.join(map(repr, ops.MODULES))}, got {impl!r}")


def _check_summary(summary: str, num_prefix_tokens: int) -> None:
    if summary not in ("cls", "mean_patch"):
        raise ValueError(f"summary must be 'cls' or 'mean_patch', got {summary!r}")
    if summary == "cls" and num_prefix_tokens < 1:
        raise ValueError('summary="cls" needs num_prefix_tokens >= 1: this tower has no CLS token; use summary="mean_patch"')
