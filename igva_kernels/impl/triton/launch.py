"""From shapes to launch parameters: tiles, warps, strides, the device.

Everything here follows from shapes and dtypes alone. There is no autotuning: it would run kernels at the first call of
every new shape, inside CUDA graph captures too, and a tile that depends on a race of timings would make dL/dw depend on
it. Nothing copies between host and device, nothing synchronises.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ACCESS_BYTES = 16
"""The widest load of one thread. The mix is bound by memory, and narrower accesses cost bandwidth."""

THREADS = 128
"""Threads of a program. The forward of IGVA takes 102 registers on sm_90 (tests/aot/budgets.json): 4 programs fit an
SM, and a dozen loads of 16 bytes in flight in each of their threads are 96 KB, where 20 KB hide the latency of memory.
Larger programs gain nothing and make the last wave coarser."""

MAX_THREADS = 1024
"""Threads of a program at most; CUDA and ROCm allow no more."""

WARP = 64 if torch.version.hip else 32
"""Threads of a warp. Twice the warps on AMD would halve the elements of a thread, and so the width of its accesses."""


@dataclass(frozen=True)
class Tile:
    """What one program works on.

    Attributes:
        size: elements from one tile to the next.
        block: elements that the program holds, a power of two; the lanes from ``size`` on are masked off.
        vec: elements of one 128-bit access.
        num_warps: so that a thread holds ``vec`` elements.
        width: D.
    """

    size: int
    block: int
    vec: int
    num_warps: int
    width: int

    def count(self, num_rows: int) -> int:
        """Tiles of one image with ``num_rows`` rows."""
        return -(-num_rows * self.width // self.size)


def elements_per_access(dtype: torch.dtype) -> int:
    """VEC: 8 elements of a 16-bit type, 4 of float32, 2 of float64."""
    return ACCESS_BYTES // dtype.itemsize


def warps_of(threads: int) -> int:
    """The warps that these threads make, at least one."""
    return max(1, threads // WARP)


def flat_tile(dtype: torch.dtype, width: int) -> Tile:
    """A tile of consecutive elements that knows nothing of rows: no lane is idle, whatever D is."""
    vec = elements_per_access(dtype)
    return Tile(size=vec * THREADS, block=vec * THREADS, vec=vec, num_warps=warps_of(THREADS), width=width)


def narrow_tile(dtype: torch.dtype, width: int) -> Tile:
    """A flat tile of one warp, where few rows would make too few programs of the usual size."""
    vec = elements_per_access(dtype)
    return Tile(size=vec * WARP, block=vec * WARP, vec=vec, num_warps=1, width=width)


def row_tile(dtype: torch.dtype, width: int) -> Tile:
    """A tile of one row, for weights per token. A D that is no power of two leaves lanes idle."""
    vec = elements_per_access(dtype)
    block = max(triton.next_power_of_2(width), vec * WARP)
    return Tile(size=width, block=block, vec=vec, num_warps=warps_of(min(block // vec, MAX_THREADS)), width=width)


def mix_tile(dtype: torch.dtype, width: int, weights: Tensor | None) -> Tile:
    """The tile in which one row of weights holds."""
    return row_tile(dtype, width) if weights is not None and weights.ndim == 3 else flat_tile(dtype, width)


def sharing_of(weights: Tensor | None) -> str:
    """Who has a row of weights: ``"all"`` tokens for (K,), an ``"image"`` for (B, K), a ``"token"`` for (B, N, K)."""
    return ("all", "image", "token")[0 if weights is None else weights.ndim - 1]


def accumulator_of(dtype: torch.dtype) -> tl.dtype:
    """The type of all arithmetic: float32, for float64 states float64."""
    return tl.float64 if dtype == torch.float64 else tl.float32


class Streams(NamedTuple):
    """The states as a kernel takes them.

    Attributes:
        states: num_sources x (B, T, D).
        batch_strides: the distinct batch strides, in units of VEC elements; one, unless copies and means are mixed.
        stride_of: per state, the index of its stride.
    """

    states: tuple[Tensor, ...]
    batch_strides: tuple[int, ...]
    stride_of: tuple[int, ...]

    @classmethod
    def of(cls, states: Sequence[Tensor]) -> Streams:
        """The states with their strides collected, once ``check_supported`` has passed."""
        if states[0].shape[0] == 1:  # nothing steps over the batch, and torch may report any stride
            return cls(tuple(states), (0,), (0,) * len(states))
        vec = elements_per_access(states[0].dtype)
        strides = [state.stride(0) for state in states]
        if strides.count(strides[0]) == len(strides):
            return cls(tuple(states), (strides[0] // vec,), (0,) * len(states))
        distinct = list(dict.fromkeys(strides))
        return cls(tuple(states), tuple(stride // vec for stride in distinct), tuple(map(distinct.index, strides)))


def stride_over(tensor: Tensor, dim: int) -> int:
    """The stride over a dimension, or 0 if it has one entry: nothing steps over it, and torch may report anything."""
    return tensor.stride(dim) if tensor.shape[dim] > 1 else 0


def device_of(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be that of the tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
