"""The GPU tests of the library, run where the figures come from: figures of wrong kernels are worth nothing."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from ..context import Context
from ..machine import ROOT

MEASURES = "pytest tests/gpu, file by file: every test by name, passed, failed or skipped."

TIME_LIMIT_S = 450
"""A part has to end within eight minutes. A file that does not end in what is left of that is an error, and later ones are
skipped; the results of those before it are kept."""


def run_part(context: Context) -> None:
    """Record one case per test that failed, and one for each file; one for all where there is no GPU."""
    folder = ROOT / "tests" / "gpu"
    if context.device.type == "cuda":
        run_folder(context, folder)
    else:  # the folder has nothing to run here, and says so at once
        context.recorder.case("pytest tests/gpu", {"folder": "tests/gpu"}, lambda: run_tests(context, folder))


def run_folder(context: Context, folder: Path) -> None:
    """Each file of a folder in a process of its own."""
    files = sorted(folder.glob("test_*.py"))
    begin = time.monotonic()
    for file in files:
        others = [other for other in files if other != file]
        left = TIME_LIMIT_S - (time.monotonic() - begin)
        context.recorder.case(
            f"pytest {folder.name}/{file.name}",
            {"folder": f"tests/{folder.name}"},
            lambda others=others, left=left: run_tests(context, folder, ignored=others, seconds=left),
        )


def run_tests(context: Context, folder: Path, *, ignored: Sequence[Path] = (), seconds: float = TIME_LIMIT_S) -> dict:
    """Run the tests of a folder in a process of their own.

    Args:
        ignored: files of the folder that are left out. (pytest would collect a file that is named even where the folder's
            conftest.py ignores it.)
        seconds: after which the run is broken off.

    Returns:
        Counts of passed and skipped tests, and their seconds. Every failed test is recorded as a case of its own.

    Raises:
        RuntimeError: a test failed, the run broke off, or on a GPU no test ran.
    """
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "report.xml"
        command = [sys.executable, "-m", "pytest", str(folder), "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command += [f"--ignore={file}" for file in ignored]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            try:
                output, _ = process.communicate(timeout=max(1.0, seconds))
            except subprocess.TimeoutExpired:
                process.kill()
                raise RuntimeError(f"pytest did not end within {seconds:.0f} s") from None
        context.recorder.show(output.strip()[-4000:])
        # 5: no test collected, which is what a folder whose tests skip as a whole may give
        if process.returncode not in (0, 1, 5) or not report.exists():
            raise RuntimeError(f"pytest ended with status {process.returncode}:\n{output[-4000:]}")
        tests = list(ElementTree.parse(report).iter("testcase"))
    failures = {test_name(test): text for test in tests if (text := failure_text(test)) is not None}
    for name, text in failures.items():
        context.recorder.case(name, {"test": name}, lambda text=text: _fail(text))
    skipped = sum(test.find("skipped") is not None for test in tests)
    if failures:
        raise RuntimeError(f"{len(failures)} of {len(tests)} tests failed")
    passed = len(tests) - skipped
    if context.device.type == "cuda" and passed == 0:
        raise RuntimeError(f"no test ran on this GPU ({skipped} skipped):\n{output[-2000:]}")
    return {"passed": passed, "skipped": skipped, "seconds": sum(float(test.get("time", 0)) for test in tests)}


def test_name(test: ElementTree.Element) -> str:
    return f"{test.get('classname')}::{test.get('name')}"


def failure_text(test: ElementTree.Element) -> str | None:
    """The message of a failed or broken test; None for one that passed or skipped."""
    for tag in ("failure", "error"):
        found = test.find(tag)
        if found is not None:
            return f"{found.get('message', '')}\n{found.text or ''}"[-4000:]
    return None


def _fail(text: str) -> dict:
    raise RuntimeError(text)
