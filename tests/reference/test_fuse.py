"""fuse, reduce_groups + mix and group_summaries against the dense formula, with every gradient."""

import pytest
import torch

from igva_kernels import FusionPlan, Weighted, fuse, group_summaries, mix, reduce_groups

IMPLEMENTATIONS = ["reference", "torch", "auto"]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", ["shared", "per_image", "per_token"])
def test_fuse_equals_the_formula_in_float64(plan, shape, impl, make_states, make_weights, formula):
    states, weights = make_states(plan), make_weights(plan, shape)
    out = fuse(states, plan, weights, num_prefix_tokens=1, impl=impl)
    assert out.is_contiguous()
    torch.testing.assert_close(out, formula(states, plan, weights, 1), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_fuse_is_as_exact_as_torch(plan, impl, dtype, make_states, make_weights, formula, assert_as_exact_as):
    states, weights = make_states(plan, width=40, dtype=dtype), make_weights(plan, dtype=torch.float32)
    wide_weights = None if weights is None else weights.double()
    exact = formula([state.double() for state in states], plan, wide_weights, 1)
    narrow_weights = None if weights is None else weights.to(dtype)
    # One rounding at the store: half an epsilon of the largest value, whatever the eager formula loses.
    out = fuse(states, plan, weights, num_prefix_tokens=1, impl=impl)
    assert out.dtype == dtype
    assert_as_exact_as(out, formula(states, plan, narrow_weights, 1), exact, slack=0.5)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("shape", ["shared", "per_image", "per_token"])
@pytest.mark.parametrize("trainable_tower", [False, True])
def test_every_gradient_equals_the_formulas(plan, shape, impl, trainable_tower, make_states, make_weights, formula):
    states, weights = make_states(plan), make_weights(plan, shape)
    leaves = [state.requires_grad_() for state in states] if trainable_tower else []
    leaves += [] if weights is None else [weights.requires_grad_()]
    if not leaves:  # a frozen tower and a plan without weights
        assert not fuse(states, plan, weights, num_prefix_tokens=1, impl=impl).requires_grad
        return
    cotangent = torch.randn(3, 6, plan.num_slots * 6, dtype=torch.float64)
    actual = torch.autograd.grad(
        fuse(states, plan, weights, num_prefix_tokens=1, impl=impl), leaves, cotangent, allow_unused=True
    )
    expected = torch.autograd.grad(formula(states, plan, weights, 1), leaves, cotangent)
    for got, want in zip(actual, expected, strict=True):
        got = torch.zeros_like(want) if got is None else got  # a layer that the plan does not read
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trainable_tower", [False, True])
def test_gradients_are_as_exact_as_torch(dtype, trainable_tower, make_states, make_weights, formula, assert_as_exact_as):
    plan = FusionPlan.igva(8, 4)
    states, weights = make_states(plan, width=40, dtype=dtype), make_weights(plan, dtype=torch.float32)
    cotangent = torch.randn(3, 6, 80, dtype=torch.float64).to(dtype)

    def gradients(function, dtype_of_states, dtype_of_weights):
        h = [state.detach().to(dtype_of_states).requires_grad_(trainable_tower) for state in states]
        w = weights.detach().to(dtype_of_weights).requires_grad_()
        out = function(h, w)
        return torch.autograd.grad(out, [w, *(h[1:] if trainable_tower else [])], cotangent.to(out.dtype))

    actual = gradients(lambda h, w: fuse(h, plan, w, num_prefix_tokens=1), dtype, torch.float32)
    eager = gradients(lambda h, w: formula(h, plan, w, 1), dtype, dtype)
    exact = gradients(lambda h, w: formula(h, plan, w, 1), torch.float64, torch.float64)
    for name, got, own, want in zip(["weights", *range(1, 9)], actual, eager, exact, strict=False):
        # The weights' gradient sums N*D products: its inputs (the saved means) carry one rounding each.
        assert_as_exact_as(got, own, want, slack=4.0, what=f"gradient of {name}")


def test_gradient_of_all_layers_of_a_group_is_one_tensor_that_autograd_does_not_overwrite(make_states, make_weights):
    plan = FusionPlan.igva(4, 2)
    states = [state.requires_grad_() for state in make_states(plan)]
    weights = make_weights(plan)
    fuse(states, plan, weights, num_prefix_tokens=1).sum().backward()
    first = [state.grad.clone() for state in states[1:]]
    # A second use of the same leaves accumulates into each grad; none may be counted twice through a shared buffer.
    fuse(states, plan, weights, num_prefix_tokens=1).sum().backward()
    for state, grad in zip(states[1:], first, strict=True):
        torch.testing.assert_close(state.grad, 2 * grad)


def test_prefix_tokens_get_no_gradient_and_give_no_output(make_states, make_weights):
    plan = FusionPlan.igva(4, 2)
    states, weights = make_states(plan), make_weights(plan)
    for state in states:
        state[:, :2] = float("nan")
    states = [state.requires_grad_() for state in states]
    out = fuse(states, plan, weights[:, :], num_prefix_tokens=2)
    assert out.isfinite().all()
    out.sum().backward()
    assert all((state.grad[:, :2] == 0).all() for state in states[1:])


def test_unread_layers_may_be_none_or_nan(make_states, make_weights):
    plan = FusionPlan.igva(6, groups=[[1, 2], [4]], base=-1)
    states, weights = make_states(plan), make_weights(plan)
    expected = fuse(states, plan, weights, num_prefix_tokens=1)
    missing = [state if index in plan.sources else None for index, state in enumerate(states)]
    assert torch.equal(fuse(missing, plan, weights, num_prefix_tokens=1), expected)
    for index in (0, 3, 5):
        states[index].fill_(float("inf"))
    assert torch.equal(fuse(states, plan, weights, num_prefix_tokens=1), expected)


def test_a_stacked_tensor_is_taken_as_its_views_with_gradient(make_states, make_weights):
    plan = FusionPlan.igva(4, 2)
    states, weights = make_states(plan), make_weights(plan)
    stacked = torch.stack(states).requires_grad_()
    out = fuse(stacked, plan, weights, num_prefix_tokens=1)
    assert torch.equal(out, fuse(states, plan, weights, num_prefix_tokens=1))
    out.sum().backward()
    assert stacked.grad[0].abs().max() == 0
    assert stacked.grad[1:, :, 1:].abs().min() > 0


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("batch", [0, 1])
def test_empty_batch_and_single_image(plan, impl, batch, make_states, make_weights):
    states, weights = make_states(plan, batch=batch), make_weights(plan, batch=batch)
    if weights is not None:
        weights.requires_grad_()
    out = fuse(states, plan, weights, num_prefix_tokens=1, impl=impl)
    assert out.shape == (batch, 6, plan.num_slots * 6)
    if weights is not None:
        out.sum().backward()
        assert weights.grad.shape == weights.shape


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_strided_states_and_strided_gradients(impl, make_states, make_weights, formula):
    plan = FusionPlan.igva(4, 2)
    weights = make_weights(plan).requires_grad_()
    wide = [torch.randn(6, 12, 7, dtype=torch.float64) for _ in range(5)]
    states = [state.transpose(1, 2)[::2, :, ::2] for state in wide]  # (3, 7, 6), nothing contiguous
    cotangent = torch.randn(12, 6, 3, dtype=torch.float64).permute(2, 1, 0)
    actual = torch.autograd.grad(fuse(states, plan, weights, num_prefix_tokens=1, impl=impl), weights, cotangent)
    expected = torch.autograd.grad(formula(states, plan, weights, 1), weights, cotangent)
    torch.testing.assert_close(actual, expected)


def test_tiles_smaller_than_one_image_and_larger_than_the_batch_give_the_same(monkeypatch, make_states, make_weights):
    from igva_kernels.impl import cpu_tiles

    plan = FusionPlan.igva(4, 2)
    states = [state.requires_grad_() for state in make_states(plan, batch=5, tokens=30)]
    weights = make_weights(plan, "per_token", batch=5, patches=29).requires_grad_()
    results = []
    for elements in (1, 100, 400, 1 << 20):
        monkeypatch.setattr(cpu_tiles, "TILE_ELEMENTS", elements)
        out = fuse(states, plan, weights, num_prefix_tokens=1, impl="torch")
        results.append((out, *torch.autograd.grad(out, [weights, *states[1:]], torch.ones_like(out))))
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_mix_of_the_reduced_groups_equals_fuse_with_gradients(plan, impl, make_states, make_weights):
    states, weights = make_states(plan), make_weights(plan)
    leaves = [state.requires_grad_() for state in states]
    leaves += [] if weights is None else [weights.requires_grad_()]
    cotangent = torch.randn(3, 6, plan.num_slots * 6, dtype=torch.float64)
    reduced = reduce_groups(states, plan, num_prefix_tokens=1, impl=impl)
    two_steps = mix(reduced, plan, weights, impl=impl)
    one_step = fuse(states, plan, weights, num_prefix_tokens=1, impl=impl)
    torch.testing.assert_close(two_steps, one_step, rtol=1e-13, atol=1e-13)
    actual = torch.autograd.grad(two_steps, leaves, cotangent, allow_unused=True)
    expected = torch.autograd.grad(one_step, leaves, cotangent, allow_unused=True)
    for got, want in zip(actual, expected, strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("summary", ["cls", "mean_patch"])
def test_summaries_and_their_gradients(plan, impl, summary, make_states):
    states = [state.requires_grad_() for state in make_states(plan)]
    if not plan.num_groups:
        with pytest.raises(ValueError, match="no weighted groups"):
            group_summaries(states, plan, num_prefix_tokens=1, summary=summary, impl=impl)
        return
    actual = group_summaries(states, plan, num_prefix_tokens=1, summary=summary, impl=impl)
    rows = slice(0, 1) if summary == "cls" else slice(1, None)
    expected = torch.stack([torch.stack([states[i][:, rows].mean(1) for i in g]).mean(0) for g in plan.groups], dim=1)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)
    cotangent = torch.randn_like(expected)
    got = torch.autograd.grad(actual, states, cotangent, allow_unused=True)
    want = torch.autograd.grad(expected, states, cotangent, allow_unused=True)
    for one, other in zip(got, want, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_frozen_tower_keeps_the_means_and_lets_the_states_go(make_states, make_weights):
    plan = FusionPlan.igva(8, 4)
    states, weights = make_states(plan), make_weights(plan).requires_grad_()
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fuse(states, plan, weights, num_prefix_tokens=1)
    kept = sorted(tuple(tensor.shape) for tensor in saved)
    assert kept == [(3, 4), (4, 3, 6, 6)]  # the weights and the four means


def test_more_groups_than_half_of_the_layers_keep_the_states_instead(make_states, make_weights):
    plan = FusionPlan(4, (Weighted(((1,), (2,), (3,), (4,))),))
    states, weights = make_states(plan), make_weights(plan).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        fuse(states, plan, weights, num_prefix_tokens=1)
    assert len(saved) == 5  # four states, which exist already, and the weights


def test_the_same_call_gives_the_same_bits(make_states, make_weights):
    plan = FusionPlan.igva(8, 4)
    states, weights = make_states(plan, dtype=torch.bfloat16), make_weights(plan, dtype=torch.float32).requires_grad_()
    outs, grads = [], []
    for _ in range(20):
        out = fuse(states, plan, weights, num_prefix_tokens=1)
        outs.append(out)
        grads.append(torch.autograd.grad(out.float().square().sum(), weights)[0])
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert all(torch.equal(grad, grads[0]) for grad in grads)
