"""Which layers feed which output slot: the one declarative object that every implementation executes.

A plan is pure data: frozen, hashable, free of torch. Everything that mixes the layers of a transformer per token has the shape

    out[b, n, s*D:(s+1)*D] = sum_l C[b, s, l] * h_l[b, n + P, :]

with a C that is mostly zero. A :class:`FusionPlan` states the structure of C; the weights arrive at run time. The published
plans are its class methods (:mod:`igva_kernels.presets`). Layer indices follow Hugging Face (:mod:`igva_kernels.slots`); they
are resolved once, when the plan is made, against the true depth.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from igva_kernels.presets import Presets, equal_groups
from igva_kernels.program import PLAIN, CopySlot, MixProgram, MixSlot, Norm, Term
from igva_kernels.slots import Layer, Mean, Slot, Weighted, layers_of, resolve_slot

__all__ = ["FusionPlan", "Layer", "Mean", "Slot", "Weighted", "equal_groups"]

Group = tuple[tuple[int, ...], Norm | None]
"""Layers that are averaged, and the norm of each."""


@dataclass(frozen=True)
class FusionPlan(Presets):
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
    # What callers found out about calls with this plan (quick.py); it is not copied and not pickled with it.
    memo: dict[str, Any] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.num_layers, int) or isinstance(self.num_layers, bool):
            raise TypeError(f"num_layers must be an int, got {self.num_layers!r}")
        if self.num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {self.num_layers}")
        slots = tuple(self.slots)
        if not slots:
            raise ValueError("slots is empty: a plan needs at least one of Layer, Mean, Weighted")
        slots = tuple(resolve_slot(slot, self.num_layers, f"slot {position}") for position, slot in enumerate(slots))
        groups = tuple(group for slot in slots if isinstance(slot, Weighted) for group in slot.groups)
        sources = tuple(sorted({layer for slot in slots for layer in layers_of(slot)}))
        summary_sources = tuple(sorted({layer for group in groups for layer in group}))
        program = _compile(slots, sources)
        derived = {
            "slots": slots,
            "groups": groups,
            "sources": sources,
            "program": program,
            "mix_program": program.over_means(),
            "summary_sources": summary_sources,
            "memo": {},
            "summary_program": _compile((Weighted(groups),) if groups else (), summary_sources),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    # ---- what a caller asks of a plan -------------------------------------------------------------------------------

    def __reduce__(self) -> tuple[type[FusionPlan], tuple[int, tuple[Slot, ...]]]:
        return type(self), (self.num_layers, self.slots)

    @property
    def num_slots(self) -> int:
        """S: the output has S*D channels."""
        return len(self.slots)

    @property
    def num_groups(self) -> int:
        """K: how many weights the plan takes; 0 for a plan without a weighted slot."""
        return len(self.groups)


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
