"""Timing that does not flatter: cold caches, interleaved variants, medians with quantiles, device time apart from host time.

A variant is given as one closure per set of inputs. One round runs all of them once; with enough sets to exceed the last-level
cache several times (:func:`num_input_sets`) no call finds its inputs there. Rounds of different variants alternate, so that a
drift of the clock hits all of them alike.

On CUDA a round is timed by one pair of events around all its calls, after a busy kernel that lets the host run ahead: an event
pair around each single launch of an idle stream would time the host's enqueueing instead (Dao-AILab/quack, benchmark notes).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

Closure = Callable[[], object]

CACHE_MULTIPLE = 3
"""Bytes of one round over bytes of the last-level cache; with LRU-like replacement 1 is enough, 3 leaves no doubt."""

MAX_SETS = 8
"""More sets would exceed the launch queue of CUDA (about 1024 launches) with the peers' hundred launches a call."""


@dataclass(frozen=True)
class Timing:
    """Seconds per call.

    Args:
        median_s, low_s, high_s: the median and the 20 % and 80 % quantiles over the rounds.
        rounds: how many rounds.
        calls: calls in one round (input sets).
        clock: "wall" (CPU) or "cuda_events".
        host_s: on CUDA, the median time in which the host enqueued one call.
        samples_s: of the single rounds, in order; not written to result files.
    """

    median_s: float
    low_s: float
    high_s: float
    rounds: int
    calls: int
    clock: str
    host_s: float | None = None
    samples_s: tuple[float, ...] = field(default=(), repr=False)

    def as_dict(self) -> dict[str, float | int | str]:
        return {key: value for key, value in asdict(self).items() if value is not None and key != "samples_s"}

    def times_faster_than(self, other: Timing) -> float:
        """The median over the rounds that both took part in of the ratio within the round.

        The speed of a shared machine drifts between rounds by more than most differences; within one it hits both.
        """
        return quantiles([theirs / ours for ours, theirs in zip(self.samples_s, other.samples_s, strict=True)])[0]


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache: L2 of the GPU, L3 (or the largest listed) of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [
        int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}[text[-1]]
        for text in (path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
        if text[:-1].isdigit() and text[-1] in "KM"
    ]
    return max(sizes, default=32 << 20)  # a system that does not say: 32 MiB, common for server parts


def num_input_sets(bytes_per_set: int, device: torch.device) -> int:
    """Sets of inputs that together exceed the cache :data:`CACHE_MULTIPLE` times; at least 2, at most :data:`MAX_SETS`."""
    return min(MAX_SETS, max(2, math.ceil(CACHE_MULTIPLE * cache_bytes(device) / max(1, bytes_per_set))))


def compare(
    variants: Mapping[str, Sequence[Closure]],
    device: torch.device,
    *,
    seconds: float = 1.0,
    rounds: int | None = None,
    min_rounds: int = 5,
    max_rounds: int = 100,
) -> dict[str, Timing]:
    """Time several variants in alternating rounds.

    Args:
        variants: for each name its closures, one per set of inputs.
        device: where they run; the clock is chosen by it.
        seconds: time to spend on the timed rounds of each variant, about.
        rounds: the number of rounds, whatever time they take; None: what fits into ``seconds``.
        min_rounds, max_rounds: bounds on that number.

    Returns:
        For each name its :class:`Timing`. Every variant is called twice before the clock starts (compilation, allocator).
    """
    run_round = _cuda_round if device.type == "cuda" else _cpu_round
    estimate = 0.0
    for closures in variants.values():
        run_round(closures)
        estimate = max(estimate, run_round(closures)[0] * len(closures))
    if rounds is None:
        rounds = min(max_rounds, max(min_rounds, int(seconds / max(estimate, 1e-9))))
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, closures in variants.items():
            samples[name].append(run_round(closures))
    clock = "cuda_events" if device.type == "cuda" else "wall"
    timings = {}
    for name, closures in variants.items():
        taken = tuple(device_s for device_s, _ in samples[name])
        median, low, high = quantiles(taken)
        host = quantiles([host_s for _, host_s in samples[name]])[0] if device.type == "cuda" else None
        timings[name] = Timing(median, low, high, rounds, len(closures), clock, host, taken)
    return timings


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20 % and 80 % quantile (linear interpolation)."""
    values = torch.tensor(samples, dtype=torch.float64)
    median, low, high = torch.quantile(values, torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)).tolist()
    return median, low, high


def _cpu_round(closures: Sequence[Closure]) -> tuple[float, float]:
    """Wall seconds per call, twice.

    An untimed call goes first: what the variant before left in the caches to be written back would else be charged to this one,
    up to a millisecond behind a copy. On CUDA the first, untimed pass does the same.
    """
    closures[-1]()
    start = time.perf_counter()
    for closure in closures:
        closure()
    per_call = (time.perf_counter() - start) / len(closures)
    return per_call, per_call


HEAD_START_S = 2e-3
"""Least head start of the host on CUDA, longer than one slow launch."""

BUSY_CYCLES_PER_S = 2.0e9
"""Clock of the fastest current data-centre parts (1.98 GHz); a slower clock only lengthens the head start."""


def _cuda_round(closures: Sequence[Closure]) -> tuple[float, float]:
    """Device and host seconds per call. The head start is the host time of a first, untimed pass over the same closures."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for closure in closures:
        closure()
    head_start = max(HEAD_START_S, 1.2 * (time.perf_counter() - begin))
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(int(head_start * BUSY_CYCLES_PER_S))
    start.record()
    begin = time.perf_counter()
    for closure in closures:
        closure()
    host = (time.perf_counter() - begin) / len(closures)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e-3 / len(closures), host


def latency(closures: Sequence[Closure], device: torch.device, *, seconds: float = 1.0, max_rounds: int = 200) -> Timing:
    """Wall seconds of one call on an idle device, from the call to the finished result: what one request waits."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    samples: list[float] = []
    closures[0]()
    closures[0]()
    deadline = time.perf_counter() + seconds
    while len(samples) < 5 or (time.perf_counter() < deadline and len(samples) < max_rounds):
        closure = closures[len(samples) % len(closures)]
        wait()
        begin = time.perf_counter()
        closure()
        wait()
        samples.append(time.perf_counter() - begin)
    median, low, high = quantiles(samples)
    return Timing(median, low, high, len(samples), 1, "wall")


def cuda_graph_time(closures: Sequence[Closure], *, replays: int = 30) -> Timing:
    """Seconds per call when one round of all closures is captured in a CUDA graph and replayed.

    Raises:
        RuntimeError: the closures cannot be captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # first calls allocate and compile; capture allows neither
        for _ in range(3):
            for closure in closures:
                closure()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for closure in closures:
            closure()
    graph.replay()
    samples = []
    for _ in range(replays):
        torch.cuda.synchronize()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(int(HEAD_START_S * BUSY_CYCLES_PER_S))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end) * 1e-3 / len(closures))
    median, low, high = quantiles(samples)
    return Timing(median, low, high, replays, len(closures), "cuda_events")
