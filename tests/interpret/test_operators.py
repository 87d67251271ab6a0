"""The kernels behind the public functions: autograd, torch.compile, the two steps of reduce and mix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from igva_kernels import FusionPlan, fuse, group_summaries, mix, reduce_groups

PLAN = FusionPlan.igva(4, 2)


@pytest.mark.parametrize("sharing", ["all", "image", "token"])
@pytest.mark.parametrize("trainable_tower", [False, True])
def test_autograd_through_every_plan(plan, sharing, trainable_tower, make_states, make_weights, formula) -> None:
    states = make_states(plan, dtype=torch.float64, finite_prefix=True)
    weights = make_weights(plan, sharing, dtype=torch.float64)
    leaves = [states[layer].requires_grad_() for layer in plan.sources] if trainable_tower else []
    leaves += [] if weights is None else [weights.requires_grad_()]
    out = fuse(states, plan, weights, num_prefix_tokens=1, impl="triton")
    exact = formula(states, plan, weights, 1)
    torch.testing.assert_close(out, exact, rtol=1e-13, atol=1e-13)
    if leaves:
        grad_out = torch.randn_like(out)
        actual = torch.autograd.grad(out, leaves, grad_out)
        expected = torch.autograd.grad(exact, leaves, grad_out)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_gradcheck(make_states) -> None:
    states = [state.requires_grad_() for state in make_states(PLAN, 1, 2, 4, dtype=torch.float64, finite_prefix=True)]
    weights = torch.randn(1, 2, dtype=torch.float64, requires_grad=True)

    def function(weights: Tensor, *states: Tensor) -> tuple[Tensor, Tensor]:
        summaries = group_summaries(states, PLAN, num_prefix_tokens=1, impl="triton")
        return fuse(states, PLAN, weights, num_prefix_tokens=1, impl="triton"), summaries

    assert torch.autograd.gradcheck(function, (weights, *states))


@pytest.mark.parametrize("trainable_tower", [False, True])
def test_compiled_equals_eager(trainable_tower, make_states, make_weights) -> None:
    states, weights = make_states(PLAN, finite_prefix=True), make_weights(PLAN, "image").requires_grad_()
    leaves = [weights, *(state.requires_grad_() for state in states if trainable_tower)]

    def function(states: list[Tensor], weights: Tensor) -> Tensor:
        return fuse(states, PLAN, weights, num_prefix_tokens=1, impl="triton").square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(function(states, weights), leaves, allow_unused=True)
    actual = torch.autograd.grad(compiled(states, weights), leaves, allow_unused=True)
    for got, want in zip(actual, expected, strict=True):
        assert (got is None and want is None) or torch.equal(got, want)


@pytest.mark.parametrize("save_means", [False, True])
def test_opcheck(save_means, make_states, make_weights, monkeypatch) -> None:
    monkeypatch.undo()  # opcheck compares storage offsets, and the guards before the outputs shift them
    states = [state.requires_grad_(not save_means) for state in make_states(PLAN, finite_prefix=True)[1:]]
    weights = make_weights(PLAN, "image").requires_grad_()
    torch.library.opcheck(torch.ops.igva.fuse, (states, weights, None, PLAN.program.encode(), 1, save_means, None, "triton"))


def test_two_steps_equal_one(plan, make_states, make_weights) -> None:
    states = make_states(plan, finite_prefix=True)
    weights = make_weights(plan, "image")
    one = fuse(states, plan, weights, num_prefix_tokens=1, impl="triton")
    two = mix(reduce_groups(states, plan, num_prefix_tokens=1, impl="triton"), plan, weights, impl="triton")
    assert torch.equal(one, two)  # float32 means lose nothing on the way


@pytest.mark.parametrize("summary", ["cls", "mean_patch"])
def test_gradients_through_the_summaries(summary, make_states) -> None:
    states = [state.requires_grad_() for state in make_states(PLAN, dtype=torch.float64, finite_prefix=True)]

    def gradients(impl: str) -> tuple[Tensor, ...]:
        summaries = group_summaries(states, PLAN, num_prefix_tokens=1, summary=summary, impl=impl)
        weights = summaries.mean(-1).softmax(-1)
        return torch.autograd.grad(fuse(states, PLAN, weights, num_prefix_tokens=1, impl=impl).square().sum(), states[1:])

    torch.testing.assert_close(gradients("triton"), gradients("reference"), rtol=1e-12, atol=1e-12)
