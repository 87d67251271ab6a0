"""Plain torch: what runs anywhere that neither the Triton kernels nor the compiled ones for a CPU can run.

One pass over the hidden states, in tiles small enough that the accumulators stay in the cache while the states stream
through; everything is in place, so that a few tiles are all that is made beside the outputs. Sums run in float32
(float64 for float64) in the order of the layers and are rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from igva_kernels.impl.cpu_tiles import Tile, tiles
from igva_kernels.impl.output_norm import normalise
from igva_kernels.impl.reference import accumulation_dtype, summary_groups, weight_of_column
from igva_kernels.output_norm import OutputNorm, statistics_of
from igva_kernels.program import PLAIN, CopySlot, MixProgram, Norm

# Shapes: B images, T tokens with prefix, P prefix tokens, N = T − P patches, D width, K weights, G groups, S slots.


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
    """The mix: ``states`` of (B, T, D) to (B, N, S*D), and the (G_w, B, N, D) means of the weighted groups if asked for.

    Arguments as for the reference. Where the weights are sparse, a tile does not read the groups that none of its tokens names.
    """
    patches, batch, num_patches, width = _patches(states, num_prefix_tokens)
    dtype = patches[0].dtype if dtype is None else dtype
    wide = accumulation_dtype(patches[0].dtype)
    out = patches[0].new_empty(batch, num_patches, len(program.slots) * width, dtype=dtype)
    slots = out.unflatten(2, (len(program.slots), width)).unbind(2)
    means = patches[0].new_empty((program.num_weighted_groups, batch, num_patches, width) if save_means else 0, dtype=dtype)
    factors = _Factors(weights, indices, wide)
    copies = _copies_by_source(program)
    uses = _uses_by_group(program)
    for tile in tiles(patches[0]):
        copied: set[int] = set()
        sums: dict[int, Tensor] = {}
        for g, group in enumerate(program.groups):
            saved = save_means and g < program.num_weighted_groups
            if not saved and not any(factors.reach(column, tile) for _, column in uses[g]):
                continue
            accumulator = patches[0].new_empty(patches[0][tile].shape, dtype=wide)
            for position, source in enumerate(group):
                _accumulate(accumulator, patches[source][tile], program.norms[g], first=position == 0)
                if source not in copied:  # while its tile is still in the cache
                    copied.add(source)
                    for s in copies.get(source, ()):
                        slots[s][tile].copy_(patches[source][tile])
            if len(group) > 1:
                accumulator.mul_(1.0 / len(group))
            if saved:
                means[g][tile].copy_(accumulator)
            for position, (s, column) in enumerate(uses[g], start=1):
                term = accumulator if position == len(uses[g]) else accumulator.clone()  # its last use may overwrite it
                factors.multiply_(term, column, tile)
                sums[s] = sums[s].add_(term) if s in sums else term
        for s, slot in enumerate(program.slots):
            if s in sums:
                slots[s][tile].copy_(sums[s])
            elif not isinstance(slot, CopySlot):
                slots[s][tile].zero_()
            elif slot.source not in copied:
                slots[s][tile].copy_(patches[slot.source][tile])
    return out, means


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
    """:func:`fuse_forward` with a norm behind it; arguments and results as for the reference.

    The mix of a tile is made in the accumulation dtype and normalised while it lies in the cache.
    """
    batch, num_patches, width = states[0][:, num_prefix_tokens:].shape
    dtype = states[0].dtype if dtype is None else dtype
    wide = accumulation_dtype(states[0].dtype)
    shape = (batch, num_patches, len(program.slots) * width)
    out = states[0].new_empty(shape, dtype=norm.dtype_of(dtype))
    mixed = out.new_empty(shape if save_mixed else 0)
    statistics = out.new_empty((statistics_of(norm), *shape[:2], 1) if save_mixed else 0, dtype=wide)
    means = out.new_empty((program.num_weighted_groups, batch, num_patches, width) if save_means else 0, dtype=dtype)
    for tile in tiles(out):
        images, rows = tile
        of_tile = [state.detach()[images, num_prefix_tokens:][:, rows] for state in states]
        weights_of_tile = weights if weights is None or weights.ndim == 1 else weights[tile[: weights.ndim - 1]]
        indices_of_tile = None if indices is None else indices[tile]
        mix, of_means = fuse_forward(of_tile, weights_of_tile, program, 0, save_means, indices=indices_of_tile, dtype=wide)
        normalised, of_rows = normalise(mix, norm)
        out[tile].copy_(normalised)
        if save_means:
            means[:, images, rows].copy_(of_means)
        if save_mixed:
            mixed[tile].copy_(mix)
            for kept, values in zip(statistics, of_rows, strict=True):
                kept[tile].copy_(values)
    return out, means, mixed, statistics


def reduce_forward(
    states: Sequence[Tensor], program: MixProgram, num_prefix_tokens: int, *, dtype: torch.dtype | None = None
) -> Tensor:
    """The (G, B, N, D) means of all groups of the program, in ``dtype`` (None: that of the states)."""
    patches, batch, num_patches, width = _patches(states, num_prefix_tokens)
    means = patches[0].new_empty(len(program.groups), batch, num_patches, width, dtype=dtype)
    for tile in tiles(patches[0]):
        for g in range(len(program.groups)):
            means[g][tile].copy_(_mean_of_group(patches, program, g, tile))
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
    factors = _Factors(weights, indices, wide)
    patches = [state.detach()[:, num_prefix_tokens:] for state in states]
    grad_weights = None
    if needs_weights and weights is not None:
        grad_weights = _grad_weights(grad_slots, patches, means, weights, factors, program, wide)
    if not needs_states:
        return grad_weights, []
    uses = _uses_by_group(program)

    def cotangent(g: int, tile: Tile) -> Tensor:
        """Of one member of group ``g``, before its norm."""
        total: Tensor | None = None
        for s, column in uses[g]:
            term = factors.times(grad_slots[s][tile].to(wide), column, tile, 1.0 / len(program.groups[g]))
            total = term if total is None else total.add_(term)
        return torch.zeros_like(grad_slots[0][tile], dtype=wide) if total is None else total

    def unread(g: int, tile: Tile) -> Tensor | None:
        return factors.unread([column for _, column in uses[g]], tile)

    return grad_weights, _grad_states(grad_slots, cotangent, patches, program, num_prefix_tokens, num_tokens, unread=unread)


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
    wide = accumulation_dtype(grad_means.dtype)
    maps = grad_means.unbind(0) or (grad_means.new_empty(grad_means.shape[1:]),)  # a plan may have no group
    patches = [state.detach()[:, num_prefix_tokens:] for state in states or ()]

    def cotangent(g: int, tile: Tile) -> Tensor:
        return maps[g][tile].to(wide) * (1.0 / len(program.groups[g]))

    without_copies = [((), groups) for _, groups in program.gradient_classes]
    return _grad_states(maps, cotangent, patches, program, num_prefix_tokens, num_tokens, without_copies)


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


def _member(patches: Tensor, norm: Norm | None, wide: torch.dtype) -> Tensor:
    """One member's tile as its group adds it: normalised where the group says so."""
    if norm is None:
        return patches
    normalise = functional.layer_norm if norm.kind == "layer" else functional.rms_norm
    return normalise(patches.to(wide), patches.shape[-1:], eps=norm.eps)


def _accumulate(accumulator: Tensor, value: Tensor, norm: Norm | None, *, first: bool) -> None:
    value = _member(value, norm, accumulator.dtype)
    if first:
        accumulator.copy_(value)
    else:
        accumulator.add_(value)


def _mean_of_group(patches: Sequence[Tensor], program: MixProgram, g: int, tile: Tile) -> Tensor:
    """The mean of a group's tile in the accumulation dtype."""
    group = program.groups[g]
    first = patches[group[0]][tile]
    accumulator = first.new_empty(first.shape, dtype=accumulation_dtype(first.dtype))
    for position, source in enumerate(group):
        _accumulate(accumulator, patches[source][tile], program.norms[g], first=position == 0)
    return accumulator.mul_(1.0 / len(group)) if len(group) > 1 else accumulator


class _Factors:
    """What multiplies the mean of a group in a tile: a weight per call, image or token, or those that a token names.

    Args:
        weights: (K,), (B, K) or (B, N, K); with ``indices`` the values (B, N, k); None for a program without weights.
        indices: (B, N, k) columns, or None.
        wide: the accumulation dtype.
    """

    def __init__(self, weights: Tensor | None, indices: Tensor | None, wide: torch.dtype) -> None:
        self._weights = None if weights is None else weights.detach().to(wide)
        self._indices = indices

    def reach(self, column: int, tile: Tile) -> bool:
        """Whether some token of the tile is reached by a column. Only sparse weights reach none."""
        return column == PLAIN or self._indices is None or bool(self._indices[tile].eq(column).any())

    def of(self, column: int, tile: Tile) -> Tensor:
        """The weights of a column that is not PLAIN, to multiply (images, patches, D); 0 where a token does not name it."""
        if self._weights is None:
            raise ValueError("weights is None, but the plan has weighted groups")
        if self._indices is not None:
            named = self._indices[tile].eq(column)
            return torch.where(named, self._weights[tile], 0).sum(-1, keepdim=True)
        selected = weight_of_column(self._weights, column)
        if self._weights.ndim == 1:
            return selected
        return selected[tile[0]] if self._weights.ndim == 2 else selected[tile]

    def multiply_(self, term: Tensor, column: int, tile: Tile) -> None:
        """``term *= of(column)`` in place; what a token does not name becomes 0, whatever it was."""
        if column != PLAIN:
            term.mul_(self.of(column, tile))
            self._clear_(term, column, tile)

    def times(self, term: Tensor, column: int, tile: Tile, scale: float) -> Tensor:
        """``term * of(column) * scale`` in a new tensor."""
        if column == PLAIN:
            return term * scale
        product = term * (self.of(column, tile) * scale)
        self._clear_(product, column, tile)
        return product

    def add_gradient_(self, grad: Tensor, of_column: Tensor, column: int, tile: Tile) -> None:
        """Add what a column receives, (images, patches, 1), to the gradient of the weights per token of a tile."""
        if self._indices is None:
            grad[..., column : column + 1] += of_column
        else:
            grad += torch.where(self._indices[tile].eq(column), of_column, 0)

    def unread(self, columns: Sequence[int], tile: Tile) -> Tensor | None:
        """(images, patches, 1): the tokens that none of the columns reaches; None if there is none by construction."""
        if self._indices is None or PLAIN in columns:
            return None
        named = [self._indices[tile].eq(column).any(-1, keepdim=True) for column in columns]
        return ~torch.cat(named, -1).any(-1, keepdim=True)

    def _clear_(self, term: Tensor, column: int, tile: Tile) -> None:
        if self._indices is not None:  # 0 times an infinity is not 0
            term.masked_fill_(~self._indices[tile].eq(column).any(-1, keepdim=True), 0)


def _grad_states(
    grad_slots: Sequence[Tensor],
    cotangent: Callable[[int, Tile], Tensor],
    patches: Sequence[Tensor],
    program: MixProgram,
    num_prefix_tokens: int,
    num_tokens: int,
    classes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]] | None = None,
    unread: Callable[[int, Tile], Tensor | None] = lambda g, tile: None,
) -> list[Tensor]:
    """One (B, T, D) a gradient class.

    Args:
        grad_slots: the cotangents of the slots, (B, N, D) each.
        cotangent: gives that of a member of a group, before its norm, as a tensor that may be overwritten.
        patches: the states' patches, read only for norms.
        classes: copies and groups of each class, if not the program's.
        unread: gives the tokens, (images, patches, 1), that a group does not reach, whatever its members hold there.
    """
    like = grad_slots[0]
    batch, _, width = like.shape
    wide = accumulation_dtype(like.dtype)
    classes = program.gradient_classes if classes is None else classes
    source_of_class = [program.class_of_source.index(c) for c in range(len(classes))]
    grads = [like.new_empty(batch, num_tokens, width) for _ in classes]
    for grad in grads:
        grad[:, :num_prefix_tokens] = 0
    targets = [grad[:, num_prefix_tokens:] for grad in grads]
    for tile in tiles(like):
        shares: dict[int, Tensor] = {}  # a normalised group gives each of its members another gradient, from one share
        for target, source, (copy_slots, groups) in zip(targets, source_of_class, classes, strict=True):
            total: Tensor | None = None
            for g in groups:
                norm = program.norms[g]
                if norm is None:
                    term = cotangent(g, tile)
                else:
                    if g not in shares:
                        shares[g] = cotangent(g, tile)
                    value, beyond = patches[source][tile].to(wide), unread(g, tile)
                    term = _norm_backward(shares[g], value if beyond is None else value.masked_fill(beyond, 0), norm)
                total = term if total is None else total.add_(term)
            for s in copy_slots:
                copied = grad_slots[s][tile]
                if total is None:
                    total = copied  # a view of the cotangent: not to be written to
                else:
                    total = total.add_(copied) if groups else total + copied.to(wide)
            target[tile].copy_(total if total is not None else like.new_zeros(()))
    return grads


def _norm_backward(grad: Tensor, value: Tensor, norm: Norm) -> Tensor:
    """The vector-Jacobian product of a norm over the last dimension, (images, patches, D)."""
    if norm.kind == "layer":
        value = value - value.mean(-1, keepdim=True)
    inverse = value.square().mean(-1, keepdim=True).add_(norm.eps).rsqrt_()
    normalised = value * inverse
    slope = (grad * normalised).mean(-1, keepdim=True)
    result = grad - normalised.mul_(slope)
    if norm.kind == "layer":
        result -= grad.mean(-1, keepdim=True)
    return result.mul_(inverse)


def _grad_weights(
    grad_slots: Sequence[Tensor],
    patches: Sequence[Tensor],
    means: Tensor | None,
    weights: Tensor,
    factors: _Factors,
    program: MixProgram,
    wide: torch.dtype,
) -> Tensor:
    """dL/dw in the shape of ``weights``, in the accumulation dtype."""
    uses = _uses_by_group(program)
    per_token = weights.ndim == 3
    grad_weights = grad_slots[0].new_zeros(
        weights.shape if per_token else (grad_slots[0].shape[0], weights.shape[-1]), dtype=wide
    )
    for tile in tiles(grad_slots[0]):
        for g in range(program.num_weighted_groups):
            reached = [(s, column) for s, column in uses[g] if column != PLAIN and factors.reach(column, tile)]
            if not reached:
                continue
            mean = means[g][tile] if means is not None else _mean_of_group(patches, program, g, tile)
            for s, column in reached:
                product = grad_slots[s][tile].to(wide) * mean
                if per_token:
                    factors.add_gradient_(grad_weights[tile], product.sum(2, keepdim=True), column, tile)
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
