"""Options and ceilings of the pytest-benchmark suite: ``python -m pytest benchmarks --help`` lists them."""

from __future__ import annotations

import pytest
import torch

from benchmarks.bandwidth import Bandwidth, copy_bandwidth, make_copy
from benchmarks.machine import describe


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fusion benchmarks")
    group.addoption("--device", choices=("cuda", "cpu"), help="default: cuda where there is one, else cpu")
    group.addoption("--large", action="store_true", help="B = 16 on a CPU as well (10 GB of memory)")
    group.addoption("--tiny", action="store_true", help="tiny sizes: runs the code, measures nothing")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    name = request.config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.exit("--device cuda: torch finds no GPU here", returncode=2)
    return torch.device(name)


@pytest.fixture(scope="session")
def bandwidth(request: pytest.FixtureRequest, device: torch.device) -> Bandwidth:
    """Copy bandwidth, measured in this run."""
    return copy_bandwidth(make_copy(device, tiny=request.config.getoption("--tiny")), device)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["fusion"] = describe(torch.device(config.getoption("--device") or "cpu"))
