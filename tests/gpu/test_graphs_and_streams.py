"""Captured graphs with new inputs, and launches on the stream that is current, whichever call was recorded where."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from igva_kernels import FusionPlan, Norm, SparseWeights, fuse

pytestmark = pytest.mark.gpu

BATCH, PATCHES, WIDTH = 2, 576, 1024
REPLAYS = 3
DELAY_CYCLES = 20_000_000
"""About ten milliseconds: a kernel that does not wait for its stream reads what was there before."""


class Inputs:
    """Static inputs of a call, which can be filled anew."""

    def __init__(self, plan: FusionPlan, sharing: str | None) -> None:
        shape = (BATCH, 1 + PATCHES, WIDTH)
        self.plan = plan
        self.states = [
            torch.randn(shape, device="cuda", dtype=torch.bfloat16) if layer in plan.sources else None
            for layer in range(plan.num_layers + 1)
        ]
        self.weights: Tensor | SparseWeights | None = None
        if sharing == "image":
            self.weights = torch.rand(BATCH, plan.num_groups, device="cuda", requires_grad=True)
        elif sharing == "sparse":
            indices = torch.randint(plan.num_groups, (BATCH, PATCHES, 3), device="cuda")
            self.weights = SparseWeights(torch.rand(BATCH, PATCHES, 3, device="cuda", requires_grad=True), indices)
        self.grad_out = torch.randn(BATCH, PATCHES, plan.num_slots * WIDTH, device="cuda", dtype=torch.bfloat16)

    @property
    def values(self) -> Tensor | None:
        return self.weights.values if isinstance(self.weights, SparseWeights) else self.weights

    @torch.no_grad()
    def refill(self) -> None:
        for tensor in (*self.states, self.values, self.grad_out):
            if tensor is not None:
                tensor.copy_(torch.randn_like(tensor))

    def step(self) -> list[Tensor]:
        out = fuse(self.states, self.plan, self.weights, num_prefix_tokens=1, impl="triton")
        if self.values is None:
            return [out]
        return [out, *torch.autograd.grad(out, self.values, self.grad_out)]


CALLS = {
    "igva": (FusionPlan.igva(24, 4), "image"),
    "tgif": (FusionPlan.tgif(24), "image"),
    "sparse": (FusionPlan.mixture_of_layers(24), "sparse"),
    "normalised": (FusionPlan.mean_of_normalised_layers(24, norm=Norm("layer")), None),
}


@pytest.fixture(params=CALLS)
def inputs(request: pytest.FixtureRequest) -> Inputs:
    return Inputs(*CALLS[request.param])


@contextmanager
def side_stream() -> Iterator[torch.cuda.Stream]:
    """A stream that begins after, and ends before, what else runs on the current one."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield stream
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.parametrize("calls_before", (1, 3), ids=("after one call", "after calls that repeated"))
def test_a_graph_replays_with_new_inputs(inputs: Inputs, calls_before: int) -> None:
    with side_stream():
        for _ in range(calls_before):  # compiles; a call that repeats may launch in a shorter way, and is captured as well
            inputs.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = inputs.step()
    for _ in range(REPLAYS):
        inputs.refill()
        graph.replay()
        assert all(map(torch.equal, captured, inputs.step()))


def test_two_graphs_share_a_memory_pool() -> None:
    both = [Inputs(*CALLS["igva"]), Inputs(*CALLS["sparse"])]
    with side_stream():
        for inputs in both:
            inputs.step()
    graphs, captured, pool = [], [], torch.cuda.graph_pool_handle()
    for inputs in both:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            captured.append(inputs.step())
        graphs.append(graph)
    for inputs, graph, results in zip(both, graphs, captured, strict=True):  # in the order of the capture, as a pool demands
        inputs.refill()
        graph.replay()
        assert all(map(torch.equal, results, inputs.step()))


@pytest.mark.parametrize("recorded_on", ("default", "side"))
def test_a_call_runs_on_the_current_stream(inputs: Inputs, recorded_on: str) -> None:
    """The inputs are written late, on a stream of their own: only a kernel on the same stream sees them."""
    for _ in range(3):
        if recorded_on == "side":
            with side_stream():
                inputs.step()
        else:
            inputs.step()
    with side_stream():
        torch.cuda._sleep(DELAY_CYCLES)
        inputs.refill()
        late = inputs.step()
    assert all(map(torch.equal, late, inputs.step()))


def test_two_streams_at_once_give_the_bits_of_one(inputs: Inputs) -> None:
    expected = inputs.step()
    results: list[Callable[[], bool]] = []
    streams = [torch.cuda.Stream() for _ in range(2)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                found = inputs.step()
            results.append(lambda found=found: all(map(torch.equal, found, expected)))
    torch.cuda.synchronize()
    assert all(result() for result in results)


def test_the_same_bits_on_twenty_runs(inputs: Inputs) -> None:
    first = inputs.step()
    assert all(all(map(torch.equal, first, inputs.step())) for _ in range(19))
