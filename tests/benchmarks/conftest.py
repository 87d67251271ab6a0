"""Shared by the tests of the benchmarks: a recorder that keeps its lines, and a context with tiny sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.context import Context
from benchmarks.record import Recorder


@pytest.fixture
def lines() -> list[str]:
    """What the recorder printed."""
    return []


@pytest.fixture
def recorder(tmp_path: Path, lines: list[str]) -> Recorder:
    return Recorder(tmp_path / "result.json", "kernels", {"device": "cpu"}, {"tiny": True}, budget_s=600, show=lines.append)


@pytest.fixture
def context(recorder: Recorder) -> Context:
    return Context(torch.device("cpu"), tiny=True, seconds=0.001, recorder=recorder)
