"""Row tiles at full size: norms before the mean, sparse weights per token, and the plans that take 24 groups."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from igva_kernels import FusionPlan, Mean, SparseWeights, Weighted, fuse, mix, reduce_groups
from igva_kernels.program import Norm

pytestmark = pytest.mark.gpu

BATCH, PATCHES = 4, 576
LAYERS = tuple((layer,) for layer in range(1, 25))
TGIF = FusionPlan(24, (Weighted(LAYERS, plus=-2),))
NORMALISED = FusionPlan(24, (Weighted((tuple(range(1, 13)), tuple(range(13, 25))), plus=-2, norm=Norm("layer")),))
MEAN_OF_NORMALISED = FusionPlan(24, (Mean(tuple(range(1, 25)), norm=Norm("rms", 1e-6)),))

SLACK = {torch.float32: 4.0, torch.float16: 0.5, torch.bfloat16: 0.5}  # as in test_exactness.py
WIDTHS = [384, 1024, 1152, 3200]  # part of a piece, whole pieces, a piece in part, several warps


def states_of(plan: FusionPlan, width: int, dtype: torch.dtype, prefix: float = float("nan")) -> list[Tensor | None]:
    states: list[Tensor | None] = [None] * (plan.num_layers + 1)
    for layer in plan.sources:
        state = torch.randn(BATCH, 1 + PATCHES, width, device="cuda").to(dtype)
        state[:, :1] = prefix
        states[layer] = state
    return states


def cast(states: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if state is None else state.detach().to(dtype) for state in states]


def sparse_weights(columns: int, chosen: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Values, columns, and the same as dense weights."""
    indices = torch.rand(BATCH, PATCHES, columns, device="cuda").topk(chosen).indices
    values = torch.randn(BATCH, PATCHES, chosen, device="cuda")
    return values, indices, torch.zeros(BATCH, PATCHES, columns, device="cuda").scatter(-1, indices, values)


@pytest.mark.parametrize("dtype", SLACK, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("plan", [NORMALISED, MEAN_OF_NORMALISED], ids=["layer", "rms"])
def test_norms_and_their_gradients(plan, width, dtype, formula, assert_as_exact_as) -> None:
    states = states_of(plan, width, dtype, prefix=0.0)
    weights = torch.randn(BATCH, plan.num_groups, device="cuda") if plan.num_groups else None
    grad_out = torch.randn(BATCH, PATCHES, width, device="cuda").to(dtype)

    def run(function, dtype_of_states: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        inputs = cast(states, dtype_of_states)
        leaves = [inputs[layer].requires_grad_() for layer in plan.sources]
        out = function(inputs, None if weights is None else weights.to(dtype_of_states))
        return out.detach(), list(torch.autograd.grad(out, leaves, grad_out.to(dtype_of_states)))

    out, grads = run(lambda s, w: fuse(s, plan, w, num_prefix_tokens=1, impl="triton"), dtype)
    same, same_grads = run(lambda s, w: formula(s, plan, w, 1), dtype)
    exact, exact_grads = run(lambda s, w: formula(s, plan, w, 1), torch.float64)
    assert_as_exact_as(out, same, exact, slack=SLACK[dtype])
    for layer, got, own, want in zip(plan.sources, grads, same_grads, exact_grads, strict=True):
        assert_as_exact_as(got, own, want, slack=2 * SLACK[dtype], what=f"dh of layer {layer}")


@pytest.mark.parametrize("dtype", SLACK, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_sparse_weights_and_their_gradients(width, dtype, formula, assert_as_exact_as) -> None:
    states, (values, indices, dense) = states_of(TGIF, width, dtype, prefix=0.0), sparse_weights(24)
    grad_out = torch.randn(BATCH, PATCHES, width, device="cuda").to(dtype)
    values.requires_grad_()
    out = fuse(states, TGIF, SparseWeights(values, indices), num_prefix_tokens=1, impl="triton")
    exact_states = cast(states, torch.float64)
    exact = formula(exact_states, TGIF, dense.double(), 1)
    assert_as_exact_as(out, formula(states, TGIF, dense.to(dtype), 1), exact, slack=SLACK[dtype])
    (grad,) = torch.autograd.grad(out, values, grad_out)
    products = torch.stack([(grad_out.double() * exact_states[layer][:, 1:]).sum(-1) for layer in range(1, 25)], dim=-1)
    exact_grad = products.gather(-1, indices)
    assert_as_exact_as(grad, exact_grad.float(), exact_grad, slack=20)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_a_token_does_not_name_does_not_reach_it(poison) -> None:
    plan = FusionPlan(24, (Weighted(LAYERS),))
    states, (values, indices, _) = states_of(plan, 1024, torch.bfloat16), sparse_weights(24)
    weights = SparseWeights(values, indices)
    expected = fuse(states, plan, weights, num_prefix_tokens=1, impl="triton")
    for column, (layer,) in enumerate(LAYERS):
        states[layer][:, 1:][~(indices == column).any(-1)] = poison
    assert torch.equal(fuse(states, plan, weights, num_prefix_tokens=1, impl="triton"), expected)


@pytest.mark.parametrize("sharing", ["image", "token"])
def test_24_groups_of_one_layer(sharing, formula, assert_as_exact_as) -> None:
    states = states_of(TGIF, 1024, torch.bfloat16)
    weights = torch.randn(BATCH, *(() if sharing == "image" else (PATCHES,)), 24, device="cuda")
    out = fuse(states, TGIF, weights, num_prefix_tokens=1, impl="triton")
    exact = formula(cast(states, torch.float64), TGIF, weights.double(), 1)
    assert_as_exact_as(out, formula(states, TGIF, weights.bfloat16(), 1), exact, slack=0.5)


@pytest.mark.parametrize("plan", [FusionPlan.igva(24, 4), TGIF], ids=["igva", "layers"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_float32_means_give_the_bits_of_one_step(plan, dtype) -> None:
    states, weights = states_of(plan, 1152, dtype, prefix=0.0), torch.randn(BATCH, plan.num_groups, device="cuda")
    one = fuse(states, plan, weights, num_prefix_tokens=1, impl="triton")
    means = reduce_groups(states, plan, num_prefix_tokens=1, means_dtype=torch.float32, impl="triton")
    assert torch.equal(mix(means, plan, weights, impl="triton"), one)


def test_the_same_bits_on_every_run() -> None:
    states, (values, indices, _) = states_of(TGIF, 1024, torch.bfloat16, prefix=0.0), sparse_weights(24)
    leaves = [values.requires_grad_(), *(states[layer].requires_grad_() for layer in TGIF.sources)]
    grad_out = torch.randn(BATCH, PATCHES, 1024, device="cuda").bfloat16()

    def run() -> list[Tensor]:
        out = fuse(states, TGIF, SparseWeights(values, indices), num_prefix_tokens=1, impl="triton")
        return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]

    first = run()
    for _ in range(19):
        assert all(map(torch.equal, first, run()))
