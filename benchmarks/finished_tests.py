"""A plugin of pytest, ``-p benchmarks.finished_tests --finished-tests FILE``: a line of JSON for every test as it ends.

What is in the file stays there when pytest is killed, which junit's report, written at the end, does not survive. Under
pytest-xdist the process that hands out the tests writes, and also names a test whose worker died.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TextIO

import pytest

TEXT_LIMIT = 4000
"""Characters kept of a failure: its end, where the error is."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--finished-tests", type=Path, help="file that gets a line of JSON for every test as it ends")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--finished-tests")
    if path is not None and not hasattr(config, "workerinput"):  # xdist's workers report to the process that writes
        config.pluginmanager.register(Writer(path), "finished tests writer")


class Writer:
    """Appends to the file: ``{"collected": n}``, and per test ``{"test", "outcome", "seconds", "text"}``."""

    def __init__(self, path: Path) -> None:
        self._file: TextIO = path.open("a", encoding="utf-8")
        self._open: dict[str, dict] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.items:  # none where xdist's workers collect
            self._write({"collected": len(session.items)})

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self._write({"collected": len(ids)})

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            text = report.longreprtext[-TEXT_LIMIT:]
            self._write({"test": report.nodeid or "collection", "outcome": "failed", "seconds": 0.0, "text": text})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        entry = self._open.setdefault(report.nodeid, {"test": report.nodeid, "outcome": "passed", "seconds": 0.0, "text": ""})
        entry["seconds"] += report.duration
        if report.failed:
            entry["outcome"] = "failed"
            entry["text"] = (entry["text"] + report.longreprtext)[-TEXT_LIMIT:]
        elif report.skipped and entry["outcome"] == "passed":
            entry["outcome"] = "skipped"
            entry["text"] = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        if report.when not in ("setup", "call"):  # a worker that died reports once, and no teardown
            self._write(self._open.pop(report.nodeid))

    def pytest_unconfigure(self) -> None:
        self._file.close()

    def _write(self, entry: dict) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
