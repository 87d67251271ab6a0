"""Norms of the members before they are averaged, forward and backward."""

import pytest
import torch

from igva_kernels import FusionPlan, Layer, Mean, Weighted
from igva_kernels.impl import cpu, native, reference
from igva_kernels.program import Norm

pytestmark = pytest.mark.usefixtures("_built")

LAYER, RMS = Norm("layer"), Norm("rms", 1e-3)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLANS = {
    "mean of normalised layers": FusionPlan(4, (Mean((1, 2, 4), LAYER),)),
    "weighted": FusionPlan(6, (Weighted(((1, 2), (3, 4), (5,)), norm=RMS), Layer(2))),
    "same layers with and without": FusionPlan(3, (Weighted(((0, 1, 2),), norm=LAYER), Mean((0, 1, 2)), Mean((0, 1), RMS))),
    "one layer in groups of two norms": FusionPlan(3, (Weighted(((1,), (1, 2)), norm=RMS), Mean((1, 3), LAYER), Layer(1))),
}


@pytest.fixture(params=PLANS, ids=str)
def plan(request):
    return PLANS[request.param]


def forward(module, case, **options):
    return module.fuse_forward(case.states, case.weights, case.plan.program, 1, False, **options)[0]


def backward(module, case, *, means=None):
    num_tokens = case.states[0].shape[1]
    needs_weights = case.weights is not None
    return module.fuse_backward(
        case.cotangent, case.states, means, case.weights, case.plan.program, 1, num_tokens, needs_weights, True
    )


@pytest.mark.usefixtures("either_build")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [33, 64])
def test_forward_is_as_exact_as_torch(plan, dtype, width, make_case, assert_as_exact_as):
    case = make_case(plan, dtype, width=width)
    exact = forward(reference, case.to(torch.float64))
    assert_as_exact_as(forward(native, case), forward(reference, case), exact, slack=0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ["shared", "per_image", "per_token"])
def test_gradients_are_as_exact_as_torch(plan, dtype, shape, make_case, assert_as_exact_as):
    case = make_case(plan, dtype, width=33, shape=shape)
    grad_weights, grads = backward(native, case)
    own_weights, own = backward(cpu, case)
    exact_weights, exact = backward(reference, case.to(torch.float64))
    for index, gradients in enumerate(zip(grads, own, exact, strict=True)):
        assert_as_exact_as(*gradients, slack=1.0, what=f"class {index}")
    if case.weights is not None:
        assert_as_exact_as(grad_weights, own_weights, exact_weights, slack=4.0, what="weights")


@pytest.mark.parametrize("shape", ["per_image", "per_token"])
def test_gradients_with_kept_means_and_states(shape, make_case, assert_as_exact_as):
    case = make_case(PLANS["weighted"], shape=shape)
    means = native.fuse_forward(case.states, case.weights, case.plan.program, 1, True)[1]
    from_means, from_states = backward(native, case, means=means), backward(native, case)
    assert_as_exact_as(from_means[0], from_states[0], backward(reference, case.to(torch.float64))[0], slack=4.0)
    assert all(torch.equal(a, b) for a, b in zip(from_means[1], from_states[1], strict=True))


def test_sparse_weights_of_normalised_layers(make_case, assert_as_exact_as):
    case = make_case(PLANS["weighted"], shape="per_token")._replace(weights=torch.randn(3, 6, 1))
    indices = torch.randint(-1, 3, (3, 6, 1))
    exact_case = case.to(torch.float64)
    out, exact = (forward(module, one, indices=indices) for module, one in ((native, case), (reference, exact_case)))
    assert_as_exact_as(out, forward(cpu, case, indices=indices), exact, slack=0.5)
    arguments = (case.plan.program, 1, 7, True, True)
    results = [
        module.fuse_backward(one.cotangent, one.states, None, one.weights, *arguments, indices=indices)
        for module, one in ((native, case), (cpu, case), (reference, exact_case))
    ]
    assert_as_exact_as(*(values for values, _ in results), slack=4.0, what="values")
    for index, gradients in enumerate(zip(*(grads for _, grads in results), strict=True)):
        assert_as_exact_as(*gradients, slack=1.0, what=f"class {index}")


def test_reduction_and_its_gradients(plan, make_case, assert_as_exact_as):
    case = make_case(plan, width=33)
    program, wide = plan.program, [state.double() for state in case.states]
    means = native.reduce_forward(case.states, program, 1)
    assert_as_exact_as(
        means, cpu.reduce_forward(case.states, program, 1), reference.reduce_forward(wide, program, 1), slack=0.5
    )
    cotangent = torch.randn_like(means)
    actual = native.reduce_backward(cotangent, program, 1, 7, states=case.states)
    own = cpu.reduce_backward(cotangent, program, 1, 7, states=case.states)
    exact = reference.reduce_backward(cotangent.double(), program, 1, 7, states=wide)
    for index, gradients in enumerate(zip(actual, own, exact, strict=True)):
        assert_as_exact_as(*gradients, slack=1.0, what=f"class {index}")


def test_the_same_bits_on_any_number_of_threads(plan, make_case, many_threads):
    case = make_case(plan, torch.bfloat16, tokens=40)
    many_threads(1)
    out, (grad_weights, grads) = forward(native, case), backward(native, case)
    many_threads(3)
    for _ in range(5):
        assert torch.equal(forward(native, case), out)
        again_weights, again = backward(native, case)
        assert all(torch.equal(a, b) for a, b in zip(again, grads, strict=True))
        assert grad_weights is None or torch.equal(again_weights, grad_weights)
