"""A plan over the tensors that are really passed: what the implementations unroll.

:class:`igva_kernels.plan.FusionPlan` compiles itself to a :class:`MixProgram`. It is hashable, and crosses the operator's
schema as a list of ints.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Literal

NormKind = Literal["layer", "rms"]
NORM_KINDS: tuple[NormKind, ...] = ("layer", "rms")

SMALLEST_EPS = 2.0**-126
"""The smallest normal float32. With less, a row of zeros, which stands for a row that is not to be read, would become 0 / 0."""


@dataclass(frozen=True)
class Norm:
    """A norm without parameters over the D channels of each token, applied to each hidden state before it is averaged.

    ``"layer"`` is ``(h - mean) / sqrt(var + eps)`` with the biased variance, as ``torch.nn.functional.layer_norm``;
    ``"rms"`` is ``h / sqrt(mean(h²) + eps)``, as ``torch.nn.functional.rms_norm``. Both in the accumulation dtype, not rounded
    in between.

    Args:
        kind: ``"layer"`` or ``"rms"``.
        eps: added under the root, at least :data:`SMALLEST_EPS`.

    Raises:
        ValueError: another kind, or an ``eps`` below the smallest.
    """

    kind: NormKind
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.kind not in NORM_KINDS:
            raise ValueError(f"kind must be one of {', '.join(map(repr, NORM_KINDS))}, got {self.kind!r}")
        if not self.eps >= SMALLEST_EPS:
            raise ValueError(f"eps must be at least {SMALLEST_EPS:.3g}, the least normal float32, got {self.eps!r}; try 1e-5")


PLAIN = -1
"""Weight column of a term that has the constant weight 1."""


@dataclass(frozen=True)
class Term:
    """One group mean in a slot.

    Args:
        group: index into :attr:`MixProgram.groups`.
        column: column of the weights, or :data:`PLAIN` for the constant 1.
    """

    group: int
    column: int


@dataclass(frozen=True)
class CopySlot:
    """A slot that copies one source."""

    source: int


@dataclass(frozen=True)
class MixSlot:
    """A slot that sums weighted group means, in this order."""

    terms: tuple[Term, ...]


@dataclass(frozen=True)
class MixProgram:
    """A plan over the tensors that are really passed: what the kernels unroll.

    Args:
        num_sources: how many states are passed.
        groups: the groups, as ascending positions among the sources; no two have both the same members and the same norm. Those
            that carry a weight come first.
        slots: one per output slot.
        num_weights: K, the columns of the weights.
        num_weighted_groups: how many of ``groups`` carry a weight; their means are all that dL/dw needs.
        norms: for each group the norm of its members, or None.
    """

    num_sources: int
    groups: tuple[tuple[int, ...], ...]
    slots: tuple[CopySlot | MixSlot, ...]
    num_weights: int
    num_weighted_groups: int
    norms: tuple[Norm | None, ...]
    _encoded: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        flat = [self.num_sources, self.num_weights, self.num_weighted_groups, len(self.groups)]
        for group, norm in zip(self.groups, self.norms, strict=True):
            flat += [len(group), *group, *_encode_norm(norm)]
        for slot in self.slots:
            if isinstance(slot, CopySlot):
                flat += [0, slot.source]
            else:
                flat += [len(slot.terms), *(value for term in slot.terms for value in (term.group, term.column))]
        object.__setattr__(self, "_encoded", tuple(flat))

    @property
    def has_norms(self) -> bool:
        """Whether some group normalises its members: the gradient of those depends on their values."""
        return any(norm is not None for norm in self.norms)

    @property
    def worth_saving_means(self) -> bool:
        """Whether dL/dw should come from kept group means rather than from the states.

        Keeping them costs a write and a read of K maps and saves the reading of the states: 35 map passes for forward and
        backward instead of 51 at L = 24, K = 4 with a frozen tower, 41 instead of 57 with a trainable one. Above half of the
        sources it would cost more than it saves.
        """
        return 2 * self.num_weighted_groups <= self.num_sources

    @cached_property
    def gradient_classes(self) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        """The ``(copy slots, groups)`` to which the sources of a gradient class belong, in order of the first source.

        All sources of a class have the same gradient, so it is computed once: five tensors for IGVA's 24 layers. A source that
        is normalised is a class of its own.
        """
        return tuple((copies, groups) for copies, groups, _ in self._distinct_membership)

    @cached_property
    def class_of_source(self) -> tuple[int, ...]:
        """For each source the index of its gradient class."""
        position = {key: index for index, key in enumerate(self._distinct_membership)}
        return tuple(position[key] for key in self._membership)

    @cached_property
    def _distinct_membership(self) -> tuple[tuple[tuple[int, ...], tuple[int, ...], int | None], ...]:
        return tuple(dict.fromkeys(self._membership))

    @cached_property
    def _membership(self) -> tuple[tuple[tuple[int, ...], tuple[int, ...], int | None], ...]:
        """Per source its copy slots, its groups, and itself if one of them normalises it."""
        membership = []
        for source in range(self.num_sources):
            copies = tuple(s for s, slot in enumerate(self.slots) if isinstance(slot, CopySlot) and slot.source == source)
            groups = tuple(g for g, group in enumerate(self.groups) if source in group)
            normalised = any(self.norms[g] is not None for g in groups)
            membership.append((copies, groups, source if normalised else None))
        return tuple(membership)

    def encode(self) -> list[int]:
        """The program as the ``int[]`` of the operator's schema; :func:`decode_program` is its inverse."""
        return list(self._encoded)

    def over_means(self) -> MixProgram:
        """The same mix over finished group means: sources are the G means, then the distinct copied sources.

        ``mix`` runs it on the result of ``reduce_groups``: every group is then one map.
        """
        copied = self.copied_sources
        return MixProgram(
            num_sources=len(self.groups) + len(copied),
            groups=tuple((g,) for g in range(len(self.groups))),
            slots=tuple(
                CopySlot(len(self.groups) + copied.index(slot.source)) if isinstance(slot, CopySlot) else slot
                for slot in self.slots
            ),
            num_weights=self.num_weights,
            num_weighted_groups=self.num_weighted_groups,
            norms=(None,) * len(self.groups),
        )

    @cached_property
    def copied_sources(self) -> tuple[int, ...]:
        """The distinct sources that a copy slot names, ascending."""
        return tuple(sorted({slot.source for slot in self.slots if isinstance(slot, CopySlot)}))


@lru_cache(maxsize=1024)
def _decode(flat: tuple[int, ...]) -> MixProgram:
    values = iter(flat)
    num_sources, num_weights, num_weighted_groups, num_groups = (next(values) for _ in range(4))
    groups, norms = [], []
    for _ in range(num_groups):
        groups.append(tuple(next(values) for _ in range(next(values))))
        norms.append(_decode_norm(next(values), next(values)))
    slots: list[CopySlot | MixSlot] = []
    for count in values:
        if count == 0:
            slots.append(CopySlot(next(values)))
        else:
            slots.append(MixSlot(tuple(Term(next(values), next(values)) for _ in range(count))))
    return MixProgram(num_sources, tuple(groups), tuple(slots), num_weights, num_weighted_groups, tuple(norms))


def decode_program(flat: Sequence[int]) -> MixProgram:
    """The program behind an operator's ``int[]`` (cached: the same object for the same ints)."""
    return _decode(tuple(flat))


def _encode_norm(norm: Norm | None) -> tuple[int, int]:
    """0, or one more than the position of the kind, and the bits of eps."""
    if norm is None:
        return 0, 0
    (bits,) = struct.unpack("<q", struct.pack("<d", norm.eps))
    return 1 + NORM_KINDS.index(norm.kind), bits


def _decode_norm(kind: int, bits: int) -> Norm | None:
    if kind == 0:
        return None
    (eps,) = struct.unpack("<d", struct.pack("<q", bits))
    return Norm(NORM_KINDS[kind - 1], eps)
