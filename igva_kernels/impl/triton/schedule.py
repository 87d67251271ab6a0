"""A mix program as the constants that a kernel unrolls.

The kernels walk the sources in ascending order and touch each exactly once, whatever the plan. What happens to a source
is looked up in a :class:`Schedule`, a ``tl.constexpr`` argument: every loop over it is unrolled, every index is a
constant, and the machine code holds nothing but loads, arithmetic and stores.

It is a named tuple of tuples because Triton asks three things of such an argument: it must hash fast (at each launch),
its ``repr`` must be complete (the key of the cache on disk), and what is indexed twice must be a plain tuple reached by
an attribute (Triton 3.6 cannot index a constexpr that is itself a nested tuple).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from igva_kernels.program import PLAIN, CopySlot, MixProgram, MixSlot

Terms = tuple[tuple[int, int], ...]
NormConstants = tuple[()] | tuple[str, float]


class Schedule(NamedTuple):
    """What to do with each source, group, slot, weight column and gradient class.

    Attributes:
        reads: per source, whether it takes part.
        copies: per source, the slots that copy it.
        members: per source, the groups that it is added to.
        completes: per source, the groups of which it is the last member.
        folds: per source, the ``(slot, group, column, position)`` of the terms whose turn has come once it is added: their
            group is complete, and so are those of all terms before them in the slot. A sum thus ends as early as the order
            of the terms allows, and that order, which fixes the rounding, is always the plan's.
        readers: per source, the weight columns that it reaches; empty where it is read whatever the columns are.
        shares_members: per group, whether one of its members takes part for another reason as well.
        first_members: per group, its first member.
        sizes: per group, the number of its members.
        norms: per group, the ``(kind, eps)`` that each member passes before it is added, or nothing.
        terms: per slot, the ``(group, column)`` whose weighted means it sums, in order; empty for a slot that copies.
            The column is :data:`~igva_kernels.program.PLAIN`, -1, where the weight is the constant 1.
        uses: per group, the ``(slot, column)`` where its mean goes: ``terms`` seen from the groups.
        columns: per weight column, its ``(slot, group)``.
        num_weighted_groups: the first so many groups carry a weight.
        classes: per gradient class, ``(slots that copy it, groups that it is added to)``.
        own_class: per source, its gradient class if it has one to itself because a norm makes its gradient depend on its
            values; else -1.
        owned_classes: per gradient class, whether it belongs to one such source.
        has_norms: whether some group normalises its members.
        open_groups: the most sums that wait for their turn at the same time.
    """

    reads: tuple[bool, ...]
    copies: tuple[tuple[int, ...], ...]
    members: tuple[tuple[int, ...], ...]
    completes: tuple[tuple[int, ...], ...]
    folds: tuple[tuple[tuple[int, int, int, int], ...], ...]
    readers: tuple[tuple[int, ...], ...]
    shares_members: tuple[bool, ...]
    first_members: tuple[int, ...]
    sizes: tuple[int, ...]
    norms: tuple[NormConstants, ...]
    terms: tuple[Terms, ...]
    uses: tuple[Terms, ...]
    columns: Terms
    num_weighted_groups: int
    classes: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    own_class: tuple[int, ...]
    owned_classes: tuple[bool, ...]
    has_norms: bool
    open_groups: int


@lru_cache(maxsize=1024)
def mix_schedule(program: MixProgram) -> Schedule:
    """The program as it stands: what ``fuse`` runs."""
    terms = tuple(
        tuple((term.group, term.column) for term in slot.terms) if isinstance(slot, MixSlot) else () for slot in program.slots
    )
    copied = [slot.source if isinstance(slot, CopySlot) else None for slot in program.slots]
    return _schedule(program, terms, copied)


@lru_cache(maxsize=1024)
def gradient_schedule(program: MixProgram, needs_weights: bool, needs_states: bool) -> Schedule:
    """What the backward of ``fuse`` runs.

    dL/dw depends on the weighted terms alone, so only the members of weighted groups are read for it, and only their
    slots of the output's gradient. dL/dh depends on all slots, and reads the sources that a norm touches.
    """
    mix = mix_schedule(program)
    weighted = tuple(tuple((group, column) for group, column in terms if column != PLAIN) for terms in mix.terms)
    for_weights = _schedule(program, weighted, copied=[])
    if not needs_states:
        return for_weights
    reads = tuple(
        own_class >= 0 or (needs_weights and reads_for_weights)
        for own_class, reads_for_weights in zip(mix.own_class, for_weights.reads, strict=True)
    )
    if program.has_norms:  # a source that is read for its norm needs all of its groups
        return mix._replace(reads=reads)
    return mix._replace(reads=reads, members=for_weights.members, completes=for_weights.completes)


@lru_cache(maxsize=1024)
def means_schedule(program: MixProgram) -> Schedule:
    """One slot per group that holds its plain mean: what ``reduce_groups`` runs."""
    return _schedule(program, tuple(((group, PLAIN),) for group in range(len(program.groups))), copied=[])


@lru_cache(maxsize=1024)
def summary_schedule(program: MixProgram) -> Schedule:
    """One slot per weight column that holds the plain mean of its group: what ``group_summaries`` runs.

    Of the states as they are: a summary is what the weights are computed from, whatever is mixed with them.
    """
    terms = tuple(((group, PLAIN),) for _, group in mix_schedule(program).columns)
    return _schedule(program, terms, copied=[])._replace(norms=((),) * len(program.groups), has_norms=False)


class Selection(NamedTuple):
    """Sparse weights of single layers: what is named is selected by its pointer, and no other layer is looked at.

    Attributes:
        sources: per weight column, its source.
        slot: the slot of all columns.
        group: a group of a column; all of them have its norm.
        forward: the schedule of what is left: copies, plain terms.
        only_weights: the schedule of dL/dw alone, which is left nothing to read.
        with_states: the same with dL/dh.
    """

    sources: tuple[int, ...]
    slot: int
    group: int
    forward: Schedule
    only_weights: Schedule
    with_states: Schedule


@lru_cache(maxsize=1024)
def selection(program: MixProgram) -> Selection | None:
    """How sparse weights select the sources of a program, or None if they cannot: if a column is a mean of several
    layers, or is not in the same slot as the others, before its plain terms."""
    mix = mix_schedule(program)
    groups = [group for _, group in mix.columns]
    slots = {slot for slot, _ in mix.columns}
    if len(slots) != 1 or any(mix.sizes[g] > 1 for g in groups) or len({mix.norms[g] for g in groups}) > 1:
        return None
    (slot,) = slots
    columns = [column for _, column in mix.terms[slot]]
    if columns[: len(groups)] != list(range(len(groups))):
        return None
    plain = tuple(tuple((group, column) for group, column in terms if column == PLAIN) for terms in mix.terms)
    rest = _schedule(program, plain, [each.source if isinstance(each, CopySlot) else None for each in program.slots])
    # plain terms keep their places behind the columns: the first of them is added, and does not begin the sum
    folds = tuple(
        tuple((s, g, column, place + len(groups) * (s == slot)) for s, g, column, place in turn) for turn in rest.folds
    )
    nothing = (False,) * program.num_sources
    return Selection(
        sources=tuple(mix.first_members[group] for group in groups),
        slot=slot,
        group=groups[0],
        forward=rest._replace(folds=folds),
        only_weights=gradient_schedule(program, False, False)._replace(reads=nothing),
        with_states=gradient_schedule(program, False, True),
    )


def _schedule(program: MixProgram, terms: tuple[Terms, ...], copied: list[int | None]) -> Schedule:
    sources = range(program.num_sources)
    copies = tuple(tuple(slot for slot, copied_source in enumerate(copied) if copied_source == source) for source in sources)
    placed = [(slot, group, column) for slot, slot_terms in enumerate(terms) for group, column in slot_terms]
    uses = tuple(
        tuple((slot, column) for slot, used_group, column in placed if used_group == group)
        for group in range(len(program.groups))
    )
    members = tuple(tuple(g for g, group in enumerate(program.groups) if uses[g] and source in group) for source in sources)
    # classes of the program, not of these terms: callers get one tensor per class, whether it takes part here or not
    first_of_class = [program.class_of_source.index(c) for c in range(len(program.gradient_classes))]
    folds = _folds(program, terms)
    normalised = [any(program.norms[g] is not None for g in groups) for groups in members]
    return Schedule(
        reads=tuple(bool(copies[source] or members[source]) for source in sources),
        copies=copies,
        members=members,
        completes=tuple(tuple(g for g in groups if program.groups[g][-1] == source) for source, groups in enumerate(members)),
        folds=folds,
        readers=tuple(_readers(copies[source], [uses[g] for g in members[source]]) for source in sources),
        shares_members=tuple(any(copies[source] or len(members[source]) > 1 for source in group) for group in program.groups),
        first_members=tuple(group[0] for group in program.groups),
        sizes=tuple(len(group) for group in program.groups),
        norms=tuple(() if norm is None else (norm.kind, norm.eps) for norm in program.norms),
        terms=terms,
        uses=uses,
        columns=tuple((slot, group) for column, slot, group in sorted((c, s, g) for s, g, c in placed if c != PLAIN)),
        num_weighted_groups=program.num_weighted_groups,
        classes=tuple((copies[source], members[source]) for source in first_of_class),
        own_class=tuple(program.class_of_source[source] if normalised[source] else -1 for source in sources),
        owned_classes=tuple(normalised[source] for source in first_of_class),
        has_norms=any(normalised),
        open_groups=_open_groups(members, folds),
    )


def _folds(program: MixProgram, terms: tuple[Terms, ...]) -> tuple[tuple[tuple[int, int, int, int], ...], ...]:
    """Per source the terms whose turn it brings, as :class:`Schedule` describes them."""
    folded = [0] * len(terms)  # terms of each slot
    folds = []
    for source in range(program.num_sources):
        turn = []
        for slot, slot_terms in enumerate(terms):
            while folded[slot] < len(slot_terms) and program.groups[slot_terms[folded[slot]][0]][-1] <= source:
                turn.append((slot, *slot_terms[folded[slot]], folded[slot]))
                folded[slot] += 1
        folds.append(tuple(turn))
    return tuple(folds)


def _open_groups(members: tuple[tuple[int, ...], ...], folds: tuple[tuple[tuple[int, int, int, int], ...], ...]) -> int:
    first, last = {}, {}
    for source, groups in enumerate(members):
        for group in groups:
            first.setdefault(group, source)
        for _, group, _, _ in folds[source]:
            last[group] = source
    return max((sum(first[g] <= source <= last[g] for g in first) for source in range(len(members))), default=0)


def _readers(copies: tuple[int, ...], uses: list[Terms]) -> tuple[int, ...]:
    columns = {column for terms in uses for _, column in terms}
    return () if copies or PLAIN in columns else tuple(sorted(columns))
