"""Values and gradients of multi-scale deformable attention against the formulation in grid_sample."""

import pytest
import torch

from igva_kernels.deformable import multi_scale_deformable_attention as attention

IMPLS = ("reference", "torch")


def with_gradients(function, inputs, cotangent):
    inputs = inputs.leaves()
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs.tensors, cotangent.to(out.dtype))]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("heads", "points", "channels"), [(3, 2, 6), (1, 1, 1), (2, 5, 8)])
def test_float64_equals_the_formula(impl, heads, points, channels, shapes, make_inputs, formula):
    inputs = make_inputs(shapes, heads=heads, points=points, channels=channels, softmax=False)
    cotangent = torch.randn(2, 5, heads * channels, dtype=torch.float64)
    actual = with_gradients(lambda *args: attention(*args, impl=impl), inputs, cotangent)
    expected = with_gradients(formula, inputs, cotangent)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_as_exact_as_torch(impl, dtype, shapes, make_inputs, formula, assert_as_exact_as):
    # The locations of both are float32: what is compared is the arithmetic.
    inputs = make_inputs(shapes, queries=40).to(dtype, locations=torch.float32)
    cotangent = torch.randn(2, 40, 18).to(dtype)
    actual = with_gradients(lambda *args: attention(*args, impl=impl), inputs, cotangent)
    exact = with_gradients(formula, inputs.to(torch.float64), cotangent)
    same = with_gradients(formula, inputs.to(torch.float32), cotangent)  # rounded once to dtype: what a caller gets today
    for name, got, own, want in zip(("output", "value", "locations", "weights"), actual, same, exact, strict=True):
        assert got.dtype == (torch.float32 if name in ("locations", "weights") else dtype)
        assert_as_exact_as(got, own.to(got.dtype), want, slack=4, what=name)


@pytest.mark.parametrize("impl", IMPLS)
def test_by_hand(impl):
    value = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64).view(1, 6, 1, 1)  # 2 rows of 3
    centre_of_the_last_cell, middle, a_quarter_cell_outside = (5 / 6, 3 / 4), (1 / 2, 1 / 2), (-1 / 12, 1 / 4)
    locations = torch.tensor([centre_of_the_last_cell, middle, a_quarter_cell_outside], dtype=torch.float64)
    weights = torch.tensor([10.0, 1.0, 4.0], dtype=torch.float64)
    out = attention(value, [(2, 3)], locations.view(1, 3, 1, 1, 1, 2), weights.view(1, 3, 1, 1, 1), impl=impl)
    # the last cell; halfway between 2 and 5; a quarter of cell 0, since x = -3/4
    torch.testing.assert_close(out.flatten(), torch.tensor([60.0, 3.5, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("place", [float("nan"), float("inf"), -float("inf"), 1e30, -0.25, 1.25])
def test_a_location_outside_reads_nothing(impl, place, make_inputs):
    """Not even NaN, in a value that no other location is near."""
    inputs = make_inputs([(2, 2)], points=1, heads=1)
    inputs.value.fill_(float("nan"))
    inputs.locations[..., 1].fill_(0.5)
    inputs.locations[..., 0].fill_(place)  # -0.25 and 1.25 are exactly one cell outside
    out, value_grad, locations_grad, weights_grad = with_gradients(
        lambda *args: attention(*args, impl=impl), inputs, torch.ones(2, 5, 6)
    )
    for result in (out, value_grad, weights_grad, locations_grad):
        assert (result == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("batch", "queries"), [(0, 3), (2, 0)])
def test_nothing_to_do(impl, batch, queries, make_inputs):
    inputs = make_inputs([(2, 3)], batch=batch, queries=queries)
    out, value_grad, *_ = with_gradients(
        lambda *args: attention(*args, impl=impl), inputs, torch.zeros(batch, queries, 18, dtype=torch.float64)
    )
    assert out.shape == (batch, queries, 18)
    assert (value_grad == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_arguments_equal_contiguous_ones(impl, make_inputs):
    inputs = make_inputs([(3, 4), (2, 2)])
    strided = inputs._replace(
        value=inputs.value.transpose(1, 2).contiguous().transpose(1, 2),
        locations=inputs.locations.flip(-1).contiguous().flip(-1).transpose(0, 1).contiguous().transpose(0, 1),
        weights=inputs.weights.transpose(3, 4).contiguous().transpose(3, 4),
    )
    cotangent = torch.randn(5, 2, 18, dtype=torch.float64).transpose(0, 1)
    actual = with_gradients(lambda *args: attention(*args, impl=impl), strided, cotangent)
    expected = with_gradients(lambda *args: attention(*args, impl=impl), inputs, cotangent)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_only_the_gradients_that_are_needed(impl, make_inputs):
    inputs = make_inputs([(3, 4)])
    every = torch.autograd.grad(attention(*(leaves := inputs.leaves()), impl=impl).sum(), leaves.tensors)
    for position, expected in enumerate(every):
        tensors = [tensor.detach().requires_grad_(index == position) for index, tensor in enumerate(inputs.tensors)]
        out = attention(tensors[0], inputs.shapes, tensors[1], tensors[2], impl=impl)
        torch.testing.assert_close(torch.autograd.grad(out.sum(), tensors[position])[0], expected)
