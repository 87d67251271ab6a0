"""The command of every part, as a user runs it, with tiny sizes on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import PARTS, main
from benchmarks.machine import parse_nvidia_smi
from benchmarks.parts import kernels
from benchmarks.parts.kernels import AUTOTUNE, AUTOTUNE_SUM, COMPILE, COMPILE_SUM
from benchmarks.record import read_json
from benchmarks.report import main as report
from benchmarks.sizes import MODES

ROOT = Path(__file__).resolve().parents[2]

WITHOUT_EXTRAS = """
import sys
for name in ("accelerate", "peft", "jsonargparse", "rich", "matplotlib", "sentence_transformers", "datasets", "flash_attn"):
    sys.modules[name] = None
from benchmarks.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
"""A GPU machine has torch, triton, transformers, pytest and pytest-benchmark; whatever else is imported raises here."""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # pytest-benchmark does not measure inside of a worker of xdist, and takes a process of its own for one by its environment
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=inherited | environment, capture_output=True, text=True, timeout=300
    )


def test_help_says_what_every_part_measures() -> None:
    done = run("-m", "benchmarks", "--help")
    assert done.returncode == 0, done.stderr
    for part in PARTS:
        assert f"\n{part}:\n" in done.stdout
    assert "CLIP-L/14-336" in done.stdout and "--tiny" in done.stdout


TITLES = {
    "tests": ("tests",),
    "kernels": (
        "fuse, forward",
        "fuse, forward and backward, trainable tower",
        "fuse, backward alone, frozen tower",
        "fuse, backward alone, trainable tower",
        "group summaries",
        "weight allocator",
    ),
    "peers": ("fuse, forward and backward, frozen tower", "weight allocator", "vision side: tower, fusion, projector"),
    "autotune": ("fuse, forward",),
    "tune": ("launch settings",),
    "family": ("other mixes, against the code of their authors",),
    "host": ("host",),
    "vision": ("vision side: tower, fusion, projector",),
    "training": ("training step",),
    "training_step": (
        "training step, part by part",
        "what the loop gives and what the kernels give",
        "the language model's layers, on top of all parts",
        "head and loss alone",
    ),
}
"""Tables of the report, by part."""


@pytest.mark.parametrize("part", PARTS)
def test_every_part_runs_without_extras(part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / f"cpu-tiny-{part}.json"
    arguments = ("--part", part, "--tiny", "--device", "cpu", "--out-dir", str(tmp_path))
    done = run("-c", WITHOUT_EXTRAS, *arguments, IGVA_COMMIT="0123abc")
    assert done.returncode == 0, done.stdout + done.stderr
    document = read_json(out)
    assert document["part"] == part and document["complete"] and document["arguments"]["tiny"]
    assert {case["status"] for case in document["cases"]} == {"ok"}
    assert document["machine"]["versions"]["torch"] == torch.__version__
    assert document["machine"]["commit"] == "0123abc"
    assert "its figures mean nothing" in done.stdout
    if part == "kernels":
        assert document["ceilings"]["copy"]["bytes_per_s"] > 0
        modes = {case["parameters"].get("mode") for case in document["cases"] if "fuse" in case["name"]}
        assert modes == set(MODES)
    if part in ("peers", "autotune"):
        variants = {case["parameters"].get("variant") for case in document["cases"]}
        assert {COMPILE, COMPILE_SUM} <= variants if part == "peers" else {AUTOTUNE, AUTOTUNE_SUM} <= variants
    if part == "training":
        igva, llava = (case["metrics"] for case in document["cases"])
        assert igva["fusion_share"] > 0 and "fusion_share" not in llava
        assert igva["trained_parameters"] < igva["parameters"]  # the tower is frozen
    if part == "training_step":
        lines = [case for case in document["cases"] if "line" in case["parameters"]]
        assert {case["parameters"]["part"] for case in lines} == {"recipe", "loop", "kernels"}
        assert all(case["metrics"]["tokens_per_s"] > 0 and case["metrics"]["peak_bytes"] > 0 for case in lines)

    assert report([str(out)]) == 0
    text = capsys.readouterr().out
    assert "Tiny sizes" in text
    for title in TITLES[part]:
        header, rule, *rows = text.split(f"### {title}\n\n")[1].split("\n\n")[0].splitlines()
        assert rows and {line.count("|") for line in (rule, *rows)} == {header.count("|")}


def test_report_names_failed_and_skipped_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = {"device": "X", "cpu": "Y", "cpu_count": 1, "cpu_capability": "Z", "torch_threads": 1, "versions": {"torch": "2"}}
    cases = [
        {"name": "a", "status": "error", "parameters": {}, "error": "WrongResult: off\nby much"},
        {"name": "b", "status": "skipped", "parameters": {}, "reason": "no time"},
    ]
    file = tmp_path / "result.json"
    document = {"schema": 1, "part": "kernels", "started": "now", "machine": machine, "arguments": {}, "ceilings": {}}
    file.write_text(json.dumps(document | {"cases": cases, "complete": False}))
    assert report([str(file)]) == 0
    text = capsys.readouterr().out
    assert "### Failed\n\n- a: WrongResult: off\n" in text
    assert "### Not run\n\n- b: no time\n" in text
    assert "Tiny" not in text


def test_report_refuses_what_is_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "other.json"
    file.write_text("{}")
    assert report([str(file)]) == 2
    assert report([str(tmp_path / "missing.json")]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["--part", "kernels", "--device", "cuda"]) == 2
    assert "finds no GPU" in capsys.readouterr().err


def test_out_is_for_one_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--part", "all", "--device", "cpu", "--out", "x.json"]) == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--cases", "("), ("--rounds", "0"), ("--rounds", "many")])
def test_wrong_options_are_refused(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--part", "kernels", "--device", "cpu", option, value])
    assert stopped.value.code == 2 and option in capsys.readouterr().err


def test_one_case_with_three_rounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--part", "kernels", "--tiny", "--device", "cpu", "--out-dir", str(tmp_path), "--rounds", "3", "--cases"]
    assert main([*arguments, "fuse tiny B=2 .* stage 2 forward"]) == 0
    cases = read_json(tmp_path / "cpu-tiny-kernels.json")["cases"]
    assert {(case["parameters"]["variant"], case["metrics"]["rounds"]) for case in cases} == {
        ("igva_kernels", 3),
        ("official eager", 3),
    }
    assert main([*arguments, "no case is called this"]) == 1
    assert "no case is called this" in capsys.readouterr().out


def test_a_lost_device_ends_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*arguments: object, **keywords: object) -> float:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(kernels, "matmul_flops", lost)
    assert main(["--part", "kernels", "--tiny", "--device", "cpu", "--out-dir", str(tmp_path)]) == 1
    first, second = read_json(tmp_path / "cpu-tiny-kernels.json")["cases"]
    assert first["status"] == "ok" and second["status"] == "error"
    assert "the device is lost" in capsys.readouterr().err


def test_what_nvidia_smi_says() -> None:
    found = parse_nvidia_smi("580.01, 345 MHz, 3201 MHz, 1980 MHz\n")
    assert found == {
        "driver_version": "580.01",
        "clocks.sm": "345 MHz",
        "clocks.mem": "3201 MHz",
        "clocks.max.sm": "1980 MHz",
    }
    assert parse_nvidia_smi("") == {"driver_version": ""}


def test_pytest_benchmark_suite_runs(tmp_path: Path) -> None:
    """The suite itself with tiny sizes; torch.compile is left to the part ``kernels``."""
    out = tmp_path / "suite.json"
    arguments = ["--tiny", "-q", "-p", "no:cacheprovider", f"--benchmark-json={out}", "-k", "not torch.compile"]
    done = run("-m", "pytest", "benchmarks", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    benchmarks = json.loads(out.read_text())["benchmarks"]
    assert len(benchmarks) == 16
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        assert (
            info["tiny"]
            and info["copy_gb_per_s"] > 0
            and info["share_of_copy"] > 0
            and info["peak_bytes"] > 0
            and info["peak_maps"] > 0
        )
        assert info["gb_per_s"] == pytest.approx(info["floor_bytes"] / benchmark["stats"]["median"] / 1e9)
