"""When a tower that runs layer by layer can reduce what, and what it can forget.

A schedule is the plan read along the depth of the tower: pure Python, worked out once a plan. Groups may overlap, a layer may
be copied and averaged, and the base may lie before or after the groups.
"""

from __future__ import annotations

from dataclasses import dataclass

from igva_kernels.plan import FusionPlan, Mean, Weighted
from igva_kernels.program import Norm

_ATTRIBUTE = "_streaming_schedule"


@dataclass(frozen=True)
class GroupStep:
    """The reduction of one group; with its last member it is complete.

    Args:
        index: of the group in ``plan.program.groups``.
        members: its hidden states, ascending.
        norm: of the members before they are averaged.
        plan: the plan whose one slot is the mean of this group.
    """

    index: int
    members: tuple[int, ...]
    norm: Norm | None
    plan: FusionPlan

    def member_plan(self, layer: int) -> FusionPlan:
        """The plan whose one slot is this member with the group's norm."""
        return FusionPlan(self.plan.num_layers, (Mean((layer,), self.norm),))


@dataclass(frozen=True)
class SummaryStep:
    """The summary of one distinct set of members, which is that of the states without a norm.

    Args:
        members: the hidden states, ascending.
        plan: the plan whose one weighted group this is.
    """

    members: tuple[int, ...]
    plan: FusionPlan


@dataclass(frozen=True)
class Schedule:
    """Args:
    plan: what is scheduled.
    last: the last hidden state that the plan reads; blocks after it need not run.
    groups: one step a group, in the order of ``plan.program.groups``.
    summaries: one step a distinct set of weighted members.
    summary_of_column: for each column of the weights the index of its summary.
    copies: the hidden states that are copied, ascending.
    released_after: for each hidden state the number of the last one that completes a group with it, -1 where it is in no group.
    """

    plan: FusionPlan
    last: int
    groups: tuple[GroupStep, ...]
    summaries: tuple[SummaryStep, ...]
    summary_of_column: tuple[int, ...]
    copies: tuple[int, ...]
    released_after: tuple[int, ...]


def schedule_of(plan: FusionPlan) -> Schedule:
    """The schedule of a plan, worked out once and kept with the plan."""
    _attach_schedule(plan)
    return getattr(plan, _ATTRIBUTE)


def _attach_schedule(plan: FusionPlan) -> None:
    if not hasattr(plan, _ATTRIBUTE):
        object.__setattr__(plan, _ATTRIBUTE, _make_schedule(plan))


# torch.compile can neither trace the making of plans nor guard what a constant function returns, but it reads an attribute of a
# plan that it knows. This is the mark of torch.compiler.assume_constant_result, which would import torch._dynamo, and triton.
_attach_schedule._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _make_schedule(plan: FusionPlan) -> Schedule:
    program = plan.program
    groups = []
    for index, (positions, norm) in enumerate(zip(program.groups, program.norms, strict=True)):
        members = tuple(plan.sources[position] for position in positions)
        groups.append(GroupStep(index, members, norm, FusionPlan(plan.num_layers, (Mean(members, norm),))))
    distinct = list(dict.fromkeys(plan.groups))
    released_after = [-1] * (plan.num_layers + 1)
    for group in groups:
        for layer in group.members:
            released_after[layer] = max(released_after[layer], group.members[-1])
    return Schedule(
        plan=plan,
        last=plan.sources[-1],
        groups=tuple(groups),
        summaries=tuple(SummaryStep(members, FusionPlan(plan.num_layers, (Weighted((members,)),))) for members in distinct),
        summary_of_column=tuple(distinct.index(members) for members in plan.groups),
        copies=tuple(plan.sources[source] for source in program.copied_sources),
        released_after=tuple(released_after),
    )
