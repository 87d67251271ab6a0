"""The fused allocator on a card, at full size: numbers, determinism, graphs, launches, compilation."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from fuzz.poison import poisoned_empty
from torch import Tensor, nn

from igva_kernels.modules import WeightAllocator

pytestmark = pytest.mark.gpu

RUNS = 20
SMALL = {"num_groups": 3, "vision_dim": 96, "text_dim": 48, "hidden_dim": 64, "num_blocks": 1, "num_heads": 2}


def make(dtype: torch.dtype, impl: str = "triton", **sizes: int) -> WeightAllocator:
    """IGVA's allocator, or one of other sizes, with weights large enough that attention and head differ from uniform.

    No unit of the ffn is near zero: one that rounding turns on or off is an error of its own size, in whichever of the
    implementations it happens.
    """
    allocator = WeightAllocator(**sizes, impl=impl).cuda()
    for parameter in allocator.parameters():
        nn.init.normal_(parameter, std=0.05)
    for block in allocator.transformers:
        nn.init.normal_(block.norm1.weight, mean=1.0, std=0.1)
        nn.init.normal_(block.norm2.weight, mean=1.0, std=0.1)
        with torch.no_grad():
            block.ffn[0].weight.div_(2.5)
            block.ffn[0].bias.copy_(5 * torch.randn_like(block.ffn[0].bias).sign())
            block.ffn[2].weight.div_(2.5)
    return allocator.to(dtype)


def inputs(batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Summaries, embeddings and the gradient of the weights."""
    summaries = torch.randn(batch, 4, 1024, device="cuda").to(dtype)
    return summaries, torch.randn(batch, 768, device="cuda").to(dtype), torch.randn(batch, 4, device="cuda")


def run(allocator: WeightAllocator, summaries: Tensor, embeds: Tensor, grad_out: Tensor) -> dict[str, Tensor]:
    """The weights and all gradients, by name."""
    summaries, embeds = summaries.detach().requires_grad_(), embeds.detach().requires_grad_()
    weights = allocator(summaries, embeds)
    leaves = {"summaries": summaries, "instruction_embeds": embeds, **dict(allocator.named_parameters())}
    grads = torch.autograd.grad(weights, list(leaves.values()), grad_out.to(weights.dtype))
    return {"weights": weights.detach(), **dict(zip(leaves, grads, strict=True))}


@pytest.fixture(autouse=True)
def _no_tf32(monkeypatch) -> None:
    """The stock modules in float32 are a yardstick only in float32."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("batch", [1, 16, 20, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_as_exact_as_the_stock_modules(dtype, batch, assert_as_exact_as) -> None:
    fused, stock, exact = make(dtype), make(dtype, "torch"), make(torch.float64, "torch")
    stock.load_state_dict(fused.state_dict())
    exact.load_state_dict(fused.state_dict())
    summaries, embeds, grad_out = inputs(batch, dtype)
    actual, same_dtype = (run(allocator, summaries, embeds, grad_out) for allocator in (fused, stock))
    expected = run(exact, summaries.double(), embeds.double(), grad_out)
    for name, value in actual.items():
        # a single image's stock error is a matter of luck: four roundings of the parameters' dtype more are allowed
        roundings = 4 * torch.finfo(dtype).eps / torch.finfo(value.dtype).eps
        assert_as_exact_as(value, same_dtype[name], expected[name], slack=roundings, what=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_small(dtype, assert_as_exact_as) -> None:
    """Of a few programs, for compute-sanitizer, in memory that is poisoned."""
    fused, stock, exact = make(dtype, **SMALL), make(dtype, "torch", **SMALL), make(torch.float64, "torch", **SMALL)
    stock.load_state_dict(fused.state_dict())
    exact.load_state_dict(fused.state_dict())
    summaries, embeds = torch.randn(3, 3, 96, device="cuda").to(dtype), torch.randn(3, 48, device="cuda").to(dtype)
    grad_out = torch.randn(3, 3, device="cuda")
    with poisoned_empty():
        actual = run(fused, summaries, embeds, grad_out)
    same_dtype = run(stock, summaries, embeds, grad_out)
    expected = run(exact, summaries.double(), embeds.double(), grad_out)
    for name, value in actual.items():
        # what small sums leave of rounding is a matter of luck: four roundings of the parameters' dtype more, as above
        roundings = 4 * torch.finfo(dtype).eps / torch.finfo(value.dtype).eps
        assert_as_exact_as(value, same_dtype[name], expected[name], slack=roundings, what=name)


@pytest.mark.parametrize("batch", [3, 64])
def test_the_same_bits_on_every_run(batch) -> None:
    fused, arguments = make(torch.bfloat16), inputs(batch, torch.bfloat16)
    first = run(fused, *arguments)
    for _ in range(RUNS - 1):
        again = run(fused, *arguments)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_an_image_does_not_depend_on_its_batch() -> None:
    """Within one size of row tile the sums of a row are the same whatever stands beside it."""
    fused = make(torch.bfloat16)
    summaries, embeds, _ = inputs(16, torch.bfloat16)
    with torch.no_grad():
        together = fused(summaries, embeds)
        alone = fused(summaries[5:14], embeds[5:14])
    assert torch.equal(together[5:14], alone)


def test_captured_in_a_cuda_graph() -> None:
    fused = make(torch.bfloat16)
    arguments = inputs(8, torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles the kernels, which a capture may not do
        run(fused, *arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(fused, *arguments)
    for tensor in arguments:
        tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    expected = run(fused, *arguments)
    assert all(torch.equal(captured[name], expected[name]) for name in expected)


def test_neither_synchronises_nor_copies_to_the_host() -> None:
    fused, arguments = make(torch.bfloat16), inputs(8, torch.bfloat16)
    run(fused, *arguments)  # compiling may
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(fused, *arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def kernels_of(function) -> int:
    """Kernels that ran on the device, as its profiler saw them."""
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA)


def test_launches() -> None:
    """With a gradient for the weights that torch makes beforehand, so that nothing but the allocator is counted."""
    fused, (summaries, embeds, grad_out) = make(torch.bfloat16), inputs(8, torch.bfloat16)
    parameters = list(fused.parameters())
    weights = fused(summaries, embeds)
    assert kernels_of(lambda: fused(summaries, embeds)) <= 22
    assert kernels_of(lambda: torch.autograd.grad(weights, parameters, grad_out, retain_graph=True)) <= 40


def test_compiled_equals_eager() -> None:
    fused = make(torch.bfloat16)
    summaries, embeds, grad_out = inputs(8, torch.bfloat16)

    def loss(summaries: Tensor, embeds: Tensor) -> Tensor:
        return (fused(summaries, embeds) * grad_out).sum()

    parameters = list(fused.parameters())
    expected = torch.autograd.grad(loss(summaries, embeds), parameters)
    actual = torch.autograd.grad(torch.compile(loss, fullgraph=True)(summaries, embeds), parameters)
    assert all(map(torch.equal, actual, expected))


def test_opcheck() -> None:
    fused = make(torch.float32)
    summaries, embeds, _ = inputs(2, torch.float32)
    torch.library.opcheck(torch.ops.igva.allocate, (summaries, embeds, fused._parameters_in_order(), 4, 1e-5, True))


def test_auto_takes_the_kernels_where_they_can_run() -> None:
    from igva_kernels.impl.triton import allocator as kernels

    summaries, embeds, _ = inputs(2, torch.bfloat16)
    with mock.patch.object(kernels, "allocate_forward", wraps=kernels.allocate_forward) as forward:
        make(torch.bfloat16, "auto")(summaries, embeds)
        assert forward.call_count == 1
        wide = make(torch.float64, "auto")(summaries, embeds)  # float64 is left to the stock modules
        assert forward.call_count == 1 and wide.dtype == torch.float64
        with torch.autocast("cuda", dtype=torch.bfloat16):  # the dtype of the parameters counts, not autocast's
            assert make(torch.float32, "auto")(summaries, embeds).dtype == torch.float32
        assert forward.call_count == 2
