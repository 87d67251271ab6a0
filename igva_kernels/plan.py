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
from typing import Literal

from igva_kernels.program import PLAIN, CopySlot, MixProgram, MixSlot, Norm, Term

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
        norm: applied to each of them before they are averaged; None for the states as they are.
    """

    layers: tuple[int, ...]
    norm: Norm | None = None


@dataclass(frozen=True)
class Weighted:
    """A slot that holds ``sum_k w_k * mean(group k)`` with weights given at run time, and one layer beside them if wanted.

    Args:
        groups: K groups of hidden states. Several weighted slots of one plan take consecutive columns of the weights.
        plus: a hidden state that is added with the constant weight 1, as it is; None for none.
        norm: applied to each hidden state of the groups before they are averaged; None for the states as they are.
    """

    groups: tuple[tuple[int, ...], ...]
    plus: int | None = None
    norm: Norm | None = None


Slot = Layer | Mean | Weighted

Group = tuple[tuple[int, ...], Norm | None]
"""Layers that are averaged, and the norm of each."""


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
        sources = tuple(sorted({layer for slot in slots for layer in _layers_of(slot)}))
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
            return Mean(resolve_group(slot.layers, self.num_layers, where), _checked_norm(slot.norm, where))
        if isinstance(slot, Weighted):
            groups = tuple(slot.groups)
            if not groups:
                raise ValueError(f"{where}: Weighted needs at least one group, got none")
            return Weighted(
                tuple(resolve_group(group, self.num_layers, f"{where}, group {k}") for k, group in enumerate(groups)),
                None if slot.plus is None else resolve_layer(slot.plus, self.num_layers, f"{where}, plus"),
                _checked_norm(slot.norm, where),
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


def _checked_norm(norm: Norm | None, where: str) -> Norm | None:
    if norm is not None and not isinstance(norm, Norm):
        raise TypeError(f'{where}: norm must be a Norm or None, got {norm!r}; write Norm("rms") or Norm("layer", eps=1e-5)')
    return norm


def _layers_of(slot: Slot) -> tuple[int, ...]:
    if isinstance(slot, Layer):
        return (slot.index,)
    if isinstance(slot, Mean):
        return slot.layers
    return (*(layer for group in slot.groups for layer in group), *(() if slot.plus is None else (slot.plus,)))


def _compile(slots: tuple[Slot, ...], sources: tuple[int, ...]) -> MixProgram:
    position = {layer: index for index, layer in enumerate(sources)}
    weighted: list[Group] = [(group, slot.norm) for slot in slots if isinstance(slot, Weighted) for group in slot.groups]
    plain: list[Group] = [(slot.layers, slot.norm) for slot in slots if isinstance(slot, Mean)]
    plain += [((slot.plus,), None) for slot in slots if isinstance(slot, Weighted) and slot.plus is not None]
    distinct = list(dict.fromkeys(weighted + plain))
    compiled: list[CopySlot | MixSlot] = []
    column = 0
    for slot in slots:
        if isinstance(slot, Layer):
            compiled.append(CopySlot(position[slot.index]))
        elif isinstance(slot, Mean):
            compiled.append(MixSlot((Term(distinct.index((slot.layers, slot.norm)), PLAIN),)))
        else:
            terms = [Term(distinct.index((group, slot.norm)), column + k) for k, group in enumerate(slot.groups)]
            if slot.plus is not None:
                terms.append(Term(distinct.index(((slot.plus,), None)), PLAIN))
            compiled.append(MixSlot(tuple(terms)))
            column += len(slot.groups)
    return MixProgram(
        num_sources=len(sources),
        groups=tuple(tuple(position[layer] for layer in layers) for layers, _ in distinct),
        slots=tuple(compiled),
        num_weights=column,
        num_weighted_groups=len(set(weighted)),
        norms=tuple(norm for _, norm in distinct),
    )
