"""The GPU tests of the library, run where the figures come from: figures of wrong kernels are worth nothing."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ..context import Context
from ..machine import ROOT
from ..record import DeviceLost

MEASURES = "pytest tests/gpu: every test by name, passed, failed or skipped, and its seconds."

TIME_LIMIT_S = 450
"""A part has to end within eight minutes. A run that does not end in this time is broken off and an error; the results of the
tests that had ended are kept."""

MAX_PROCESSES = 14
"""Side by side on one card with pytest-xdist. Most of the time goes to the compiler, which uses one core; each process holds a
CUDA context and its test's tensors, a few GB."""

TEST_LIMIT_S = 200
"""For one test with pytest-timeout: a kernel that hangs costs its process, and not the run."""


def run_part(context: Context) -> None:
    """Record one case for the run, one for each file, and one for each test that failed."""
    on_gpu = context.device.type == "cuda"  # else the folder has nothing to run, and says so at once
    run_folder(context, ROOT / "tests" / "gpu", processes=min(MAX_PROCESSES, os.cpu_count() or 1) if on_gpu else 1)


def run_folder(context: Context, folder: Path, *, processes: int = 1, seconds: float = TIME_LIMIT_S) -> None:
    """Run the tests of a folder, and record what came of each.

    A file's case has the outcome and the seconds of each of its tests. A failed test is a case of its own, with its error.
    The run's case is an error where a test failed, where pytest broke off, and where on a GPU no test passed.

    Args:
        processes: how many at a time, where pytest-xdist is installed; else one.
        seconds: after which the run is broken off.
    """
    run = PytestRun()

    def whole() -> dict:
        run.execute(context, folder, processes, seconds)
        return run.judge(on_gpu=context.device.type == "cuda")

    parameters = {"folder": f"tests/{folder.name}", "processes": processes}
    _record(context, f"pytest tests/{folder.name}", parameters, whole)
    for file, tests in run.by_file().items():
        _record(context, f"pytest {file}", {"file": file}, lambda tests=tests: metrics_of(tests))
    for test in run.tests:
        if test["outcome"] == "failed":
            _record(context, test["test"], {"test": test["test"]}, lambda text=test["text"]: _fail(text))


@dataclass
class PytestRun:
    """One process of pytest, and those that it starts.

    Args:
        tests: an entry for each test that ended, see :mod:`benchmarks.finished_tests`.
        collected: how many tests there are; None where pytest did not come so far.
        output: of pytest.
        status: its exit status; None where it was broken off.
        seconds: after which it is broken off.
    """

    tests: list[dict] = field(default_factory=list)
    collected: int | None = None
    output: str = ""
    status: int | None = None
    seconds: float = TIME_LIMIT_S

    def execute(self, context: Context, folder: Path, processes: int, seconds: float) -> None:
        """Run pytest to its end, or until the time is up, and read what ended."""
        self.seconds = seconds
        with tempfile.TemporaryDirectory() as temporary:
            finished = Path(temporary) / "finished.jsonl"
            command = [sys.executable, "-m", "pytest", str(folder), "-q", "--tb=short", "-p", "no:cacheprovider"]
            command += ["-p", "benchmarks.finished_tests", f"--finished-tests={finished}"]
            command += side_by_side(context, processes)
            # A session of its own: the workers are killed with the process that started them.
            with subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            ) as process:
                try:
                    self.output, _ = process.communicate(timeout=seconds)
                    self.status = process.returncode
                except subprocess.TimeoutExpired:
                    pass  # judge() says so, beside what had ended
                finally:
                    with contextlib.suppress(ProcessLookupError):  # the usual case: nothing is left
                        os.killpg(process.pid, signal.SIGKILL)
                if self.status is None:
                    self.output, _ = process.communicate()
            self._read(finished)
        context.recorder.show(self.output.strip()[-4000:])

    def _read(self, finished: Path) -> None:
        if not finished.exists():
            return
        for line in finished.read_text(encoding="utf-8").splitlines(keepends=True):
            if not line.endswith("\n"):
                return  # pytest was killed while it wrote
            entry = json.loads(line)
            if "collected" in entry:
                self.collected = entry["collected"]
            else:
                self.tests.append(entry)

    def judge(self, *, on_gpu: bool) -> dict:
        """Counts of all tests.

        Raises:
            RuntimeError: a test failed, the run broke off, or on a GPU no test passed.
        """
        counts = metrics_of(self.tests)
        said = f"{counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped"
        of_all = "" if self.collected is None else f" of {self.collected}"
        if self.status is None:
            raise RuntimeError(f"pytest did not end within {self.seconds:.0f} s; {len(self.tests)}{of_all} tests ended: {said}")
        if counts["failed"]:
            raise RuntimeError(f"{counts['failed']} of {len(self.tests)} tests failed")
        # 5: no test collected, which is what a folder whose tests skip as a whole may give
        if self.status not in (0, 5):
            raise RuntimeError(f"pytest ended with status {self.status}; {said}:\n{self.output[-4000:]}")
        if on_gpu and not counts["passed"]:
            raise RuntimeError(f"no test ran on this GPU ({said}):\n{self.output[-2000:]}")
        del counts["tests"]  # they stand with their files
        return counts

    def by_file(self) -> dict[str, list[dict]]:
        """The tests of each file, in the order of their names."""
        files: dict[str, list[dict]] = {}
        for test in sorted(self.tests, key=lambda test: test["test"]):
            files.setdefault(test["test"].split("::")[0], []).append(test)
        return files


def side_by_side(context: Context, processes: int) -> list[str]:
    """pytest's arguments for several processes and for tests that hang, as far as the plugins for that are installed."""
    arguments = []
    if processes > 1:
        if importlib.util.find_spec("xdist") is None:
            context.recorder.show("pytest-xdist is not installed: one test after the other")
        else:
            # Neighbours, which share kernels to compile, stay in one process until another has nothing to do.
            arguments += ["-n", str(processes), "--dist", "worksteal"]
    if importlib.util.find_spec("pytest_timeout") is None:
        context.recorder.show("pytest-timeout is not installed: a test that hangs ends with the run")
    else:
        # By a thread, which ends the process: a signal does not reach Python while a driver's call waits.
        arguments += [f"--timeout={TEST_LIMIT_S}", "--timeout-method=thread"]
    return arguments


def metrics_of(tests: list[dict]) -> dict:
    """Counts, seconds, and the outcome and seconds of each test."""
    outcomes = Counter(test["outcome"] for test in tests)
    each = {test["test"]: {"outcome": test["outcome"], "seconds": round(test["seconds"], 3)} for test in tests}
    for test in tests:
        if test["outcome"] == "skipped":
            each[test["test"]]["reason"] = test["text"]
    counts = {outcome: outcomes[outcome] for outcome in ("passed", "failed", "skipped")}
    return counts | {"seconds": round(sum(test["seconds"] for test in tests), 3), "tests": each}


def _record(context: Context, name: str, parameters: dict, measure) -> None:
    # Whatever error a test's text names: it lost the device to pytest's process, not to this one, and is recorded by now.
    with contextlib.suppress(DeviceLost):
        context.recorder.case(name, parameters, measure, begun=True)


def _fail(text: str) -> dict:
    raise RuntimeError(text)
