"""The definition of "correct": plain torch, one formula a function, any dtype up to float64.

Written to be read beside the paper, not to be fast. It computes in the dtype that :func:`accumulation_dtype` names, rounds
once at the end, and gets its gradients from autograd, so that there is no second formula that could be wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from igva_kernels.output_norm import OutputNorm, statistics_of
from igva_kernels.program import PLAIN, CopySlot, MixProgram, Norm

# Shapes: B images, T tokens with prefix, P prefix tokens, N = T − P patches, D width, K weights, G groups, S slots.


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 (so that gradcheck means something), float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_supported(
    states: Sequence[Tensor],
    weights: Tensor | None,
    program: MixProgram,
    num_prefix_tokens: int,
    *,
    indices: Tensor | None = None,
) -> str | None:
    """The reference runs everything: None."""
    return None


def weight_of_column(weights: Tensor, column: int) -> Tensor:
    """Column k of weights (K,), (B, K) or (B, N, K), shaped to multiply a (B, N, D) map."""
    selected = weights[..., column]
    return selected.reshape(*selected.shape, *(1,) * (3 - selected.ndim))


def fuse_forward(
    states: Sequence[Tensor],
    weights: Tensor | None,
    program: MixProgram,
    num_prefix_tokens: int,
    save_means: bool,
    *,
    indices: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The mix: ``states`` of (B, T, D) to (B, N, S*D), and the (G_w, B, N, D) means of the weighted groups if asked for.

    Args:
        indices: (B, N, k), the columns to which the ``weights`` (B, N, k) belong; None where the weights are dense. A column
            that a token does not name does not reach it, whatever it holds; an index that is no column is padding.
        dtype: of both results; None for that of the states. Copied sources have it already, means may be wider.
    """
    dtype = states[0].dtype if dtype is None else dtype
    means = _group_means(states, program, num_prefix_tokens, indices)
    slots = []
    for slot in program.slots:
        if isinstance(slot, CopySlot):
            slots.append(states[slot.source][:, num_prefix_tokens:])
            continue
        total = torch.zeros_like(means[0])
        for term in slot.terms:
            mean = means[term.group]
            if term.column != PLAIN and indices is None:
                mean = mean * weight_of_column(_required(weights).to(mean.dtype), term.column)
            elif term.column != PLAIN and indices is not None:
                named = indices.eq(term.column)  # (B, N, k)
                factor = torch.where(named, _required(weights).to(mean.dtype), 0).sum(-1, keepdim=True)
                mean = torch.where(named.any(-1, keepdim=True), mean, 0) * factor
            total = total + mean
        slots.append(total.to(dtype))
    out = torch.cat(slots, dim=-1)
    saved = torch.stack(means[: program.num_weighted_groups]).to(dtype) if save_means else states[0].new_empty(0)
    return out, saved


def normalised_forward(
    states: Sequence[Tensor],
    weights: Tensor | None,
    norm: OutputNorm,
    program: MixProgram,
    num_prefix_tokens: int,
    save_means: bool,
    save_mixed: bool,
    *,
    indices: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`fuse_forward` with a norm over the S*D channels of each token behind it, and what the backward needs.

    Args:
        norm: its parameters; the output is in their dtype.
        save_mixed: whether to keep the mix before the norm and the statistics of its rows; empty tensors if not.
        dtype: that of the mix without a norm, and of the means.

    Returns:
        The output (B, N, S*D), the means as from :func:`fuse_forward`, the mix in the dtype of the output, and in the
        accumulation dtype mean and 1/deviation of each row, (2, B, N, 1); (1, B, N, 1) for an RMSNorm, which has no mean.
    """
    dtype = states[0].dtype if dtype is None else dtype
    wide = accumulation_dtype(states[0].dtype)
    mixed, means = fuse_forward(states, weights, program, num_prefix_tokens, save_means, indices=indices, dtype=wide)
    mixed = mixed.to(wide)  # copies alone are as the states
    out = normalised_rows(mixed, norm.weight, norm.bias, norm).to(norm.dtype_of(dtype))
    if not save_mixed:
        return out, means.to(dtype), out.new_empty(0), out.new_empty(0, dtype=wide)
    mean = mixed.mean(-1, keepdim=True) if norm.kind == "layer" else torch.zeros_like(mixed[..., :1])
    factor = 1 / ((mixed - mean).square().mean(-1, keepdim=True) + norm.eps).sqrt()
    statistics = torch.stack([mean, factor])[-statistics_of(norm) :]
    return out, means.to(dtype), mixed.to(out.dtype), statistics


def output_norm_backward(
    grad_out: Tensor, mixed: Tensor, statistics: Tensor, norm: OutputNorm, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The vector-Jacobian product of the norm: dL/d(mix), dL/d(weight), dL/d(bias), those that are needed.

    Autograd computes the statistics again, from ``mixed``; the other implementations take those of the forward.
    """
    wide = accumulation_dtype(mixed.dtype)
    with torch.enable_grad():
        values = (mixed, norm.weight, norm.bias)
        leaves = [None if each is None else each.detach().to(wide).requires_grad_() for each in values]
        out = normalised_rows(_required(leaves[0]), leaves[1], leaves[2], norm)
        wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need and leaf is not None]
        grads = iter(torch.autograd.grad(out, wanted, grad_out.to(wide)))
    to_mixed, to_weight, to_bias = (
        next(grads).to(value.dtype) if need and value is not None else None for value, need in zip(values, needs, strict=True)
    )
    return to_mixed, to_weight, to_bias


def normalised_rows(rows: Tensor, weight: Tensor | None, bias: Tensor | None, norm: OutputNorm) -> Tensor:
    """Rows (..., S*D) behind the norm, in their dtype."""
    weight, bias = (None if each is None else each.to(rows.dtype) for each in (weight, bias))
    if norm.kind == "rms":
        return functional.rms_norm(rows, rows.shape[-1:], weight, norm.eps)
    return functional.layer_norm(rows, rows.shape[-1:], weight, bias, norm.eps)


def reduce_forward(
    states: Sequence[Tensor], program: MixProgram, num_prefix_tokens: int, *, dtype: torch.dtype | None = None
) -> Tensor:
    """The (G, B, N, D) means of all groups of the program, in ``dtype`` (None: that of the states)."""
    dtype = states[0].dtype if dtype is None else dtype
    means = _group_means(states, program, num_prefix_tokens)
    if not means:
        batch, tokens, width = states[0].shape
        return states[0].new_empty(0, batch, tokens - num_prefix_tokens, width, dtype=dtype)
    return torch.stack(means).to(dtype)


def summaries_forward(states: Sequence[Tensor], program: MixProgram, num_prefix_tokens: int, summary: str) -> Tensor:
    """One vector for each weighted group, (B, K, D): the mean of its CLS rows, or of all its patches."""
    rows = slice(0, 1) if summary == "cls" else slice(num_prefix_tokens, None)
    wide = accumulation_dtype(states[0].dtype)
    per_group = []
    for group in program.groups:
        per_group.append(_mean([states[source][:, rows].to(wide) for source in group]))
    columns = [per_group[group].mean(dim=1) for group in summary_groups(program)]
    return torch.stack(columns, dim=1).to(states[0].dtype)


def fuse_backward(
    grad_out: Tensor,
    states: Sequence[Tensor],
    means: Tensor | None,
    weights: Tensor | None,
    program: MixProgram,
    num_prefix_tokens: int,
    num_tokens: int,
    needs_weights: bool,
    needs_states: bool,
    *,
    indices: Tensor | None = None,
) -> tuple[Tensor | None, list[Tensor]]:
    """The vector-Jacobian product of :func:`fuse_forward`: dL/dw and one dL/dh a gradient class.

    ``states`` may be empty where ``means`` are given, or where no dL/dw is wanted and the program has no norms.
    """
    grad_weights: Tensor | None = None
    if needs_weights and means is not None:
        grad_weights = _grad_weights_from_means(grad_out, means, _required(weights), program)
    elif needs_weights:
        wide = accumulation_dtype(grad_out.dtype)
        with torch.enable_grad():
            leaf = _required(weights).detach().to(wide).requires_grad_()
            wide_states = [state.detach().to(wide) for state in states]
            out, _ = fuse_forward(wide_states, leaf, program, num_prefix_tokens, False, indices=indices)
            (grad_weights,) = torch.autograd.grad(out, leaf, grad_out.to(wide))
    grad_states: list[Tensor] = []
    if needs_states:
        batch, _, channels = grad_out.shape
        wide_weights = None if weights is None else weights.detach().to(accumulation_dtype(grad_out.dtype))
        grad_states = _vjp(
            lambda leaves: fuse_forward(leaves, wide_weights, program, num_prefix_tokens, False, indices=indices)[0],
            grad_out,
            program,
            (batch, num_tokens, channels // len(program.slots)),
            states if program.has_norms else None,
        )
    return grad_weights, grad_states


def reduce_backward(
    grad_means: Tensor,
    program: MixProgram,
    num_prefix_tokens: int,
    num_tokens: int,
    *,
    states: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """The vector-Jacobian product of :func:`reduce_forward`, one (B, T, D) a gradient class.

    ``states`` are needed where the program has norms.
    """
    _, batch, _, width = grad_means.shape
    return _vjp(
        lambda leaves: reduce_forward(leaves, program, num_prefix_tokens),
        grad_means,
        program,
        (batch, num_tokens, width),
        states,
    )


def summaries_backward(
    grad: Tensor, program: MixProgram, num_prefix_tokens: int, num_tokens: int, summary: str
) -> list[Tensor]:
    """The vector-Jacobian product of :func:`summaries_forward`, one (B, T, D) a gradient class."""
    batch, _, width = grad.shape
    return _vjp(
        lambda leaves: summaries_forward(leaves, program, num_prefix_tokens, summary),
        grad,
        program,
        (batch, num_tokens, width),
        None,
    )


def summary_groups(program: MixProgram) -> list[int]:
    """The group behind each weight column."""
    columns = {
        term.column: term.group
        for slot in program.slots
        if not isinstance(slot, CopySlot)
        for term in slot.terms
        if term.column != PLAIN
    }
    return [columns[column] for column in range(program.num_weights)]


def _group_means(
    states: Sequence[Tensor], program: MixProgram, num_prefix_tokens: int, indices: Tensor | None = None
) -> list[Tensor]:
    """With ``indices`` (B, N, k), members of a normalised group are 0 in the tokens that the group does not reach."""
    wide = accumulation_dtype(states[0].dtype)
    patches = [state[:, num_prefix_tokens:].to(wide) for state in states]
    means = []
    for g, (group, norm) in enumerate(zip(program.groups, program.norms, strict=True)):
        members = [patches[source] for source in group]
        columns = _columns_of_group(program, g)
        if norm is not None and indices is not None and PLAIN not in columns:  # the gradient of a NaN through a norm is NaN
            reached = torch.isin(indices, indices.new_tensor(columns)).any(-1, keepdim=True)
            members = [torch.where(reached, member, 0) for member in members]
        means.append(_mean([_normalised(member, norm) for member in members]))
    return means


def _columns_of_group(program: MixProgram, group: int) -> list[int]:
    mixes = [slot for slot in program.slots if not isinstance(slot, CopySlot)]
    return [term.column for slot in mixes for term in slot.terms if term.group == group]


def _normalised(value: Tensor, norm: Norm | None) -> Tensor:
    if norm is None:
        return value
    normalise = functional.layer_norm if norm.kind == "layer" else functional.rms_norm
    return normalise(value, value.shape[-1:], eps=norm.eps)


def _mean(maps: Sequence[Tensor]) -> Tensor:
    total = maps[0]
    for value in maps[1:]:
        total = total + value
    return total / len(maps)


def _grad_weights_from_means(grad_out: Tensor, means: Tensor, weights: Tensor, program: MixProgram) -> Tensor:
    """dL/dw where only the group means were kept: the mix is linear in w, so they are all that it needs."""
    wide = accumulation_dtype(grad_out.dtype)
    width = means.shape[-1]
    per_token = means.new_zeros((*means.shape[1:3], program.num_weights), dtype=wide)  # (B, N, K)
    for s, slot in enumerate(program.slots):
        if isinstance(slot, CopySlot):
            continue
        grad_slot = grad_out[..., s * width : (s + 1) * width].to(wide)
        for term in slot.terms:
            if term.column != PLAIN:
                per_token[..., term.column] += (grad_slot * means[term.group].to(wide)).sum(-1)
    if weights.ndim == 3:
        return per_token
    per_image = per_token.sum(1)
    return per_image if weights.ndim == 2 else per_image.sum(0)


def _vjp(
    function: Callable[[list[Tensor]], Tensor],
    cotangent: Tensor,
    program: MixProgram,
    shape: tuple[int, int, int],
    states: Sequence[Tensor] | None,
) -> list[Tensor]:
    """Gradients of a function of the states (B, T, D), one a gradient class.

    Args:
        states: where the function is taken; None for a function that is linear in them, so that zeros will do.
    """
    wide = accumulation_dtype(cotangent.dtype)
    with torch.enable_grad():
        leaves = [
            (cotangent.new_zeros(shape, dtype=wide) if states is None else states[source].detach().to(wide)).requires_grad_()
            for source in range(program.num_sources)
        ]
        # A source that is only copied has no part in the group means: its gradient is zero.
        grads = torch.autograd.grad(function(leaves), leaves, cotangent.detach().to(wide), materialize_grads=True)
    first_of_class = [program.class_of_source.index(c) for c in range(len(program.gradient_classes))]
    return [grads[source].to(cotangent.dtype) for source in first_of_class]


def _required(weights: Tensor | None) -> Tensor:
    if weights is None:
        raise ValueError("weights is None, but the plan has weighted groups")
    return weights
