"""The part ``tests``: what pytest says of each test becomes cases of the record, also where it is broken off."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.context import Context
from benchmarks.machine import ROOT
from benchmarks.parts.tests import run_folder

WITH_XDIST = pytest.mark.skipif(importlib.util.find_spec("xdist") is None, reason="needs pytest-xdist")
PROCESSES = [1, pytest.param(2, marks=[WITH_XDIST, pytest.mark.slow])]


def run(context: Context, folder: Path, processes: int = 1, seconds: float = 60) -> dict[str, dict]:
    """The cases by the last part of their names."""
    run_folder(context, folder, processes=processes, seconds=seconds)
    return {case["name"].removeprefix("pytest ").rsplit("/", 1)[-1]: case for case in context.recorder.document["cases"]}


def write(folder: Path, name: str, body: str) -> None:
    (folder / f"test_{name}.py").write_text(body)


@pytest.mark.parametrize("processes", PROCESSES)
def test_every_test_is_recorded_with_its_outcome_and_seconds(context: Context, tmp_path: Path, processes: int) -> None:
    write(tmp_path, "a", "import pytest\ndef test_a(): pass\n@pytest.mark.skip(reason='no disk')\ndef test_b(): pass\n")
    write(tmp_path, "b", "def test_c(): pass\ndef test_d(): assert 1 == 2\n")
    cases = run(context, tmp_path, processes)
    assert cases.keys() == {tmp_path.name, "test_a.py", "test_b.py", "test_b.py::test_d"}
    assert "1 of 4 tests failed" in cases[tmp_path.name]["error"]
    metrics = cases["test_a.py"]["metrics"]
    assert (metrics["passed"], metrics["failed"], metrics["skipped"]) == (1, 0, 1)
    (a, b) = metrics["tests"].values()
    assert a["outcome"] == "passed" and a["seconds"] >= 0
    assert b["outcome"] == "skipped" and "no disk" in b["reason"]
    assert cases["test_b.py"]["metrics"]["failed"] == 1
    assert cases["test_b.py::test_d"]["status"] == "error" and "assert 1 == 2" in cases["test_b.py::test_d"]["error"]


def test_counts_of_a_run_in_which_all_passed(context: Context, tmp_path: Path) -> None:
    write(tmp_path, "a", "def test_a(): pass\n")
    metrics = run(context, tmp_path)[tmp_path.name]["metrics"]
    assert (metrics["passed"], metrics["failed"], metrics["skipped"]) == (1, 0, 0) and "tests" not in metrics


@pytest.mark.parametrize(
    ("processes", "seconds"), [(1, 9), pytest.param(2, 20, marks=[WITH_XDIST, pytest.mark.slow])], ids=["one", "side by side"]
)
def test_what_ended_is_kept_when_the_time_is_up(context: Context, tmp_path: Path, processes: int, seconds: int) -> None:
    write(tmp_path, "a", "def test_a(): pass\ndef test_b(): assert 1 == 2\n")
    write(tmp_path, "z", "import threading\ndef test_z(): threading.Event().wait(600)\n")
    cases = run(context, tmp_path, processes, seconds)
    assert f"did not end within {seconds} s; 2 of 3 tests ended: 1 passed, 1 failed" in cases[tmp_path.name]["error"]
    assert cases["test_a.py"]["metrics"]["passed"] == 1 and "1 == 2" in cases["test_a.py::test_b"]["error"]


@WITH_XDIST
@pytest.mark.slow
def test_a_process_that_dies_costs_its_test(context: Context, tmp_path: Path) -> None:
    write(tmp_path, "a", "import os\ndef test_a(): os._exit(3)\n")
    write(tmp_path, "b", "def test_b(): pass\n")
    cases = run(context, tmp_path, processes=2)
    assert "crashed" in cases["test_a.py::test_a"]["error"]
    assert cases["test_b.py"]["metrics"]["passed"] == 1


def test_an_error_that_lost_the_device_to_a_test_does_not_end_the_part(context: Context, tmp_path: Path) -> None:
    write(tmp_path, "a", "def test_a(): raise RuntimeError('CUDA error: an illegal memory access')\ndef test_b(): assert 0\n")
    cases = run(context, tmp_path)
    assert cases["test_a.py::test_a"]["status"] == cases["test_a.py::test_b"]["status"] == "error"


@pytest.mark.parametrize("processes", PROCESSES)
def test_a_broken_file_is_an_error(context: Context, tmp_path: Path, processes: int) -> None:
    write(tmp_path, "a", "import no_such_module\n")
    cases = run(context, tmp_path, processes)
    assert cases[tmp_path.name]["status"] == "error"
    assert any("no_such_module" in case["error"] for case in cases.values() if case["status"] == "error")


def test_nothing_run_on_a_gpu_is_an_error(context: Context, tmp_path: Path) -> None:
    write(tmp_path, "a", "import pytest\n@pytest.mark.skip\ndef test_b(): pass\n")
    context.device = torch.device("cuda")
    assert "no test ran" in run(context, tmp_path)[tmp_path.name]["error"]


def test_the_tests_of_the_gpu_can_be_collected() -> None:
    """Without a GPU nothing of that folder runs, and a test that cannot even be imported would show on a card only."""
    files = sorted(file.relative_to(ROOT).as_posix() for file in (ROOT / "tests" / "gpu").glob("test_*.py"))
    # By name: the folder's conftest.py leaves them out where there is no GPU, but not what is asked for.
    command = [sys.executable, "-m", "pytest", *files, "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert all(f"{file}::" in done.stdout for file in files), f"a file of {files} has no test"
