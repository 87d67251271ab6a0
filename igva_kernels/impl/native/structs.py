"""The structs of mix.c as ctypes sees them, and programs in the form in which it walks them. One int64 or pointer a field."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence, Sized
from ctypes import Structure, c_double, c_float, c_int64, c_void_p
from functools import lru_cache

import torch
from torch import Tensor

from igva_kernels.output_norm import OutputNorm
from igva_kernels.program import PLAIN, CopySlot, MixProgram, Norm

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Element types and their numbers in mix.c."""


class Shape(Structure):
    """``struct shape``."""

    _fields_ = (
        ("batch", c_int64),
        ("rows", c_int64),
        ("width", c_int64),
        ("rows_per_chunk", c_int64),
        ("threads", c_int64),
        ("next", c_int64),
        ("scratch", c_void_p),
        ("scratch_size", c_int64),
    )


class Map(Structure):
    """``struct map``."""

    _fields_ = (("data", c_void_p), ("image_stride", c_int64), ("row_stride", c_int64))


class NormOfRow(Structure):
    """``struct norm``."""

    _fields_ = (("kind", c_int64), ("eps", c_double))


class Groups(Structure):
    """``struct groups``."""

    _fields_ = (
        ("count", c_int64),
        ("member_start", c_void_p),
        ("member", c_void_p),
        ("norm", c_void_p),
        ("use_start", c_void_p),
        ("use_slot", c_void_p),
        ("use_column", c_void_p),
    )


class Classes(Structure):
    """``struct classes``."""

    _fields_ = (
        ("count", c_int64),
        ("part_start", c_void_p),
        ("norm", c_void_p),
        ("term_start", c_void_p),
        ("term_slot", c_void_p),
        ("term_column", c_void_p),
        ("term_scale", c_void_p),
        ("sources", c_void_p),
        ("source_type", c_int64),
    )


class Weights(Structure):
    """``struct weights``."""

    _fields_ = (
        ("data", c_void_p),
        ("image_stride", c_int64),
        ("row_stride", c_int64),
        ("num_columns", c_int64),
        ("num_named", c_int64),
        ("indices", c_void_p),
    )


class Forward(Structure):
    """``struct forward``."""

    _fields_ = (
        ("shape", Shape),
        ("groups", Groups),
        ("weights", Weights),
        ("in_type", c_int64),
        ("copy_type", c_int64),
        ("out_type", c_int64),
        ("mean_type", c_int64),
        ("num_slots", c_int64),
        ("num_means", c_int64),
        ("mixed_slot", c_void_p),
        ("copy_start", c_void_p),
        ("copy_source", c_void_p),
        ("copy_slot", c_void_p),
        ("sources", c_void_p),
        ("out", c_void_p),
        ("means", c_void_p),
        ("norm", NormOfRow),
        ("norm_weight", c_void_p),
        ("norm_bias", c_void_p),
        ("mixed", c_void_p),
        ("row_mean", c_void_p),
        ("row_factor", c_void_p),
    )


class Backward(Structure):
    """``struct backward``."""

    _fields_ = (
        ("shape", Shape),
        ("groups", Groups),
        ("classes", Classes),
        ("weights", Weights),
        ("grad_type", c_int64),
        ("map_type", c_int64),
        ("num_slots", c_int64),
        ("prefix", c_int64),
        ("needed", c_void_p),
        ("grad_out", Map),
        ("slot_stride", c_int64),
        ("maps", c_void_p),
        ("grads", c_void_p),
        ("partials", c_void_p),
        ("grad_weights", c_void_p),
    )


def integers(values: Sequence[int]) -> ctypes.Array[c_int64]:
    """An ``int64_t`` array."""
    return (c_int64 * max(1, len(values)))(*values)


def maps(tensors: Sequence[Tensor], first_row: int) -> array[int]:
    """An array of ``struct map``: (B, T, D) tensors from row ``first_row`` on."""
    flat: list[int] = []
    for tensor in tensors:
        image_stride, row_stride, _ = tensor.stride()
        size = tensor.element_size()
        flat += (tensor.data_ptr() + first_row * row_stride * size, image_stride * size, row_stride * size)
    return array("q", flat)  # built faster than a ctypes array, which counts where there are two dozen tensors


class ForwardLayout:
    """A program as ``igva_forward`` walks it. The arrays live as long as this object.

    Args:
        program: the mix.
        only_means: leave the slots out, for ``reduce_groups``.

    Attributes:
        groups: all groups with the slots that use them, in the order of groups.
        num_slots: S, or 0.
        num_mixed: how many of the slots are sums.
        members: the sources that belong to a group.
        copied: those that a slot copies.
    """

    def __init__(self, program: MixProgram, only_means: bool) -> None:
        slots = () if only_means else program.slots
        self.num_slots = len(slots)
        self.num_mixed = sum(not isinstance(slot, CopySlot) for slot in slots)
        self.members = tuple(sorted({source for group in program.groups for source in group}))
        self.groups, self._group_arrays = _groups(program.groups, program.norms, [] if only_means else _uses(program))
        self.copied = program.copied_sources if slots else ()
        copies = [(slot.source, s) for s, slot in enumerate(slots) if isinstance(slot, CopySlot)]
        after: list[list[tuple[int, int]]] = [[] for _ in range(len(program.groups) + 1)]
        for source, slot in copies:  # right after the first group that reads the source
            after[next((g for g, group in enumerate(program.groups) if source in group), -1)].append((source, slot))
        self.mixed_slot = integers([not isinstance(slot, CopySlot) for slot in slots])
        self.copy_start = integers(_starts(after))
        self.copy_source = integers([source for copies_of_group in after for source, _ in copies_of_group])
        self.copy_slot = integers([slot for copies_of_group in after for _, slot in copies_of_group])


class BackwardLayout:
    """A program as ``igva_backward`` walks it. The arrays live as long as this object.

    Args:
        program: the mix.
        needs_weights: dL/dw is wanted; ``from_means`` then says whether the group means are given, else the states.
        needs_states: dL/dh is wanted.
        of_means: the cotangents are those of the group means (``reduce_groups``), not of the slots.
    """

    def __init__(
        self, program: MixProgram, *, needs_weights: bool, from_means: bool, needs_states: bool, of_means: bool = False
    ) -> None:
        uses = _uses(program)
        weighted = range(program.num_weighted_groups if needs_weights else 0)
        self.groups, self._group_arrays = _groups(
            [(g,) if from_means else program.groups[g] for g in weighted],
            [None if from_means else program.norms[g] for g in weighted],
            [[use for use in uses[g] if use[1] != PLAIN] for g in weighted],
        )
        parts: list[dict[Norm | None, list[tuple[int, int, float]]]] = []
        for copy_slots, groups in program.gradient_classes if needs_states else ():
            terms_of_norm: dict[Norm | None, list[tuple[int, int, float]]] = {None: []}  # the part without a norm comes first
            for g in groups:
                used = [(g, PLAIN)] if of_means else uses[g]
                terms = terms_of_norm.setdefault(program.norms[g], [])
                terms += [(slot, column, 1.0 / len(program.groups[g])) for slot, column in used]
            terms_of_norm[None] += [] if of_means else [(slot, PLAIN, 1.0) for slot in copy_slots]
            parts.append(terms_of_norm)
        in_parts = [terms for terms_of_norm in parts for terms in terms_of_norm.values()]
        flat = [term for terms in in_parts for term in terms]
        self._class_arrays: tuple[ctypes.Array, ...] = (
            integers(_starts(parts)),
            _norms([norm for terms_of_norm in parts for norm in terms_of_norm]),
            integers(_starts(in_parts)),
            integers([slot for slot, _, _ in flat]),
            integers([column for _, column, _ in flat]),
            (c_float * max(1, len(flat)))(*(scale for _, _, scale in flat)),
        )
        self.class_addresses = tuple(ctypes.addressof(values) for values in self._class_arrays)
        self.num_slots = len(program.groups) if of_means else len(program.slots)
        read = {slot for slot, _, _ in flat} | {s for g in weighted for s, column in uses[g] if column != PLAIN}
        self.needed = integers([s in read for s in range(self.num_slots)])
        # Only where there are norms do the gradients depend on the states: each class then has a source to look at.
        classes = range(len(parts)) if program.has_norms else ()
        self.class_sources = tuple(program.class_of_source.index(c) for c in classes)


@lru_cache(maxsize=1024)
def forward_layout(program: MixProgram, only_means: bool = False) -> ForwardLayout:
    """The layout of a program, made once."""
    return ForwardLayout(program, only_means)


@lru_cache(maxsize=1024)
def backward_layout(program: MixProgram, needs_weights: bool, from_means: bool, needs_states: bool) -> BackwardLayout:
    """The layout of a program's backward, made once."""
    return BackwardLayout(program, needs_weights=needs_weights, from_means=from_means, needs_states=needs_states)


@lru_cache(maxsize=1024)
def reduction_layout(program: MixProgram) -> BackwardLayout:
    """The layout of the backward of ``reduce_groups``, made once."""
    return BackwardLayout(program, needs_weights=False, from_means=False, needs_states=True, of_means=True)


def _uses(program: MixProgram) -> list[list[tuple[int, int]]]:
    """For each group the (slot, weight column) pairs that use its mean."""
    uses: list[list[tuple[int, int]]] = [[] for _ in program.groups]
    for s, slot in enumerate(program.slots):
        if not isinstance(slot, CopySlot):
            for term in slot.terms:
                uses[term.group].append((s, term.column))
    return uses


def _groups(
    members: Sequence[Sequence[int]], norms: Sequence[Norm | None], uses: Sequence[Sequence[tuple[int, int]]]
) -> tuple[Groups, tuple[ctypes.Array, ...]]:
    """``struct groups``, and the arrays to which it points."""
    uses = uses or [[] for _ in members]
    arrays = (
        integers(_starts(members)),
        integers([source for group in members for source in group]),
        _norms(norms),
        integers(_starts(uses)),
        integers([slot for used in uses for slot, _ in used]),
        integers([column for used in uses for _, column in used]),
    )
    return Groups(len(members), *(ctypes.addressof(values) for values in arrays)), arrays


def norm_of_row(norm: Norm | OutputNorm | None) -> NormOfRow:
    """``struct norm``."""
    return NormOfRow(0, 0.0) if norm is None else NormOfRow({"layer": 1, "rms": 2}[norm.kind], norm.eps)


def _norms(norms: Sequence[Norm | None]) -> ctypes.Array[NormOfRow]:
    return (NormOfRow * max(1, len(norms)))(*map(norm_of_row, norms))


def _starts(lists: Sequence[Sized]) -> list[int]:
    """Where each list begins when they are laid end to end, and where the last one ends."""
    starts = [0]
    for values in lists:
        starts.append(starts[-1] + len(values))
    return starts
