"""Measuring variants of one computation: check all, time the right ones in alternating rounds, record each."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from .check import WrongResult
from .context import Context
from .memory import peak_bytes
from .timing import Closure, Timing, compare, cuda_graph_time, latency, num_input_sets

Prepare = Callable[[], Sequence[Closure]]
"""Checks a variant and returns one closure per set of inputs; raises what is wrong with it."""

BASELINE = "official eager"

COPY = "copy"
"""The name under which the copy takes part in the rounds of a case."""


def measure_variants(
    context: Context,
    name: str,
    parameters: dict,
    variants: Mapping[str, Prepare],
    *,
    floor_bytes: int | None = None,
    map_bytes: int | None = None,
    predicted_s: Mapping[str, float | None] | None = None,
    with_latency: bool = False,
    with_graph: bool = False,
) -> None:
    """Record one case per variant.

    Args:
        name, parameters: of the computation; the variant's name is added to both.
        variants: how to prepare each. One that cannot be prepared is recorded as an error and is not timed.
        floor_bytes: bytes that the computation must move; gives GB/s and the share of the bandwidth of a copy, whose rounds
            alternate with those of the variants.
        map_bytes: gives the peak memory in maps.
        predicted_s: for some variants the time that :mod:`benchmarks.predict` gives, put beside the measured one.
        with_latency: measure the wall time of a single call as well.
        with_graph: on CUDA, measure the replay of a CUDA graph as well.
    """
    recorder, device = context.recorder, context.device
    ready: dict[str, Sequence[Closure]] = {}
    failed: dict[str, Exception] = {}
    begun = not recorder.spent
    if begun:
        for variant, prepare in variants.items():
            try:
                ready[variant] = prepare()
            except Exception as error:
                traceback.clear_frames(error.__traceback__)  # they hold tensors, which may be why memory ran out
                failed[variant] = error
    timings: dict[str, Timing] = {}
    try:
        copy = {COPY: context.copy.closures} if floor_bytes and ready else {}
        timings = compare({**ready, **copy}, device, seconds=context.seconds)
    except Exception as error:  # the rounds alternate, so nobody has a figure then
        traceback.clear_frames(error.__traceback__)
        failed |= dict.fromkeys(ready, error)
        ready = {}

    def metrics(variant: str) -> dict:
        if variant in failed:
            raise failed[variant]
        timing = timings[variant]
        found = timing.as_dict() | {"peak_bytes": peak_bytes(ready[variant][0], device)}
        if map_bytes:
            found["peak_maps"] = found["peak_bytes"] / map_bytes
        if floor_bytes:
            found["floor_bytes"] = floor_bytes
            found["gb_per_s"] = floor_bytes / timing.median_s / 1e9
            found["copy_gb_per_s"] = context.copy.bytes / timings[COPY].median_s / 1e9
            found["share_of_copy"] = floor_bytes / context.copy.bytes * timing.times_faster_than(timings[COPY])
        if predicted_s and (predicted := predicted_s.get(variant)):
            found["predicted_s"] = predicted
            found["measured_over_predicted"] = timing.median_s / predicted
        if variant != BASELINE and BASELINE in timings:
            found["times_faster_than_official_eager"] = timing.times_faster_than(timings[BASELINE])
        if with_latency:
            found["latency"] = latency(ready[variant], device, seconds=context.seconds).as_dict()
        return found

    for variant in variants:
        measure = partial(metrics, variant)
        recorder.case(f"{name}: {variant}", parameters | {"variant": variant}, measure, begun=begun)
    if with_graph and device.type == "cuda":  # cases of their own: what cannot be captured still has its other figures
        for variant, closures in ready.items():
            labels = parameters | {"variant": variant, "operation": f"CUDA graph of {name.split()[0]}"}
            recorder.case(f"{name}: {variant}: CUDA graph", labels, partial(_graph_metrics, closures), begun=begun)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the next case has other sizes


def _graph_metrics(closures: Sequence[Closure]) -> dict:
    return cuda_graph_time(closures).as_dict()


def require_close(name: str, actual: Tensor, eager: Tensor, exact: Tensor, *, slack: float = 8) -> None:
    """The rule of :mod:`benchmarks.check` for one tensor.

    Args:
        actual, eager: the results of the variant and of the peer, in one dtype.
        exact: the peer's result in float64.
        slack: roundings of the largest value that are allowed beyond twice the peer's error.

    Raises:
        WrongResult: the error is larger.
    """
    if actual.shape != exact.shape:
        raise WrongResult(f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}")
    error = (actual.detach().double() - exact).abs().max().item()
    peer_error = (eager.detach().double() - exact).abs().max().item()
    eps = torch.finfo(eager.dtype).eps
    allowed = 2 * peer_error + slack * eps * exact.abs().max().item()
    if not error <= allowed:
        raise WrongResult(f"{name}: off by {error:.3e}, allowed {allowed:.3e}")


def sets_for(context: Context, bytes_per_set: int) -> int:
    """Input sets of a case: cold caches, or two in a tiny run."""
    return 2 if context.tiny else num_input_sets(bytes_per_set, context.device)
