"""Peak memory against its formula, in maps of (B, N, D): outputs, and what is kept for the backward. No other map is made."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from igva_kernels import FusionPlan, Norm, SparseWeights, fuse, group_summaries, mix, reduce_groups

pytestmark = pytest.mark.gpu

BATCH, PATCHES, PREFIX, WIDTH = 8, 576, 1, 1024
MAP = BATCH * PATCHES * WIDTH * 2
SLACK = MAP // 8
"""Partial sums, weights and the rounding of the caching allocator; no map hides in it."""


def peak_of(function: Callable[[], object]) -> int:
    """Bytes that a call has at most allocated beside what there was; its result included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = function()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def make_states(plan: FusionPlan, trainable: bool) -> list[Tensor | None]:
    shape = (BATCH, PREFIX + PATCHES, WIDTH)
    return [
        torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_(trainable) if layer in plan.sources else None
        for layer in range(plan.num_layers + 1)
    ]


def per_image(plan: FusionPlan) -> Tensor:
    return torch.rand(BATCH, plan.num_groups, device="cuda")


def sparse(plan: FusionPlan) -> SparseWeights:
    shape = (BATCH, PATCHES, 2)
    return SparseWeights(torch.rand(shape, device="cuda"), torch.randint(plan.num_groups, shape, device="cuda"))


PLANS = {
    "igva": (FusionPlan.igva(24, 4), per_image),
    "dense connector": (FusionPlan.dense_connector_dci(24), lambda plan: None),
    "tgif": (FusionPlan.tgif(24), per_image),
    "sparse": (FusionPlan.mixture_of_layers(24), sparse),
    "normalised": (FusionPlan.mean_of_normalised_layers(24, norm=Norm("rms")), lambda plan: None),
}


@pytest.mark.parametrize("name", PLANS)
def test_inference_holds_the_output(name: str) -> None:
    plan, make_weights = PLANS[name]
    states, weights = make_states(plan, False), make_weights(plan)

    def run() -> Tensor:
        return fuse(states, plan, weights, num_prefix_tokens=PREFIX, impl="triton")

    run()  # compiles
    assert peak_of(run) <= plan.num_slots * MAP + SLACK


@pytest.mark.parametrize("name", ("igva", "tgif", "sparse"))
def test_a_frozen_tower_keeps_the_means_where_they_are_fewer_than_half_of_the_layers(name: str) -> None:
    plan, make_weights = PLANS[name]
    states, weights = make_states(plan, False), make_weights(plan)
    values = (weights.values if isinstance(weights, SparseWeights) else weights).requires_grad_()
    grad_out = torch.randn(BATCH, PATCHES, plan.num_slots * WIDTH, device="cuda", dtype=torch.bfloat16)

    def run() -> Tensor:
        return fuse(states, plan, weights, num_prefix_tokens=PREFIX, impl="triton")

    torch.autograd.grad(run(), values, grad_out)  # compiles
    kept = 4 if name == "igva" else 0  # the others have a group a layer, and the states are there anyway
    assert peak_of(run) <= (plan.num_slots + kept) * MAP + SLACK
    out = run()
    assert peak_of(lambda: torch.autograd.grad(out, values, grad_out)) <= SLACK


@pytest.mark.parametrize("name", ("igva", "dense connector", "normalised"))
def test_a_trainable_tower_gets_one_gradient_a_class(name: str) -> None:
    plan, make_weights = PLANS[name]
    states, weights = make_states(plan, True), make_weights(plan)
    leaves = [state for state in states if state is not None]
    if weights is not None:
        leaves.append(weights.requires_grad_())
    grad_out = torch.randn(BATCH, PATCHES, plan.num_slots * WIDTH, device="cuda", dtype=torch.bfloat16)

    def run() -> Tensor:
        return fuse(states, plan, weights, num_prefix_tokens=PREFIX, impl="triton")

    torch.autograd.grad(run(), leaves, grad_out)  # compiles
    out = run()
    classes = len(plan.program.gradient_classes)
    assert classes == {"igva": 5, "dense connector": 3, "normalised": 24}[name]
    tokens = (PREFIX + PATCHES) / PATCHES
    assert peak_of(lambda: torch.autograd.grad(out, leaves, grad_out)) <= classes * tokens * MAP + SLACK


def test_two_steps_hold_the_means_and_then_the_output() -> None:
    plan, make_weights = PLANS["igva"]
    states, weights = make_states(plan, False), make_weights(plan)

    def reduce() -> object:
        return reduce_groups(states, plan, num_prefix_tokens=PREFIX, means_dtype=torch.float32, impl="triton")

    means = reduce()
    mix(means, plan, weights, impl="triton")  # compiles
    assert peak_of(reduce) <= 4 * 2 * MAP + SLACK  # float32: two maps each
    assert peak_of(lambda: mix(means, plan, weights, impl="triton")) <= 2 * MAP + SLACK


@pytest.mark.parametrize("summary", ("cls", "mean_patch"))
def test_summaries_hold_no_map(summary: str) -> None:
    plan, _ = PLANS["igva"]
    states = make_states(plan, False)

    def run() -> Tensor:
        return group_summaries(states, plan, num_prefix_tokens=PREFIX, summary=summary, impl="triton")

    run()
    assert peak_of(run) <= SLACK
