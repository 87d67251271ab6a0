"""fuse_forward and fuse_backward against a float64 formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from igva_kernels.plan import FusionPlan, Weighted

SHARINGS = ["all", "image", "token"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
IGVA = FusionPlan.igva(4, 2)

# Units in the last place beside torch's own error: half of one for the single rounding at the store. The interpreter
# truncates on stores of bfloat16 instead of rounding, up to a whole unit.
SLACK = {torch.float64: 2.0, torch.float32: 2.0, torch.float16: 0.5, torch.bfloat16: 1.0}


def read_by(plan: FusionPlan, states: list[Tensor]) -> list[Tensor]:
    return [states[layer] for layer in plan.sources]


def wide(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.double()


@pytest.mark.parametrize("sharing", SHARINGS)
def test_forward_of_every_plan(kernels, plan, sharing, make_states, make_weights, formula, assert_as_exact_as) -> None:
    states, weights = make_states(plan), make_weights(plan, sharing)
    out, means = kernels.fuse_forward(read_by(plan, states), weights, plan.program, 1, False)
    exact = formula([state.double() for state in states], plan, wide(weights), 1)
    assert out.is_contiguous() and means.shape == (0,)
    assert_as_exact_as(out, formula(states, plan, weights, 1), exact, slack=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("patches", "width"),
    [(4, 1000), (37, 40), (1, 24)],  # rows across tiles, tiles across rows, less than a tile
)
@pytest.mark.parametrize("sharing", ["image", "token"])
def test_forward_of_every_dtype(
    kernels, dtype, patches, width, sharing, make_states, make_weights, formula, assert_as_exact_as
) -> None:
    patches = min(patches, 4) if sharing == "token" else patches  # one program a row
    states = make_states(IGVA, patches=patches, width=width, dtype=dtype)
    weights = make_weights(IGVA, sharing, patches=patches)
    out, means = kernels.fuse_forward(read_by(IGVA, states), weights, IGVA.program, 1, True)
    assert out.dtype == means.dtype == dtype
    exact = formula([state.double() for state in states], IGVA, wide(weights), 1)
    assert_as_exact_as(out, formula(states, IGVA, weights.to(dtype), 1), exact, slack=SLACK[dtype], what="out")
    for mean, group in zip(means, IGVA.groups, strict=True):
        members = torch.stack([states[layer][:, 1:] for layer in group])
        exact_mean = members.double().mean(0)
        assert_as_exact_as(mean, members.sum(0) / len(group), exact_mean, slack=SLACK[dtype], what="mean")


@pytest.mark.parametrize("kept", ["means", "states"])
@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("needs_states", [False, True])
def test_gradients_of_every_weighted_plan(
    kernels,
    weighted_plan,
    sharing,
    kept,
    needs_states,
    make_states,
    make_weights,
    formula_gradients,
    assert_as_exact_as,
) -> None:
    states, weights = make_states(weighted_plan), make_weights(weighted_plan, sharing)
    program, sources = weighted_plan.program, read_by(weighted_plan, states)
    grad_out = torch.randn(2, 3, weighted_plan.num_slots * 40)
    means = kernels.fuse_forward(sources, weights, program, 1, True)[1] if kept == "means" else None
    grad_weights, grad_states = kernels.fuse_backward(
        grad_out, sources if means is None else [], means, weights, program, 1, 4, True, needs_states
    )
    exact_states, exact_weights = formula_gradients(states, weighted_plan, weights, 1, grad_out, torch.float64)
    torch_states, torch_weights = formula_gradients(states, weighted_plan, weights, 1, grad_out, torch.float32)
    assert grad_weights.dtype == torch.float32 and grad_weights.is_contiguous()
    # sums of up to B*N*D = 400 products in another order than torch's: sqrt(400) roundings
    assert_as_exact_as(grad_weights, torch_weights, exact_weights, slack=20, what="dw")
    assert len(grad_states) == (len(program.gradient_classes) if needs_states else 0)
    if needs_states:
        for position, (same, exact) in enumerate(zip(torch_states, exact_states, strict=True)):
            grad = grad_states[program.class_of_source[position]]
            assert_as_exact_as(grad, same, exact, slack=2, what=f"dh of source {position}")


def test_gradients_of_the_states_alone(kernels, plan, make_states, make_weights, formula_gradients, assert_as_exact_as) -> None:
    """A trainable tower with frozen weights, or a plan without any: neither states nor means are needed."""
    states, weights = make_states(plan, prefix=3), make_weights(plan, "image")
    grad_out = torch.randn(2, 3, plan.num_slots * 40)
    none, grad_states = kernels.fuse_backward(grad_out, [], None, weights, plan.program, 3, 6, False, True)
    assert none is None
    exact, _ = formula_gradients(states, plan, weights, 3, grad_out, torch.float64)
    same, _ = formula_gradients(states, plan, weights, 3, grad_out, torch.float32)
    for position, cls in enumerate(plan.program.class_of_source):
        assert_as_exact_as(grad_states[cls], same[position], exact[position], slack=2, what=f"dh of source {position}")
        assert (grad_states[cls][:, :3] == 0).all(), "prefix rows have no gradient"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("patches", "width"), [(4, 1000), (37, 40)])
@pytest.mark.parametrize("kept", ["means", "states"])
def test_gradients_of_every_dtype(
    kernels, dtype, patches, width, kept, make_states, make_weights, formula_gradients, assert_as_exact_as
) -> None:
    states, weights = make_states(IGVA, patches=patches, width=width, dtype=dtype), make_weights(IGVA, "image")
    program, sources = IGVA.program, read_by(IGVA, states)
    grad_out = torch.randn(2, patches, 2 * width).to(dtype)
    means = kernels.fuse_forward(sources, weights, program, 1, True)[1] if kept == "means" else None
    grad_weights, grad_states = kernels.fuse_backward(
        grad_out, sources if means is None else [], means, weights, program, 1, 1 + patches, True, True
    )
    exact_states, exact_weights = formula_gradients(states, IGVA, weights, 1, grad_out, torch.float64)
    same_states, _ = formula_gradients(states, IGVA, weights, 1, grad_out, dtype)
    for position, cls in enumerate(program.class_of_source):
        assert grad_states[cls].dtype == dtype
        assert_as_exact_as(grad_states[cls], same_states[position], exact_states[position], slack=SLACK[dtype])

    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    assert grad_weights.dtype == accumulation
    # each product is off by the rounding of its saved mean, and each sum by the square root of its length in roundings
    patch = [state[:, 1:].double() for state in states]
    products = torch.stack(
        [(grad_out[..., :width].double() * torch.stack([patch[i] for i in group]).mean(0)) for group in IGVA.groups],
        dim=1,
    ).flatten(2)
    stored = torch.finfo(dtype).eps if kept == "means" else 0.0
    summed = torch.finfo(accumulation).eps * products.shape[-1] ** 0.5
    bound = products.abs().sum(-1) * (stored + summed)
    assert ((grad_weights.double() - exact_weights).abs() <= bound).all()


def test_states_with_different_batch_strides(kernels, make_states, make_weights, formula) -> None:
    """Views into larger tensors: the copies beside the means in ``mix`` have another batch stride than these."""
    states, weights = make_states(IGVA), make_weights(IGVA, "image")
    for layer, spare in ((1, 1), (3, 2), (4, 1)):
        larger = torch.full((2, 4 + spare, 40), float("nan"))
        larger[:, :4] = states[layer]
        states[layer] = larger[:, :4]
    assert kernels.check_supported(read_by(IGVA, states), weights, IGVA.program, 1) is None
    out, means = kernels.fuse_forward(read_by(IGVA, states), weights, IGVA.program, 1, True)
    exact = formula(states, IGVA, weights, 1)
    torch.testing.assert_close(out, exact)
    grad_out = torch.randn_like(out)
    from_states, _ = kernels.fuse_backward(grad_out, read_by(IGVA, states), None, weights, IGVA.program, 1, 4, True, False)
    from_means, _ = kernels.fuse_backward(grad_out, [], means, weights, IGVA.program, 1, 4, True, False)
    torch.testing.assert_close(from_states, from_means)


def test_one_image_may_have_any_batch_stride(kernels, make_states, make_weights, formula) -> None:
    states = [state.as_strided(state.shape, (7, 40, 1)) for state in make_states(IGVA, batch=1)]
    weights = make_weights(IGVA, "image", batch=1)
    assert kernels.check_supported(read_by(IGVA, states), weights, IGVA.program, 1) is None
    out, _ = kernels.fuse_forward(read_by(IGVA, states), weights, IGVA.program, 1, False)
    torch.testing.assert_close(out, formula(states, IGVA, weights, 1))


def test_noncontiguous_weights(kernels, make_states, formula) -> None:
    states, weights = make_states(IGVA), torch.randn(2, 2).t()
    out, _ = kernels.fuse_forward(read_by(IGVA, states), weights, IGVA.program, 1, False)
    torch.testing.assert_close(out, formula(states, IGVA, weights, 1))


def _strided(kind: str, shape: tuple[int, int, int]) -> Tensor:
    """A gradient as it leaves a slice, an expansion, a transposition."""
    batch, rows, channels = shape
    if kind == "rows of a longer sequence":
        return torch.randn(batch, rows + 9, channels)[:, 4 : 4 + rows]
    if kind == "channels of a wider map":
        return torch.randn(batch, rows, channels + 8)[..., :channels]
    if kind == "misaligned channels":
        return torch.randn(batch, rows, channels + 8)[..., 1 : 1 + channels]
    if kind == "odd row stride":
        return torch.randn(batch, rows, channels + 3)[..., :channels]
    if kind == "expanded":
        return torch.randn(1, 1, 1).expand(shape)
    return torch.randn(batch, channels, rows).transpose(1, 2)


@pytest.mark.parametrize(
    "kind",
    [
        "rows of a longer sequence",
        "channels of a wider map",
        "misaligned channels",
        "odd row stride",
        "expanded",
        "transposed",
    ],
)
def test_strided_gradient_of_the_output(kernels, kind, make_states, make_weights) -> None:
    states, weights = make_states(IGVA), make_weights(IGVA, "image")
    grad_out = _strided(kind, (2, 3, 80))
    args = (read_by(IGVA, states), None, weights, IGVA.program, 1, 4, True, True)
    grad_weights, grad_states = kernels.fuse_backward(grad_out, *args)
    same_weights, same_states = kernels.fuse_backward(grad_out.clone(memory_format=torch.contiguous_format), *args)
    assert torch.equal(grad_weights, same_weights)
    assert all(map(torch.equal, grad_states, same_states))


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize(("batch", "patches"), [(0, 3), (2, 0)])
def test_nothing_to_mix(kernels, plan, sharing, batch, patches, make_states, make_weights) -> None:
    states = make_states(plan, batch=batch, patches=patches)
    weights = make_weights(plan, sharing, batch=batch, patches=patches)
    sources, program = read_by(plan, states), plan.program
    out, means = kernels.fuse_forward(sources, weights, program, 1, plan.num_groups > 0)
    assert out.shape == (batch, patches, plan.num_slots * 40)
    if plan.num_groups:
        assert means.shape == (program.num_weighted_groups, batch, patches, 40)
    grad_weights, grad_states = kernels.fuse_backward(
        torch.zeros_like(out), sources, None, weights, program, 1, 1 + patches, weights is not None, True
    )
    assert all(grad.shape == (batch, 1 + patches, 40) and (grad == 0).all() for grad in grad_states)
    if weights is not None:
        assert grad_weights.shape == weights.shape and (grad_weights == 0).all()


def test_a_batch_beyond_2_to_the_31_elements(kernels, make_weights, formula) -> None:
    """The second image begins 2**31 elements after the first, where an int32 offset would be negative.

    The buffers are address space: only the pages of the two images are ever touched.
    """
    plan, stride = FusionPlan(2, (Weighted(((0, 1), (2,))),)), 2**31
    buffers = [torch.from_numpy(np.empty(stride + 240, dtype=np.float16)) for _ in range(3)]
    states = [buffer.as_strided((2, 4, 40), (stride, 40, 1)) for buffer in buffers]
    for state in states:
        state.copy_(torch.randn(2, 4, 40))
    weights = make_weights(plan, "image")
    out, means = kernels.fuse_forward(states, weights, plan.program, 1, True)
    exact = formula([state.float() for state in states], plan, weights, 1)
    torch.testing.assert_close(out.float(), exact, rtol=2**-10, atol=2**-10)
    grad_out = torch.randn(2, 3, 40).half()
    from_states, _ = kernels.fuse_backward(grad_out, states, None, weights, plan.program, 1, 4, True, False)
    from_means, _ = kernels.fuse_backward(grad_out, [], means, weights, plan.program, 1, 4, True, False)
    torch.testing.assert_close(from_states, from_means, rtol=1e-2, atol=2e-2)


def test_copies_keep_every_bit(kernels, make_states) -> None:
    plan = FusionPlan.llava(3)
    states = make_states(plan, dtype=torch.bfloat16)
    source = states[2]
    source[0, 1, :4] = torch.tensor([-0.0, float("inf"), 2.0**-133, -(2.0**127)], dtype=torch.bfloat16)
    out, _ = kernels.fuse_forward([source], None, plan.program, 1, False)
    assert torch.equal(out.view(torch.int16), source[:, 1:].contiguous().view(torch.int16))


def test_the_result_is_the_same_on_every_run(kernels, make_states, make_weights) -> None:
    states, weights = make_states(IGVA, patches=9, width=1000, dtype=torch.float16), make_weights(IGVA, "all")
    grad_out = torch.randn(2, 9, 2000).half()

    def run() -> list[Tensor]:
        sources = read_by(IGVA, states)
        out, means = kernels.fuse_forward(sources, weights, IGVA.program, 1, True)
        grad_weights, _ = kernels.fuse_backward(grad_out, sources, None, weights, IGVA.program, 1, 10, True, False)
        return [out, means, grad_weights]

    assert all(map(torch.equal, run(), run()))


# ---- two dtypes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sharing", ["image", "token"])
def test_float32_means_give_the_bits_of_one_step(kernels, plan, dtype, sharing, make_states, make_weights) -> None:
    """Also beside copies of the towers' type, and where a slot sums in another order than its groups end."""
    states, weights = make_states(plan, patches=4, dtype=dtype), make_weights(plan, sharing, patches=4)
    program, sources = plan.program, read_by(plan, states)
    one, _ = kernels.fuse_forward(sources, weights, program, 1, False)
    means = kernels.reduce_forward(sources, program, 1, dtype=torch.float32)
    assert means.dtype == torch.float32
    maps = [*means.unbind(0), *(sources[source][:, 1:] for source in program.copied_sources)]
    assert kernels.check_supported(maps, weights, plan.mix_program, 0) is None
    two, _ = kernels.fuse_forward(maps, weights, plan.mix_program, 0, False, dtype=dtype)
    assert two.dtype == dtype and torch.equal(one, two)


@pytest.mark.parametrize("sharing", ["image", "token"])
def test_gradients_of_the_mix_of_wide_means(kernels, sharing, make_states, make_weights, assert_as_exact_as) -> None:
    states, weights = make_states(IGVA, patches=4, dtype=torch.float16), make_weights(IGVA, sharing, patches=4)
    means = kernels.reduce_forward(read_by(IGVA, states), IGVA.program, 1, dtype=torch.float32)
    maps = [*means.unbind(0), states[3][:, 1:]]
    grad_out = torch.randn(2, 4, 80).half()
    grad_weights, grads = kernels.fuse_backward(grad_out, maps, None, weights, IGVA.mix_program, 0, 4, True, True)
    products = grad_out[:, :, None, :40].double() * means.double().permute(1, 2, 0, 3)  # (B, N, K, D)
    exact = products.sum(-1) if sharing == "token" else products.sum((1, 3))
    assert_as_exact_as(grad_weights, exact.float(), exact, slack=20)
    scale = weights if sharing == "token" else weights[:, None]
    for column in range(2):
        exact = scale[..., column, None].double() * grad_out[..., :40].double()
        assert_as_exact_as(grads[column], exact.half(), exact, slack=0.5)


def test_a_width_that_fits_the_wide_type_alone(kernels, make_states) -> None:
    """D = 12 holds whole units of float32 and no whole unit of the output's type."""
    means = [torch.randn(2, 4, 12) for _ in range(2)]
    plan = FusionPlan(2, (Weighted(((1,), (2,))),))
    weights = torch.randn(2, 2)
    out, _ = kernels.fuse_forward(means, weights, plan.program, 0, False, dtype=torch.float16)
    exact = (weights[:, :, None, None] * torch.stack(means, dim=1)).sum(1)
    torch.testing.assert_close(out, exact.half(), rtol=2**-10, atol=2**-10)
