"""Ahead-of-time compilation of the kernels: no GPU, no interpreter.

``pytest tests/aot --update-budgets`` writes the measured numbers to ``budgets.json``, for review like any change.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BUDGETS = Path(__file__).with_name("budgets.json")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-budgets", action="store_true", help="write the measured numbers to tests/aot/budgets.json")


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
    """The recorded numbers, checked or, with ``--update-budgets``, replaced."""

    def __init__(self, recorded: dict[str, dict[str, Any]], update: bool) -> None:
        self.recorded, self.update = recorded, update

    def check(self, key: str, measured: dict[str, Any]) -> None:
        """Accesses exactly as recorded, registers no more than recorded."""
        if self.update:
            self.recorded[key] = measured
            return
        if key not in self.recorded:
            pytest.fail(f"budgets.json has no entry {key!r}; measured {measured}; run with --update-budgets and review")
        budget = dict(self.recorded[key])
        registers = budget.pop("registers")
        assert measured["registers"] <= registers, f"{key}: {measured['registers']} registers, budget {registers}"
        rest = {name: value for name, value in measured.items() if name != "registers"}
        assert rest == budget, f"{key}: measured {rest}, budget {budget}"


@pytest.fixture(scope="session")
def budgets(request: pytest.FixtureRequest):
    update = request.config.getoption("--update-budgets", default=False)
    collected = Budgets(json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}, update)
    yield collected
    if update:
        partial = BUDGETS.with_suffix(".tmp")
        lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(collected.recorded.items()))
        partial.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        os.replace(partial, BUDGETS)
