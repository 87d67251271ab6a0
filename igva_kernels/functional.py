"""The public functions: check the arguments, then call the operator.

Shapes: B images · T tokens with prefix · P prefix tokens · N = T − P patches · D vision width · L encoder layers (h_0 … h_L are
L + 1 hidden states) · K groups · S slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from igva_kernels import (
    eager,
    normalised,
    ops,  # noqa: F401  (registers the operators)
    passing,
)
from igva_kernels.checks import (
    check_group_means,
    check_impl,
    check_means_dtype,
    check_plan,
    check_summarised,
    check_weights,
    select_states,
)
from igva_kernels.dispatch import resolve
from igva_kernels.output_norm import OutputNorm, check_output_norm
from igva_kernels.plan import FusionPlan
from igva_kernels.program import MixProgram
from igva_kernels.quick import signatures_of

Implementation = Literal["auto", "triton", "native", "torch", "reference"]
Summary = Literal["cls", "mean_patch"]
HiddenStates = Sequence[Tensor | None] | Tensor


class SparseWeights(NamedTuple):
    """Weights of a few groups for each token, as mixtures of layers with top-k routing have them (MoL, arXiv 2610.09440).

    Args:
        values: (B, N, k), any floating dtype; the gradient goes to them.
        indices: (B, N, k) in int32 or int64, the columns of the weights (0 .. K-1) to which the values belong. Values of one
            column add up. An index outside that range is padding: it adds nothing, and its value has the gradient 0.

    A layer that a token does not name does not reach it, whatever it holds.
    """

    values: Tensor
    indices: Tensor


@dataclass(frozen=True)
class GroupMeans:
    """What :func:`reduce_groups` keeps of the hidden states: all that :func:`mix` needs.

    Args:
        means: one (B, N, D) map for each distinct group of the plan, the weighted ones first (``plan.program.groups``).
        copies: one (B, N, D) view for each distinct layer that the plan copies, ascending.
        summaries: (B, K, D), one vector for each weighted group; None for a plan without weighted groups.
        dtype: of the hidden states, and so of what :func:`mix` makes; the means may be wider.
    """

    means: tuple[Tensor, ...]
    copies: tuple[Tensor, ...]
    summaries: Tensor | None
    dtype: torch.dtype


def fuse(
    hidden_states: HiddenStates,
    plan: FusionPlan,
    weights: Tensor | SparseWeights | None = None,
    *,
    num_prefix_tokens: int,
    output_norm: OutputNorm | None = None,
    impl: Implementation = "auto",
) -> Tensor:
    """Mix the layers of a tower in one pass: each hidden state is read once, the output written once.

    ``out[b, n, s*D:(s+1)*D]`` is slot s of the plan at patch n: a copied layer, a mean, or ``sum_k w[b, k] * mean(group k)``
    (IGVA, arXiv 2501.08443: F_fused and its concatenation with the penultimate layer). Prefix tokens (CLS, registers) are
    dropped. Sums run in float32 (float64 for float64 states), layers of a group ascending, and are rounded once.

    Where the weights need a gradient and K <= half of the layers read, the K group means are kept for it and the hidden states
    are not. Where the states need one, all layers of a group get the same tensor (unless a norm makes them differ). Gradients
    of gradients are not defined.

    Args:
        hidden_states: the L + 1 hidden states as Hugging Face gives them, each (B, T, D) of one floating dtype on one device;
            entries that the plan does not read may be None. A stacked (L + 1, B, T, D) tensor is taken as its views.
        plan: which layers feed which slot.
        weights: (K,) shared, (B, K) per image or (B, N, K) per token, any floating dtype, every one with a gradient;
            :class:`SparseWeights` for a few groups a token; None for a plan without weighted slots.
        num_prefix_tokens: P, the tokens before the patches: 1 for CLIP, 0 for SigLIP, 1 + registers for DINOv2.
        output_norm: a norm over the S*D channels of each token, in the same pass (TGIF, VipLlava); its parameters get gradients
            as well. None for the mix as it is.
        impl: ``"auto"`` takes the Triton kernels on a GPU and the compiled ones on a CPU where they can run, else plain
            torch; a named implementation never gives way.

    Returns:
        (B, N, S*D) in the dtype of the hidden states, or of the parameters of ``output_norm``; contiguous.

    Raises:
        TypeError: an argument of a wrong type, hidden states or weights that are not floating point.
        ValueError: a wrong number of hidden states, a layer that the plan reads is None, shapes, dtypes or devices that differ,
            weights missing, superfluous or of a wrong shape, an ``output_norm`` that does not fit the output, ``impl`` unknown
            or unable to run this input.
    """
    check_plan(plan)
    if output_norm is not None:
        states = select_states(hidden_states, plan, plan.sources, num_prefix_tokens)
        return _fuse_normalised(states, weights, output_norm, plan, plan.program, num_prefix_tokens, None, impl)
    options = (num_prefix_tokens, impl)
    if not eager.is_watched() and (fused := eager.fuse_again(signatures_of(plan), hidden_states, weights, options)) is not None:
        return fused
    states = select_states(hidden_states, plan, plan.sources, num_prefix_tokens)
    check_impl(impl)
    values, indices = weights if isinstance(weights, SparseWeights) else (weights, None)
    check_weights(values, indices, plan, states[0], num_prefix_tokens)
    if eager.is_plain(values, indices, *states):
        return eager.fuse(
            states,
            values,
            indices,
            plan.program,
            num_prefix_tokens,
            None,
            impl,
            signatures=signatures_of(plan),
            options=options,
        )
    return _fuse_operator(states, values, indices, plan.program, num_prefix_tokens, None, impl)


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
    check_summarised(plan, summary, num_prefix_tokens)
    states = select_states(hidden_states, plan, plan.summary_sources, num_prefix_tokens)
    check_impl(impl)
    program = plan.summary_program
    if eager.is_plain(*states) and not (torch.is_grad_enabled() and any(state.requires_grad for state in states)):
        return resolve(impl, states, None, program, num_prefix_tokens).summaries_forward(
            states, program, num_prefix_tokens, summary
        )
    return torch.ops.igva.group_summaries(states, program.encode(), num_prefix_tokens, summary, impl)


def group_summaries_and_states(
    hidden_states: HiddenStates,
    plan: FusionPlan,
    *,
    num_prefix_tokens: int,
    summary: Summary = "cls",
    impl: Implementation = "auto",
) -> tuple[Tensor, HiddenStates]:
    """:func:`group_summaries`, and the hidden states to pass on to :func:`fuse`: for towers that are trained.

    The gradient of the summaries is one row of a map. Where the states are passed on from here, it is added in place to the
    maps that the backward of :func:`fuse` makes, one a group. Otherwise autograd makes a map of zeros for it and adds that,
    once for each hidden state. Give the returned states to one call of :func:`fuse` and to nothing else.

    Args, Raises: as for :func:`group_summaries`.

    Returns:
        The (B, K, D) summaries, and hidden states equal to those given (the very same where no gradient flows through them).
    """
    # Operators must not return their inputs, so under torch.compile the gradients meet in the ordinary way.
    values = [state for state in hidden_states if state is not None]
    needs_states = torch.is_grad_enabled() and any(state.requires_grad for state in values)
    if not needs_states or not eager.is_plain(*values):
        summaries = group_summaries(hidden_states, plan, num_prefix_tokens=num_prefix_tokens, summary=summary, impl=impl)
        return summaries, hidden_states
    check_summarised(plan, summary, num_prefix_tokens)
    states = select_states(hidden_states, plan, plan.summary_sources, num_prefix_tokens)
    check_impl(impl)
    module = resolve(impl, states, None, plan.summary_program, num_prefix_tokens)
    summaries, passed = passing.summaries_and_states(states, plan.summary_program, num_prefix_tokens, summary, module)
    together = list(hidden_states)
    for layer, state in zip(plan.summary_sources, passed, strict=True):
        together[layer] = state
    return summaries, together


def reduce_groups(
    hidden_states: HiddenStates,
    plan: FusionPlan,
    *,
    num_prefix_tokens: int,
    summary: Summary = "cls",
    means_dtype: torch.dtype | None = None,
    impl: Implementation = "auto",
) -> GroupMeans:
    """The first of two steps: the group means, which do not depend on the weights.

    Use it where one set of images meets several instructions, or where the states cannot all be kept (a streaming tower). With
    means in the accumulation dtype, ``mix(reduce_groups(h, plan, ...), plan, weights)`` is ``fuse(h, plan, weights, ...)`` bit
    for bit. With 16-bit means, each is rounded once more, by at most half an ulp of the mean.

    Args:
        means_dtype: None for the dtype of the hidden states, or the accumulation dtype: float32 (float64 for float64 states).

    Other arguments, Raises: as for :func:`fuse` and :func:`group_summaries`.
    """
    check_plan(plan)
    states = select_states(hidden_states, plan, plan.sources, num_prefix_tokens)
    check_impl(impl)
    check_means_dtype(means_dtype, states[0].dtype)
    program = plan.program
    means = torch.ops.igva.reduce_groups(states, program.encode(), num_prefix_tokens, means_dtype, impl)
    summaries = None
    if plan.num_groups:
        summaries = group_summaries(hidden_states, plan, num_prefix_tokens=num_prefix_tokens, summary=summary, impl=impl)
    copies = tuple(states[source][:, num_prefix_tokens:] for source in program.copied_sources)
    return GroupMeans(means.unbind(0), copies, summaries, states[0].dtype)


def mix(
    group_means: GroupMeans,
    plan: FusionPlan,
    weights: Tensor | SparseWeights | None = None,
    *,
    output_norm: OutputNorm | None = None,
    impl: Implementation = "auto",
) -> Tensor:
    """The second of two steps: the slots of the plan from finished group means.

    Args:
        group_means: the result of :func:`reduce_groups` for the same plan.
        plan, weights, output_norm, impl: as for :func:`fuse`.

    Returns:
        (B, N, S*D) in ``group_means.dtype``, or in the dtype of the parameters of ``output_norm``; contiguous.

    Raises:
        ValueError: ``group_means`` does not fit the plan; weights, ``output_norm`` and ``impl`` as for :func:`fuse`.
    """
    check_plan(plan)
    states = check_group_means(group_means.means, group_means.copies, group_means.dtype, plan)
    if output_norm is not None:
        return _fuse_normalised(states, weights, output_norm, plan, plan.mix_program, 0, group_means.dtype, impl)
    check_impl(impl)
    values, indices = weights if isinstance(weights, SparseWeights) else (weights, None)
    check_weights(values, indices, plan, states[0], 0)
    dtype = None if states[0].dtype == group_means.dtype else group_means.dtype
    if eager.is_plain(values, indices, *states):
        return eager.fuse(states, values, indices, plan.mix_program, 0, dtype, impl)
    return _fuse_operator(states, values, indices, plan.mix_program, 0, dtype, impl)


def _fuse_normalised(
    states: list[Tensor],
    weights: Tensor | SparseWeights | None,
    output_norm: OutputNorm,
    plan: FusionPlan,
    program: MixProgram,
    num_prefix_tokens: int,
    dtype: torch.dtype | None,
    impl: str,
) -> Tensor:
    check_impl(impl)
    values, indices = weights if isinstance(weights, SparseWeights) else (weights, None)
    check_weights(values, indices, plan, states[0], num_prefix_tokens)
    dtype = None if dtype == states[0].dtype else dtype
    check_output_norm(output_norm, plan.num_slots * states[0].shape[2], dtype or states[0].dtype, states[0].device)
    return normalised.fuse(states, values, indices, output_norm, program, num_prefix_tokens, dtype, impl)


def _fuse_operator(
    states: list[Tensor],
    weights: Tensor | None,
    indices: Tensor | None,
    program: MixProgram,
    num_prefix_tokens: int,
    dtype: torch.dtype | None,
    impl: str,
) -> Tensor:
    grad_enabled = torch.is_grad_enabled()
    weights_need = grad_enabled and weights is not None and weights.requires_grad
    states_need = grad_enabled and any(state.requires_grad for state in states)
    save_means = eager.should_save_means(program, indices, weights_need, states_need)
    out, _ = torch.ops.igva.fuse(states, weights, indices, program.encode(), num_prefix_tokens, save_means, dtype, impl)
    return out
