"""Values and gradients at full size, against float64 and against torch's own arithmetic in the same dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from igva_kernels import FusionPlan, Mean, Weighted, fuse, group_summaries, mix, reduce_groups

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SLACK = {torch.float64: 2.0, torch.float32: 2.0, torch.float16: 0.5, torch.bfloat16: 0.5}
"""Units in the last place beside torch's own error: half of one for the single rounding of the 16-bit types at the
store."""


def cast(states: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [None if state is None else state.detach().to(dtype) for state in states]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sharing", ["all", "image", "token"])
def test_forward(tower, dtype, sharing, make_states, make_weights, formula, assert_as_exact_as) -> None:
    states, weights = make_states(tower, 4, dtype), make_weights(tower, 4, sharing)
    prefix = tower.num_prefix_tokens
    out = fuse(states, tower.plan, weights, num_prefix_tokens=prefix, impl="triton")
    assert out.dtype == dtype and out.is_contiguous()
    same = formula(states, tower.plan, weights.to(dtype), prefix)
    exact = formula(cast(states, torch.float64), tower.plan, weights.double(), prefix)
    assert_as_exact_as(out, same, exact, slack=SLACK[dtype])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_stores_round_to_nearest_even(dtype) -> None:
    """Every bit: the mean of two values in [1, 2) is exact in float32, and a quarter of them are ties of the 16-bit
    type."""
    plan = FusionPlan(2, (Mean((1, 2)),))
    states = [None, *((1 + torch.rand(8, 577, 1024, device="cuda")).to(dtype).clamp(max=1.99) for _ in range(2))]
    out = fuse(states, plan, num_prefix_tokens=1, impl="triton")
    exact = (states[1][:, 1:].double() + states[2][:, 1:].double()) / 2
    assert torch.equal(out, exact.to(dtype))
    assert (out.double() != exact).any(), "no value needed rounding"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_copies_keep_every_bit(dtype) -> None:
    """All 65536 bit patterns, with subnormals, infinities and the payloads of NaNs."""
    patterns = torch.arange(-(2**15), 2**15, device="cuda").to(torch.int16).view(dtype).view(1, 64, 1024)
    out = fuse([None, patterns], FusionPlan.llava(1, layer=1), num_prefix_tokens=0, impl="triton")
    assert torch.equal(out.view(torch.int16), patterns.view(torch.int16))


def weights_bound(tower, states, grad_out: Tensor, sharing: str) -> Tensor:
    """How far dL/dw may be off, an element: rounding errors of independent sign, which add up like the root of squares.

    Each product carries the rounding of its mean, which frozen and trainable towers alike save for the backward (standard
    deviation 0.3 eps). The sum in the accumulation dtype adds some 20 roundings of a partial sum.
    """
    plan, prefix = tower.plan, tower.num_prefix_tokens
    slot = next(index for index, slot in enumerate(plan.slots) if isinstance(slot, Weighted))
    grad_slot = grad_out[..., slot * tower.width : (slot + 1) * tower.width].double()
    summed = {"all": (0, 1, 2), "image": (1, 2), "token": (2,)}[sharing]
    norms = [
        (grad_slot * sum(states[layer][:, prefix:].double() for layer in group) / len(group)).square().sum(summed).sqrt()
        for group in plan.groups
    ]
    accumulation = torch.finfo(torch.float64 if grad_out.dtype == torch.float64 else torch.float32).eps
    stored = torch.finfo(grad_out.dtype).eps
    return torch.stack(norms, dim=-1) * (2 * stored + 20 * accumulation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sharing", ["all", "image", "token"])
@pytest.mark.parametrize("trainable_tower", [False, True])
def test_every_gradient(tower, dtype, sharing, trainable_tower, make_states, make_weights, formula, assert_as_exact_as) -> None:
    states, weights = make_states(tower, 2, dtype, finite_prefix=True), make_weights(tower, 2, sharing)
    plan, prefix = tower.plan, tower.num_prefix_tokens
    grad_out = torch.randn(2, tower.num_patches, plan.num_slots * tower.width, device="cuda").to(dtype)

    def gradients(function, dtype_of_states, dtype_of_weights) -> list[Tensor]:
        inputs = cast(states, dtype_of_states)
        leaves = [weights.to(dtype_of_weights).requires_grad_()]
        if trainable_tower:
            leaves += [inputs[layer].requires_grad_() for layer in plan.sources]
        return list(torch.autograd.grad(function(inputs, leaves[0]), leaves, grad_out.to(dtype_of_states)))

    accumulation = torch.promote_types(dtype, torch.float32)  # dL/dw arrives in the dtype of the weights
    actual = gradients(lambda s, w: fuse(s, plan, w, num_prefix_tokens=prefix, impl="triton"), dtype, accumulation)
    same = gradients(lambda s, w: formula(s, plan, w, prefix), dtype, dtype)
    exact = gradients(lambda s, w: formula(s, plan, w, prefix), torch.float64, torch.float64)

    error, bound = (actual[0].double() - exact[0]).abs(), weights_bound(tower, states, grad_out, sharing)
    assert (error <= (same[0].double() - exact[0]).abs() + bound).all(), f"dw: off by {(error / bound).max():.1f} bounds"
    for layer, got, own, want in zip(plan.sources, actual[1:], same[1:], exact[1:], strict=trainable_tower):
        assert_as_exact_as(got, own, want, slack=SLACK[dtype], what=f"dh of layer {layer}")
        assert (got[:, :prefix] == 0).all(), f"layer {layer}: a prefix row has a gradient"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("summary", ["cls", "mean_patch"])
def test_summaries_and_their_gradients(clip, dtype, summary, make_states, assert_as_exact_as) -> None:
    states = make_states(clip, 4, dtype, finite_prefix=True)
    rows = slice(0, 1) if summary == "cls" else slice(1, None)
    leaves = [state.requires_grad_() for state in states if state is not None]
    summaries = group_summaries(states, clip.plan, num_prefix_tokens=1, summary=summary, impl="triton")
    for column, group in enumerate(clip.plan.groups):
        members = torch.stack([states[layer].detach()[:, rows] for layer in group])
        same, exact = members.mean(0).mean(1), members.double().mean((0, 2))
        # The mean of some 3,500 numbers around zero is far smaller than they are, and their roundings with it: in the order of
        # the kernel they come to 2.5 units of the largest mean, in that of torch to 1.5 or less.
        slack = 8.0 if dtype in (torch.float32, torch.float64) else SLACK[dtype]
        assert_as_exact_as(summaries[:, column], same, exact, slack=slack)

    grad = torch.randn_like(summaries)
    grads = dict(zip(clip.plan.sources, torch.autograd.grad(summaries, leaves, grad, allow_unused=True), strict=True))
    for column, group in enumerate(clip.plan.groups):
        exact = torch.zeros(states[1].shape, dtype=torch.float64, device="cuda")
        exact[:, rows] = grad[:, column, None].double() / len(group) / (1 if summary == "cls" else 576)
        for layer in group:
            assert_as_exact_as(grads[layer], exact.to(dtype), exact, slack=SLACK[dtype])


def test_two_steps_equal_one(clip, make_states, make_weights) -> None:
    states, weights = make_states(clip, 4, torch.float32, finite_prefix=True), make_weights(clip, 4, "image")
    one = fuse(states, clip.plan, weights, num_prefix_tokens=1, impl="triton")
    two = mix(reduce_groups(states, clip.plan, num_prefix_tokens=1, impl="triton"), clip.plan, weights, impl="triton")
    assert torch.equal(two, one)  # float32 means lose nothing on the way, and nothing is contracted


def test_gradcheck() -> None:
    plan = FusionPlan.igva(4, 2)
    states = [torch.randn(2, 4, 8, dtype=torch.float64, device="cuda", requires_grad=True) for _ in range(5)]
    weights = torch.randn(2, 2, dtype=torch.float64, device="cuda", requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda weights, *states: fuse(states, plan, weights, num_prefix_tokens=1, impl="triton"), (weights, *states)
    )


def test_a_batch_beyond_2_to_the_31_elements(clip, make_weights) -> None:
    """Inputs, output and gradients pass 2**31 elements; the last images are computed once more alone."""
    batch, tokens, width = 3700, 577, 1024
    assert batch * tokens * width > 2**31
    maps = 3 + 2 + 3 + 2  # states, output, their gradients
    free, _ = torch.cuda.mem_get_info()
    if free < 1.1 * maps * 2 * batch * tokens * width:
        pytest.skip(f"needs {1.1 * maps * 2 * batch * tokens * width / 2**30:.0f} GiB, {free / 2**30:.0f} are free")
    plan = FusionPlan.igva(2, 2, base=0)
    states = [torch.empty(batch, tokens, width, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(3)]
    weights = torch.randn(batch, 2, device="cuda")
    grad_out = torch.empty(batch, tokens - 1, 2 * width, dtype=torch.bfloat16, device="cuda").normal_()

    def run(images: slice) -> list[Tensor]:
        leaves = [tensor[images].detach().requires_grad_() for tensor in (weights, *states)]
        out = fuse(leaves[1:], plan, leaves[0], num_prefix_tokens=1, impl="triton")
        return [out.detach(), *torch.autograd.grad(out, leaves, grad_out[images])]

    last = slice(batch - 3, batch)
    assert all(torch.equal(whole[last], alone) for whole, alone in zip(run(slice(None)), run(last), strict=True))
