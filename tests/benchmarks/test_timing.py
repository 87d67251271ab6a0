"""The clock's bookkeeping. No test here asserts how long something takes."""

from __future__ import annotations

import pytest
import torch

from benchmarks.bandwidth import copy_bandwidth, make_copy, make_copy_of_size, matmul_flops
from benchmarks.timing import MAX_SETS, Timing, cache_bytes, compare, latency, num_input_sets, quantiles

CPU = torch.device("cpu")


def test_rounds_of_variants_alternate_and_use_every_set() -> None:
    calls: list[str] = []
    variants = {
        "a": [lambda: calls.append("a0"), lambda: calls.append("a1")],
        "b": [lambda: calls.append("b0"), lambda: calls.append("b1")],
    }
    timings = compare(variants, CPU, seconds=0, min_rounds=3)
    round_of_a, round_of_b = ["a1", "a0", "a1"], ["b1", "b0", "b1"]  # each after one call that is not timed
    assert calls == round_of_a * 2 + round_of_b * 2 + (round_of_a + round_of_b) * 3
    assert {name: (timing.rounds, timing.calls, timing.clock) for name, timing in timings.items()} == {
        "a": (3, 2, "wall"),
        "b": (3, 2, "wall"),
    }
    assert all(0 <= timing.low_s <= timing.median_s <= timing.high_s for timing in timings.values())


def test_the_number_of_rounds_can_be_given() -> None:
    calls: list[int] = []
    found = compare({"a": [lambda: calls.append(0)]}, CPU, seconds=100, rounds=3)["a"]
    assert found.rounds == 3 and len(calls) == 2 * (2 + 3)  # two to warm up; before each an untimed call


def test_a_copy_of_a_case_moves_as_many_bytes() -> None:
    copy = make_copy_of_size(CPU, 1 << 20)
    assert copy.bytes == 1 << 20
    assert len(copy.closures) == min(MAX_SETS, -(-3 * cache_bytes(CPU) // copy.bytes))
    assert len(make_copy_of_size(CPU, 4 * cache_bytes(CPU)).closures) == 1


def test_quantiles() -> None:
    assert quantiles([3.0, 1.0, 2.0, 5.0, 4.0]) == (3.0, 1.8, 4.2)


def test_variants_are_compared_within_the_rounds() -> None:
    """On a machine that becomes three times slower after two of five rounds; the ratio of the medians is 3."""
    slow = Timing(6.0, 2.0, 6.0, 5, 1, "wall", samples_s=(2.0, 2.0, 6.0, 6.0, 6.0))
    fast = Timing(2.0, 1.0, 3.0, 5, 1, "wall", samples_s=(1.0, 1.0, 3.0, 3.0, 2.0))
    assert fast.times_faster_than(slow) == 2.0
    assert slow.times_faster_than(fast) == 0.5
    assert "samples_s" not in fast.as_dict()


def test_enough_sets_to_exceed_the_cache() -> None:
    cache = cache_bytes(CPU)
    assert cache > 0
    assert num_input_sets(cache, CPU) == 3
    assert num_input_sets(10 * cache, CPU) == 2
    assert num_input_sets(1, CPU) == MAX_SETS


def test_latency_times_single_calls() -> None:
    calls: list[int] = []
    timing = latency([lambda: calls.append(0), lambda: calls.append(1)], CPU, seconds=0)
    assert timing.rounds == 5 and timing.calls == 1
    assert calls == [0, 0, 0, 1, 0, 1, 0]


def test_ceilings_count_reads_and_writes() -> None:
    copy = copy_bandwidth(make_copy(CPU, tiny=True), CPU, seconds=0)
    assert copy.bytes_per_copy == 2 * (64 << 10)
    assert copy.bytes_per_s * copy.timing.median_s == pytest.approx(copy.bytes_per_copy)
    assert matmul_flops(CPU, torch.float32, size=16, seconds=0) > 0
