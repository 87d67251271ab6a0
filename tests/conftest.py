"""Shared by all tests: fixed seeds, and the yardstick for accuracy."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

# The modules of tests/documents as ``documents.NAME``: that folder is on no import path, and tests/model needs them too.
_documents = ModuleType("documents")
_documents.__spec__ = importlib.util.spec_from_loader("documents", loader=None, is_package=True)
_documents.__path__ = [str(Path(__file__).parent / "documents")]
sys.modules.setdefault("documents", _documents)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(20250115)


def _assert_as_exact_as(actual: Tensor, same_dtype: Tensor, exact: Tensor, *, slack: float, what: str = "result") -> None:
    """Every element is no further from the float64 result than torch's own computation in the same dtype, plus a tolerance.

    ``slack`` is in units of the dtype's epsilon times the largest magnitude of the exact result: 1 allows one more rounding.
    """
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)} instead of {tuple(exact.shape)}"
    assert actual.isfinite().all() or not exact.isfinite().all(), f"{what}: not finite"
    if exact.numel() == 0:
        return
    error = (actual.double() - exact.double()).abs()
    allowed = (same_dtype.double() - exact.double()).abs().max() + slack * torch.finfo(actual.dtype).eps * exact.abs().max()
    worst = error.max()
    assert worst <= allowed, f"{what}: error {worst:.3e} against float64, torch's own plus tolerance is {allowed:.3e}"


@pytest.fixture
def assert_as_exact_as() -> Callable[..., None]:
    return _assert_as_exact_as
