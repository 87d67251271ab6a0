"""Measuring variants of one computation: check all, time the right ones in alternating rounds, record each."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from .bandwidth import make_copy_of_size
from .check import WrongResult
from .context import Context
from .memory import peak_bytes
from .record import loses_device
from .timing import Closure, Timing, compare, cuda_graph_time, latency, num_input_sets

Prepare = Callable[[], Sequence[Closure]]
"""Checks a variant and returns one closure per set of inputs; raises what is wrong with it."""

BASELINE = "official eager"

COPY, COPY_OF_SAME_SIZE = "copy", "copy of the same size"
"""The names under which the copies take part in the rounds of a case."""


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
    """Record one case per variant that the recorder wants.

    Args:
        name, parameters: of the computation; the variant's name is added to both.
        variants: how to prepare each. One that cannot be prepared is recorded as an error and is not timed.
        floor_bytes: bytes that the computation must move; gives GB/s and the share of the bandwidth of two copies, a large one
            and one of as many bytes, whose rounds alternate with those of the variants.
        map_bytes: gives the peak memory in maps.
        predicted_s: for some variants the time that :mod:`benchmarks.predict` gives, put beside the measured one.
        with_latency: measure the wall time of a single call as well.
        with_graph: on CUDA, measure the replay of a CUDA graph as well.

    Raises:
        DeviceLost: an error has left the device unusable to this process; it is recorded as that of a variant.
    """
    recorder, device = context.recorder, context.device
    with_graph = with_graph and device.type == "cuda"
    suffixes = ("", GRAPH) if with_graph else ("",)
    variants = {
        variant: prepare
        for variant, prepare in variants.items()
        if any(recorder.chosen(f"{name}: {variant}{suffix}") for suffix in suffixes)
    }
    if not variants:
        return
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
                if loses_device(error):  # nothing can be timed after it: the case below says what happened
                    variants, ready = {variant: prepare}, {}
                    break
    timings: dict[str, Timing] = {}
    same_size = 0
    try:
        copies: dict[str, Sequence[Closure]] = {}
        if floor_bytes and ready:
            small = make_copy_of_size(device, floor_bytes)
            same_size = small.bytes
            copies = {COPY: context.copy.closures, COPY_OF_SAME_SIZE: small.closures}
        timings = compare({**ready, **copies}, device, seconds=context.seconds, rounds=context.rounds)
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
            of_same_size = timing.times_faster_than(timings[COPY_OF_SAME_SIZE])
            found["share_of_copy_of_same_size"] = floor_bytes / same_size * of_same_size
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
    if with_graph:  # cases of their own: what cannot be captured still has its other figures
        for variant, closures in ready.items():
            labels = parameters | {"variant": variant, "operation": f"CUDA graph of {name.split()[0]}"}
            recorder.case(f"{name}: {variant}{GRAPH}", labels, partial(_graph_metrics, closures), begun=begun)
    release(device)  # the next case has other sizes


GRAPH = ": CUDA graph"
"""What the name of a graph's case ends with."""


def release(device: torch.device) -> None:
    """Give the memory of what nobody holds any more back to the card."""
    if device.type == "cuda":
        gc.collect()  # models and tracebacks hold themselves in cycles
        torch.cuda.empty_cache()


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
