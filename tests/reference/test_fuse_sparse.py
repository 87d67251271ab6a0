"""Sparse weights per token against the dense formula, and what must not happen: reading a layer that no token names."""

import pytest
import torch

from igva_kernels import FusionPlan, Layer, Mean, Norm, SparseWeights, Weighted, fuse, mix, reduce_groups

IMPLEMENTATIONS = ["reference", "torch", "auto"]

PLANS = {
    "mixture_of_layers": FusionPlan.mixture_of_layers(5),
    "two_slots": FusionPlan(5, (Weighted(((1,), (2, 3)), plus=4), Layer(0), Weighted(((1, 2), (5,)), norm=Norm("layer")))),
    "beside_a_mean": FusionPlan(5, (Mean((1, 2)), Weighted(((1, 2), (3,))))),
}


@pytest.fixture(params=PLANS, ids=str)
def sparse_plan(request):
    return PLANS[request.param]


@pytest.fixture
def make_sparse():
    """Random values and columns (B, N, k): duplicates, and paddings on both sides of the range."""

    def make(plan, entries=4, dtype=torch.float64, indices_dtype=torch.int64):
        values = torch.randn(3, 6, entries, dtype=torch.float64).to(dtype)
        return SparseWeights(values, torch.randint(-1, plan.num_groups + 1, (3, 6, entries), dtype=indices_dtype))

    return make


def dense_of(weights, num_groups):
    """The (B, N, K) weights that say the same."""
    one_hot = (weights.indices.long()[..., None] == torch.arange(num_groups)).to(weights.values.dtype)
    return (one_hot * weights.values[..., None]).sum(-2)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("indices_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("trainable_tower", [False, True])
def test_sparse_weights_equal_the_dense_formula_with_all_gradients(
    sparse_plan, impl, indices_dtype, trainable_tower, make_states, make_sparse, formula
):
    states = [state.requires_grad_(trainable_tower) for state in make_states(sparse_plan)]
    weights = make_sparse(sparse_plan, indices_dtype=indices_dtype)
    weights.values.requires_grad_()
    out = fuse(states, sparse_plan, weights, num_prefix_tokens=1, impl=impl)
    assert out.is_contiguous()
    expected = formula(states, sparse_plan, dense_of(weights, sparse_plan.num_groups), 1)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    leaves = [weights.values, *([states[layer] for layer in sparse_plan.sources] if trainable_tower else [])]
    cotangent = torch.randn_like(expected)
    got, want = (torch.autograd.grad(result, leaves, cotangent) for result in (out, expected))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)
    padding = (weights.indices < 0) | (weights.indices >= sparse_plan.num_groups)
    assert padding.any() and (got[0][padding] == 0).all()


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_weights_are_as_exact_as_torch(sparse_plan, impl, dtype, make_states, make_sparse, formula, assert_as_exact_as):
    states = make_states(sparse_plan, width=40, dtype=dtype)
    weights = make_sparse(sparse_plan, dtype=torch.float32)
    dense = dense_of(weights, sparse_plan.num_groups)
    exact = formula([state.double() for state in states], sparse_plan, dense.double(), 1)
    out = fuse(states, sparse_plan, weights, num_prefix_tokens=1, impl=impl)
    assert out.dtype == dtype
    assert_as_exact_as(out, formula(states, sparse_plan, dense.to(dtype), 1), exact, slack=0.5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("trainable_tower", [False, True])
def test_a_layer_that_a_token_does_not_name_does_not_reach_it(impl, poison, trainable_tower, make_states):
    plan = FusionPlan.mixture_of_layers(4)
    states = make_states(plan)
    # Even tokens name layers 1 and 2, odd ones 3 and 2; nobody names 4. Padding is poisoned too.
    indices = torch.tensor([[0, 1, -1], [2, 1, 99]]).repeat(3, 3, 1)
    values = torch.randn(3, 6, 3, dtype=torch.float64)
    clean = fuse(states, plan, SparseWeights(values, indices), num_prefix_tokens=1, impl=impl)
    states[4].fill_(poison)
    states[1][:, 1:][:, 1::2] = poison
    states[3][:, 1:][:, 0::2] = poison
    values[..., 2] = poison
    values.requires_grad_()
    states = [state.requires_grad_(trainable_tower) for state in states]
    out = fuse(states, plan, SparseWeights(values, indices), num_prefix_tokens=1, impl=impl)
    assert torch.equal(out, clean)
    leaves = [values, *(states[1:] if trainable_tower else [])]
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert grad.isfinite().all()


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_tokens_that_name_nothing_get_zeros(impl, make_states):
    plan = FusionPlan.mixture_of_layers(3)
    weights = SparseWeights(torch.randn(3, 6, 2, dtype=torch.float64), torch.full((3, 6, 2), -1))
    assert (fuse(make_states(plan), plan, weights, num_prefix_tokens=1, impl=impl) == 0).all()


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_mix_takes_sparse_weights_over_reduced_groups(sparse_plan, impl, make_states, make_sparse):
    states, weights = make_states(sparse_plan), make_sparse(sparse_plan)
    weights.values.requires_grad_()
    reduced = reduce_groups(states, sparse_plan, num_prefix_tokens=1, impl=impl)
    two_steps = mix(reduced, sparse_plan, weights, impl=impl)
    one_step = fuse(states, sparse_plan, weights, num_prefix_tokens=1, impl=impl)
    torch.testing.assert_close(two_steps, one_step, rtol=1e-13, atol=1e-13)
    got, want = (torch.autograd.grad(out.square().sum(), weights.values)[0] for out in (two_steps, one_step))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_sparse_weights_save_the_states_and_no_means(make_states, make_sparse):
    plan = FusionPlan.igva(8, 2)
    states, weights = make_states(plan), make_sparse(plan, entries=2)
    weights.values.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        fuse(states, plan, weights, num_prefix_tokens=1)
    held = {tensor.data_ptr() for tensor in saved}
    assert {state.data_ptr() for state in states[1:]} <= held
    assert all(tensor.shape != (2, 3, 6, 6) for tensor in saved)


@pytest.mark.parametrize(
    ("values", "indices", "error", "words"),
    [
        (torch.zeros(3, 6, 2), torch.zeros(3, 6, 2), TypeError, "indices must be an int32 or int64 tensor, got torch.float32"),
        (torch.zeros(3, 6, 2), [[0]], TypeError, "indices.*list"),
        (torch.zeros(3, 6, 2).long(), torch.zeros(3, 6, 2).long(), TypeError, "weights must be floating point"),
        (torch.zeros(3, 2), torch.zeros(3, 2).long(), ValueError, r"values has the shape \(3, 2\).*\(3, 6, 'k >= 1'\)"),
        (torch.zeros(3, 6, 0), torch.zeros(3, 6, 0).long(), ValueError, "k >= 1"),
        (torch.zeros(3, 6, 2), torch.zeros(3, 6, 1).long(), ValueError, "indices is.*must agree"),
    ],
)
def test_errors_name_the_part_that_is_wrong(values, indices, error, words, make_states):
    plan = FusionPlan.mixture_of_layers(3)
    with pytest.raises(error, match=words):
        fuse(make_states(plan), plan, SparseWeights(values, indices), num_prefix_tokens=1)


def test_plain_torch_reads_only_the_layers_that_a_tile_names(monkeypatch) -> None:
    """Forward and backward: a layer that none of the tokens names is not added to anything."""
    from igva_kernels.impl import cpu

    read: list[int] = []
    accumulate = cpu._accumulate

    def noted(accumulator, value, norm, *, first):
        read.append(int(value.flatten()[0]))
        accumulate(accumulator, value, norm, first=first)

    monkeypatch.setattr(cpu, "_accumulate", noted)
    plan = FusionPlan.scalar_mix(4)  # a group for each of h0 .. h4
    states = [torch.full((2, 3, 8), float(layer)) for layer in range(5)]
    values = torch.rand(2, 3, 2).requires_grad_()
    indices = torch.tensor([1, 3]).expand(2, 3, 2)
    out = fuse(states, plan, SparseWeights(values, indices), num_prefix_tokens=0, impl="torch")
    assert sorted(read) == [1, 3]
    out.sum().backward()
    assert sorted(read) == [1, 1, 3, 3]
