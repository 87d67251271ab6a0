"""The result file: cases with metrics or an error, written whole or not at all, after every case."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

SCHEMA = 1
STATUSES = ("ok", "error", "skipped")


class DeviceLost(RuntimeError):
    """An error after which every further call on the device fails: the process has to end."""


LOST = (
    "illegal memory access",
    "misaligned address",
    "unspecified launch failure",
    "illegal instruction",
    "device-side assert",
    "invalid address space",
    "invalid program counter",
)
"""Texts of CUDA's errors that leave the context of the process unusable, as torch and Triton both print them."""


def loses_device(error: BaseException) -> bool:
    """Whether an error, or one that led to it, is one of :data:`LOST`."""
    seen: BaseException | None = error
    while seen is not None:
        if any(text in str(seen).lower() for text in LOST):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


@dataclass
class Recorder:
    """Runs cases one after the other and keeps what came of each.

    Args:
        path: the JSON file.
        part: name of the part.
        machine: see :func:`benchmarks.machine.describe`.
        arguments: the command line, as given.
        budget_s: cases that would begin later than this are recorded as skipped.
        show: where progress lines go.
        only: cases whose name it does not find are left out; None: all cases.
    """

    path: Path
    part: str
    machine: dict
    arguments: dict
    budget_s: float
    show: Callable[[str], None] = field(default=lambda line: print(line, flush=True))
    only: re.Pattern[str] | None = None

    def __post_init__(self) -> None:
        self._begin = time.monotonic()
        self.document = {
            "schema": SCHEMA,
            "part": self.part,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": self.machine,
            "arguments": self.arguments,
            "ceilings": {},
            "cases": [],
            "complete": False,
        }

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._begin

    @property
    def spent(self) -> bool:
        """Whether the time budget is used up."""
        return self.elapsed_s > self.budget_s

    @property
    def failed(self) -> int:
        return self._count("error")

    def _count(self, status: str) -> int:
        return sum(case["status"] == status for case in self.document["cases"])

    def chosen(self, name: str) -> bool:
        """Whether the case of this name is to run."""
        return self.only is None or self.only.search(name) is not None

    def case(self, name: str, parameters: dict, measure: Callable[[], dict], *, begun: bool = False) -> dict | None:
        """Run one case and return its metrics; None when it failed, was skipped or is not among the chosen ones.

        An exception of ``measure``, or a metric that is no finite number, becomes an entry with its text: the other cases go
        on, and the command fails at the end. ``begun`` says that the case's work began within the budget, so that its results
        are recorded whatever the time is now.

        Raises:
            DeviceLost: the error leaves the device unusable to this process. It is recorded; no other case can run.
        """
        if not self.chosen(name):
            return None
        entry: dict = {"name": name, "parameters": parameters}
        if self.spent and not begun:
            self._add(entry | {"status": "skipped", "reason": f"the time budget of {self.budget_s:.0f} s is spent"})
            return None
        begin = time.monotonic()
        lost = False
        try:
            metrics = measure()
            require_finite(metrics)
            entry |= {"status": "ok", "metrics": metrics}
        except Exception as error:
            entry |= _error_entry(error)
            lost = loses_device(error)
        entry["seconds"] = round(time.monotonic() - begin, 3)
        self._add(entry)
        if lost:
            raise DeviceLost(f"{name}: {entry['error'].splitlines()[0]}")
        return entry.get("metrics")

    def guard(self, name: str, run: Callable[[], None]) -> None:
        """Run what records cases itself; an exception outside of them becomes a failed case of this name.

        Raises:
            DeviceLost: as :meth:`case`.
        """
        try:
            run()
        except DeviceLost:
            raise
        except Exception as error:
            self._add({"name": name, "parameters": {}} | _error_entry(error))
            if loses_device(error):
                raise DeviceLost(f"{name}: {error}") from error

    def _add(self, entry: dict) -> None:
        self.document["cases"].append(entry)
        detail = entry.get("error") or entry.get("reason") or summary_line(entry["metrics"])
        first_line = (detail.splitlines() or [""])[0]
        self.show(f"[{self.elapsed_s:6.1f} s] {self.part}: {entry['name']}: {entry['status']} {first_line}".rstrip())
        self.write()

    def finish(self) -> int:
        """Write the final file; the exit status: 1 if a case failed or nothing ran, else 0."""
        if self.only is not None and not self.document["cases"]:
            self.show(f"{self.part}: no case has a name in which {self.only.pattern!r} is found")
        self.document["complete"] = not self._count("skipped")
        self.document["seconds"] = round(self.elapsed_s, 1)
        self.write()
        passed = self._count("ok")
        self.show(f"{self.part}: {passed} ok, {self.failed} failed, {self._count('skipped')} skipped -> {self.path}")
        return 1 if self.failed or not passed else 0

    def write(self) -> None:
        validate(self.document)
        write_json(self.path, self.document)


def _error_entry(error: Exception) -> dict:
    return {
        "status": "error",
        "error": f"{type(error).__name__}: {error}".strip(),
        "traceback": "".join(traceback.format_exception(error)),
    }


def require_finite(metrics: dict, path: str = "") -> None:
    """JSON has no NaN and no infinity.

    Raises:
        ValueError: names the metric that is one.
    """
    for key, value in metrics.items():
        if isinstance(value, dict):
            require_finite(value, f"{path}{key}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"metric {path}{key} is {value}, which no result file can hold")


def summary_line(metrics: dict) -> str:
    """The figures of a case for the progress line: the scalars, shortened."""
    shown = [f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
             for key, value in metrics.items() if isinstance(value, int | float | str)]  # fmt: skip
    return " ".join(shown)


def write_json(path: Path, document: dict) -> None:
    """Write through a temporary file in the same folder, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(document, file, indent=1, allow_nan=False)
            file.write("\n")
        os.chmod(temporary, 0o644)  # mkstemp gives 0600
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_json(path: Path) -> dict:
    """A result file, validated.

    Raises:
        ValueError: not a result file of this schema.
    """
    document = json.loads(Path(path).read_text())
    validate(document)
    return document


def validate(document: dict) -> None:
    """Check the form of a result file.

    Raises:
        ValueError: names what is missing or wrong.
    """
    expected = {
        "schema": int, "part": str, "started": str, "machine": dict, "arguments": dict, "ceilings": dict, "cases": list,
        "complete": bool,
    }  # fmt: skip
    for key, kind in expected.items():
        if not isinstance(document.get(key), kind):
            raise ValueError(f"result file: {key!r} must be a {kind.__name__}, got {document.get(key)!r}")
    if document["schema"] != SCHEMA:
        raise ValueError(f"result file: schema {document['schema']}, this version reads {SCHEMA}")
    for case in document["cases"]:
        if case.get("status") not in STATUSES or not isinstance(case.get("name"), str):
            raise ValueError(f"result file: a case needs a name and one status of {STATUSES}, got {case!r}")
        if (case["status"] == "ok") != ("metrics" in case):
            raise ValueError(f"result file: case {case['name']!r} must have metrics exactly when its status is ok")
