"""pytest-benchmark suite of ``fuse``: ``python -m pytest benchmarks``.

Every benchmark checks its results first; a variant that computes something else fails and has no time. ``extra_info`` of each
says what the floor is, how near the time comes to it, and what the call's peak memory is.
"""

from __future__ import annotations

import itertools
import time

import pytest
import torch

from benchmarks.bandwidth import Bandwidth
from benchmarks.memory import method, peak_bytes
from benchmarks.parts.kernels import COMPILE, EAGER, OURS, SEED, checked_closures, describe, fuse_variant
from benchmarks.roofline import case_traffic
from benchmarks.sizes import CLIP_L_336, TINY, FuseCase, make_inputs
from benchmarks.timing import compare, num_input_sets

BATCHES = (1, 4, 16)
DTYPES = (torch.float32, torch.bfloat16)
WORKLOADS = [(2, "forward"), (2, "frozen"), (2, "trainable"), (1, "forward")]


@pytest.fixture(params=BATCHES, ids=lambda batch: f"B{batch}")
def batch(request: pytest.FixtureRequest, device: torch.device) -> int:
    if request.param == 16 and device.type == "cpu" and not request.config.getoption("--large"):
        pytest.skip("B = 16 on a CPU takes 10 GB and minutes; --large runs it")
    if request.param != 1 and request.config.getoption("--tiny"):
        pytest.skip("--tiny runs B = 1")
    return request.param


@pytest.mark.parametrize("variant", (OURS, EAGER, COMPILE))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("stage", "mode"), WORKLOADS, ids=[f"stage{stage}-{mode}" for stage, mode in WORKLOADS])
def test_fuse(
    request: pytest.FixtureRequest,
    benchmark,
    stage: int,
    mode: str,
    batch: int,
    dtype: torch.dtype,
    variant: str,
    device: torch.device,
    bandwidth: Bandwidth,
) -> None:
    tiny = request.config.getoption("--tiny")
    case = FuseCase(TINY if tiny else CLIP_L_336, batch, dtype, stage, mode)
    benchmark.group = case.name
    torch.compiler.reset()  # each case compiles the same function for other shapes
    count = 2 if tiny else num_input_sets(case.input_bytes, device)
    sets = [make_inputs(case, device, SEED + index) for index in range(count)]
    closures = checked_closures(case, fuse_variant(case, variant), sets)

    if benchmark.disabled:  # --benchmark-disable: the check above is all that there is to do
        benchmark(closures[0])
        return
    rotation = itertools.cycle(closures)

    def call() -> None:
        next(rotation)()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    call()
    begin = time.perf_counter()
    call()
    estimate = time.perf_counter() - begin
    rounds = 3 if tiny else max(5, min(100, int(1 / estimate)))  # about a second
    benchmark.pedantic(call, rounds=rounds, warmup_rounds=len(closures))

    traffic = case_traffic(case)
    seconds = benchmark.stats.stats.median
    if device.type == "cuda":  # the wall time above includes launch and synchronisation
        timing = compare({variant: closures}, device)[variant]
        seconds = timing.median_s
        benchmark.extra_info["device_time"] = timing.as_dict()
    peak = peak_bytes(closures[0], device)
    benchmark.extra_info |= describe(case) | {
        "variant": variant,
        "tiny": tiny,
        "input_sets": count,
        "floor_bytes": traffic.bytes,
        "gb_per_s": traffic.bytes / seconds / 1e9,
        "copy_gb_per_s": bandwidth.bytes_per_s / 1e9,
        "share_of_copy": traffic.bytes / seconds / bandwidth.bytes_per_s,
        "peak_bytes": peak,
        "peak_maps": peak / case.map_bytes,
        "memory_method": method(device),
    }
