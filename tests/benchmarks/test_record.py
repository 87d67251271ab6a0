"""The result file: whole at every moment, its form checked, failures kept beside what went well."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.record import LOST, DeviceLost, Recorder, loses_device, read_json, summary_line, validate, write_json


def test_a_failing_case_is_recorded_and_the_others_go_on(recorder: Recorder, lines: list[str]) -> None:
    def fail() -> dict:
        raise MemoryError("no more\nmemory")

    assert recorder.case("first", {}, lambda: {"median_s": 0.25}) == {"median_s": 0.25}
    assert recorder.case("second", {"batch": 4}, fail) is None
    recorder.case("third", {}, lambda: {"median_s": 0.5})
    assert recorder.finish() == 1
    document = read_json(recorder.path)
    assert [case["status"] for case in document["cases"]] == ["ok", "error", "ok"]
    assert document["cases"][1]["error"] == "MemoryError: no more\nmemory"
    assert "fail()" in document["cases"][1]["traceback"] or "in fail" in document["cases"][1]["traceback"]
    assert document["complete"]
    assert lines[0].endswith("first: ok median_s=0.25")
    assert lines[1].endswith("second: error MemoryError: no more")


def test_the_file_is_valid_after_every_case(recorder: Recorder) -> None:
    for index in range(3):
        recorder.case(f"case {index}", {}, dict)
        document = read_json(recorder.path)
        assert len(document["cases"]) == index + 1 and not document["complete"]
    assert recorder.finish() == 0
    assert read_json(recorder.path)["complete"]
    assert [path.name for path in recorder.path.parent.iterdir()] == ["result.json"]  # no temporary file is left


def test_cases_beyond_the_budget_are_skipped(tmp_path: Path, lines: list[str]) -> None:
    recorder = Recorder(tmp_path / "result.json", "kernels", {}, {}, budget_s=-1, show=lines.append)
    ran: list[int] = []
    recorder.case("late", {}, lambda: ran.append(1))
    assert not ran
    assert recorder.finish() == 1  # nothing was measured
    document = read_json(recorder.path)
    assert document["cases"][0]["status"] == "skipped" and not document["complete"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def valid() -> dict:
    return {
        "schema": 1,
        "part": "kernels",
        "started": "2026-11-23T12:00:00+00:00",
        "machine": {},
        "arguments": {},
        "ceilings": {},
        "cases": [{"name": "a", "status": "ok", "metrics": {}, "parameters": {}}],
        "complete": True,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema 2"),
        ({"machine": None}, "machine"),
        ({"cases": [{"name": "a", "status": "fine"}]}, "status"),
        ({"cases": [{"name": "a", "status": "ok"}]}, "metrics"),
        ({"cases": [{"name": "a", "status": "error", "metrics": {}}]}, "metrics"),
    ],
)
def test_validate_names_what_is_wrong(change: dict, message: str) -> None:
    validate(valid())
    with pytest.raises(ValueError, match=message):
        validate(valid() | change)


def test_summary_line_shows_scalars_only() -> None:
    assert summary_line({"a": 1.23456, "b": 2, "c": "wall", "d": {"x": 1}}) == "a=1.235 b=2 c=wall"


def test_a_case_that_began_in_time_is_recorded(tmp_path: Path, lines: list[str]) -> None:
    recorder = Recorder(tmp_path / "result.json", "kernels", {}, {}, budget_s=-1, show=lines.append)
    assert recorder.case("in time", {}, lambda: {"median_s": 1.0}, begun=True) == {"median_s": 1.0}


def test_a_metric_that_is_no_number_fails_its_case_alone(recorder: Recorder) -> None:
    recorder.case("first", {}, lambda: {"times": {"median_s": float("nan")}})
    recorder.case("second", {}, lambda: {"median_s": 1.0})
    assert recorder.finish() == 1
    first, second = read_json(recorder.path)["cases"]
    assert first["status"] == "error" and "times.median_s is nan" in first["error"] and second["status"] == "ok"


@pytest.mark.parametrize("text", LOST)
def test_an_error_that_loses_the_device_is_written_and_stops(text: str, recorder: Recorder) -> None:
    def fail() -> dict:
        raise RuntimeError(f"CUDA error: {text.capitalize()} was encountered")

    with pytest.raises(DeviceLost, match=r"^first: RuntimeError: CUDA error"):
        recorder.case("first", {}, fail)
    (case,) = read_json(recorder.path)["cases"]
    assert case["status"] == "error" and recorder.finish() == 1


def test_what_led_to_an_error_counts_and_memory_does_not() -> None:
    try:
        try:
            raise RuntimeError("Triton Error [CUDA]: misaligned address")
        except RuntimeError as error:
            raise ValueError("the check failed") from error
    except ValueError as error:
        assert loses_device(error)
    assert not loses_device(RuntimeError("CUDA out of memory"))


def test_an_error_between_cases_is_a_failed_case(recorder: Recorder) -> None:
    def run() -> None:
        recorder.case("first", {}, lambda: {"median_s": 1.0})
        raise ValueError("between")

    recorder.guard("the part", run)
    assert recorder.finish() == 1
    assert [(case["name"], case["status"]) for case in read_json(recorder.path)["cases"]] == [
        ("first", "ok"),
        ("the part", "error"),
    ]


def test_only_the_chosen_cases_run(recorder: Recorder, lines: list[str]) -> None:
    recorder.only = re.compile("B=1 .*forward")
    ran: list[str] = []
    for name in ("B=1 bf16 forward", "B=16 bf16 forward"):
        recorder.case(name, {}, lambda name=name: ran.append(name) or {"median_s": 1.0})
    assert ran == ["B=1 bf16 forward"] and recorder.finish() == 0


def test_to_choose_no_case_is_an_error(recorder: Recorder, lines: list[str]) -> None:
    recorder.only = re.compile("nothing is called this")
    recorder.case("first", {}, lambda: {"median_s": 1.0})
    assert recorder.finish() == 1
    assert any("nothing is called this" in line for line in lines)
