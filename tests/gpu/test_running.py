"""How the kernels behave in a program: determinism, graphs, streams, memory, compilation, devices."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from igva_kernels import fuse, group_summaries
from igva_kernels.plan import FusionPlan

pytestmark = pytest.mark.gpu

MIB = 2**20
RUNS = 20


def forward_and_backward(tower, states, weights, grad_out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    out = fuse(states, tower.plan, weights, num_prefix_tokens=tower.num_prefix_tokens, impl="triton")
    return [out, *torch.autograd.grad(out, leaves, grad_out)]


@pytest.fixture(params=[False, True], ids=["frozen", "trainable"])
def training_step(request, clip, make_states, make_weights):
    """states, weights, the gradient of the output, and the leaves of CLIP-L in bfloat16."""
    states = make_states(clip, 8, torch.bfloat16, finite_prefix=True)
    weights = make_weights(clip, 8, "image").requires_grad_()
    leaves = [weights]
    if request.param:
        leaves += [state.requires_grad_() for state in states if state is not None]
    grad_out = torch.randn(8, 576, 2048, device="cuda").bfloat16()
    return states, weights, grad_out, leaves


def test_the_same_bits_on_every_run(clip, training_step) -> None:
    first = forward_and_backward(clip, *training_step)
    for _ in range(RUNS - 1):
        assert all(map(torch.equal, first, forward_and_backward(clip, *training_step)))


def test_captured_in_a_cuda_graph(clip, make_states, make_weights) -> None:
    states, weights = make_states(clip, 2, torch.float16), make_weights(clip, 2, "image").requires_grad_()
    grad_out = torch.randn(2, 576, 2048, device="cuda").half()

    def step() -> list[Tensor]:
        return forward_and_backward(clip, states, weights, grad_out, [weights])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles the kernels, which a capture may not do
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for state in states:
        if state is not None:
            state.copy_(torch.randn_like(state))
    with torch.no_grad():
        weights.copy_(torch.randn_like(weights))
    graph.replay()
    assert all(map(torch.equal, captured, step()))


def test_on_several_streams(clip, make_states, make_weights) -> None:
    inputs = [(make_states(clip, 2, torch.bfloat16), make_weights(clip, 2, "image")) for _ in range(4)]
    expected = [fuse(states, clip.plan, weights, num_prefix_tokens=1, impl="triton") for states, weights in inputs]
    torch.cuda.synchronize()
    streams, actual = [torch.cuda.Stream() for _ in inputs], []
    for stream, (states, weights) in zip(streams, inputs, strict=True):
        with torch.cuda.stream(stream):
            actual.append(fuse(states, clip.plan, weights, num_prefix_tokens=1, impl="triton"))
    torch.cuda.synchronize()
    assert all(map(torch.equal, actual, expected))


def test_neither_synchronises_nor_copies_to_the_host(clip, training_step) -> None:
    forward_and_backward(clip, *training_step)  # compiling may
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_backward(clip, *training_step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def peak_of(function) -> tuple[int, object]:
    """Bytes that a call has at most allocated beside what there was, and its result."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, result


def test_peak_memory_is_what_is_returned(clip, make_states, make_weights) -> None:
    """Inference: the output. Frozen tower: the output and K means, and nothing large for the backward."""
    states, weights = make_states(clip, 8, torch.bfloat16, finite_prefix=True), make_weights(clip, 8, "image")
    one_map = 8 * 576 * 1024 * 2

    def run(weights: Tensor) -> Tensor:
        return fuse(states, clip.plan, weights, num_prefix_tokens=1, impl="triton")

    run(weights)
    peak, _ = peak_of(lambda: run(weights))
    assert peak <= 2 * one_map + MIB

    weights.requires_grad_()
    grad_out = torch.randn(8, 576, 2048, device="cuda").bfloat16()
    torch.autograd.grad(run(weights), weights, grad_out)  # compiles
    peak, out = peak_of(lambda: run(weights))
    assert peak <= (2 + 4) * one_map + MIB
    peak, _ = peak_of(lambda: torch.autograd.grad(out, weights, grad_out))
    assert peak <= MIB  # the partial sums


def test_peak_memory_of_a_trainable_tower(clip, make_states, make_weights) -> None:
    """One gradient map a class: five, not twenty-four."""
    states, weights = make_states(clip, 8, torch.bfloat16, finite_prefix=True), make_weights(clip, 8, "image")
    leaves = [weights.requires_grad_(), *(state.requires_grad_() for state in states if state is not None)]
    grad_out = torch.randn(8, 576, 2048, device="cuda").bfloat16()
    forward_and_backward(clip, states, weights, grad_out, leaves)
    out = fuse(states, clip.plan, weights, num_prefix_tokens=1, impl="triton")
    peak, _ = peak_of(lambda: torch.autograd.grad(out, leaves, grad_out))
    assert peak <= 5 * 8 * 577 * 1024 * 2 + MIB


def test_compiled_equals_eager(clip, training_step) -> None:
    states, weights, grad_out, leaves = training_step

    def loss(states: list[Tensor | None], weights: Tensor) -> Tensor:
        out = fuse(states, clip.plan, weights, num_prefix_tokens=1, impl="triton")
        return (out.float() * grad_out.float()).sum()

    compiled = torch.compile(loss, fullgraph=True)
    expected = torch.autograd.grad(loss(states, weights), leaves)
    actual = torch.autograd.grad(compiled(states, weights), leaves)
    assert all(map(torch.equal, actual, expected))


def test_opcheck(clip, make_states, make_weights) -> None:
    states = [state for state in make_states(clip, 2, torch.float32, finite_prefix=True) if state is not None]
    weights = make_weights(clip, 2, "image").requires_grad_()
    torch.library.opcheck(torch.ops.igva.fuse, (states, weights, None, clip.plan.program.encode(), 1, True, None, "triton"))


def test_autocast_changes_nothing(clip, make_states, make_weights) -> None:
    """The states keep their dtype and the weights stay float32, whatever autocast would like."""
    states, weights = (
        make_states(clip, 2, torch.float32, finite_prefix=True),
        make_weights(clip, 2, "image").requires_grad_(),
    )
    grad_out = torch.randn(2, 576, 2048, device="cuda")
    expected = forward_and_backward(clip, states, weights, grad_out, [weights])
    with torch.autocast("cuda", dtype=torch.bfloat16):
        actual = forward_and_backward(clip, states, weights, grad_out, [weights])
    assert [tensor.dtype for tensor in actual] == [torch.float32, torch.float32]
    assert all(map(torch.equal, actual, expected))


def test_no_images(clip, make_states, make_weights) -> None:
    states, weights = make_states(clip, 0, torch.bfloat16), make_weights(clip, 0, "image").requires_grad_()
    out = fuse(states, clip.plan, weights, num_prefix_tokens=1, impl="triton")
    assert out.shape == (0, 576, 2048)
    (grad,) = torch.autograd.grad(out.sum(), weights)
    assert grad.shape == (0, 4)
    assert group_summaries(states, clip.plan, num_prefix_tokens=1, impl="triton").shape == (0, 4, 1024)


def test_auto_takes_the_kernels_where_they_can_run(clip, make_states, make_weights) -> None:
    import igva_kernels.impl.triton as kernels

    states, weights = make_states(clip, 1, torch.bfloat16), make_weights(clip, 1, "image")
    with mock.patch.object(kernels, "launch_mix_forward", wraps=kernels.launch_mix_forward) as launch:
        fuse(states, clip.plan, weights, num_prefix_tokens=1)
        assert launch.call_count == 1
        narrow = [torch.randn(1, 5, 12, device="cuda").half() for _ in range(2)]
        fuse(narrow, FusionPlan.llava(1), num_prefix_tokens=1)  # D = 12 has no 128-bit rows: plain torch
        assert launch.call_count == 1
        with pytest.raises(ValueError, match="D=12"):
            fuse(narrow, FusionPlan.llava(1), num_prefix_tokens=1, impl="triton")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_on_a_device_that_is_not_current(clip, make_states, make_weights) -> None:
    states, weights = make_states(clip, 1, torch.bfloat16), make_weights(clip, 1, "image")
    expected = fuse(states, clip.plan, weights, num_prefix_tokens=1, impl="triton")
    with torch.cuda.device(0):
        elsewhere = [None if state is None else state.to("cuda:1") for state in states]
        actual = fuse(elsewhere, clip.plan, weights.to("cuda:1"), num_prefix_tokens=1, impl="triton")
    assert actual.device == torch.device("cuda:1")
    assert torch.equal(actual.to("cuda:0"), expected)
