"""Uninitialised memory that shows itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor

GUARD = 64
"""Elements before and behind each allocation; a multiple of 16 bytes in every dtype, so that alignment stays what it is."""


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """What Python code allocates with ``empty`` holds NaN until it is written, and lies between NaNs that must stay.

    Raises:
        AssertionError: at the end, if something was written before or behind an allocation.
    """
    buffers: list[Tensor] = []

    def poisoned(allocate, *args, **kwargs) -> Tensor:
        tensor = allocate(*args, **kwargs)
        if type(tensor) is not Tensor or not tensor.is_floating_point():
            return tensor
        if not tensor.is_contiguous():
            return tensor.fill_(float("nan"))
        buffer = torch.full((tensor.numel() + 2 * GUARD,), float("nan"), dtype=tensor.dtype, device=tensor.device)
        buffers.append(buffer)
        # not a view: what the library returns is the base of its storage in production as well
        return tensor.set_(buffer.untyped_storage(), GUARD, tensor.shape)

    guards = torch._C._dynamo.guards  # with what calls that repeat allocate, see igva_kernels/impl/triton/replay.py
    with ExitStack() as stack:
        for owner, name in (
            (guards, "_empty_strided_cpu"),
            (guards, "_empty_strided_cuda"),
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (Tensor, "new_empty"),
            (Tensor, "new_empty_strided"),
        ):
            allocate = getattr(owner, name)
            stack.enter_context(
                mock.patch.object(owner, name, lambda *args, _allocate=allocate, **kwargs: poisoned(_allocate, *args, **kwargs))
            )
        yield
    for buffer in buffers:
        assert buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all(), "written outside of an allocation"
