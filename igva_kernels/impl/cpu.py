"""Plain torch at copy bandwidth: what runs on a CPU, and anywhere that the Triton kernels cannot run.

One pass over the hidden states, in tiles small enough that the accumulators stay in the cache while the states stream
through; everything is in place, so that a few tiles are all that is made beside the outputs. Sums run in float32
(float64 for float64) in the order of the layers and are rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from igva_kernels.impl.reference import accumulation_dtype, summary_groups, weight_of_column
from igva_kernels.program import PLAIN, CopySlot, MixProgram

# Shapes: B images, T tokens with prefix, P prefix tokens, N = T − P patches, D width, K weights, G groups, S slots.

TILE_ELEMENTS = 1 << 20
"""Elements of one tile: 4 MiB of float32 accumulator, which the last-level cache holds while the states stream through. Smaller
tiles fit a nearer cache, but pay thirty calls and, with several threads, thirty barriers each. Measured for CLIP-L on two AVX2
cores with 2^15, 2^17 and 2^20 elements: 19.5, 9.4 and 6.2 ms (float32, B = 1), 71, 35 and 21 ms (bfloat16, B = 4)."""

Tile = tuple[slice, slice]


def check_supported(
    states: Sequence[Tensor],
    weights: Tensor | None,
    program: MixProgram,
    num_prefix_tokens: int,
    *,
    indices: Tensor | None = None,
) -> str | None:
    """Plain torch runs everything: None."""
    return None


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
    """The mix: ``states`` of (B, T, D) to (B, N, S*D), and the (G_w, B, N, D) means of the weighted groups if asked for."""
    patches, batch, num_patches, width = _patches(states, num_prefix_tokens)
    wide = accumulation_dtype(patches[0].dtype)
    out = patches[0].new_empty(batch, num_patches, len(program.slots) * width)
    slots = out.unflatten(2, (len(program.slots), width)).unbind(2)
    means = patches[0].new_empty((program.num_weighted_groups, batch, num_patches, width) if save_means else 0)
    factors = None if weights is None else weights.detach().to(wide)
    copies = _copies_by_source(program)
    uses = _uses_by_group(program)
    for tile in _tiles(patches[0]):
        copied: set[int] = set()
        sums: dict[int, Tensor] = {}
        for g, group in enumerate(program.groups):
            accumulator = patches[0].new_empty(patches[0][tile].shape, dtype=wide)
            for position, source in enumerate(group):
                _accumulate(accumulator, patches[source][tile], first=position == 0)
                if source not in copied:  # while its tile is still in the cache
                    copied.add(source)
                    for s in copies.get(source, ()):
                        slots[s][tile].copy_(patches[source][tile])
            if len(group) > 1:
                accumulator.mul_(1.0 / len(group))
            if save_means and g < program.num_weighted_groups:
                means[g][tile].copy_(accumulator)
            for position, (s, column) in enumerate(uses[g], start=1):
                term = accumulator if position == len(uses[g]) else accumulator.clone()  # its last use may overwrite it
                if column != PLAIN:
                    term.mul_(_factor(factors, column, tile))
                sums[s] = sums[s].add_(term) if s in sums else term
        for s, total in sums.items():
            slots[s][tile].copy_(total)
        for source, targets in copies.items():
            if source not in copied:
                for s in targets:
                    slots[s][tile].copy_(patches[source][tile])
    return out, means


def reduce_forward(
    states: Sequence[Tensor], program: MixProgram, num_prefix_tokens: int, *, dtype: torch.dtype | None = None
) -> Tensor:
    """The (G, B, N, D) means of all groups of the program."""
    patches, batch, num_patches, width = _patches(states, num_prefix_tokens)
    means = patches[0].new_empty(len(program.groups), batch, num_patches, width)
    for tile in _tiles(patches[0]):
        for g, group in enumerate(program.groups):
            means[g][tile].copy_(_mean_of_group(patches, group, tile))
    return means


def summaries_forward(states: Sequence[Tensor], program: MixProgram, num_prefix_tokens: int, summary: str) -> Tensor:
    """One vector for each weighted group, (B, K, D): the mean of its CLS rows, or of all its patches."""
    wide = accumulation_dtype(states[0].dtype)
    if summary == "cls":
        rows = [state[:, 0].to(wide) for state in states]
    else:
        rows = [state[:, num_prefix_tokens:].mean(dim=1, dtype=wide) for state in states]
    batch, width = rows[0].shape
    out = states[0].new_empty(batch, program.num_weights, width)
    for column, g in enumerate(summary_groups(program)):
        group = program.groups[g]
        total = rows[group[0]].clone()
        for source in group[1:]:
            total += rows[source]
        out[:, column] = total.mul_(1.0 / len(group))
    return out


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

    dL/dw needs the group means: the saved ``means`` where the forward kept them, else they are summed again from ``states``.
    """
    num_slots = len(program.slots)
    width = grad_out.shape[2] // num_slots
    grad_slots = grad_out.unflatten(2, (num_slots, width)).unbind(2)
    wide = accumulation_dtype(grad_out.dtype)
    factors = None if weights is None else weights.detach().to(wide)
    grad_weights = None
    if needs_weights and weights is not None:
        patches = [state[:, num_prefix_tokens:] for state in states]
        grad_weights = _grad_weights(grad_slots, patches, means, weights, program, wide)
    grad_states: list[Tensor] = []
    if needs_states:
        uses = _uses_by_group(program)
        for copy_slots, groups in program.gradient_classes:
            terms = [(s, PLAIN, 1.0) for s in copy_slots]
            terms += [(s, column, 1.0 / len(program.groups[g])) for g in groups for s, column in uses[g]]
            grad_state = grad_out.new_empty(grad_out.shape[0], num_tokens, width)
            grad_state[:, :num_prefix_tokens] = 0
            target = grad_state[:, num_prefix_tokens:]
            for tile in _tiles(target):
                target[tile].copy_(_sum_of_terms(grad_slots, terms, factors, tile, wide))
            grad_states.append(grad_state)
    return grad_weights, grad_states


def reduce_backward(
    grad_means: Tensor,
    program: MixProgram,
    num_prefix_tokens: int,
    num_tokens: int,
    *,
    states: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """The vector-Jacobian product of :func:`reduce_forward`, one (B, T, D) a gradient class."""
    _, batch, _, width = grad_means.shape
    wide = accumulation_dtype(grad_means.dtype)
    maps = grad_means.unbind(0)
    grads = []
    for _, groups in program.gradient_classes:
        terms = [(g, PLAIN, 1.0 / len(program.groups[g])) for g in groups]
        grad_state = grad_means.new_zeros(batch, num_tokens, width)
        target = grad_state[:, num_prefix_tokens:]
        if terms:
            for tile in _tiles(target):
                target[tile].copy_(_sum_of_terms(maps, terms, None, tile, wide))
        grads.append(grad_state)
    return grads


def summaries_backward(
    grad: Tensor, program: MixProgram, num_prefix_tokens: int, num_tokens: int, summary: str
) -> list[Tensor]:
    """The vector-Jacobian product of :func:`summaries_forward`, one (B, T, D) a gradient class."""
    batch, _, width = grad.shape
    wide = accumulation_dtype(grad.dtype)
    group_of_column = summary_groups(program)
    scale = 1.0 if summary == "cls" else 1.0 / (num_tokens - num_prefix_tokens)
    grads = []
    for _, groups in program.gradient_classes:
        row = grad.new_zeros(batch, width, dtype=wide)
        for column, g in enumerate(group_of_column):
            if g in groups:
                row.add_(grad[:, column].to(wide), alpha=scale / len(program.groups[g]))
        grad_state = grad.new_zeros(batch, num_tokens, width)
        if summary == "cls":
            grad_state[:, 0] = row
        else:
            grad_state[:, num_prefix_tokens:] = row.to(grad.dtype)[:, None]
        grads.append(grad_state)
    return grads


# ---- tiles ------------------------------------------------------------------------------------------------------------


def _patches(states: Sequence[Tensor], num_prefix_tokens: int) -> tuple[list[Tensor], int, int, int]:
    patches = [state.detach()[:, num_prefix_tokens:] for state in states]
    batch, num_patches, width = patches[0].shape
    return patches, batch, num_patches, width


def _tiles(like: Tensor) -> Iterator[Tile]:
    """Slices (images, patches) that cover a (B, N, D) map; the whole map at once off the CPU, where launches are dear."""
    batch, num_patches, width = like.shape
    if like.numel() == 0:
        return
    if like.device.type != "cpu":
        yield slice(None), slice(None)
        return
    images = max(1, TILE_ELEMENTS // (num_patches * width))
    rows = num_patches if images > 1 else max(1, TILE_ELEMENTS // width)
    for first_image in range(0, batch, images):
        for first_row in range(0, num_patches, rows):
            yield slice(first_image, first_image + images), slice(first_row, first_row + rows)


def _accumulate(accumulator: Tensor, value: Tensor, *, first: bool) -> None:
    if first:
        accumulator.copy_(value)
    else:
        accumulator.add_(value)


def _mean_of_group(patches: Sequence[Tensor], group: tuple[int, ...], tile: Tile) -> Tensor:
    """The mean of a group's tile in the accumulation dtype."""
    first = patches[group[0]][tile]
    accumulator = first.new_empty(first.shape, dtype=accumulation_dtype(first.dtype))
    for position, source in enumerate(group):
        _accumulate(accumulator, patches[source][tile], first=position == 0)
    return accumulator.mul_(1.0 / len(group)) if len(group) > 1 else accumulator


def _factor(factors: Tensor | None, column: int, tile: Tile) -> Tensor:
    """Column of the weights for a tile, broadcastable to (images, patches, D)."""
    if factors is None:
        raise ValueError("weights is None, but the plan has weighted groups")
    selected = weight_of_column(factors, column)
    if factors.ndim == 1:
        return selected
    return selected[tile[0]] if factors.ndim == 2 else selected[tile]


def _sum_of_terms(
    maps: Sequence[Tensor],
    terms: Sequence[tuple[int, int, float]],
    factors: Tensor | None,
    tile: Tile,
    wide: torch.dtype,
) -> Tensor:
    """``sum over (map, column, scale) of map * w[column] * scale`` for one tile."""
    total: Tensor | None = None
    for index, column, scale in terms:
        term = maps[index][tile].to(wide)
        if column != PLAIN:
            term = term * (_factor(factors, column, tile) * scale)
        elif scale != 1.0:
            term = term * scale
        total = term if total is None else total + term
    if total is None:
        raise ValueError("a gradient class without a copy and without a group: the program is malformed")
    return total


def _grad_weights(
    grad_slots: Sequence[Tensor],
    patches: Sequence[Tensor],
    means: Tensor | None,
    weights: Tensor,
    program: MixProgram,
    wide: torch.dtype,
) -> Tensor:
    batch, num_patches, _ = grad_slots[0].shape
    uses = _uses_by_group(program)
    per_token = weights.ndim == 3
    shape = (batch, num_patches, program.num_weights) if per_token else (batch, program.num_weights)
    grad_weights = grad_slots[0].new_zeros(shape, dtype=wide)
    for tile in _tiles(grad_slots[0]):
        for g in range(program.num_weighted_groups):
            mean = means[g][tile] if means is not None else _mean_of_group(patches, program.groups[g], tile)
            for s, column in uses[g]:
                if column == PLAIN:
                    continue
                product = grad_slots[s][tile].to(wide) * mean
                if per_token:
                    grad_weights[(*tile, column)] += product.sum(2)
                else:
                    grad_weights[tile[0], column] += product.sum((1, 2))
    return grad_weights.sum(0) if weights.ndim == 1 else grad_weights


def _copies_by_source(program: MixProgram) -> dict[int, list[int]]:
    copies: dict[int, list[int]] = {}
    for s, slot in enumerate(program.slots):
        if isinstance(slot, CopySlot):
            copies.setdefault(slot.source, []).append(s)
    return copies


def _uses_by_group(program: MixProgram) -> list[list[tuple[int, int]]]:
    """For each group the (slot, weight column) pairs that use its mean."""
    uses: list[list[tuple[int, int]]] = [[] for _ in program.groups]
    for s, slot in enumerate(program.slots):
        if not isinstance(slot, CopySlot):
            for term in slot.terms:
                uses[term.group].append((s, term.column))
    return uses
