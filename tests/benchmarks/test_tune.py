"""The part that compares launch settings: which it compares, that a wrong one is not timed, and what it proposes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import launch_settings, one_launch, predict
from benchmarks.check import WrongResult
from benchmarks.context import Context
from benchmarks.sizes import CLIP_L_336, TINY, FuseCase

pytest.importorskip("triton")

from benchmarks.launch_settings import FORWARDS, PASSES, Compiled, LaunchSetting, Wanted, settings_of, shipped_setting
from benchmarks.parts import tune

ROOT = Path(__file__).resolve().parents[2]
BF16 = torch.bfloat16


def run(script: str, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=inherited | environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", PASSES)
def test_the_shipped_setting_comes_first_and_no_setting_twice(name: str) -> None:
    found = settings_of(name, BF16)
    assert found[0] == shipped_setting(BF16) == LaunchSetting(4, 8, True)
    assert len(set(found)) == len(found) == (16 if name in FORWARDS else 3)
    assert LaunchSetting(2, 8, True) in found


def test_the_shipped_setting_is_the_tile_of_the_library() -> None:
    from igva_kernels.impl.triton.launch import elements_per_access, flat_tile

    for dtype in (BF16, torch.float32):
        tile = flat_tile(elements_per_access(dtype), 1024)
        assert shipped_setting(dtype).tile(CLIP_L_336, dtype) == tile


def test_the_advice_names_the_constants() -> None:
    text = tune.advice(LaunchSetting(2, 16, False), shipped_setting(BF16), BF16)
    assert "FLAT_THREADS = 64, ACCESSES = 2, EVICT_FIRST = False" in text and "launch.py" in text
    case = FuseCase(CLIP_L_336, 1, BF16)
    assert "FLAT_THREADS" in tune.Winner("forward", case, "2 warps", 1.2, text).line
    assert "keep the shipped" in tune.Winner("forward", case, "2 warps", 1.005, text).line


def test_other_bits_and_what_was_left_unwritten_are_refused() -> None:
    shipped = {"output": torch.ones(4)}
    tune.require_same_bits({"output": torch.ones(4)}, shipped, TINY)
    for wrong in (1 + 1e-6, float("nan")):
        with pytest.raises(WrongResult, match="other bits"):
            tune.require_same_bits({"output": torch.ones(4).index_fill(0, torch.tensor([2]), wrong)}, shipped, TINY)
    with pytest.raises(WrongResult, match="off by"):
        tune.require_near("dw", {"grad_weights": torch.full((2,), float("nan"))}, {"grad_weights": torch.ones(2)}, TINY)


def test_a_wrong_setting_is_recorded_and_the_others_are_timed(context: Context) -> None:
    def wrong() -> list:
        raise WrongResult("other bits")

    calls = {"shipped": lambda: [lambda: None], "wrong": wrong, "right": lambda: [lambda: None]}
    gains = tune.measure_settings(context, "forward", FuseCase(TINY, 1, BF16), calls, "shipped", 1000, {"right": {"spills": 3}})
    assert gains.keys() == {"right"}
    shipped, refused, right = context.recorder.document["cases"]
    assert shipped["metrics"]["times_faster_than_shipped"] == 1
    assert refused["status"] == "error" and "other bits" in refused["error"]
    assert right["metrics"]["spills"] == 3 and right["metrics"]["share_of_copy"] > 0


def test_nothing_is_compared_with_a_shipped_setting_that_fails(context: Context) -> None:
    def fails() -> list:
        raise WrongResult("off by much")

    calls = {"shipped": fails, "other": lambda: [lambda: None]}
    assert tune.measure_settings(context, "dw", FuseCase(TINY, 1, BF16), calls, "shipped", 1000, {}) == {}
    assert [case["status"] for case in context.recorder.document["cases"]] == ["error", "error"]


def test_without_a_card_the_part_says_so(context: Context) -> None:
    context.tiny = False
    tune.run_part(context)
    (case,) = context.recorder.document["cases"]
    assert "on a card" in case["metrics"]["not_run"]


def test_one_launch_says_what_it_will_launch() -> None:
    forward, backward = one_launch.launches_of(FuseCase(CLIP_L_336, 16, BF16, mode="frozen"), None)[1:]
    assert "grid (576, 16)" in forward and "566.2 MB" in forward and "H100" in forward and "waves" in forward
    assert backward.startswith("dw: grid (576, 16)")
    assert "predicted" not in one_launch.launches_of(FuseCase(CLIP_L_336, 1, BF16), "NVIDIA GeForce RTX 4090")[1]


def test_one_launch_needs_a_card(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert one_launch.main([]) == 2
    assert "finds no GPU" in capsys.readouterr().err


def test_settings_are_put_beside_each_other(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code = predict.read_codes()["forward | CLIP-L/14-336 | bfloat16 | sm_90"]

    def compiled(wanted: list[Wanted]) -> dict[Wanted, Compiled | str]:
        return {each: Compiled(code, 7) if each.setting.num_warps < 8 else "PTXASError: no" for each in wanted}

    monkeypatch.setattr(launch_settings, "compile_all", compiled)
    monkeypatch.setattr(launch_settings, "can_compile_ahead", lambda target: target == "sm_90")
    chosen = ["--settings", "--tower", CLIP_L_336.name, "--kernel", "forward", "--dtype", "bfloat16", "--batch", "1"]
    assert predict.main([*chosen, "--card", "H100 SXM"]) == 1
    shown = capsys.readouterr()
    assert shown.out.count("| 7 |") == 12 and shown.err.count("PTXASError") == 4
    assert predict.main([*chosen, "--card", "MI300X"]) == 2


EVERY_SETTING = """
import math, torch
from benchmarks.launch_settings import PASSES, run_pass, settings_of
from benchmarks.parts import tune
from benchmarks.sizes import TINY, FuseCase, make_inputs
inputs = make_inputs(FuseCase(TINY, 2, torch.float32), torch.device("cpu"), 1)
shipped = settings_of("forward", torch.float32)[0].tile(TINY, torch.float32)
means = run_pass("forward, means saved", TINY, shipped, inputs)["means"]
for name in PASSES:
    expected = tune.reference_of(name, TINY, inputs, means)
    for setting in settings_of(name, torch.float32):
        found = run_pass(name, TINY, setting.tile(TINY, torch.float32), inputs, means, fill=math.nan)
        tune.require_near(name, found, expected, TINY)
print("right")
"""


def test_every_setting_computes_the_formula_in_the_interpreter() -> None:
    assert "right" in run(EVERY_SETTING, TRITON_INTERPRET="1")


COMPILED_AHEAD = """
import os, sys, torch
from pathlib import Path
from benchmarks.launch_settings import Compiled, LaunchSetting, Wanted, compile_setting, run_pass
from benchmarks.sizes import CLIP_L_336, FuseCase, make_inputs
from benchmarks.stand_in import missing, stand_in_driver
if missing():
    print("missing", missing())
    sys.exit()
setting = LaunchSetting(2, 8, False)
found = compile_setting(Wanted("forward", CLIP_L_336, torch.bfloat16, setting, "sm_90"))
assert isinstance(found, Compiled) and found.spills == 0 and found.code.threads == 64, found
cubins = lambda: sorted(Path(os.environ["TRITON_CACHE_DIR"]).rglob("mix_forward_kernel.cubin"))
before = cubins()
inputs = make_inputs(FuseCase(CLIP_L_336, 2, torch.bfloat16), torch.device("cpu"), 1)
with stand_in_driver() as launches:
    run_pass("forward", CLIP_L_336, setting.tile(CLIP_L_336, torch.bfloat16), inputs)
    assert launches.count == 1
assert len(before) == 1 and cubins() == before, (before, cubins())
print("right")
"""


def test_a_launch_finds_what_was_compiled_ahead(tmp_path: Path) -> None:
    out = run(COMPILED_AHEAD, TRITON_CACHE_DIR=str(tmp_path))
    if out.startswith("missing"):
        pytest.skip(out)
    assert "right" in out
