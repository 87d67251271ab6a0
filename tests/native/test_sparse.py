"""Weights that each token names for itself: values with indices."""

import pytest
import torch

from igva_kernels import FusionPlan, Layer, Mean, Weighted
from igva_kernels.impl import cpu, native, reference

pytestmark = pytest.mark.usefixtures("_built")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLANS = {
    "top-k of all layers": FusionPlan(6, (Weighted(tuple((layer,) for layer in range(7))),)),
    "with a reserve layer": FusionPlan(4, (Weighted(((0,), (1, 2), (3,)), plus=4),)),
    "beside others": FusionPlan(4, (Layer(1), Weighted(((0, 1), (2,))), Mean((1, 3)), Weighted(((0, 1), (4,))))),
}


@pytest.fixture(params=PLANS, ids=str)
def case(request, make_case):
    """A float32 case whose weights are the values of two columns a token."""
    made = make_case(PLANS[request.param], tokens=9, shape="per_token")
    return made._replace(weights=torch.randn(3, 8, 2))


def some_indices(plan, dtype=torch.int64):
    """Two different columns a token; here and there padding on either side of the range."""
    indices = torch.stack([torch.randperm(plan.num_groups)[:2] for _ in range(24)]).reshape(3, 8, 2)
    indices[0, 1, 0], indices[1, 2, 1] = -1, plan.num_groups
    return indices.to(dtype)


def forward(module, case, indices):
    return module.fuse_forward(case.states, case.weights, case.plan.program, 1, False, indices=indices)[0]


def backward(module, case, indices, states=True):
    program = case.plan.program
    return module.fuse_backward(case.cotangent, case.states, None, case.weights, program, 1, 9, True, states, indices=indices)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_forward_has_the_bits_of_plain_torch(case, dtype, index_dtype):
    case, indices = case.to(dtype, weights=torch.float32), some_indices(case.plan, index_dtype)
    assert torch.equal(forward(native, case, indices), forward(cpu, case, indices))


def test_forward_and_gradients_against_float64(case, assert_as_exact_as):
    indices = some_indices(case.plan)
    exact_case = case.to(torch.float64)
    assert_as_exact_as(
        forward(native, case, indices), forward(cpu, case, indices), forward(reference, exact_case, indices), slack=0.5
    )
    grad_values, grads = backward(native, case, indices)
    own_values, own = backward(cpu, case, indices)
    exact_values, exact = backward(reference, exact_case, indices)
    assert grad_values.shape == case.weights.shape
    assert_as_exact_as(grad_values, own_values, exact_values, slack=1.0, what="values")
    for index, gradients in enumerate(zip(grads, own, exact, strict=True)):
        assert_as_exact_as(*gradients, slack=0.5, what=f"class {index}")


def test_a_column_named_twice_gets_the_sum(case):
    indices = torch.zeros(3, 8, 2, dtype=torch.int64)
    once = case._replace(weights=torch.cat([case.weights.sum(-1, keepdim=True), torch.zeros(3, 8, 1)], -1))
    alone = indices.clone()
    alone[..., 1] = -1
    assert torch.equal(forward(native, case, indices), forward(native, once, alone))
    grad_values, _ = backward(native, case, indices)
    assert torch.equal(grad_values[..., 0], grad_values[..., 1])


def test_what_a_token_does_not_name_does_not_reach_it(make_case):
    plan = PLANS["top-k of all layers"]
    case = make_case(plan, tokens=9)._replace(weights=torch.randn(3, 8, 2))
    indices = some_indices(plan)
    expected, (expected_values, expected_grads) = forward(native, case, indices), backward(native, case, indices)
    for column, state in enumerate(case.states):
        state[:, 1:][~indices.eq(column).any(-1)] = float("nan")
    assert torch.equal(forward(native, case, indices), expected)
    grad_values, grads = backward(native, case, indices)
    assert torch.equal(grad_values, expected_values)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected_grads, strict=True))


def test_a_token_that_names_nothing_gets_zero(case):
    nothing = torch.full((3, 8, 2), -1)
    out = forward(native, case, nothing)
    assert torch.equal(out, forward(cpu, case, nothing))
    grad_values, _ = backward(native, case, nothing, states=False)
    assert (grad_values == 0).all()
