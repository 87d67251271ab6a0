"""The gradient of the summaries, where the states pass through their node on the way to the mix."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from igva_kernels import FusionPlan, Layer, Weighted, fuse, group_summaries, group_summaries_and_states

SHAPE = (2, 7, 6)
PLANS = {
    "igva": FusionPlan.igva(8, 4),
    "base_outside_the_groups": FusionPlan(4, (Weighted(((1, 2), (3,))), Layer(0))),
    "overlapping": FusionPlan(4, (Weighted(((1, 2, 3), (3, 4))), Layer(-2))),
}


def loss_of(states, plan, summary, impl, *, passing: bool) -> Tensor:
    """A function of the mix whose weights depend on the summaries."""
    options = {"num_prefix_tokens": 1, "summary": summary, "impl": impl}
    if passing:
        summaries, states = group_summaries_and_states(states, plan, **options)
    else:
        summaries = group_summaries(states, plan, **options)
    weights = summaries.float().square().mean(-1).softmax(-1)
    fused = fuse(states, plan, weights, num_prefix_tokens=1, impl=impl)
    return (fused * torch.linspace(-1, 1, fused.shape[-1])).square().sum()


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("summary", ["cls", "mean_patch"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_gradients_are_those_of_two_separate_nodes(plan, summary, impl):
    states = [torch.randn(SHAPE, dtype=torch.float64, requires_grad=True) for _ in range(plan.num_layers + 1)]
    reads = [states[layer] for layer in plan.sources]
    apart = torch.autograd.grad(loss_of(states, plan, summary, "reference", passing=False), reads)
    passed = torch.autograd.grad(loss_of(states, plan, summary, impl, passing=True), reads)
    for layer, a, b in zip(plan.sources, apart, passed, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12, msg=lambda text, layer=layer: f"layer {layer}: {text}")


def test_a_tower_in_front_gets_the_right_gradient():
    """Each state also feeds the next layer, so autograd adds to the maps that the members of a group share."""
    plan = FusionPlan.igva(6, 2)
    layers = [torch.nn.Linear(6, 6, dtype=torch.float64) for _ in range(6)]
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    image = torch.randn(SHAPE, dtype=torch.float64)

    def gradients(passing: bool):
        states = [image]
        for layer in layers:
            states.append(layer(states[-1]).tanh())
        return torch.autograd.grad(loss_of(states, plan, "cls", "torch", passing=passing), parameters)

    for a, b in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


class CountMaps(TorchDispatchMode):
    """Counts the tensors of the size of a map that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.made: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.shape == SHAPE and not func.is_view and func.name().split(".")[0][-1] != "_":
            self.made[func.name()] += 1
        return result


def test_the_backward_makes_one_map_a_gradient_class():
    plan = FusionPlan.igva(8, 4)
    states = [torch.randn(SHAPE, requires_grad=True) for _ in range(9)]
    loss = loss_of(states, plan, "cls", "torch", passing=True)
    with CountMaps() as counter:
        gradients = torch.autograd.grad(loss, [states[layer] for layer in plan.sources])
    assert sum(counter.made.values()) == len(plan.program.gradient_classes), counter.made
    assert all(gradient[:, 0].any() for gradient in gradients)


def test_without_gradients_the_states_are_the_same_objects():
    plan = FusionPlan.igva(4, 2)
    states = [torch.randn(SHAPE) for _ in range(5)]
    summaries, passed = group_summaries_and_states(states, plan, num_prefix_tokens=1)
    assert passed is states
    assert torch.equal(summaries, group_summaries(states, plan, num_prefix_tokens=1))


def test_compiled_gradients_are_the_eager_ones():
    plan = FusionPlan.igva(4, 2)
    states = [torch.randn(SHAPE, requires_grad=True) for _ in range(5)]
    function = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    compiled = torch.autograd.grad(function(states, plan, "cls", "torch", passing=True), states[1:])
    eager = torch.autograd.grad(loss_of(states, plan, "cls", "torch", passing=True), states[1:])
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b)
