"""The allocator's kernels against the stock modules: numbers, launches, autograd, torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from igva_kernels import FusionPlan, group_summaries
from igva_kernels.modules import WeightAllocator

TINY = {"num_groups": 3, "vision_dim": 32, "text_dim": 16, "hidden_dim": 16, "num_blocks": 1, "num_heads": 1}
SIZES = {
    "two blocks": ({**TINY, "num_blocks": 2, "hidden_dim": 32, "num_heads": 2}, 3),
    "one image, widths that no step divides": (
        {**TINY, "num_groups": 2, "hidden_dim": 48, "num_heads": 3, "vision_dim": 80, "text_dim": 48},
        1,
    ),
    "several row tiles": ({**TINY, "num_groups": 1, "hidden_dim": 16, "num_heads": 1}, 70),
}


def make(sizes: dict[str, int], dtype: torch.dtype, impl: str = "triton") -> WeightAllocator:
    """An allocator with weights that make every gradient visible: the stock ones leave the scores near zero.

    No unit of the ffn is near zero either: one that rounding turns on or off is an error of its own size, in whichever of the
    implementations it happens.
    """
    allocator = WeightAllocator(**sizes, impl=impl)
    for parameter in allocator.parameters():
        nn.init.normal_(parameter, std=0.2)
    for block in allocator.transformers:
        nn.init.normal_(block.norm1.weight, mean=1.0, std=0.2)
        nn.init.normal_(block.norm2.weight, mean=1.0, std=0.2)
        with torch.no_grad():
            block.ffn[0].weight.div_(2)
            block.ffn[0].bias.copy_(4 * torch.randn_like(block.ffn[0].bias).sign())
            block.ffn[2].weight.div_(2)
    return allocator.to(dtype)


def inputs(sizes: dict[str, int], batch: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    summaries = torch.randn(batch, sizes["num_groups"], sizes["vision_dim"], dtype=torch.float64)
    embeds = torch.randn(batch, sizes["text_dim"], dtype=torch.float64)
    return summaries.to(dtype).requires_grad_(), embeds.to(dtype).requires_grad_()


def run(allocator: WeightAllocator, summaries: Tensor, embeds: Tensor, grad_out: Tensor) -> dict[str, Tensor]:
    """The weights and all gradients, by name."""
    summaries, embeds = summaries.detach().requires_grad_(), embeds.detach().requires_grad_()
    weights = allocator(summaries, embeds)
    leaves = {"summaries": summaries, "instruction_embeds": embeds, **dict(allocator.named_parameters())}
    grads = torch.autograd.grad(weights, list(leaves.values()), grad_out.to(weights.dtype))
    return {"weights": weights.detach(), **dict(zip(leaves, grads, strict=True))}


@pytest.fixture(autouse=True)
def _interpreted(kernels, monkeypatch) -> None:
    """No test runs before all kernels are decorated, and it is certain that they are interpreted.

    Two slices instead of eight: small widths then take several steps, the last one incomplete.
    """
    from igva_kernels.impl.triton import allocator, allocator_tiles

    assert type(allocator.head_kernel).__name__ == "InterpretedFunction"
    monkeypatch.setattr(allocator_tiles, "THREADS", 2 * allocator_tiles.launch.WARP)


# ---- numbers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("sizes", "batch"), SIZES.values(), ids=SIZES.keys())
def test_as_exact_as_the_stock_modules(sizes, batch, dtype, assert_as_exact_as) -> None:
    fused = make(sizes, dtype)
    stock, exact = (WeightAllocator(**sizes, impl="torch").to(kind) for kind in (dtype, torch.float64))
    stock.load_state_dict(fused.state_dict())
    exact.load_state_dict(fused.state_dict())
    summaries, embeds = inputs(sizes, batch, dtype)
    grad_out = torch.randn(batch, sizes["num_groups"])
    actual, same_dtype = (run(allocator, summaries, embeds, grad_out) for allocator in (fused, stock))
    expected = run(exact, summaries.double(), embeds.double(), grad_out)
    assert actual["weights"].dtype == torch.float32
    for name, value in actual.items():
        assert value.dtype == same_dtype[name].dtype
        # The stock error of a handful of numbers is a matter of luck, so a few roundings of the parameters' dtype are allowed.
        roundings = 4 * torch.finfo(dtype).eps / torch.finfo(value.dtype).eps
        assert_as_exact_as(value, same_dtype[name], expected[name], slack=roundings, what=name)


def test_a_softmax_far_from_zero_does_not_overflow(assert_as_exact_as) -> None:
    """Scores in the hundreds: the largest is subtracted first, in the attention and in the head."""
    fused = make(TINY, torch.float32)
    with torch.no_grad():
        fused.transformers[0].cross_attention.in_proj_weight.mul_(40)
        fused.linear.weight.mul_(200)
    exact = WeightAllocator(**TINY, impl="torch").double()
    exact.load_state_dict(fused.state_dict())
    summaries, embeds = inputs(TINY, 2)
    weights = fused(summaries, embeds)
    assert weights.isfinite().all()
    torch.testing.assert_close(weights.double(), exact(summaries.double(), embeds.double()), rtol=1e-3, atol=1e-4)


def test_layer_norm_of_rows_far_from_zero(assert_as_exact_as) -> None:
    """A mean of a thousand deviations: the sum of squares minus the squared mean would have no digit left."""
    fused = make(TINY, torch.float32)
    with torch.no_grad():
        fused.transformers[0].cross_attention.out_proj.bias.add_(1e3)
    stock, exact = (WeightAllocator(**TINY, impl="torch").to(kind) for kind in (torch.float32, torch.float64))
    stock.load_state_dict(fused.state_dict())
    exact.load_state_dict(fused.state_dict())
    summaries, embeds = inputs(TINY, 2)
    expected = exact(summaries.double(), embeds.double())
    assert_as_exact_as(fused(summaries, embeds), stock(summaries, embeds), expected, slack=16)


def test_the_same_bits_on_every_run() -> None:
    fused = make(TINY, torch.float32)
    summaries, embeds = inputs(TINY, 3)
    grad_out = torch.randn(3, 3)
    first, second = (run(fused, summaries, embeds, grad_out) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_inputs_of_another_dtype_and_layout() -> None:
    """They are cast while they are read, as the stock modules cast them before."""
    fused = make(TINY, torch.float16)
    _, embeds = inputs(TINY, 2)
    summaries = torch.randn(3, 32, 2).permute(2, 0, 1)
    grad_out = torch.randn(2, 3)
    actual = run(fused, summaries, embeds, grad_out)
    expected = run(fused, summaries.half().contiguous(), embeds.half(), grad_out)
    assert torch.equal(actual["weights"], expected["weights"])
    assert actual["summaries"].dtype == torch.float32
    torch.testing.assert_close(actual["summaries"].half(), expected["summaries"], rtol=2e-3, atol=1e-6)


def test_no_images() -> None:
    fused = make(TINY, torch.float32)
    summaries, embeds = inputs(TINY, 0)
    results = run(fused, summaries, embeds, torch.zeros(0, 3))
    assert results["weights"].shape == (0, 3) and results["summaries"].shape == summaries.shape
    assert all(not grad.any() for name, grad in results.items() if name not in ("weights", "summaries", "instruction_embeds"))


# ---- autograd and compilation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("needed", ["parameters", "summaries", "instruction_embeds"])
def test_only_the_gradients_that_are_needed(needed) -> None:
    fused = make(TINY, torch.float32)
    summaries, embeds = inputs(TINY, 2)
    everything = run(fused, summaries, embeds, grad_out := torch.randn(2, 3))
    summaries = summaries.detach().requires_grad_(needed == "summaries")
    embeds = embeds.detach().requires_grad_(needed == "instruction_embeds")
    fused.requires_grad_(needed == "parameters")
    fused(summaries, embeds).backward(grad_out)
    leaves = {"summaries": summaries, "instruction_embeds": embeds, **dict(fused.named_parameters())}
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == leaf.requires_grad, name
        if leaf.requires_grad:
            assert torch.equal(leaf.grad, everything[name]), name


def test_inference_equals_training() -> None:
    """Without gradients the operator's boundary is skipped and nothing is kept; the numbers are the same."""
    fused = make(TINY, torch.float32)
    summaries, embeds = inputs(TINY, 2)
    with torch.no_grad():
        weights = fused(summaries, embeds)
    assert torch.equal(weights, fused(summaries, embeds))


def test_compiled_equals_eager() -> None:
    fused = make(TINY, torch.float32)
    summaries, embeds = inputs(TINY, 2)
    grad_out = torch.randn(2, 3)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    expected = run(fused, summaries, embeds, grad_out)
    leaves = [summaries, *fused.parameters()]
    grads = torch.autograd.grad(compiled(summaries, embeds), leaves, grad_out)
    assert torch.equal(grads[0], expected["summaries"])
    for (name, _), grad in zip(fused.named_parameters(), grads[1:], strict=True):
        assert torch.equal(grad, expected[name]), name


def test_opcheck(monkeypatch) -> None:
    monkeypatch.undo()  # opcheck compares storage offsets, and the guards before the outputs shift them
    fused = make(TINY, torch.float32)
    arguments = (*inputs(TINY, 2), fused._parameters_in_order(), 1, 1e-5, True)
    torch.library.opcheck(torch.ops.igva.allocate, arguments)


def test_autocast_changes_nothing() -> None:
    """The kernels compute in the dtype of the parameters, as the official model does."""
    fused = make(TINY, torch.float32)
    summaries, embeds = inputs(TINY, 2)
    expected = run(fused, summaries, embeds, grad_out := torch.randn(2, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(fused, summaries, embeds, grad_out)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


# ---- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "dtype", "reason"),
    [
        ({"hidden_dim": 24, "num_heads": 2}, torch.float32, "hidden_dim / num_heads = 12 is not a multiple of 16"),
        ({"vision_dim": 40}, torch.float32, "vision_dim = 40"),
        ({"text_dim": 20}, torch.float32, "text_dim = 20"),
        ({"num_groups": 33}, torch.float32, "num_groups = 33 is more than 32"),
        ({}, torch.float64, "torch.float64"),
    ],
)
def test_a_named_implementation_does_not_give_way(sizes, dtype, reason) -> None:
    sizes = {**TINY, **sizes}
    fused = make(sizes, dtype)
    with pytest.raises(ValueError, match=f'impl="triton".*{reason}'):
        fused(*inputs(sizes, 2, dtype))


def test_other_refusals(monkeypatch) -> None:
    import triton

    class Adapter(nn.Linear):
        """What an adapter or a quantised layer looks like from outside."""

    fused = make(TINY, torch.float32)
    adapted = make(TINY, torch.float32)
    adapted.transformers[0].ffn[2] = Adapter(16, 16)
    with pytest.raises(ValueError, match=r"transformers\.0\.ffn\.2 is a Adapter"):
        adapted(*inputs(TINY, 2))
    mixed = make(TINY, torch.float16)
    mixed.transformers[0].norm1.float()
    with pytest.raises(ValueError, match=r"parameters of torch.float16 and of torch.float32"):
        mixed(*inputs(TINY, 2))
    transposed = make(TINY, torch.float32)
    transposed.cls_proj.weight = nn.Parameter(torch.randn(32, 16).T)
    with pytest.raises(ValueError, match="not contiguous"):
        transposed(*inputs(TINY, 2))
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="on cpu, and Triton needs"):
        fused(*inputs(TINY, 2))


# ---- launches -----------------------------------------------------------------------------------------------------------


class TorchLaunches(TorchDispatchMode):
    """Counts the operations that are kernels on a GPU: all but views, allocations and the library's own operators."""

    FREE = ("empty", "new_empty", "empty_like", "new_empty_strided", "empty_strided", "detach", "_unsafe_view", "promote_types")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        out = func(*args, **(kwargs or {}))
        if not (func.is_view or name in self.FREE or func.namespace == "igva"):
            self.names.append(name)
        return out


@contextmanager
def counted() -> Iterator[Callable[[], int]]:
    """The launches within: of Triton kernels, and of torch."""
    from triton.runtime.interpreter import InterpretedFunction

    kernels: list[str] = []
    real = InterpretedFunction.run

    def run(self, *args, **kwargs):
        kernels.append(self.fn.__name__)
        return real(self, *args, **kwargs)

    with mock.patch.object(InterpretedFunction, "run", run), TorchLaunches() as torch_launches:
        yield lambda: len(kernels) + len(torch_launches.names)


IGVA = {**TINY, "num_groups": 4, "num_blocks": 4}


def launches_of(impl: str, dtype: torch.dtype = torch.float32) -> tuple[int, int]:
    """Forward and backward of the four blocks of IGVA, with gradients of everything."""
    allocator = make(IGVA, dtype, impl)
    summaries, embeds = inputs(IGVA, 2, dtype)
    grad_out = torch.randn(2, 4)
    with counted() as count:
        weights = allocator(summaries, embeds)
        forward = count()
        torch.autograd.grad(weights, [summaries, embeds, *allocator.parameters()], grad_out)
        return forward, count() - forward


def test_launches_of_the_four_blocks() -> None:
    forward, backward = launches_of("triton")
    assert (forward, backward) == (19, 25)  # the aim: at most 22 and 40


def test_launches_of_the_stock_modules() -> None:
    """What is saved. On a GPU some of these operations are more than one kernel."""
    forward, backward = launches_of("torch")
    assert 55 <= forward <= 75
    assert backward >= 100


def test_the_count_is_not_blind() -> None:
    with counted() as count:
        torch.randn(3).add(1).view(3)
        assert count() == 2


def test_group_summaries_are_one_launch() -> None:
    plan = FusionPlan.igva(24, 4)
    states = [torch.randn(1, 3, 16) for _ in range(25)]
    with counted() as count:
        group_summaries(states, plan, num_prefix_tokens=1, impl="triton")
        assert count() == 1
