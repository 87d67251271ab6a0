"""The compiled gradients against float64, from kept means and from the states."""

import pytest
import torch

from igva_kernels import FusionPlan
from igva_kernels.impl import cpu, native, reference

pytestmark = pytest.mark.usefixtures("_built")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = ["shared", "per_image", "per_token"]


def backward(module, case, *, kept_means=None, weights=True, states=True):
    num_tokens = case.cotangent.shape[1] + case.num_prefix_tokens
    program = case.plan.program
    return module.fuse_backward(
        case.cotangent,
        [] if kept_means is not None or not weights else case.states,
        kept_means,
        case.weights,
        program,
        case.num_prefix_tokens,
        num_tokens,
        weights and case.weights is not None,
        states,
    )


def kept(module, case):
    if case.weights is None:
        return None
    return module.fuse_forward(case.states, case.weights, case.plan.program, case.num_prefix_tokens, True)[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("from_means", [False, True])
def test_gradients_are_as_exact_as_torch(plan, dtype, shape, from_means, make_case, in_dtype, assert_as_exact_as):
    case = make_case(plan, dtype, shape=shape)
    grad_weights, grads = backward(native, case, kept_means=kept(native, case) if from_means else None)
    exact_weights, exact = backward(reference, case.to(torch.float64))

    leaves = case._replace(
        states=[state.clone().requires_grad_() for state in case.states],
        weights=None if case.weights is None else case.weights.clone().requires_grad_(),
    )
    inputs = [*leaves.states, *([] if leaves.weights is None else [leaves.weights])]
    eager = torch.autograd.grad(in_dtype(leaves), inputs, leaves.cotangent)
    program = plan.program
    for index, (actual, expected) in enumerate(zip(grads, exact, strict=True)):
        assert actual.dtype == dtype
        own = eager[program.class_of_source.index(index)]
        assert_as_exact_as(actual, own, expected, slack=0.5, what=f"gradient of class {index}")
    if case.weights is not None:
        assert grad_weights.dtype == torch.float32
        assert grad_weights.shape == case.weights.shape
        # The kept means carry one rounding each.
        slack = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps if from_means else 4.0
        assert_as_exact_as(grad_weights, eager[-1], exact_weights, slack=slack, what="gradient of the weights")


@pytest.mark.usefixtures("either_build")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_the_states_have_the_bits_of_plain_torch_on_every_processor(plan, dtype, shape, make_case):
    case = make_case(plan, dtype, width=43, shape=shape)
    _, actual = backward(native, case, weights=False)
    _, expected = backward(cpu, case, weights=False)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_bits_on_any_number_of_threads(threads, shape, plan, make_case, many_threads):
    case = make_case(plan, torch.bfloat16, tokens=60, shape=shape)
    many_threads(1)
    alone_weights, alone = backward(native, case)
    many_threads(threads)
    for _ in range(5):
        grad_weights, grads = backward(native, case)
        assert all(torch.equal(a, b) for a, b in zip(grads, alone, strict=True))
        assert grad_weights is None or torch.equal(grad_weights, alone_weights)


def test_the_same_bits_on_every_processor(make_case, request):
    case = make_case(FusionPlan.igva(8, 4), torch.bfloat16, tokens=60)
    here, _ = backward(native, case)
    request.getfixturevalue("portable")
    assert torch.equal(backward(native, case)[0], here)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_cotangent_with_strides(plan, shape, make_case):
    case = make_case(plan, shape=shape)
    expected_weights, expected = backward(native, case)
    views = [
        torch.full((3, 8, case.cotangent.shape[2] + 5), float("nan"))[:, 1:-1, 3:-2].copy_(case.cotangent),
        torch.empty(case.cotangent.shape[::-1]).permute(2, 1, 0).copy_(case.cotangent),
    ]
    for view in views:
        grad_weights, grads = backward(native, case._replace(cotangent=view))
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
        assert grad_weights is None or torch.equal(grad_weights, expected_weights)


@pytest.mark.parametrize("batch", [0, 2])
def test_empty_batches_and_prefixes(batch, make_case):
    case = make_case(FusionPlan.igva(4, 2), batch=batch, prefix=3)
    case = case._replace(cotangent=torch.randn(batch, 4, 80), weights=torch.rand(2))
    grad_weights, grads = backward(native, case)
    assert all(grad.shape == (batch, 7, 40) for grad in grads)
    assert all((grad[:, :3] == 0).all() for grad in grads)
    assert grad_weights.shape == (2,)
    if batch == 0:
        assert (grad_weights == 0).all()


def test_what_is_not_needed_is_not_computed(make_case):
    case = make_case(FusionPlan.igva(4, 2))
    grad_weights, grads = backward(native, case, states=False)
    assert grads == []
    assert torch.equal(grad_weights, backward(native, case)[0])
    assert backward(native, case, weights=False)[0] is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_element_of_the_gradients_is_written(plan, dtype, make_case, monkeypatch):
    case = make_case(plan, dtype, tokens=9, width=37, prefix=2)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        grad_weights, grads = backward(native, case)
        means = native.reduce_forward(case.states, plan.program, 2)
        reduced = native.reduce_backward(torch.ones_like(means), plan.program, 2, 9)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(tensor.isfinite().all() for tensor in (*grads, *reduced))
    assert grad_weights is None or grad_weights.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_the_reduction(plan, dtype, make_case):
    case = make_case(plan, dtype)
    means = native.reduce_forward(case.states, plan.program, 1)
    for cotangent in (torch.randn_like(means), torch.randn(means.shape[::-1]).to(dtype).permute(3, 2, 1, 0)):
        actual = native.reduce_backward(cotangent, plan.program, 1, 7)
        expected = cpu.reduce_backward(cotangent, plan.program, 1, 7)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_sums_over_many_tokens_lose_nothing(make_case):
    """A column of ones against ones: the exact sum is a whole number that float32 holds."""
    case = make_case(FusionPlan(1, FusionPlan.igva(1, 1).slots), batch=1, tokens=1 << 14, width=16, prefix=0)
    ones = case._replace(states=[torch.ones_like(state) for state in case.states], cotangent=torch.ones_like(case.cotangent))
    assert backward(native, ones)[0].item() == 1 << 18
