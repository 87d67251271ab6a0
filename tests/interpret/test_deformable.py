"""Multi-scale deformable attention in Triton's interpreter: every kernel against the definition."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from igva_kernels.deformable import multi_scale_deformable_attention as attention

SHAPES = {
    "one_level": [(4, 4)],
    "mmfuser": [(2, 2)] * 4,
    "pyramid": [(3, 5), (2, 1)],
}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def shapes(request: pytest.FixtureRequest) -> list[tuple[int, int]]:
    return request.param


@pytest.fixture
def make_inputs() -> Callable[..., list[Tensor]]:
    """value, locations and weights in float64. Locations are up to two cells outside, and keep away from the centres of cells,
    where the interpolation has a kink."""

    def make(
        shapes: Sequence[tuple[int, int]], batch: int = 2, queries: int = 3, heads: int = 2, points: int = 2, channels: int = 8
    ) -> list[Tensor]:
        extents = torch.tensor([(width, height) for height, width in shapes])[:, None]  # (L, 1, 2)
        shape = (batch, queries, heads, len(shapes), points)
        cell = torch.floor(torch.rand(*shape, 2, dtype=torch.float64) * (extents + 4)) - 3
        locations = (cell + 0.55 + 0.9 * torch.rand_like(cell)) / extents
        num_cells = sum(height * width for height, width in shapes)
        value = torch.randn(batch, num_cells, heads, channels, dtype=torch.float64)
        return [value, locations, torch.randn(shape, dtype=torch.float64)]

    return make


def with_gradients(impl: str, shapes, tensors: Sequence[Tensor], cotangent: Tensor, **options) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = attention(leaves[0], shapes, leaves[1], leaves[2], impl=impl, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))]


@pytest.fixture(autouse=True)
def _interpreted(kernels) -> None:
    """``kernels`` fails where the interpreter is off."""


@pytest.mark.parametrize("deterministic", [True, False])
def test_float64_equals_the_definition(deterministic, shapes, make_inputs) -> None:
    tensors, cotangent = make_inputs(shapes), torch.randn(2, 3, 16, dtype=torch.float64)
    actual = with_gradients("triton", shapes, tensors, cotangent, deterministic=deterministic)
    torch.testing.assert_close(actual, with_gradients("reference", shapes, tensors, cotangent), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("heads", "points", "channels"), [(1, 1, 1), (1, 3, 6), (2, 1, 48)])
def test_sizes_that_fit_no_tile(heads, points, channels, make_inputs) -> None:
    shapes = [(2, 3), (1, 1)]
    tensors = make_inputs(shapes, batch=1, heads=heads, points=points, channels=channels)
    cotangent = torch.randn(1, 3, heads * channels, dtype=torch.float64)
    actual = with_gradients("triton", shapes, tensors, cotangent)
    torch.testing.assert_close(actual, with_gradients("reference", shapes, tensors, cotangent), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("deterministic", [True, False])
def test_many_tiles_of_queries_and_of_cells(deterministic, make_inputs) -> None:
    shapes = [(2, 2), (1, 3)]
    tensors = make_inputs(shapes, batch=1, queries=3, heads=1, channels=256)  # tiles of 1 query, and of 1 cell
    cotangent = torch.randn(1, 3, 256, dtype=torch.float64)
    actual = with_gradients("triton", shapes, tensors, cotangent, deterministic=deterministic)
    torch.testing.assert_close(actual, with_gradients("reference", shapes, tensors, cotangent), rtol=1e-12, atol=1e-12)


def test_a_cell_that_everybody_reads(make_inputs) -> None:
    """A loop of many turns beside cells that nobody reads."""
    shapes = [(3, 3)]
    tensors = make_inputs(shapes, batch=1, queries=12, heads=1)
    tensors[1].copy_(0.5 + 0.1 * torch.rand_like(tensors[1]))
    cotangent = torch.randn(1, 12, 8, dtype=torch.float64)
    actual = with_gradients("triton", shapes, tensors, cotangent)
    torch.testing.assert_close(actual, with_gradients("reference", shapes, tensors, cotangent), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_as_exact_as_the_definition(dtype, deterministic, make_inputs, assert_as_exact_as) -> None:
    """Both compute in float32 and round once. The interpreter truncates to bfloat16, which costs one more unit."""
    shapes = [(3, 4), (2, 2)]
    value, locations, weights = make_inputs(shapes, batch=1)
    tensors = value.to(dtype), locations.float(), weights.float()
    cotangent = torch.randn(1, 3, 16).to(dtype)
    actual = with_gradients("triton", shapes, tensors, cotangent, deterministic=deterministic)
    same = with_gradients("reference", shapes, tensors, cotangent)
    exact = with_gradients("reference", shapes, [tensor.double() for tensor in tensors], cotangent)
    for name, got, own, want in zip(("output", "value", "locations", "weights"), actual, same, exact, strict=True):
        assert got.dtype == own.dtype
        assert_as_exact_as(got, own, want, slack=4 if got.dtype == torch.float32 else 1, what=name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_locations_and_weights_in_16_bits(dtype, make_inputs) -> None:
    tensors = [tensor.to(dtype) for tensor in make_inputs([(2, 2)], batch=1)]
    cotangent = torch.randn(1, 3, 16).to(dtype)
    actual = with_gradients("triton", [(2, 2)], tensors, cotangent)
    expected = with_gradients("reference", [(2, 2)], tensors, cotangent)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("place", [float("nan"), float("inf"), -float("inf"), 1e30, -0.25, 1.25])
def test_a_location_outside_reads_nothing(place, deterministic, make_inputs) -> None:
    """Not even NaN, in a value that no other location is near."""
    value, locations, weights = make_inputs([(2, 2)], batch=1, queries=2, heads=1, points=1)
    value.fill_(float("nan"))
    locations[..., 1].fill_(0.5)
    locations[..., 0].fill_(place)  # -0.25 and 1.25 are exactly one cell outside
    cotangent = torch.ones(1, 2, 8, dtype=torch.float64)
    for result in with_gradients("triton", [(2, 2)], (value, locations, weights), cotangent, deterministic=deterministic):
        assert (result == 0).all()


@pytest.mark.parametrize(("batch", "queries"), [(0, 3), (2, 0)])
@pytest.mark.parametrize("deterministic", [True, False])
def test_nothing_to_do(batch, queries, deterministic, make_inputs) -> None:
    tensors = make_inputs([(2, 3)], batch=batch, queries=queries)
    cotangent = torch.zeros(batch, queries, 16, dtype=torch.float64)
    out, value_grad, *_ = with_gradients("triton", [(2, 3)], tensors, cotangent, deterministic=deterministic)
    assert out.shape == (batch, queries, 16)
    assert (value_grad == 0).all()


def test_strided_arguments(make_inputs) -> None:
    tensors, cotangent = make_inputs([(2, 3)], batch=1), torch.randn(3, 1, 16, dtype=torch.float64).transpose(0, 1)
    strided = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
    actual = with_gradients("triton", [(2, 3)], strided, cotangent)
    torch.testing.assert_close(actual, with_gradients("reference", [(2, 3)], tensors, cotangent), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("deterministic", [True, False])
def test_only_the_gradients_that_are_needed(deterministic, make_inputs) -> None:
    tensors = make_inputs([(2, 3)], batch=1)
    every = with_gradients("reference", [(2, 3)], tensors, torch.ones(1, 3, 16, dtype=torch.float64))[1:]
    for position, expected in enumerate(every):
        value, locations, weights = (tensor.detach().requires_grad_(i == position) for i, tensor in enumerate(tensors))
        out = attention(value, [(2, 3)], locations, weights, impl="triton", deterministic=deterministic)
        (actual,) = torch.autograd.grad(out.sum(), (value, locations, weights)[position])
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("deterministic", [True, False])
def test_gradcheck(deterministic, make_inputs) -> None:
    leaves = [tensor.requires_grad_() for tensor in make_inputs([(2, 2)], batch=1, queries=1, heads=1, channels=2)]
    assert torch.autograd.gradcheck(
        lambda value, locations, weights: attention(
            value, [(2, 2)], locations, weights, impl="triton", deterministic=deterministic
        ),
        leaves,
        fast_mode=True,
    )


def test_compiled_equals_eager(make_inputs) -> None:
    leaves = [tensor.requires_grad_() for tensor in make_inputs([(2, 1)], batch=1, queries=1, heads=1)]

    def function(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return attention(value, [(2, 1)], locations, weights, impl="triton").square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(*leaves), leaves)
    assert all(map(torch.equal, actual, torch.autograd.grad(function(*leaves), leaves)))


def test_opcheck(make_inputs, monkeypatch) -> None:
    monkeypatch.undo()  # opcheck compares storage offsets, and the guards before the outputs shift them
    value, locations, weights = (tensor.requires_grad_() for tensor in make_inputs([(2, 1)], batch=1, queries=1, heads=1))
    torch.library.opcheck(torch.ops.igva.deformable_attention, (value, [2, 1], locations, weights, None, "triton"))


def test_who_may_add_atomically() -> None:
    from igva_kernels.impl.triton.deformable import gathers_value_gradient

    assert [gathers_value_gradient(option) for option in (None, True, False)] == [True, True, False]
    torch.use_deterministic_algorithms(True)
    try:
        assert gathers_value_gradient(False)
    finally:
        torch.use_deterministic_algorithms(False)


def test_reasons(make_inputs, monkeypatch) -> None:
    from igva_kernels.impl.triton import deformable

    shapes = ((2, 3), (1, 1))
    value, locations, weights = make_inputs(shapes, batch=2)
    reason = deformable.check_supported
    assert reason(value, shapes, locations, weights) is None
    assert "value is torch.float8" in reason(value.to(torch.float8_e5m2), shapes, locations, weights)
    for limit, size, text in (
        ("MAX_BATCH", 1, "B=2 images of H=2 heads"),
        ("MAX_CHANNELS", 7, "C=8 channels"),
        ("MAX_OFFSET", 48, "B*Q*H*L*P = 48"),
        ("MAX_OFFSET", 60, "B*H*(cells with borders) = 64"),
        ("MAX_OFFSET", 100, "S*H*C = 112"),
    ):
        with monkeypatch.context() as context:
            context.setattr(deformable, limit, size)
            assert text in (reason(value, shapes, locations, weights) or ""), (limit, size)
