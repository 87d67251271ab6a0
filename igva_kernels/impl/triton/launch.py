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
"""Threads of a program of the deformable kernels."""

FLAT_THREADS = 128
"""Threads of a program of a flat tile. The forward of IGVA takes 101 registers on sm_90 (tests/aot/budgets.json): 4 programs
fit an SM, and a dozen loads of 16 bytes in flight in each of their threads are 96 KB, where 20 KB hide the latency of
memory. Larger programs gain nothing and make the last wave coarser."""

ACCESSES = 1
"""Accesses of ACCESS_BYTES that a thread of a flat tile makes to each map."""

EVICT_FIRST = True
"""Whether the states are streamed past L2: the kernel that reads them is the last to do so while they could still be there."""

ROW_REGISTERS = 128
"""Registers that the rows of a row tile may take in a thread, of the 255 that there are: the rest holds the loads in
flight, the weights and the addresses."""

MAX_THREADS = 1024
"""Threads of a program at most; CUDA and ROCm allow no more."""

WARP = 64 if torch.version.hip else 32
"""Threads of a warp. Twice the warps on AMD would halve the elements of a thread, and so the width of its accesses."""


@dataclass(frozen=True)
class Tile:
    """What one program works on at a time.

    Attributes:
        block: elements of the tile, a power of two.
        vec: elements of one 128-bit access of the narrowest type that is read or written.
        num_warps: so that a thread holds ``vec`` elements, or a few times as many.
        width: D.
        pieces: 0 for a flat tile. A row tile is one row, in so many pieces of ``block`` elements, of which the last may be
            part empty.
        evict_first: whether states are read with the hint that nobody reads them again.
    """

    block: int
    vec: int
    num_warps: int
    width: int
    pieces: int = 0
    evict_first: bool = EVICT_FIRST

    def count(self, num_rows: int) -> int:
        """Programs of one image with ``num_rows`` rows."""
        return num_rows if self.pieces else -(-num_rows * self.width // self.block)


def elements_per_access(*dtypes: torch.dtype) -> int:
    """VEC: 8 elements of a 16-bit type, 4 of float32, 2 of float64; of several types, those of the narrowest.

    A thread that holds 8 elements reads or writes a float32 map with two accesses of 128 bits, and a 16-bit map with one.
    """
    return ACCESS_BYTES // min(dtype.itemsize for dtype in dtypes)


def common_access(states: Sequence[Tensor], width: int, *others: torch.dtype) -> int:
    """VEC for states, and maps of ``others``, whose types may differ: float32 means beside copies of a 16-bit tower.

    Where a row or an image of the wider type does not begin at a unit of the narrower, the units are smaller.
    """
    dtypes = {state.dtype for state in states}.union(others)
    vec = elements_per_access(*dtypes)
    if len(dtypes) > 1:
        while width % vec or any(stride_over(state, 0) % vec for state in states):
            vec //= 2
    return vec


def warps_of(threads: int) -> int:
    """The warps that these threads make, at least one."""
    return max(1, threads // WARP)


def flat_tile(vec: int, width: int) -> Tile:
    """A tile of consecutive elements that knows nothing of rows: no lane is idle, whatever D is."""
    return Tile(block=ACCESSES * vec * FLAT_THREADS, vec=vec, num_warps=warps_of(FLAT_THREADS), width=width)


def narrow_tile(vec: int, width: int) -> Tile:
    """A flat tile of one warp, where few rows would make too few programs of the usual size."""
    return Tile(block=vec * WARP, vec=vec, num_warps=1, width=width)


def row_tile(vec: int, width: int, accumulator: torch.dtype, num_rows_held: int) -> Tile:
    """A row of one image, for weights per token and for norms.

    One warp takes the row piece by piece, one access of a thread each: 256 elements of a 16-bit type, so that D = 384 leaves
    a quarter of the lanes idle, 1152 a tenth and 768 or 1024 none, where a block of the next power of two would idle up to
    half. Sums over the row then need no barrier, which no load could be moved across. Rows that would not fit the registers
    of one warp are shared by more.

    Args:
        num_rows_held: rows of the accumulation type that are alive at the same time.
    """
    registers_of_element = num_rows_held * max(1, accumulator.itemsize // 4)
    warps = 1
    while warps < MAX_THREADS // WARP:
        pieces = -(-width // (vec * WARP * warps))
        if pieces == 1 or pieces * vec * registers_of_element <= ROW_REGISTERS:
            break
        warps *= 2
    block = vec * WARP * warps
    return Tile(block=block, vec=vec, num_warps=warps, width=width, pieces=-(-width // block))


NORMALISED_WARPS = 256 // 32
"""Warps of a program at most where a norm follows the mix. Up to 256 threads each may have all of its 255 registers; beyond,
the register file would be divided among more, and rows of ROW_REGISTERS would be spilled."""


def normalised_tile(vec: int, width: int, accumulator: torch.dtype, num_rows_held: int) -> Tile | None:
    """The row of a token for a norm over all of its slots, which wait in registers for the last of them.

    As :func:`row_tile`: VipLlava's five slots of 1024 and the row at hand take two warps. None where they do not fit
    ROW_REGISTERS of a thread in :data:`NORMALISED_WARPS`: 16 rows of a 16-bit type, 32 of float32, of up to 2048 channels, or
    fewer wider ones.
    """
    tile = row_tile(vec, width, accumulator, num_rows_held)
    registers = tile.pieces * vec * num_rows_held * max(1, accumulator.itemsize // 4)
    return tile if registers <= ROW_REGISTERS and tile.num_warps * WARP <= NORMALISED_WARPS * 32 else None


def sharing_of(weights: Tensor | None, indices: Tensor | None = None) -> str:
    """Who has a row of weights: ``"all"`` tokens for (K,), an ``"image"`` for (B, K), a ``"token"`` for (B, N, K); or
    ``"sparse"``, a token with k of them that ``indices`` (B, N, k) name."""
    if indices is not None:
        return "sparse"
    return ("all", "image", "token")[0 if weights is None else weights.ndim - 1]


def accumulation_of(*dtypes: torch.dtype) -> torch.dtype:
    """The type of all arithmetic: float32, or float64 where a state is of that type."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def accumulator_of(*dtypes: torch.dtype) -> tl.dtype:
    """:func:`accumulation_of`, as Triton names it."""
    return tl.float64 if torch.float64 in dtypes else tl.float32


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
    def of(cls, states: Sequence[Tensor], vec: int) -> Streams:
        """The states with their strides collected, once ``check_supported`` has passed."""
        steps = states[0].shape[0] > 1  # else nothing steps over the batch, and torch may report any stride
        strides = [state.stride(0) for state in states]
        distinct = strides[:1] if strides.count(strides[0]) == len(strides) else list(dict.fromkeys(strides))
        stride_of = tuple(map(distinct.index, strides)) if len(distinct) > 1 else (0,) * len(states)
        return cls(tuple(states), tuple(stride // vec if steps else 0 for stride in distinct), stride_of)


def pinning() -> str:
    """How row kernels pin their sums (row_tiles.py, ``pin``): the assembly language, or none for the interpreter."""
    if triton.knobs.runtime.interpret:
        return ""
    return "ptx" if WARP == 32 else "gcn"


def register_limit(registers: int) -> dict[str, int]:
    """The option of a launch that lets ptxas use so many registers a thread; AMD's compiler has no such option."""
    return {"maxnreg": registers} if WARP == 32 else {}


def stride_over(tensor: Tensor, dim: int) -> int:
    """The stride over a dimension, or 0 if it has one entry: nothing steps over it, and torch may report anything."""
    return tensor.stride(dim) if tensor.shape[dim] > 1 else 0


def device_of(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be that of the tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
