"""What a call launches, written down for those who want to launch it again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import local
from typing import Generic, TypeVar

Launch = TypeVar("Launch")


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
