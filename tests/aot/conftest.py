"""Ahead-of-time compilation of the kernels: no GPU, no interpreter.

``pytest tests/aot --update-budgets`` writes the measured numbers to the budget files, for review like any change.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BUDGETS = Path(__file__).with_name("budgets.json")
PINNED_TRITON = "3.6.0"
"""The version of constraints.txt, whose numbers the budget files hold; those of another stand beside them."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-budgets", action="store_true", help="write the measured numbers to tests/aot/budgets*.json")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--update-budgets", default=False) and hasattr(config, "workerinput"):
        raise pytest.UsageError("--update-budgets collects the numbers of one process: run it without -n")


@pytest.fixture(scope="session")
def machine_code() -> ModuleType:
    """``machine_code.py`` of this folder, which is on no import path."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.fail("TRITON_INTERPRET is set, so nothing can be compiled: run `pytest tests/aot` in a process of its own")
    spec = importlib.util.spec_from_file_location("machine_code", Path(__file__).with_name("machine_code.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class Budgets:
    """The recorded numbers, checked or, with ``--update-budgets``, replaced.

    Attributes:
        pinned: whether this is the Triton of constraints.txt.
    """

    pinned = importlib.metadata.version("triton") == PINNED_TRITON

    def __init__(self, recorded: dict[str, dict[str, Any]], update: bool) -> None:
        self.recorded, self.update = recorded, update

    def check(self, key: str, measured: dict[str, Any]) -> None:
        """Accesses exactly as recorded, registers no more than recorded."""
        if self.update:
            self.recorded[key] = measured
            return
        if key not in self.recorded:
            pytest.fail(f"no budget for {key!r}; measured {measured}; run with --update-budgets and review")
        budget = dict(self.recorded[key])
        registers = budget.pop("registers")
        assert measured["registers"] <= registers, f"{key}: {measured['registers']} registers, budget {registers}"
        rest = {name: value for name, value in measured.items() if name != "registers"}
        assert rest == budget, f"{key}: measured {rest}, budget {budget}"


def of_this_triton(path: Path) -> Path:
    """``budgets.json`` for the pinned version, ``budgets.triton-3.9.0.json`` for that one."""
    return path if Budgets.pinned else path.with_suffix(f".triton-{importlib.metadata.version('triton')}.json")


@pytest.fixture(scope="module")
def budgets(request: pytest.FixtureRequest):
    """The numbers of ``budgets.json``, or of the file that the test module names as BUDGETS."""
    update = request.config.getoption("--update-budgets", default=False)
    path = of_this_triton(getattr(request.module, "BUDGETS", BUDGETS))
    collected = Budgets(json.loads(path.read_text()) if path.exists() else {}, update)
    yield collected
    if update:
        partial = path.with_name(path.name + ".tmp")
        lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(collected.recorded.items()))
        partial.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        os.replace(partial, path)
