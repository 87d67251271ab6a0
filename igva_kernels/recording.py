"""What launching a call again takes: what it launched, written down, and new memory for its outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import local
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Launch = TypeVar("Launch")

_guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)


class Recorder(local, Generic[Launch]):
    """Keeps what is launched while somebody records, for each thread by itself."""

    def __init__(self) -> None:
        self._launches: list[Launch] | None = None

    @property
    def is_recording(self) -> bool:
        """Whether anybody wants to know."""
        return self._launches is not None

    def add(self, launch: Launch) -> None:
        """Write a launch down where somebody records."""
        if self._launches is not None:
            self._launches.append(launch)

    @contextmanager
    def recording(self) -> Iterator[list[Launch]]:
        """The launches that this thread makes meanwhile."""
        launches: list[Launch] = []
        self._launches = launches
        try:
            yield launches
        finally:
            self._launches = None


def allocation_on(device: torch.device) -> Callable[[Any, Any, torch.dtype], Tensor]:
    """``empty(shape, strides, dtype)`` on the current device of this type.

    The one that torch.compile's own code calls takes a quarter of the time of ``torch.empty``. It is private to torch.
    """
    found = getattr(_guards, f"_empty_strided_{device.type}", None)
    return found or (lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device=device))
