"""Vision towers that run layer by layer: group means in place of hidden states, or only the hidden states that a plan reads.

The loop over the blocks is a forward of the tower: under FSDP2 (``fully_shard``) it runs between the hooks of the sharded
module, whether that is the tower or the :class:`StreamingTower` around it. What is kept when, and what that costs, is told in
:mod:`igva_kernels.towers.reduction`.

Shapes: B images · T tokens with prefix · P prefix tokens · N = T − P patches · D vision width · K weighted groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from igva_kernels.checks import check_impl, check_plan, check_summarised
from igva_kernels.functional import GroupMeans, Implementation, Summary
from igva_kernels.plan import FusionPlan
from igva_kernels.towers.layouts import blocks_of, num_prefix_tokens_of, run_blocks, vision_part
from igva_kernels.towers.reduction import REDUCTIONS, ReduceAt
from igva_kernels.towers.schedule import schedule_of
from igva_kernels.towers.sharding import as_forward


class StreamingTower(nn.Module):
    """A frozen tower of transformers that gives group means in place of hidden states.

    Its parameters keep their names behind the prefix ``tower.``. :func:`stream_group_means` is the same as a function, for a
    tower that has its place in another module.

    Works under ``torch.compile`` and under FSDP2: apply ``fully_shard`` to the blocks, then to the tower or to this module.

    Args:
        tower: a tower of a known type (:data:`igva_kernels.towers.layouts.LAYOUTS`).
        num_prefix_tokens: P; None takes it from the tower's config.
        reduce_at: ``"group"`` or ``"layer"``, see :mod:`igva_kernels.towers.reduction`.
        impl: as for :func:`igva_kernels.reduce_groups`.

    Raises:
        ValueError: a tower that is not known, or an unknown ``reduce_at``.
    """

    def __init__(
        self,
        tower: nn.Module,
        *,
        num_prefix_tokens: int | None = None,
        reduce_at: ReduceAt = "group",
        impl: Implementation = "auto",
    ) -> None:
        super().__init__()
        _check_reduce_at(reduce_at)
        self.num_layers = len(blocks_of(tower))
        self.num_prefix_tokens = _prefix_tokens(tower, num_prefix_tokens)
        self.reduce_at, self.impl = reduce_at, impl
        self.tower = tower

    def forward(
        self,
        pixel_values: Tensor,
        *,
        plan: FusionPlan,
        summary: Summary | None = None,
        means_dtype: torch.dtype | None = torch.float32,
        **inputs: Any,
    ) -> GroupMeans:
        """See :func:`stream_group_means`."""
        return stream_group_means(
            self.tower,
            pixel_values,
            plan,
            num_prefix_tokens=self.num_prefix_tokens,
            summary=summary,
            means_dtype=means_dtype,
            reduce_at=self.reduce_at,
            impl=self.impl,
            **inputs,
        )

    def extra_repr(self) -> str:
        return f"num_layers={self.num_layers}, num_prefix_tokens={self.num_prefix_tokens}, reduce_at={self.reduce_at!r}"


def stream_group_means(
    tower: nn.Module,
    pixel_values: Tensor,
    plan: FusionPlan,
    *,
    num_prefix_tokens: int | None = None,
    summary: Summary | None = None,
    means_dtype: torch.dtype | None = torch.float32,
    reduce_at: ReduceAt = "group",
    impl: Implementation = "auto",
    **inputs: Any,
) -> GroupMeans:
    """Run a frozen tower layer by layer and reduce each group as soon as it is complete; no gradient flows into the tower.

    A hidden state is dropped as soon as no open group needs it, and blocks after the last layer that the plan reads do not run.
    ``mix(group_means, plan, weights)`` is then the fused map. With float32 means that is bitwise what
    :func:`igva_kernels.fuse` gives for the tuple of hidden states. With 16-bit means each mean is rounded once more, which
    moves an element of the output by at most u · Σ_k |w_k · mean_k| before its own rounding: one rounding to nearest errs by
    at most u = eps/2 of a (normal) value, 2⁻⁸ in bfloat16 and 2⁻¹¹ in float16, and the weights pass the errors on.

    Args:
        tower: a tower of a known type (:data:`igva_kernels.towers.layouts.LAYOUTS`), under ``fully_shard`` or not.
        pixel_values: as the tower's ``forward`` takes them: (B, 3, height, width), for SigLIP2 (B, T, values of a patch). Tiles
            of one picture are images like any other.
        plan: which layers are averaged and copied; its ``num_layers`` is the tower's number of blocks.
        num_prefix_tokens: P; None takes it from the tower's config.
        summary: ``"cls"`` or ``"mean_patch"``, as for :func:`igva_kernels.group_summaries`; None takes ``"cls"`` where the
            tower has prefix tokens, else ``"mean_patch"``. The padding of SigLIP2's images counts as patches, as in the tuple.
        means_dtype: ``torch.float32`` (for a float64 tower: float64), or None for the dtype of the hidden states.
        reduce_at: ``"group"`` or ``"layer"``, see :mod:`igva_kernels.towers.reduction`. Bitwise the same, but for the summaries
            by mean patch, which differ in the order of their sums, and for ``impl="reference"``, which divides.
        impl: as for :func:`igva_kernels.reduce_groups`.
        inputs: further inputs of the tower's ``forward``: ``interpolate_pos_encoding`` (CLIP, SigLIP, ViT), ``spatial_shapes``
            and ``pixel_attention_mask`` (SigLIP2), ``bool_masked_pos`` and ``attention_mask`` (DINOv2, ViT).

    Returns:
        Means, (B, N, D) each, in ``means_dtype``; copied layers, (B, N, D) each, and summaries, (B, K, D), in the dtype of the
        hidden states.

    Raises:
        TypeError: ``plan`` is no plan.
        ValueError: a tower that is not known, that has another number of blocks than the plan has layers, or parameters that
            require a gradient in grad mode; inputs that the tower does not take; ``"cls"`` without a prefix token; an unknown
            ``summary``, ``reduce_at`` or ``means_dtype``.
    """
    _check_reduce_at(reduce_at)
    _check_plan(tower, plan)
    if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in tower.parameters()):
        raise ValueError(
            "tower has parameters that require a gradient, which streaming would cut off; freeze them with "
            "requires_grad_(False), run under torch.no_grad(), or give selected_hidden_states(tower, ...) to fuse()"
        )
    if means_dtype not in (None, torch.float32):
        raise ValueError(f"means_dtype must be torch.float32 or None (that of the hidden states), got {means_dtype!r}")
    num_prefix_tokens = _prefix_tokens(tower, num_prefix_tokens)
    if summary is None:
        summary = "cls" if num_prefix_tokens else "mean_patch"
    if plan.num_groups:
        check_summarised(plan, summary, num_prefix_tokens)
    check_impl(impl)
    schedule = schedule_of(plan)
    reduction = REDUCTIONS[reduce_at](schedule, num_prefix_tokens, summary, means_dtype, impl)

    def run(module: nn.Module, pixel_values: Tensor, inputs: dict[str, Any]) -> GroupMeans:
        run_blocks(module, pixel_values, schedule.last, reduction.take, **inputs)
        return reduction.finish()

    with torch.no_grad():
        return _as_forward_of_both(tower, run, pixel_values, inputs)


def selected_hidden_states(
    tower: nn.Module, pixel_values: Tensor, plan: FusionPlan, **inputs: Any
) -> tuple[Tensor | None, ...]:
    """The hidden states that a plan reads, as :func:`igva_kernels.fuse` takes them: for towers that are trained.

    Differentiable, with activation checkpointing where the tower's blocks are set to it. Blocks after the last layer that the
    plan reads are not run, and states that it does not read are not held.

    Args:
        tower, pixel_values, plan, inputs: as for :func:`stream_group_means`.

    Returns:
        L + 1 entries: (B, T, D) for the layers that the plan reads, else None.

    Raises:
        TypeError: ``plan`` is no plan.
        ValueError: a tower that is not known, or that has another number of blocks than the plan has layers; inputs that the
            tower does not take.
    """
    _check_plan(tower, plan)
    states: list[Tensor | None] = [None] * (plan.num_layers + 1)

    def take(layer: int, hidden: Tensor) -> None:
        if layer in plan.sources:
            states[layer] = hidden

    def run(module: nn.Module, pixel_values: Tensor, inputs: dict[str, Any]) -> tuple[Tensor | None, ...]:
        run_blocks(module, pixel_values, plan.sources[-1], take, **inputs)
        return tuple(states)

    return _as_forward_of_both(tower, run, pixel_values, inputs)


def _as_forward_of_both(tower: nn.Module, run: Any, *args: Any) -> Any:
    """``run(vision part, *args)`` as a forward of the tower and, where that is another module, of its vision part."""
    part = vision_part(tower)
    if part is tower:
        return as_forward(tower, run, *args)
    return as_forward(tower, lambda _, *args: as_forward(part, run, *args), *args)


def _prefix_tokens(tower: nn.Module, num_prefix_tokens: int | None) -> int:
    return num_prefix_tokens_of(vision_part(tower).config) if num_prefix_tokens is None else num_prefix_tokens


def _check_plan(tower: nn.Module, plan: FusionPlan) -> None:
    check_plan(plan)
    num_blocks = len(blocks_of(tower))
    if plan.num_layers != num_blocks:
        raise ValueError(
            f"plan is for {plan.num_layers} layers, but the tower has {num_blocks} blocks; "
            f"make the plan with num_layers={num_blocks}"
        )


def _check_reduce_at(reduce_at: str) -> None:
    if reduce_at not in REDUCTIONS:
        raise ValueError(f"reduce_at must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduce_at!r}")
