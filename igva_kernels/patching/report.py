"""What a patch replaced, what it left, and how to take it back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType, TracebackType
from typing import Any

from torch import nn

from igva_kernels.functional import Implementation

_MARK = "_igva_kernels_patch"


@dataclass(frozen=True)
class Replacement:
    """What a rule offers for a module: a method to put in place of its own.

    Args:
        name: of the method.
        function: takes the module as its first argument, like the method's own function.
        what: what it does now, in a few words.
    """

    name: str
    function: Callable[..., Any]
    what: str


Rule = Callable[[Any, Implementation], Replacement | str | None]
"""Looks at a module: a replacement, why there is none although the module is known, or None for a module that is not known."""


@dataclass(frozen=True)
class Replaced:
    """Args:
    path: of the module in the model; empty for the model itself.
    method: class and name of the method.
    what: what it does now.
    """

    path: str
    method: str
    what: str

    def __str__(self) -> str:
        return f"replaced  {self.path or '(the model)'}: {self.method}: {self.what}"


@dataclass(frozen=True)
class Left:
    """Args:
    path: of the module in the model; empty for the model itself.
    kind: its class.
    reason: why it was left as it is.
    """

    path: str
    kind: str
    reason: str

    def __str__(self) -> str:
        return f"left      {self.path or '(the model)'}: {self.kind}: {self.reason}"


@dataclass
class PatchReport:
    """What :func:`igva_kernels.patch` did. Printed, it is one line an entry; as a context manager it undoes itself."""

    replaced: list[Replaced] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def apply(self, path: str, module: nn.Module, found: Replacement | str) -> None:
        """Put a replacement in place, and enter it."""
        kind = type(module).__name__
        if isinstance(found, str):
            self.left.append(Left(path, kind, found))
            return
        before = module.__dict__.get(found.name)
        if hasattr(before, _MARK):
            self.left.append(Left(path, kind, f"{found.name} is patched already; undo that patch first"))
            return
        method = MethodType(found.function, module)
        found.function.__dict__[_MARK] = True
        object.__setattr__(module, found.name, method)
        self._undo.append(lambda: _restore(module, found.name, before))
        self.replaced.append(Replaced(path, f"{kind}.{found.name}", found.what))

    def undo(self) -> None:
        """Restore every method that was replaced. A second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> PatchReport:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.undo()

    def __str__(self) -> str:
        return "\n".join(map(str, [*self.replaced, *self.left]))


def _restore(module: nn.Module, name: str, before: Any) -> None:
    if before is None:
        module.__dict__.pop(name, None)
    else:
        object.__setattr__(module, name, before)
