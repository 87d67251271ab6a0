"""Multi-scale deformable attention on a card, at the sizes of MMFuser and of Deformable DETR."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from fuzz.poison import poisoned_empty
from torch import Tensor

from igva_kernels import multi_scale_deformable_attention as attention
from igva_kernels.modules import MMFuserFusion

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
RUNS = 20


@dataclass(frozen=True)
class Sizes:
    shapes: tuple[tuple[int, int], ...]
    queries: int
    heads: int
    channels: int
    points: int = 4


SIZES = {
    "MMFuser, cross": Sizes(((24, 24),) * 4, 576, 16, 64),
    "MMFuser, self": Sizes(((24, 24),), 576, 16, 64),
    "SigLIP-so400m": Sizes(((27, 27),) * 4, 729, 16, 72),
    "Deformable DETR, encoder": Sizes(((64, 80), (32, 40), (16, 20), (8, 10)), 6800, 8, 32),
    "Deformable DETR, decoder": Sizes(((64, 80), (32, 40), (16, 20), (8, 10)), 300, 8, 32),
}


SMALL = Sizes(((3, 4),) * 2, queries=5, heads=2, channels=32, points=2)


@pytest.fixture(params=SIZES.values(), ids=SIZES.keys())
def sizes(request: pytest.FixtureRequest) -> Sizes:
    return request.param


@pytest.fixture
def make_inputs() -> Callable[..., list[Tensor]]:
    """value in ``dtype``; locations, up to two cells outside and away from the kinks of the interpolation, and weights in at
    least float32."""

    def make(sizes: Sizes, dtype: torch.dtype, batch: int = 2) -> list[Tensor]:
        wide = torch.promote_types(dtype, torch.float32)
        extents = torch.tensor([(width, height) for height, width in sizes.shapes], device="cuda")[:, None]
        shape = (batch, sizes.queries, sizes.heads, len(sizes.shapes), sizes.points)
        cell = torch.floor(torch.rand(*shape, 2, device="cuda", dtype=torch.float64) * (extents + 4)) - 3
        locations = (cell + 0.55 + 0.9 * torch.rand_like(cell)) / extents
        num_cells = sum(height * width for height, width in sizes.shapes)
        value = torch.randn(batch, num_cells, sizes.heads, sizes.channels, device="cuda")
        weights = torch.randn(shape, device="cuda").flatten(3).softmax(-1).view(shape)
        return [value.to(dtype), locations.to(wide), weights.to(wide)]

    return make


def formula(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """``grid_sample`` on each level, in the widest type of the arguments."""
    wide = torch.promote_types(value.dtype, locations.dtype)
    batch, _, heads, channels = value.shape
    total: Tensor | float = 0.0
    for level, part in enumerate(value.to(wide).split([height * width for height, width in shapes], dim=1)):
        maps = part.permute(0, 2, 3, 1).reshape(batch * heads, channels, *shapes[level])
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
        sampled = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        total = total + (sampled * weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)
    return total.view(batch, heads * channels, -1).transpose(1, 2).to(value.dtype)


def with_gradients(function: Callable[..., Tensor], shapes, tensors: Sequence[Tensor], cotangent: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out = function(leaves[0], shapes, leaves[1], leaves[2])
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))]


@pytest.fixture
def check(make_inputs, assert_as_exact_as) -> Callable[[Sizes, torch.dtype, bool], None]:
    """Output and gradients of the kernels against float64, in memory that is poisoned."""

    def run(sizes: Sizes, dtype: torch.dtype, deterministic: bool) -> None:
        tensors = make_inputs(sizes, dtype)
        cotangent = torch.randn(2, sizes.queries, sizes.heads * sizes.channels, device="cuda").to(dtype)
        with poisoned_empty():
            actual = with_gradients(
                lambda *args: attention(*args, impl="triton", deterministic=deterministic), sizes.shapes, tensors, cotangent
            )
        same = with_gradients(formula, sizes.shapes, tensors, cotangent)
        exact = with_gradients(formula, sizes.shapes, [tensor.double() for tensor in tensors], cotangent)
        for name, got, own, want in zip(("output", "value", "locations", "weights"), actual, same, exact, strict=True):
            assert got.dtype == own.dtype
            # A cell of the decoder's finest level may sum some dozen samples in another order than grid_sample's atomics. In
            # float64 torch's own result is the exact one, has no error, and the slack is all that a sum of some hundred
            # samples may be off by.
            slack = {torch.float32: 8, torch.float64: 64}.get(got.dtype, 0.5)
            assert_as_exact_as(got, own, want, slack=slack, what=name)

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("deterministic", [True, False])
def test_output_and_every_gradient(sizes, dtype, deterministic, check) -> None:
    check(sizes, dtype, deterministic)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("deterministic", [True, False])
def test_small(dtype, deterministic, check) -> None:
    """Of a few programs, for compute-sanitizer."""
    check(SMALL, dtype, deterministic)


def test_the_same_bits_on_every_run(sizes, make_inputs) -> None:
    tensors = make_inputs(sizes, torch.bfloat16)
    cotangent = torch.randn(2, sizes.queries, sizes.heads * sizes.channels, device="cuda").bfloat16()

    def run() -> list[Tensor]:
        return with_gradients(lambda *args: attention(*args, impl="triton"), sizes.shapes, tensors, cotangent)

    first = run()
    for _ in range(RUNS - 1):
        assert all(map(torch.equal, first, run()))


@pytest.mark.parametrize("deterministic", [True, False])
def test_all_samples_in_one_cell(deterministic, make_inputs, assert_as_exact_as) -> None:
    """The worst case of both sums of dvalue: one long list, and many additions to one address."""
    sizes = SIZES["MMFuser, self"]
    value, locations, weights = make_inputs(sizes, torch.float32)
    locations.fill_(0.5).add_(0.01 * torch.rand_like(locations))
    cotangent = torch.randn(2, 576, 1024, device="cuda")
    tensors = value, locations, weights
    actual = with_gradients(
        lambda *args: attention(*args, impl="triton", deterministic=deterministic), sizes.shapes, tensors, cotangent
    )[1]
    same = with_gradients(formula, sizes.shapes, tensors, cotangent)[1]
    exact = with_gradients(formula, sizes.shapes, [tensor.double() for tensor in tensors], cotangent)[1]
    assert_as_exact_as(actual, same, exact, slack=64)  # 2304 terms: the root of their number, and some


@pytest.mark.parametrize("deterministic", [True, False])
def test_captured_in_a_cuda_graph(deterministic, make_inputs) -> None:
    sizes = SIZES["MMFuser, cross"]
    tensors = make_inputs(sizes, torch.float16)
    cotangent = torch.randn(2, 576, 1024, device="cuda").half()

    def step() -> list[Tensor]:
        return with_gradients(
            lambda *args: attention(*args, impl="triton", deterministic=deterministic), sizes.shapes, tensors, cotangent
        )

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles the kernels, which a capture may not do
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for tensor, fresh in zip(tensors, make_inputs(sizes, torch.float16), strict=True):
        tensor.copy_(fresh)
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        if deterministic:
            assert torch.equal(got, want)
        else:
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("deterministic", [True, False])
def test_neither_synchronises_nor_copies_to_the_host(sizes, deterministic, make_inputs) -> None:
    tensors = make_inputs(sizes, torch.bfloat16)
    cotangent = torch.randn(2, sizes.queries, sizes.heads * sizes.channels, device="cuda").bfloat16()

    def step() -> None:
        with_gradients(
            lambda *args: attention(*args, impl="triton", deterministic=deterministic), sizes.shapes, tensors, cotangent
        )

    step()  # compiling may
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_peak_memory(make_inputs) -> None:
    """Forward: the output. Gathered dvalue: the gradients, and the sort of one int32 a sample."""
    sizes = SIZES["MMFuser, cross"]
    tensors = [tensor.requires_grad_() for tensor in make_inputs(sizes, torch.bfloat16, batch=8)]
    cotangent = torch.randn(8, 576, 1024, device="cuda").bfloat16()

    def forward() -> Tensor:
        return attention(tensors[0], sizes.shapes, tensors[1], tensors[2], impl="triton")

    torch.autograd.grad(forward(), tensors, cotangent)  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = forward()
    assert torch.cuda.max_memory_allocated() - before <= out.numel() * 2 + 2**20
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    grads = torch.autograd.grad(out, tensors, cotangent)
    results = sum(grad.numel() * grad.itemsize for grad in grads)
    samples = tensors[2].numel()
    # keys, sorted keys, order, and the sort's own copies of them: no more than three times 12 bytes a sample
    assert torch.cuda.max_memory_allocated() - before <= results + 36 * samples + 2**24


def test_auto_is_triton_on_a_card(make_inputs) -> None:
    sizes = SIZES["MMFuser, self"]
    value, locations, weights = make_inputs(sizes, torch.float16)
    automatic = attention(value, sizes.shapes, locations, weights)
    assert torch.equal(automatic, attention(value, sizes.shapes, locations, weights, impl="triton"))


def test_plain_torch_on_a_card(make_inputs) -> None:
    """What "auto" falls back to where Triton is missing."""
    sizes = SIZES["MMFuser, cross"]
    tensors, cotangent = make_inputs(sizes, torch.float32), torch.randn(2, 576, 1024, device="cuda")
    plain = with_gradients(lambda *args: attention(*args, impl="torch"), sizes.shapes, tensors, cotangent)
    kernels = with_gradients(lambda *args: attention(*args, impl="triton"), sizes.shapes, tensors, cotangent)
    torch.testing.assert_close(plain, kernels, rtol=1e-4, atol=1e-4)


def test_a_batch_beyond_2_to_the_31_elements() -> None:
    """The value passes 2**31 elements; the last images are computed once more alone."""
    shapes, batch = ((24, 24),) * 4, 1000
    assert batch * 2304 * 1024 > 2**31
    free, _ = torch.cuda.mem_get_info()
    needed = 6 * 2 * batch * 2304 * 1024
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free")
    value = torch.empty(batch, 2304, 16, 64, dtype=torch.bfloat16, device="cuda").normal_()
    locations = torch.rand(batch, 9, 16, 4, 4, 2, device="cuda")
    weights = torch.rand(batch, 9, 16, 4, 4, device="cuda")
    cotangent = torch.randn(batch, 9, 1024, device="cuda").bfloat16()

    def run(images: slice) -> list[Tensor]:
        tensors = [tensor[images] for tensor in (value, locations, weights)]
        return with_gradients(lambda *args: attention(*args, impl="triton"), shapes, tensors, cotangent[images])

    last = slice(batch - 3, batch)
    assert all(torch.equal(whole[last], alone) for whole, alone in zip(run(slice(None)), run(last), strict=True))


def test_mmfuser_compiled_equals_eager() -> None:
    fusion = MMFuserFusion().cuda()
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    states = [torch.randn(2, 577, 1024, device="cuda") if layer in fusion.layers else None for layer in range(25)]
    expected = fusion(states, num_prefix_tokens=1)
    compiled = torch.compile(fusion, fullgraph=True)
    actual = compiled(states, num_prefix_tokens=1)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    names = [name for name, _ in fusion.named_parameters()]
    got, want = (torch.autograd.grad(out.square().sum(), list(fusion.parameters())) for out in (actual, expected))
    for name, ours, theirs in zip(names, got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item(), msg=name)
