"""Which layers feed which output slot: the one declarative object that every implementation executes.

A plan is pure data: frozen, hashable, free of torch. Everything that mixes the layers of a transformer per token has the shape

    out[b, n, s*D:(s+1)*D] = sum_l C[b, s, l] * h_l[b, n + P, :]

with a C that is mostly zero. A :class:`FusionPlan` states the structure of C; the weights arrive at run time.

Layer indices follow Hugging Face's ``hidden_states``: ``h_0`` is the embedding output, ``h_l`` the output of block l, and a
negative index counts from the end (``-1`` is ``h_L``, ``-2`` the penultimate layer). They are resolved once, when the plan is
made, against the true depth.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Literal

SlotOrder = Literal["fused_first", "base_first"]


@dataclass(frozen=True)
class Layer:
    """A slot that copies one hidden state.

    Args:
        index: hidden state to copy, ``0 .. L`` or negative.
    """

    index: int


@dataclass(frozen=True)
class Mean:
    """A slot that holds the plain mean of some hidden states.

    Args:
        layers: hidden states to average, each once, ``0 .. L`` or negative.
    """

    layers: tuple[int, ...]


@dataclass(frozen=True)
class Weighted:
    """A slot that holds ``sum_k w_k * mean(group k)`` with weights given at run time.

    Args:
        groups: K groups of hidden states. Several weighted slots of one plan take consecutive columns of the weights.
    """

    groups: tuple[tuple[int, ...], ...]


Slot = Layer | Mean | Weighted


@dataclass(frozen=True)
class FusionPlan:
    """The layers of a tower and the slots that they fill, in order of concatenation.

    Args:
        num_layers: L, the number of encoder blocks; there are L + 1 hidden states.
        slots: the output slots; slot s fills the channels ``s*D .. (s+1)*D`` of the output.

    Raises:
        TypeError: a slot is none of :class:`Layer`, :class:`Mean`, :class:`Weighted`, or an index is not an int.
        ValueError: no layers, no slots, an empty or repeating group, or an index outside ``-(L+1) .. L``.

    After construction every index is non-negative and every group ascending, so that equal plans compare equal.

    Attributes:
        groups: the weighted groups of all slots, in the order of the weights' columns.
        sources: the hidden states that the plan reads, ascending. All others may be None.
        program: the plan over the states that it reads, as the implementations take it.
        mix_program: the same mix over finished group means.
        summary_sources: the hidden states that the weighted groups read, ascending.
        summary_program: the weighted groups alone, over ``summary_sources``.
    """

    num_layers: int
    slots: tuple[Slot, ...]
    # Derived here and not on demand, since torch.compile cannot trace the lock of a cached property.
    groups: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False)
    sources: tuple[int, ...] = field(init=False, repr=False, compare=False)
    program: MixProgram = field(init=False, repr=False, compare=False)
    mix_program: MixProgram = field(init=False, repr=False, compare=False)
    summary_sources: tuple[int, ...] = field(init=False, repr=False, compare=False)
    summary_program: MixProgram = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.num_layers, int) or isinstance(self.num_layers, bool):
            raise TypeError(f"num_layers must be an int, got {self.num_layers!r}")
        if self.num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {self.num_layers}")
        slots = tuple(self.slots)
        if not slots:
            raise ValueError("slots is empty: a plan needs at least one of Layer, Mean, Weighted")
        slots = tuple(self._resolve_slot(position, slot) for position, slot in enumerate(slots))
        groups = tuple(group for slot in slots if isinstance(slot, Weighted) for group in slot.groups)
        sources = tuple(sorted({layer for slot in slots for group in _layers_of(slot) for layer in group}))
        summary_sources = tuple(sorted({layer for group in groups for layer in group}))
        program = _compile(slots, sources)
        derived = {
            "slots": slots,
            "groups": groups,
            "sources": sources,
            "program": program,
            "mix_program": program.over_means(),
            "summary_sources": summary_sources,
            "summary_program": _compile((Weighted(groups),) if groups else (), summary_sources),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def _resolve_slot(self, position: int, slot: Slot) -> Slot:
        where = f"slot {position}"
        if isinstance(slot, Layer):
            return Layer(resolve_layer(slot.index, self.num_layers, where))
        if isinstance(slot, Mean):
            return Mean(resolve_group(slot.layers, self.num_layers, where))
        if isinstance(slot, Weighted):
            groups = tuple(slot.groups)
            if not groups:
                raise ValueError(f"{where}: Weighted needs at least one group, got none")
            return Weighted(
                tuple(resolve_group(group, self.num_layers, f"{where}, group {k}") for k, group in enumerate(groups))
            )
        raise TypeError(f"{where} must be a Layer, Mean or Weighted, got {slot!r}")

    # ---- what a caller asks of a plan -------------------------------------------------------------------------------

    @property
    def num_slots(self) -> int:
        """S: the output has S*D channels."""
        return len(self.slots)

    @property
    def num_groups(self) -> int:
        """K: how many weights the plan takes; 0 for a plan without a weighted slot."""
        return len(self.groups)

    # ---- presets ----------------------------------------------------------------------------------------------------

    @classmethod
    def igva(
        cls,
        num_layers: int,
        num_groups: int = 4,
        *,
        groups: Sequence[Sequence[int]] | None = None,
        base: int = -2,
        order: SlotOrder = "fused_first",
    ) -> FusionPlan:
        """IGVA, stage 2: the weighted sum of K group means beside one layer (arXiv 2501.08443; methods section).

        Args:
            num_layers: L of the tower; 24 for CLIP-L.
            num_groups: K; the blocks ``1 .. L`` are cut into K runs of equal length. The embedding output h_0 is in no group,
                the last block is.
            groups: the groups themselves, where L is not divisible by K or other layers are wanted.
            base: the layer that is concatenated, by default the penultimate one.
            order: ``"fused_first"`` as the paper writes it, ``"base_first"`` as the released code does. Projector weights
                trained with one order do not fit the other.

        Raises:
            ValueError: L is not divisible by K and ``groups`` is not given, or ``order`` is unknown.
        """
        return cls(num_layers, _ordered(Weighted(_groups(num_layers, num_groups, groups)), Layer(base), order))

    @classmethod
    def igva_average(
        cls,
        num_layers: int,
        num_groups: int = 4,
        *,
        groups: Sequence[Sequence[int]] | None = None,
        base: int = -2,
        order: SlotOrder = "fused_first",
    ) -> FusionPlan:
        """IGVA, stage 1: the plain mean of the group means beside one layer (``aggregate_by_average`` of the released code).

        For groups of equal size that is the mean of all their layers. Groups of unequal size would weigh a layer by the size of
        its group: run :meth:`igva` with the weights 1/K for that. Arguments as for :meth:`igva`.

        Raises:
            ValueError: the groups differ in size or share a layer.
        """
        resolved = [resolve_group(g, num_layers, f"group {k}") for k, g in enumerate(_groups(num_layers, num_groups, groups))]
        layers = [layer for group in resolved for layer in group]
        if len({len(group) for group in resolved}) > 1 or len(set(layers)) < len(layers):
            raise ValueError(
                f"groups must be disjoint and of equal size for a plain mean, got {resolved}; "
                "use FusionPlan.igva(...) with weights of 1/K instead"
            )
        return cls(num_layers, _ordered(Mean(tuple(layers)), Layer(base), order))

    @classmethod
    def llava(cls, num_layers: int, *, layer: int = -2) -> FusionPlan:
        """LLaVA-1.5: one layer, by default the penultimate one (arXiv 2310.03744)."""
        return cls(num_layers, (Layer(layer),))


def equal_groups(num_layers: int, num_groups: int) -> tuple[tuple[int, ...], ...]:
    """Blocks ``1 .. L`` in K runs of L/K consecutive layers.

    Raises:
        ValueError: K is not in ``1 .. L`` or does not divide L; the text names the divisors.
    """
    if not 1 <= num_groups <= num_layers or num_layers % num_groups:
        divisors = [k for k in range(1, num_layers + 1) if num_layers % k == 0]
        raise ValueError(
            f"num_groups={num_groups} does not cut {num_layers} layers into equal runs; "
            f"use one of {divisors}, or name the layers with groups=[[...], ...]"
        )
    size = num_layers // num_groups
    return tuple(tuple(range(1 + k * size, 1 + (k + 1) * size)) for k in range(num_groups))


def resolve_layer(index: int, num_layers: int, where: str) -> int:
    """A hidden-state index as ``0 .. num_layers``.

    Raises:
        TypeError: not an int.
        ValueError: outside ``-(num_layers + 1) .. num_layers``; the text names ``where``, the index and the depth.
    """
    if not isinstance(index, int) or isinstance(index, bool):
        raise TypeError(f"{where}: a layer index must be an int, got {index!r}")
    if not -(num_layers + 1) <= index <= num_layers:
        raise ValueError(
            f"{where}: layer {index} does not exist: a tower of {num_layers} layers has the hidden states "
            f"0 .. {num_layers} (or -1 .. {-(num_layers + 1)} from the end)"
        )
    return index if index >= 0 else index + num_layers + 1


def resolve_group(layers: Iterable[int], num_layers: int, where: str) -> tuple[int, ...]:
    """A group of hidden states as ascending non-negative indices.

    Raises:
        ValueError: empty, or a layer that appears twice (also as a positive and a negative index).
    """
    resolved = sorted(resolve_layer(layer, num_layers, where) for layer in layers)
    if not resolved:
        raise ValueError(f"{where}: a group needs at least one layer, got none")
    if len(set(resolved)) < len(resolved):
        repeated = sorted({layer for layer in resolved if resolved.count(layer) > 1})
        raise ValueError(f"{where}: layer {repeated[0]} appears more than once in {resolved}; list each layer once")
    return tuple(resolved)


def _groups(num_layers: int, num_groups: int, groups: Sequence[Sequence[int]] | None) -> tuple[tuple[int, ...], ...]:
    return equal_groups(num_layers, num_groups) if groups is None else tuple(tuple(group) for group in groups)


def _ordered(fused: Slot, base: Layer, order: SlotOrder) -> tuple[Slot, ...]:
    if order == "fused_first":
        return (fused, base)
    if order == "base_first":
        return (base, fused)
    raise ValueError(f"order must be 'fused_first' (the paper) or 'base_first' (the released code), got {order!r}")


def _layers_of(slot: Slot) -> tuple[tuple[int, ...], ...]:
    if isinstance(slot, Layer):
        return ((slot.index,),)
    return (slot.layers,) if isinstance(slot, Mean) else slot.groups


# ---- the form that the implementations execute --------------------------------------------------------------------------

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
        groups: the distinct groups, as ascending positions among the sources; those that carry a weight come first.
        slots: one per output slot.
        num_weights: K, the columns of the weights.
        num_weighted_groups: how many of ``groups`` carry a weight; their means are all that dL/dw needs.
    """

    num_sources: int
    groups: tuple[tuple[int, ...], ...]
    slots: tuple[CopySlot | MixSlot, ...]
    num_weights: int
    num_weighted_groups: int
    _encoded: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        flat = [self.num_sources, self.num_weights, self.num_weighted_groups, len(self.groups)]
        for group in self.groups:
            flat += [len(group), *group]
        for slot in self.slots:
            if isinstance(slot, CopySlot):
                flat += [0, slot.source]
            else:
                flat += [len(slot.terms), *(value for term in slot.terms for value in (term.group, term.column))]
        object.__setattr__(self, "_encoded", tuple(flat))

    @cached_property
    def gradient_classes(self) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        """The distinct ``(copy slots, groups)`` to which sources belong, in order of the first source.

        All sources of a class have the same gradient, so it is computed once: five tensors for IGVA's 24 layers.
        """
        return tuple(dict.fromkeys(self._membership))

    @cached_property
    def class_of_source(self) -> tuple[int, ...]:
        """For each source the index of its gradient class."""
        position = {key: index for index, key in enumerate(self.gradient_classes)}
        return tuple(position[key] for key in self._membership)

    @cached_property
    def _membership(self) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        return tuple(
            (
                tuple(s for s, slot in enumerate(self.slots) if isinstance(slot, CopySlot) and slot.source == source),
                tuple(g for g, group in enumerate(self.groups) if source in group),
            )
            for source in range(self.num_sources)
        )

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
        )

    @cached_property
    def copied_sources(self) -> tuple[int, ...]:
        """The distinct sources that a copy slot names, ascending."""
        return tuple(sorted({slot.source for slot in self.slots if isinstance(slot, CopySlot)}))


@lru_cache(maxsize=1024)
def _decode(flat: tuple[int, ...]) -> MixProgram:
    values = iter(flat)
    num_sources, num_weights, num_weighted_groups, num_groups = (next(values) for _ in range(4))
    groups = tuple(tuple(next(values) for _ in range(next(values))) for _ in range(num_groups))
    slots: list[CopySlot | MixSlot] = []
    for count in values:
        if count == 0:
            slots.append(CopySlot(next(values)))
        else:
            slots.append(MixSlot(tuple(Term(next(values), next(values)) for _ in range(count))))
    return MixProgram(num_sources, groups, tuple(slots), num_weights, num_weighted_groups)


def decode_program(flat: Sequence[int]) -> MixProgram:
    """The program behind an operator's ``int[]`` (cached: the same object for the same ints)."""
    return _decode(tuple(flat))


def _compile(slots: tuple[Slot, ...], sources: tuple[int, ...]) -> MixProgram:
    position = {layer: index for index, layer in enumerate(sources)}
    weighted = [group for slot in slots if isinstance(slot, Weighted) for group in slot.groups]
    plain = [slot.layers for slot in slots if isinstance(slot, Mean)]
    distinct = list(dict.fromkeys(weighted + plain))
    compiled: list[CopySlot | MixSlot] = []
    column = 0
    for slot in slots:
        if isinstance(slot, Layer):
            compiled.append(CopySlot(position[slot.index]))
        elif isinstance(slot, Mean):
            compiled.append(MixSlot((Term(distinct.index(slot.layers), PLAIN),)))
        else:
            compiled.append(MixSlot(tuple(Term(distinct.index(group), column + k) for k, group in enumerate(slot.groups))))
            column += len(slot.groups)
    return MixProgram(
        num_sources=len(sources),
        groups=tuple(tuple(position[layer] for layer in group) for group in distinct),
        slots=tuple(compiled),
        num_weights=column,
        num_weighted_groups=len(set(weighted)),
    )
