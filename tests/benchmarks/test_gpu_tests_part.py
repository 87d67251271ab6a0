"""The part ``tests``: failures of pytest become cases of the record."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.context import Context
from benchmarks.parts.tests import run_folder, run_tests


def write(folder: Path, body: str) -> Path:
    (folder / "test_sample.py").write_text(body)
    return folder


def test_counts_passed_and_skipped(context: Context, tmp_path: Path) -> None:
    folder = write(tmp_path, "import pytest\ndef test_a(): pass\n@pytest.mark.skip\ndef test_b(): pass\n")
    counts = run_tests(context, folder)
    assert (counts["passed"], counts["skipped"]) == (1, 1)


def test_a_failed_test_is_a_case_of_its_own(context: Context, tmp_path: Path) -> None:
    folder = write(tmp_path, "def test_a(): pass\ndef test_b(): assert 1 == 2\n")
    with pytest.raises(RuntimeError, match="1 of 2 tests failed"):
        run_tests(context, folder)
    (case,) = context.recorder.document["cases"]
    assert case["name"].endswith("test_sample::test_b") and case["status"] == "error"
    assert "1 == 2" in case["error"]


def test_a_broken_file_is_an_error(context: Context, tmp_path: Path) -> None:
    folder = write(tmp_path, "import no_such_module\n")
    with pytest.raises(RuntimeError):
        run_tests(context, folder)


def test_nothing_run_on_a_gpu_is_an_error(context: Context, tmp_path: Path) -> None:
    folder = write(tmp_path, "import pytest\n@pytest.mark.skip\ndef test_b(): pass\n")
    context.device = torch.device("cuda")
    with pytest.raises(RuntimeError, match="no test ran"):
        run_tests(context, folder)


def test_files_run_one_by_one_and_a_slow_one_does_not_take_the_others_with_it(context: Context, tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text("def test_a(): pass\n")
    (tmp_path / "test_b.py").write_text("def test_b(): pass\ndef test_c(): pass\n")
    run_folder(context, tmp_path)
    assert [case["metrics"]["passed"] for case in context.recorder.document["cases"]] == [1, 2]
    (tmp_path / "test_endless.py").write_text("import threading\ndef test_d(): threading.Event().wait(600)\n")
    others = [tmp_path / "test_a.py", tmp_path / "test_b.py"]
    with pytest.raises(RuntimeError, match="did not end within 5 s"):
        run_tests(context, tmp_path, ignored=others, seconds=5)
