"""The counter of live memory, on calls whose peak is known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.memory import peak_bytes, running_peak
from benchmarks.parts.kernels import EAGER, OURS, fuse_variant
from benchmarks.sizes import CLIP_L_336, FuseCase, Tower, make_inputs

CPU = torch.device("cpu")
UNIT = 256 * 1024 * 4
"""Bytes of the maps of these tests; the allocator's rounding and small tensors stay far below a tenth of it."""


def peak_units(call: Callable[[], object]) -> float:
    return peak_bytes(call, CPU) / UNIT


@pytest.fixture
def one() -> Tensor:
    """A map that is alive before every call, so never counted."""
    return torch.randn(256, 1024)


def test_counts_the_result(one: Tensor) -> None:
    assert peak_units(lambda: one + 1) == pytest.approx(1, abs=0.1)


def test_counts_what_is_alive_at_once_and_not_what_was_freed(one: Tensor) -> None:
    def chain() -> Tensor:
        value = one + 1
        for _ in range(5):
            value = value + 1  # the old value dies after the new one is made
        return value

    assert peak_units(chain) == pytest.approx(2, abs=0.1)
    assert peak_units(lambda: [one + i for i in range(5)]) == pytest.approx(5, abs=0.1)


def test_counts_temporaries_inside_of_an_opaque_operator(one: Tensor) -> None:
    library = torch.library.Library("igva_benchmark_test", "DEF")
    library.define("three_temporaries(Tensor x) -> Tensor")

    def three_temporaries(x: Tensor) -> Tensor:
        first, second, third = x + 1, x + 2, x + 3
        return first.add_(second).add_(third)

    library.impl("three_temporaries", three_temporaries, "CPU")
    assert peak_units(lambda: torch.ops.igva_benchmark_test.three_temporaries(one)) == pytest.approx(3, abs=0.1)


def test_counts_what_the_backward_keeps(one: Tensor) -> None:
    leaf = one.clone().requires_grad_()

    def step() -> Tensor:
        value = leaf
        for _ in range(4):
            value = value.exp()  # each keeps its result for the backward
        return torch.autograd.grad(value.sum(), leaf)[0]

    assert peak_units(step) > 4.9  # four results and at least one gradient


def test_in_place_work_needs_nothing(one: Tensor) -> None:
    assert peak_units(lambda: one.mul_(1.0)) < 0.1


def test_running_peak() -> None:
    assert running_peak([]) == 0
    assert running_peak([3, -1, 4, -6]) == 6
    assert running_peak([-5, 3]) == 0  # releasing what was there before is no use of memory


def test_peaks_of_the_fusion() -> None:
    """CLIP-L's plan on small maps: what the released formulation holds at its end, and the one-pass mix at most."""
    tower = Tower("CLIP-L on small maps", 24, 128, 1, 256, 4)
    assert tower.groups == CLIP_L_336.groups
    case = FuseCase(tower, 8, torch.float32)
    inputs = make_inputs(case, CPU, seed=1)

    def peak_maps(name: str) -> float:
        variant = fuse_variant(case, name)
        return peak_bytes(lambda: variant(inputs), CPU) / case.map_bytes

    official = 6 + 1 + 4 + 4 + 1 + 2  # last group's stack and mean, the groups' patches, their product, its sum, the output
    assert peak_maps(EAGER) == pytest.approx(official, abs=0.2)  # the stack and the mean hold prefix rows
    output, tiles, factors = 2, 3, 0.01  # a tile, here the whole map: its sum, a group's and the next group's; the weights
    assert output <= peak_maps(OURS) <= output + tiles + factors
