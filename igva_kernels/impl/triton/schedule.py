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


class Schedule(NamedTuple):
    """What to do with each source, group, slot, weight column and gradient class.

    Attributes:
        copies: per source, the slots that copy it.
        members: per source, the groups that it is added to.
        sizes: per group, the number of its members.
        terms: per slot, the ``(group, column)`` whose weighted means it sums, in order; empty for a slot that copies.
            The column is :data:`~igva_kernels.plan.PLAIN`, -1, where the weight is the constant 1.
        uses: per group, the ``(slot, column)`` where its mean goes: ``terms`` seen from the groups.
        columns: per weight column, its ``(slot, group)``.
        num_weighted_groups: the first so many groups carry a weight.
        classes: per gradient class, ``(slots that copy it, groups that it is added to)``.
    """

    copies: tuple[tuple[int, ...], ...]
    members: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    terms: tuple[Terms, ...]
    uses: tuple[Terms, ...]
    columns: Terms
    num_weighted_groups: int
    classes: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


@lru_cache(maxsize=1024)
def mix_schedule(program: MixProgram) -> Schedule:
    """The program as it stands: what ``fuse`` runs."""
    terms = tuple(
        tuple((term.group, term.column) for term in slot.terms) if isinstance(slot, MixSlot) else () for slot in program.slots
    )
    copied = [slot.source if isinstance(slot, CopySlot) else None for slot in program.slots]
    return _schedule(program, terms, copied)


@lru_cache(maxsize=1024)
def gradient_schedule(program: MixProgram, needs_states: bool) -> Schedule:
    """What the backward of ``fuse`` runs.

    dL/dw depends on the weighted terms alone, so only the members of weighted groups are read for it, and only their
    slots of the output's gradient. dL/dh depends on all slots.
    """
    mix = mix_schedule(program)
    weighted = tuple(tuple((group, column) for group, column in terms if column != PLAIN) for terms in mix.terms)
    for_weights = _schedule(program, weighted, copied=[])
    return mix._replace(members=for_weights.members) if needs_states else for_weights


@lru_cache(maxsize=1024)
def means_schedule(program: MixProgram) -> Schedule:
    """One slot per group that holds its plain mean: what ``reduce_groups`` runs."""
    return _schedule(program, tuple(((group, PLAIN),) for group in range(len(program.groups))), copied=[])


@lru_cache(maxsize=1024)
def summary_schedule(program: MixProgram) -> Schedule:
    """One slot per weight column that holds the plain mean of its group: what ``group_summaries`` runs."""
    return _schedule(program, tuple(((group, PLAIN),) for _, group in mix_schedule(program).columns), copied=[])


def _schedule(program: MixProgram, terms: tuple[Terms, ...], copied: list[int | None]) -> Schedule:
    copies = tuple(
        tuple(slot for slot, copied_source in enumerate(copied) if copied_source == source)
        for source in range(program.num_sources)
    )
    placed = [(slot, group, column) for slot, slot_terms in enumerate(terms) for group, column in slot_terms]
    used = {group for _, group, _ in placed}
    members = tuple(
        tuple(g for g, group in enumerate(program.groups) if g in used and source in group)
        for source in range(program.num_sources)
    )
    # classes of the program, not of these terms: callers get one tensor per class, whether it takes part here or not
    first_of_class = [program.class_of_source.index(c) for c in range(len(program.gradient_classes))]
    return Schedule(
        copies=copies,
        members=members,
        sizes=tuple(len(group) for group in program.groups),
        terms=terms,
        uses=tuple(
            tuple((slot, column) for slot, used_group, column in placed if used_group == group)
            for group in range(len(program.groups))
        ),
        columns=tuple((slot, group) for column, slot, group in sorted((c, s, g) for s, g, c in placed if c != PLAIN)),
        num_weighted_groups=program.num_weighted_groups,
        classes=tuple((copies[source], members[source]) for source in first_of_class),
    )
