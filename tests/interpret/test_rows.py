"""Row tiles: norms before the mean, sparse weights per token, and what of them must not be read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from igva_kernels import SparseWeights, fuse
from igva_kernels.plan import FusionPlan, Layer, Weighted
from igva_kernels.program import SMALLEST_EPS, Norm

SLACK = {torch.float64: 4.0, torch.float32: 4.0, torch.float16: 0.5, torch.bfloat16: 1.0}  # as in test_mix.py
BATCH, PATCHES = 2, 3

# every layer for itself, a group of two, an overlap, and a layer that is read whatever the token names
SPARSE = FusionPlan(4, (Weighted(((1,), (2,), (3, 4), (2, 3)), plus=1),))
# no layer is read for two reasons, so that what is not named is not read
DISJOINT = FusionPlan(4, (Weighted(((1,), (2,), (3, 4))), Layer(0)))
# single layers, of which the named ones are selected by their pointers
SINGLE = FusionPlan(4, (Layer(0), Weighted(((2,), (1,), (3,), (4,)), plus=3)))
SELECTED_AND_NORMALISED = FusionPlan(3, (Weighted(((1,), (2,), (3,)), plus=1, norm=Norm("layer")),))
MIXES = ["overlapping", "disjoint", "single", "normalised"]


def read_by(plan: FusionPlan, states: list[Tensor]) -> list[Tensor]:
    return [states[layer] for layer in plan.sources]


def wide(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


# ---- norms --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", ["image", "token"])
@pytest.mark.parametrize("width", [40, 200])  # part of a piece, two pieces
def test_normalised_forward(
    kernels, normalised_plan, sharing, width, make_states, make_weights, formula, assert_as_exact_as
) -> None:
    plan = normalised_plan
    states, weights = make_states(plan, patches=PATCHES, width=width), make_weights(plan, sharing, patches=PATCHES)
    out, _ = kernels.fuse_forward(read_by(plan, states), weights, plan.program, 1, False)
    exact = formula([state.double() for state in states], plan, wide(weights), 1)
    assert_as_exact_as(out, formula(states, plan, weights, 1), exact, slack=4)


@pytest.mark.parametrize("dtype", SLACK, ids=str)
def test_normalised_forward_of_every_dtype(kernels, dtype, make_states, formula, assert_as_exact_as) -> None:
    plan = FusionPlan(2, (Weighted(((1, 2),), norm=Norm("layer")),))
    states, weights = make_states(plan, patches=PATCHES, dtype=dtype), torch.randn(BATCH, 1)
    out, means = kernels.fuse_forward(read_by(plan, states), weights, plan.program, 1, True)
    assert out.dtype == means.dtype == dtype
    same = formula(states, plan, weights.to(dtype), 1)
    assert_as_exact_as(out, same, formula([state.double() for state in states], plan, wide(weights), 1), slack=SLACK[dtype])


def test_the_deviation_of_a_row_far_from_zero(kernels, make_states, formula, assert_as_exact_as) -> None:
    """The difference of two moments would leave no digit of it."""
    plan = FusionPlan(1, (Weighted(((1,),), norm=Norm("layer")),))
    states, weights = [state + 4096 for state in make_states(plan, patches=PATCHES)], torch.ones(BATCH, 1)
    out, _ = kernels.fuse_forward(read_by(plan, states), weights, plan.program, 1, False)
    exact = formula([state.double() for state in states], plan, wide(weights), 1)
    assert_as_exact_as(out, exact.float(), exact, slack=4096)


@pytest.mark.parametrize("kept", ["means", "states"])
@pytest.mark.parametrize("sharing", ["all", "token"])
def test_gradients_through_norms(
    kernels, normalised_plan, kept, sharing, make_states, make_weights, formula_gradients, assert_as_exact_as
) -> None:
    plan, width = normalised_plan, 136  # two pieces of float32
    states = make_states(plan, patches=PATCHES, width=width, prefix=1)
    weights = make_weights(plan, sharing, patches=PATCHES)
    program, sources = plan.program, read_by(plan, states)
    grad_out = torch.randn(BATCH, PATCHES, plan.num_slots * width)
    means = kernels.fuse_forward(sources, weights, program, 1, True)[1] if kept == "means" else None
    grad_weights, grad_states = kernels.fuse_backward(
        grad_out, sources, means, weights, program, 1, 1 + PATCHES, weights is not None, True
    )
    finite = [torch.nan_to_num(state, posinf=0.0) for state in states]  # prefix rows have no gradient, whatever they hold
    exact_states, exact_weights = formula_gradients(finite, plan, weights, 1, grad_out, torch.float64)
    torch_states, torch_weights = formula_gradients(finite, plan, weights, 1, grad_out, torch.float32)
    for position, (same, exact) in enumerate(zip(torch_states, exact_states, strict=True)):
        grad = grad_states[program.class_of_source[position]]
        assert_as_exact_as(grad, same, exact, slack=8, what=f"dh of source {position}")
        assert (grad[:, :1] == 0).all(), "prefix rows have no gradient"
    if weights is not None:
        assert_as_exact_as(grad_weights, torch_weights, exact_weights, slack=20, what="dw")
        alone, _ = kernels.fuse_backward(grad_out, sources, means, weights, program, 1, 1 + PATCHES, True, False)
        torch.testing.assert_close(alone, grad_weights)


def test_rows_that_are_not_read_with_the_smallest_eps(kernels, make_states) -> None:
    """Their deviation is 0: neither a prefix row, nor a group that a token does not name, nor padding may become 0 / 0."""
    norm = Norm("layer", SMALLEST_EPS)
    plan = FusionPlan(1, (Weighted(((1,),), norm=norm),))
    states, grad_out = make_states(plan, patches=PATCHES), torch.randn(BATCH, PATCHES, 40)
    _, (grad,) = kernels.fuse_backward(grad_out, states[1:], None, torch.ones(1), plan.program, 1, 1 + PATCHES, False, True)
    assert (grad[:, 0] == 0).all() and grad.isfinite().all()

    for groups in (((1,), (2,)), ((1, 2), (2, 3))):  # one state a group is read by its index, shared ones are masked
        plan = FusionPlan(3, (Weighted(groups, norm=norm),))
        states = [state.requires_grad_() for state in make_states(plan, patches=PATCHES, finite_prefix=True)]
        values = torch.rand(BATCH, PATCHES, 2).requires_grad_()
        indices = torch.tensor([0, -1]).expand(BATCH, PATCHES, 2)
        out = fuse(states, plan, SparseWeights(values, indices), num_prefix_tokens=1, impl="triton")
        grads = torch.autograd.grad(out.square().sum(), [values, *(states[layer] for layer in plan.sources)])
        assert all(tensor.isfinite().all() for tensor in (out, *grads))


def test_reduce_normalised_groups(kernels, normalised_plan, make_states, assert_as_exact_as) -> None:
    """And its gradient, which needs the states."""
    from igva_kernels.impl import reference

    plan, program = normalised_plan, normalised_plan.program
    sources = read_by(plan, make_states(plan, patches=PATCHES, finite_prefix=True))
    exact_sources = [source.double() for source in sources]
    means = kernels.reduce_forward(sources, program, 1)
    exact = reference.reduce_forward(exact_sources, program, 1)
    assert_as_exact_as(means, reference.reduce_forward(sources, program, 1), exact, slack=4)
    grad_means = torch.randn_like(means)
    grads = kernels.reduce_backward(grad_means, program, 1, 1 + PATCHES, states=sources)
    same = reference.reduce_backward(grad_means, program, 1, 1 + PATCHES, states=sources)
    exact_grads = reference.reduce_backward(grad_means.double(), program, 1, 1 + PATCHES, states=exact_sources)
    for grad, own, want in zip(grads, same, exact_grads, strict=True):
        assert_as_exact_as(grad, own, want, slack=8)


def test_gradcheck_of_a_norm(make_states) -> None:
    plan = FusionPlan(2, (Weighted(((1,), (2,)), plus=1, norm=Norm("layer")),))
    states = [state.requires_grad_() for state in make_states(plan, 1, 1, 6, dtype=torch.float64, finite_prefix=True)]
    weights = torch.randn(1, 2, dtype=torch.float64, requires_grad=True)

    def function(weights: Tensor, *states: Tensor) -> Tensor:
        return fuse(states, plan, weights, num_prefix_tokens=1, impl="triton")

    assert torch.autograd.gradcheck(function, (weights, *states))


# ---- sparse weights -----------------------------------------------------------------------------------------------------


def sparse_weights(columns: int, chosen: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Values and columns, among them a column named twice and an index that is none."""
    indices = torch.stack([torch.randperm(columns)[:chosen] for _ in range(BATCH * PATCHES)]).view(BATCH, PATCHES, chosen)
    indices[0, 0, 0] = indices[0, 0, 1]
    indices[1, 1, -1] = -1
    return torch.randn(BATCH, PATCHES, chosen, dtype=dtype), indices


def densified(values: Tensor, indices: Tensor, columns: int) -> Tensor:
    return torch.stack([torch.where(indices == column, values, 0).sum(-1) for column in range(columns)], dim=-1)


@pytest.mark.parametrize("mix", [SPARSE, DISJOINT, SINGLE, SELECTED_AND_NORMALISED], ids=MIXES)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("width", [40, 136])
def test_sparse_equals_dense(kernels, mix, index_dtype, width, make_states, formula, assert_as_exact_as) -> None:
    states, (values, indices) = make_states(mix, patches=PATCHES, width=width), sparse_weights(mix.num_groups)
    weights = densified(values, indices, mix.num_groups)
    out, _ = kernels.fuse_forward(read_by(mix, states), values, mix.program, 1, False, indices=indices.to(index_dtype))
    exact = formula([state.double() for state in states], mix, weights.double(), 1)
    assert_as_exact_as(out, formula(states, mix, weights, 1), exact, slack=4)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "mix", [DISJOINT, FusionPlan(4, (Weighted(((1,), (2,), (3,), (4,))), Layer(0)))], ids=["groups", "layers"]
)
def test_what_a_token_does_not_name_does_not_reach_it(kernels, mix, poison, make_states, formula) -> None:
    states, (values, indices) = make_states(mix, patches=PATCHES), sparse_weights(mix.num_groups, chosen=2)
    weights = densified(values, indices, mix.num_groups)
    exact = formula(states, mix, weights, 1)
    values = values.masked_fill(indices < 0, poison)  # whatever stands beside an index that is no column
    for column, group in enumerate(mix.groups):
        unnamed = ~(indices == column).any(-1)
        assert unnamed.any()
        for layer in group:
            states[layer][:, 1:][unnamed] = poison
    program, sources = mix.program, read_by(mix, states)
    for save_means in (False, True):
        out, means = kernels.fuse_forward(sources, values, program, 1, save_means, indices=indices)
        torch.testing.assert_close(out, exact)
    grad_out = torch.randn_like(out)
    args = (values, program, 1, 1 + PATCHES, True)
    from_states, grad_states = kernels.fuse_backward(grad_out, sources, None, *args, True, indices=indices)
    from_means, _ = kernels.fuse_backward(grad_out, [], means, *args, False, indices=indices)
    assert from_states.isfinite().all() and all(grad.isfinite().all() for grad in grad_states)
    torch.testing.assert_close(from_means, from_states)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_sparse_mix_of_float32_means_gives_the_bits_of_one_step(kernels, dtype, make_states) -> None:
    """In one step of groups the columns are masked, in two steps their means are selected: the order is the same."""
    plan = FusionPlan(6, (Weighted(((1, 2), (3,), (4, 5), (6,)), plus=-2),))
    program, sources = plan.program, read_by(plan, make_states(plan, patches=PATCHES, dtype=dtype))
    values, indices = sparse_weights(4)
    one, _ = kernels.fuse_forward(sources, values, program, 1, False, indices=indices)
    means = kernels.reduce_forward(sources, program, 1, dtype=torch.float32)
    two, _ = kernels.fuse_forward(means.unbind(0), values, plan.mix_program, 0, False, indices=indices, dtype=dtype)
    assert torch.equal(one, two)


def test_an_infinite_layer_of_another_group(kernels, make_states) -> None:
    """The group (2, 3) is not named: where layer 2 is infinite, which is named for itself, the sum is so and not NaN."""
    states = make_states(SPARSE, patches=PATCHES)
    states[2][:, 1:] = float("inf")
    indices = torch.ones(BATCH, PATCHES, 1, dtype=torch.int64)
    out, _ = kernels.fuse_forward(
        read_by(SPARSE, states), torch.ones(BATCH, PATCHES, 1), SPARSE.program, 1, False, indices=indices
    )
    assert (out == float("inf")).all()


@pytest.mark.parametrize("mix", [SPARSE, DISJOINT, SINGLE, SELECTED_AND_NORMALISED], ids=MIXES)
@pytest.mark.parametrize("needs_states", [False, True])
def test_gradients_of_sparse_weights(kernels, mix, needs_states, make_states, formula_gradients, assert_as_exact_as) -> None:
    states, (values, indices) = make_states(mix, patches=PATCHES, width=136), sparse_weights(mix.num_groups)
    grad_out = torch.randn(BATCH, PATCHES, mix.num_slots * 136)
    grad_values, grad_states = kernels.fuse_backward(
        grad_out,
        read_by(mix, states),
        None,
        values,
        mix.program,
        1,
        1 + PATCHES,
        True,
        needs_states,
        indices=indices,
    )
    weights = densified(values, indices, mix.num_groups)
    exact_states, dense = formula_gradients(states, mix, weights, 1, grad_out, torch.float64)
    torch_states, torch_dense = formula_gradients(states, mix, weights, 1, grad_out, torch.float32)
    named = indices.clamp(min=0)
    exact = torch.where(indices >= 0, dense.gather(-1, named), 0)
    assert_as_exact_as(grad_values, torch.where(indices >= 0, torch_dense.gather(-1, named), 0), exact, slack=20)
    if needs_states:
        for position, (same, want) in enumerate(zip(torch_states, exact_states, strict=True)):
            assert_as_exact_as(grad_states[mix.program.class_of_source[position]], same, want, slack=4)


def test_sparse_weights_of_normalised_layers(kernels, make_states, formula, assert_as_exact_as) -> None:
    plan = FusionPlan(3, (Weighted(((1,), (2,), (3,)), norm=Norm("rms")),))
    states, (values, indices) = make_states(plan, patches=PATCHES), sparse_weights(3, chosen=2)
    indices = indices.clamp(min=0)
    out, _ = kernels.fuse_forward(read_by(plan, states), values, plan.program, 1, False, indices=indices)
    weights = densified(values, indices, 3)
    exact = formula([state.double() for state in states], plan, weights.double(), 1)
    assert_as_exact_as(out, formula(states, plan, weights, 1), exact, slack=4)


def test_public_function_with_sparse_weights(make_states, formula) -> None:
    states = [state.requires_grad_() for state in make_states(SPARSE, patches=PATCHES, finite_prefix=True)]
    values, indices = sparse_weights(SPARSE.num_groups)
    values.requires_grad_()
    out = fuse(states, SPARSE, SparseWeights(values, indices), num_prefix_tokens=1, impl="triton")
    expected = formula(states, SPARSE, densified(values, indices, SPARSE.num_groups), 1)
    torch.testing.assert_close(out, expected)
    grad_out, leaves = torch.randn_like(out), [values, *(states[layer] for layer in SPARSE.sources)]
    torch.testing.assert_close(torch.autograd.grad(out, leaves, grad_out), torch.autograd.grad(expected, leaves, grad_out))
