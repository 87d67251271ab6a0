"""reduce_groups with means in the accumulation dtype, and mix over means and copies of two dtypes."""

import pytest
import torch

from igva_kernels import FusionPlan, Norm, Weighted, fuse, mix, reduce_groups

IMPLEMENTATIONS = ["reference", "torch", "auto"]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_mix_of_wide_means_is_fuse_bit_for_bit(plan, impl, dtype, make_states, make_weights):
    states, weights = make_states(plan, width=40, dtype=dtype), make_weights(plan, dtype=torch.float32)
    reduced = reduce_groups(states, plan, num_prefix_tokens=1, means_dtype=torch.float32, impl=impl)
    assert all(mean.dtype == torch.float32 for mean in reduced.means)
    assert all(copy.dtype == dtype for copy in reduced.copies) and reduced.dtype == dtype
    two_steps = mix(reduced, plan, weights, impl=impl)
    assert two_steps.dtype == dtype
    assert torch.equal(two_steps, fuse(states, plan, weights, num_prefix_tokens=1, impl=impl))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_means_cost_one_rounding_of_each(plan, impl, dtype, make_states, make_weights):
    states, weights = make_states(plan, width=40, dtype=dtype), make_weights(plan, dtype=torch.float32)
    wide = reduce_groups(states, plan, num_prefix_tokens=1, means_dtype=torch.float32, impl=impl)
    narrow = reduce_groups(states, plan, num_prefix_tokens=1, impl=impl)
    for one, other in zip(narrow.means, wide.means, strict=True):
        assert torch.equal(one, other.to(dtype))
    # Half an ulp of each mean, times its weight, and the rounding of the result: at most half an epsilon of the magnitudes.
    factors = 0 if weights is None else weights.abs().sum(-1).max()
    largest = max([mean.abs().max() for mean in wide.means], default=torch.zeros(()))
    out, exact = mix(narrow, plan, weights, impl=impl), mix(wide, plan, weights, impl=impl)
    bound = torch.finfo(dtype).eps * ((factors + 2) * largest + exact.float().abs().max())
    assert (out.float() - exact.float()).abs().max() <= bound


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradients_through_wide_means_equal_those_of_fuse(impl, make_states, make_weights, formula, assert_as_exact_as):
    plan = FusionPlan.igva(8, 4)
    states = make_states(plan, width=40, dtype=torch.bfloat16)
    weights = make_weights(plan, dtype=torch.float32)
    cotangent = torch.randn(3, 6, 80, dtype=torch.float64).to(torch.bfloat16)

    def gradients(function, dtype, weights_dtype):
        h = [state.to(dtype).requires_grad_() for state in states]
        w = weights.to(weights_dtype).requires_grad_()
        return torch.autograd.grad(function(h, w), [w, *h[1:]], cotangent.to(dtype))

    def two_steps(h, w):
        reduced = reduce_groups(h, plan, num_prefix_tokens=1, means_dtype=torch.float32, impl=impl)
        return mix(reduced, plan, w, impl=impl)

    actual = gradients(two_steps, torch.bfloat16, torch.float32)
    eager = gradients(lambda h, w: formula(h, plan, w, 1), torch.bfloat16, torch.bfloat16)
    exact = gradients(lambda h, w: formula(h, plan, w, 1), torch.float64, torch.float64)
    for name, got, own, want in zip(["weights", *range(1, 9)], actual, eager, exact, strict=True):
        # As for fuse; where a layer is also copied, autograd adds two gradients in the dtype of the states.
        assert_as_exact_as(got, own, want, slack=4.0, what=f"gradient of {name}")


@pytest.mark.parametrize("means_dtype", [torch.float16, torch.float64])
def test_other_dtypes_are_refused(means_dtype, make_states):
    plan = FusionPlan.igva(4, 2)
    with pytest.raises(ValueError, match=r"means_dtype=.*torch\.float32"):
        reduce_groups(make_states(plan, dtype=torch.bfloat16), plan, num_prefix_tokens=1, means_dtype=means_dtype)


@pytest.mark.parametrize("impl", ["torch", "auto"])
def test_normalised_states_of_any_form_have_the_gradient_of_their_values(impl):
    """What runs the backward is chosen by the states that it reads, not by the gradient alone, which is always contiguous."""
    plan = FusionPlan(3, (Weighted(((0, 1), (2, 3)), norm=Norm("layer")),))
    values = [torch.randn(2, 8, 5, dtype=torch.float64) for _ in range(4)]
    weights, cotangent = torch.rand(2), torch.randn(2, 4, 8)

    def gradients(dtype, impl, transposed):
        states = [(v if transposed else v.transpose(1, 2).contiguous()).to(dtype).requires_grad_() for v in values]
        given = [state.transpose(1, 2) if transposed else state for state in states]
        out = mix(reduce_groups(given, plan, num_prefix_tokens=1, impl=impl), plan, weights.to(dtype), impl=impl)
        found = torch.autograd.grad(out, states, cotangent.to(dtype))
        return [grad.transpose(1, 2) if transposed else grad for grad in found]

    exact = gradients(torch.float64, "reference", transposed=False)
    for grad, expected in zip(gradients(torch.float32, impl, transposed=True), exact, strict=True):
        torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-5)
