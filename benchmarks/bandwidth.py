"""The ceilings of the machine, measured in the same run as what is compared with them: copy bandwidth and matrix products."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial

import torch

from .timing import CACHE_MULTIPLE, Closure, Timing, cache_bytes, compare


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


def make_copy(device: torch.device, *, tiny: bool = False) -> Copy:
    """The copy whose bandwidth is the ceiling of what only moves memory.

    Args:
        device: CPU or CUDA.
        tiny: buffers of 64 KiB, to run the code and not to measure.
    """
    pairs = 2
    buffer_bytes = 64 << 10 if tiny else max(64 << 20, CACHE_MULTIPLE * cache_bytes(device) // pairs)
    elements = buffer_bytes // torch.float32.itemsize
    sources = [torch.randn(elements, device=device) for _ in range(pairs)]
    targets = [torch.empty_like(source) for source in sources]
    closures: list[Closure] = [partial(target.copy_, source) for target, source in zip(targets, sources, strict=True)]
    return Copy(closures, 2 * elements * torch.float32.itemsize)


def copy_bandwidth(device: torch.device, *, tiny: bool = False, seconds: float = 1.0) -> Bandwidth:
    """Bandwidth of :func:`make_copy`, by itself.

    Args:
        device, tiny: as there.
        seconds: time to spend.
    """
    copy = make_copy(device, tiny=tiny)
    timing = compare({"copy": copy.closures}, device, seconds=seconds)["copy"]
    return Bandwidth(copy.bytes / timing.median_s, copy.bytes, timing)


def matmul_flops(device: torch.device, dtype: torch.dtype, *, size: int, seconds: float = 1.0) -> float:
    """FLOP/s of a square matrix product, 2 * size^3 operations."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timing = compare({"matmul": [lambda: left @ right]}, device, seconds=seconds)["matmul"]
    return 2 * size**3 / timing.median_s
