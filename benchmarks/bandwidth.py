"""The ceilings of the machine, measured in the same run as what is compared with them: copy bandwidth and matrix products."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import partial

import torch

from .timing import CACHE_MULTIPLE, MAX_SETS, Closure, Timing, cache_bytes, compare


@dataclass(frozen=True)
class Bandwidth:
    """A measured copy.

    Args:
        bytes_per_s: bytes read plus bytes written, per second, at the median.
        bytes_per_copy: bytes read plus written by one copy.
        timing: of one copy.
    """

    bytes_per_s: float
    bytes_per_copy: int
    timing: Timing

    def as_dict(self) -> dict:
        return asdict(self) | {"timing": self.timing.as_dict()}


@dataclass(frozen=True)
class Copy:
    """``Tensor.copy_`` over rotating pairs of buffers that exceed the last-level cache.

    Args:
        closures: one a pair.
        bytes: read plus written by one of them.
    """

    closures: list[Closure]
    bytes: int


LARGE_BUFFER = 1 << 30
"""Bytes of a buffer on a card. Start and tail of a launch, 2 to 3 µs, are 5 % of a copy of 90 MB on an H200, 0.5 % of this."""

LARGE_SHARE = 32
"""A smaller card gives at most this part of its memory for one of the four buffers."""


def make_copy(device: torch.device, *, tiny: bool = False) -> Copy:
    """The copy whose bandwidth is the ceiling of what only moves memory: so large that its launch does not count.

    Args:
        device: CPU or CUDA.
        tiny: buffers of 64 KiB, to run the code and not to measure.
    """
    pairs = 2
    if tiny:
        buffer_bytes = 64 << 10
    elif device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        buffer_bytes = max(CACHE_MULTIPLE * cache_bytes(device), min(LARGE_BUFFER, memory // LARGE_SHARE))
    else:
        buffer_bytes = max(64 << 20, CACHE_MULTIPLE * cache_bytes(device) // pairs)
    return _copy_of(device, buffer_bytes, pairs)


def make_copy_of_size(device: torch.device, num_bytes: int) -> Copy:
    """A copy that reads and writes ``num_bytes`` together, as a case does: its start and its tail weigh what the case's do."""
    pairs = min(MAX_SETS, max(1, math.ceil(CACHE_MULTIPLE * cache_bytes(device) / num_bytes)))
    return _copy_of(device, num_bytes // 2, pairs)


def _copy_of(device: torch.device, buffer_bytes: int, pairs: int) -> Copy:
    elements = max(1, buffer_bytes // torch.float32.itemsize)
    sources = [torch.randn(elements, device=device) for _ in range(pairs)]
    targets = [torch.empty_like(source) for source in sources]
    closures: list[Closure] = [partial(target.copy_, source) for target, source in zip(targets, sources, strict=True)]
    return Copy(closures, 2 * elements * torch.float32.itemsize)


def copy_bandwidth(copy: Copy, device: torch.device, *, seconds: float = 1.0) -> Bandwidth:
    """Bandwidth of a copy, by itself.

    Args:
        copy: :func:`make_copy`.
        device: where it runs.
        seconds: time to spend.
    """
    timing = compare({"copy": copy.closures}, device, seconds=seconds)["copy"]
    return Bandwidth(copy.bytes / timing.median_s, copy.bytes, timing)


def matmul_flops(device: torch.device, dtype: torch.dtype, *, size: int, seconds: float = 1.0) -> float:
    """FLOP/s of a square matrix product, 2 * size^3 operations."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timing = compare({"matmul": [lambda: left @ right]}, device, seconds=seconds)["matmul"]
    return 2 * size**3 / timing.median_s
