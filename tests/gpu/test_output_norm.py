"""A norm behind the mix at full size: values and every gradient, determinism, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from igva_kernels import FusionPlan, OutputNorm, fuse, mix, reduce_groups

pytestmark = pytest.mark.gpu

BATCH, PATCHES = 4, 576
PLANS = {"tgif": FusionPlan.tgif(24), "vip_llava": FusionPlan.vip_llava(24), "igva": FusionPlan.igva(24, 4)}
SLACK = {torch.float32: 4.0, torch.float16: 1.0, torch.bfloat16: 1.0}  # as in test_rows.py, and one more rounding at a store
WIDTHS = [384, 1024, 1152]
TOO_WIDE = FusionPlan.layers(24, tuple(range(24)))  # 24 slots of 1024: two steps


def make(plan: FusionPlan, width: int, dtype: torch.dtype, kind: str = "layer") -> tuple[list, Tensor | None, OutputNorm]:
    states: list[Tensor | None] = [None] * (plan.num_layers + 1)
    for layer in plan.sources:
        states[layer] = torch.randn(BATCH, 1 + PATCHES, width, device="cuda").to(dtype)
    weights = torch.randn(BATCH, plan.num_groups, device="cuda") if plan.num_groups else None
    weight, bias = torch.randn(2, plan.num_slots * width, device="cuda").to(dtype).unbind(0)
    return states, weights, OutputNorm(weight.clone(), bias.clone() if kind == "layer" else None, 1e-5, kind)


def behind(rows: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    if kind == "rms":
        return functional.rms_norm(rows, rows.shape[-1:], weight, 1e-5)
    return functional.layer_norm(rows, rows.shape[-1:], weight, bias, 1e-5)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("dtype", SLACK, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_values_and_every_gradient(plan, width, dtype, kind, formula, assert_as_exact_as) -> None:
    states, weights, norm = make(plan, width, dtype, kind)
    grad_out = torch.randn(BATCH, PATCHES, plan.num_slots * width, device="cuda").to(dtype)

    def run(fused: bool, of: torch.dtype) -> list[Tensor]:
        inputs = [None if state is None else state.detach().to(of).requires_grad_() for state in states]
        w = None if weights is None else weights.to(torch.float32 if fused else of).requires_grad_()
        weight, bias = (None if each is None else each.detach().to(of).requires_grad_() for each in norm[:2])
        if fused:
            own = norm._replace(weight=weight, bias=bias)
            out = fuse(inputs, plan, w, num_prefix_tokens=1, output_norm=own, impl="triton")
        else:
            out = behind(formula(inputs, plan, w, 1), weight, bias, kind)
        leaves = [leaf for leaf in (weight, bias, w, *(inputs[layer] for layer in plan.sources)) if leaf is not None]
        return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(of))]

    results = zip(run(True, dtype), run(False, dtype), run(False, torch.float64), strict=True)
    for position, (got, same, exact) in enumerate(results):
        slack = SLACK[dtype] * (4 if position else 1) * torch.finfo(dtype).eps / torch.finfo(got.dtype).eps
        assert_as_exact_as(got, same, exact, slack=slack, what=f"result {position}")


@pytest.mark.parametrize("plan", [*PLANS.values(), TOO_WIDE], ids=[*PLANS, "too wide for a program"])
def test_the_sum_is_rounded_once(plan, formula) -> None:
    """Half an ulp of the output and what float32 sums leave, where two modules round the mix as well."""
    states, weights, norm = make(plan, 1024, torch.bfloat16)
    out = fuse(states, plan, weights, num_prefix_tokens=1, output_norm=norm, impl="triton").double()
    wide = [None if state is None else state.double() for state in states]
    rows = formula(wide, plan, None if weights is None else weights.double(), 1)
    exact = behind(rows, norm.weight.double(), norm.bias.double(), "layer")
    assert ((out - exact).abs() <= 2**-8 * exact.abs() + 1e-4).all()


def test_float32_means_give_the_bits_of_one_step() -> None:
    plan = PLANS["igva"]
    states, weights, norm = make(plan, 1024, torch.bfloat16)
    means = reduce_groups(states, plan, num_prefix_tokens=1, means_dtype=torch.float32, impl="triton")
    one = fuse(states, plan, weights, num_prefix_tokens=1, output_norm=norm, impl="triton")
    assert torch.equal(mix(means, plan, weights, output_norm=norm, impl="triton"), one)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_the_same_bits_on_every_run(plan) -> None:
    states, weights, norm = make(plan, 1024, torch.bfloat16)
    leaves = [leaf.requires_grad_() for leaf in (norm.weight, norm.bias, weights, *states) if leaf is not None]
    grad_out = torch.randn(BATCH, PATCHES, plan.num_slots * 1024, device="cuda").bfloat16()

    def run() -> list[Tensor]:
        out = fuse(states, plan, weights, num_prefix_tokens=1, output_norm=norm, impl="triton")
        return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]

    first = run()
    for _ in range(19):
        assert all(map(torch.equal, first, run()))


def test_inference_allocates_the_output_alone() -> None:
    states, _, norm = make(PLANS["vip_llava"], 1024, torch.bfloat16)
    fuse(states, PLANS["vip_llava"], num_prefix_tokens=1, output_norm=norm, impl="triton")  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        out = fuse(states, PLANS["vip_llava"], num_prefix_tokens=1, output_norm=norm, impl="triton")
    assert torch.cuda.max_memory_allocated() - before <= out.numel() * out.element_size() + (1 << 16)
