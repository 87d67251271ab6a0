"""A norm behind the mix, by the row kernel: values, what is kept for the backward, gradients, and rows too wide for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from igva_kernels import OutputNorm, SparseWeights, fuse, mix, reduce_groups
from igva_kernels.plan import FusionPlan, Layer, Weighted

SLACK = {
    torch.float64: 4.0,
    torch.float32: 4.0,
    torch.float16: 1.0,
    torch.bfloat16: 2.0,
}  # as in test_mix.py, and one more store
BATCH, PATCHES = 2, 2
VIP_LLAVA = FusionPlan.layers(4, (-2, -3, 1))
TGIF = FusionPlan.tgif(3)


def make_norm(form: str, num_channels: int, dtype: torch.dtype = torch.float32) -> OutputNorm:
    weight = None if form.endswith("without parameters") else torch.randn(num_channels, dtype=torch.float64).to(dtype)
    bias = torch.randn(num_channels, dtype=torch.float64).to(dtype) if form == "layer" else None
    return OutputNorm(weight, bias, 1e-3, form.split()[0])


def behind(rows: Tensor, norm: OutputNorm) -> Tensor:
    """torch's own norm, in the dtype of the rows."""
    weight, bias = (None if each is None else each.to(rows.dtype) for each in norm[:2])
    if norm.kind == "rms":
        return functional.rms_norm(rows, rows.shape[-1:], weight, norm.eps)
    return functional.layer_norm(rows, rows.shape[-1:], weight, bias, norm.eps)


def wide(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


@pytest.mark.parametrize(
    ("form", "width"), [("layer", 136), ("layer without parameters", 8), ("rms", 40)]
)  # two pieces, parts of one
def test_values_and_what_is_kept(kernels, plan, form, width, make_states, make_weights, formula, assert_as_exact_as) -> None:
    states, weights = make_states(plan, patches=PATCHES, width=width), make_weights(plan, "image", patches=PATCHES)
    norm, sources = make_norm(form, plan.num_slots * width), [states[layer] for layer in plan.sources]
    out, means, mixed, statistics = kernels.normalised_forward(sources, weights, norm, plan.program, 1, True, True)
    rows = formula([state.double() for state in states], plan, wide(weights), 1)
    assert_as_exact_as(out, behind(formula(states, plan, weights, 1), norm), behind(rows, norm), slack=4)
    assert torch.equal(mixed, kernels.fuse_forward(sources, weights, plan.program, 1, False)[0])
    assert torch.equal(means, kernels.fuse_forward(sources, weights, plan.program, 1, True)[1])
    mean = rows.mean(-1, keepdim=True) if norm.kind == "layer" else torch.zeros_like(rows[..., :1])
    factor = ((rows - mean).square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    torch.testing.assert_close(statistics[-1].double(), factor, rtol=1e-5, atol=1e-5)
    if norm.kind == "layer":
        torch.testing.assert_close(statistics[0].double(), mean, rtol=1e-5, atol=1e-5)
    again, *nothing = kernels.normalised_forward(sources, weights, norm, plan.program, 1, False, False)
    assert torch.equal(out, again) and not any(each.numel() for each in nothing)


@pytest.mark.parametrize("dtype", SLACK, ids=str)
@pytest.mark.parametrize("plan_of_case", [TGIF, VIP_LLAVA], ids=["tgif", "vip_llava"])
def test_every_dtype_with_gradients(dtype, plan_of_case, make_states, make_weights, formula, assert_as_exact_as) -> None:
    plan = plan_of_case
    states = [state.requires_grad_() for state in make_states(plan, patches=PATCHES, dtype=dtype)]
    weights, norm = make_weights(plan, "token", patches=PATCHES), make_norm("layer", plan.num_slots * 40, dtype)
    values = [states[layer] for layer in plan.sources] + [norm.weight, norm.bias] + ([] if weights is None else [weights])
    for value in values:
        value.requires_grad_()
    out = fuse(states, plan, weights, num_prefix_tokens=1, output_norm=norm, impl="triton")
    grad_out = torch.randn(out.shape, dtype=torch.float64).to(dtype)
    actual = torch.autograd.grad(out, values, grad_out)

    def own(of: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
        leaves = [value.detach().to(of).requires_grad_() for value in values]
        given = dict(zip(plan.sources, leaves, strict=False))
        all_states = [given.get(layer, state.detach().to(of)) for layer, state in enumerate(states)]
        learned = norm._replace(weight=leaves[len(given)], bias=leaves[len(given) + 1])
        result = behind(formula(all_states, plan, leaves[-1] if weights is not None else None, 1), learned)
        return result, torch.autograd.grad(result, leaves, grad_out.to(of))

    (same, same_grads), (exact, exact_grads) = own(dtype), own(torch.float64)
    assert_as_exact_as(out.detach(), same.detach(), exact.detach(), slack=SLACK[dtype])
    for n, (one, two, true) in enumerate(zip(actual, same_grads, exact_grads, strict=True)):
        # mix and gradient are stored between norm and mix, also on the way to weights in another dtype
        slack = max(1.0, 2 * SLACK[dtype] * torch.finfo(dtype).eps / torch.finfo(one.dtype).eps)
        if n < len(plan.sources):
            one, two, true = one[:, 1:], two[:, 1:], true[:, 1:]
        assert_as_exact_as(one, two, true, slack=slack, what=f"gradient {n}")


def test_wide_parameters_of_a_16_bit_tower(make_states) -> None:
    states, norm = make_states(VIP_LLAVA, dtype=torch.float16), make_norm("layer", 120)
    out = fuse(states, VIP_LLAVA, num_prefix_tokens=1, output_norm=norm, impl="triton")
    rows = torch.cat([states[layer][:, 1:].double() for layer in (3, 2, 1)], dim=-1)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), behind(rows, norm), rtol=1e-5, atol=1e-5)


def test_misaligned_parameters_are_copied(make_states) -> None:
    states, buffer = make_states(VIP_LLAVA), torch.randn(2, 121)
    norm = OutputNorm(buffer[0, 1:], buffer[1, 1:])
    out = fuse(states, VIP_LLAVA, num_prefix_tokens=1, output_norm=norm, impl="triton")
    rows = torch.cat([states[layer][:, 1:] for layer in (3, 2, 1)], dim=-1)
    torch.testing.assert_close(out, behind(rows, norm), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "plan_of_case",
    [
        FusionPlan(4, (Layer(0), Weighted(((2,), (1,), (3,), (4,)), plus=3))),  # rows are selected by their pointers
        FusionPlan(4, (Weighted(((1,), (2,), (3, 4))), Layer(0))),
    ],
    ids=["single", "groups"],
)
def test_sparse_weights_and_an_infinity_that_no_token_names(plan_of_case, make_states, formula) -> None:
    plan = plan_of_case
    states = make_states(plan, patches=PATCHES)
    indices = torch.randint(0, plan.num_groups - 1, (BATCH, PATCHES, 2))  # never the last column
    states[4].fill_(float("inf"))
    values = torch.randn(BATCH, PATCHES, 2)
    dense = torch.zeros(BATCH, PATCHES, plan.num_groups).scatter_add(2, indices, values)
    norm = make_norm("layer", 80)
    out = fuse(states, plan, SparseWeights(values, indices), num_prefix_tokens=1, output_norm=norm, impl="triton")
    finite = [*states[:4], torch.zeros_like(states[4])]
    torch.testing.assert_close(out, behind(formula(finite, plan, dense, 1), norm), rtol=1e-4, atol=1e-5)


def test_two_steps_have_the_bits_of_one(make_states, make_weights) -> None:
    plan = FusionPlan.igva(4, 2)
    states, weights = make_states(plan, patches=PATCHES, finite_prefix=True), make_weights(plan, "image")
    norm = make_norm("layer", 80)
    means = reduce_groups(states, plan, num_prefix_tokens=1, impl="triton")
    one = fuse(states, plan, weights, num_prefix_tokens=1, output_norm=norm, impl="triton")
    assert torch.equal(mix(means, plan, weights, output_norm=norm, impl="triton"), one)


def test_keeping_means_changes_no_bit(kernels, monkeypatch, make_states) -> None:
    """The means that training keeps take registers: with them this row takes two warps, which sum it in another order."""
    plan = FusionPlan(num_layers=4, slots=(Weighted(groups=((1, 2, 3, 4),)), Layer(1)))
    states = make_states(plan, patches=2, width=1000, dtype=torch.float16, finite_prefix=True)
    weights, norm = torch.rand(1), make_norm("layer", 2000, torch.float16)
    tiles, launch = [], kernels.launch_normalised_forward

    def seen(*args, tile, **options):
        tiles.append(tile)
        launch(*args, tile=tile, **options)

    monkeypatch.setattr(kernels, "launch_normalised_forward", seen)
    inference = fuse(states, plan, weights, num_prefix_tokens=1, output_norm=norm, impl="triton")
    training = fuse(states, plan, weights.requires_grad_(), num_prefix_tokens=1, output_norm=norm, impl="triton")
    assert len(tiles) == 2 and tiles[0] == tiles[1]
    assert torch.equal(inference, training)


def test_a_row_too_wide_for_a_program_takes_two_steps(kernels, monkeypatch, make_states, make_weights) -> None:
    plan, norm = FusionPlan.igva(4, 2), make_norm("layer", 80, torch.float16)
    states, weights = make_states(plan, patches=PATCHES, dtype=torch.float16), make_weights(plan, "image")
    sources = [states[layer] for layer in plan.sources]
    one = kernels.normalised_forward(sources, weights, norm, plan.program, 1, True, True)
    monkeypatch.setattr(kernels, "normalised_tile", lambda *_: None)
    monkeypatch.setattr(kernels, "launch_normalised_forward", None)  # and no launch of it
    two = kernels.normalised_forward(sources, weights, norm, plan.program, 1, True, True)
    for single, double in zip(one, two, strict=True):
        assert single.dtype == double.dtype and single.shape == double.shape
        torch.testing.assert_close(single, double, rtol=2e-3, atol=1e-5)  # one rounding to float16


def test_which_rows_are_too_wide(kernels) -> None:
    from igva_kernels.impl.triton.launch import normalised_tile

    vip_llava = normalised_tile(8, 1024, torch.float32, 6)
    assert (vip_llava.num_warps, vip_llava.pieces) == (2, 2)
    assert normalised_tile(8, 2048, torch.float32, 16).num_warps == 8
    for too_wide in ((8, 1024, torch.float32, 17), (8, 4096, torch.float32, 16), (2, 2048, torch.float64, 16)):
        assert normalised_tile(*too_wide) is None
