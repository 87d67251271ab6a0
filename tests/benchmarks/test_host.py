"""The pieces of the host's cost: what is measured is what is named. No test here asserts how long something takes."""

from __future__ import annotations

import gc

import pytest
import torch

from benchmarks import host
from benchmarks.context import Context
from benchmarks.parts import host as part
from benchmarks.pieces import pieces_of
from igva_kernels import FusionPlan, dispatch

CPU = torch.device("cpu")
PLAN = FusionPlan.igva(4, 2)


def test_calls_are_counted_and_the_collector_is_back() -> None:
    calls: list[bool] = []
    found = host.per_call(lambda: calls.append(gc.isenabled()), 0.0, calls=7)
    assert len(calls) == 3 + 5 * 7 and found["rounds"] == 5 and found["calls"] == 7
    assert not any(calls[3:]) and gc.isenabled()
    assert 0 <= found["low_s"] <= found["median_s"] <= found["high_s"]


def test_a_limit_is_held_against_the_least_processor_time() -> None:
    found = host.times([3.0, 3.0, 3.0], [1.0, 0.5, 1.0])
    assert found == {"median_s": 3.0, "low_s": 3.0, "high_s": 3.0, "cpu_s": 1.0, "least_s": 0.5, "rounds": 3}
    assert host.against(0.5, found) == {"limit_s": 0.5, "within_limit": True}
    assert not host.against(0.4, found)["within_limit"]


@pytest.mark.parametrize("mode", ("forward", "frozen", "trainable"))
def test_around_nothing_there_are_checks_dispatch_and_autograd(mode: str) -> None:
    step = host.Step(PLAN, mode, CPU)
    with host.no_implementation(PLAN, step) as nothing:
        out = step.forward(nothing)
        assert out.shape == step.grad_out.shape and (out == 0).all()  # nothing was computed
        assert out.requires_grad == (mode != "forward")
        results = step.step(nothing)
        assert len(results) == {"forward": 1, "frozen": 1, "trainable": 1 + len(PLAN.sources)}[mode]
        step.weights = step.weights[:, :1].detach()
        with pytest.raises(ValueError, match="weights has the shape"):  # the checks are not left out
            step.forward(nothing)
    assert "nothing" not in dispatch.MODULES
    with pytest.raises(ValueError, match="impl"):
        step.forward("nothing")


def test_the_operator_runs_around_nothing() -> None:
    step = host.Step(PLAN, "forward", CPU)
    with host.no_implementation(PLAN, step) as nothing:
        out, _ = part.call_operator(step, nothing)
    assert (out == 0).all()


def test_importing_does_not_import_triton() -> None:
    found = host.import_time(1)
    assert found["imports_triton"] is False and found["median_s"] > 0 and found["limit_s"] == 0.05
    assert found["rounds"] == 1 and found["from_source_s"] > 0  # the first import, which compiles, is not among the rounds


def test_a_call_that_is_not_replayed_has_no_pieces() -> None:
    with pytest.raises(RuntimeError, match="no replay to take apart"):
        pieces_of(host.Step(PLAN, "forward", CPU))


def test_without_a_compiler_the_launch_is_reported_as_not_run(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part.stand_in, "missing", lambda: "there is no C compiler `cc` to build it")
    part.measure_launch(context, PLAN)
    cases = context.recorder.document["cases"]
    assert [case["metrics"] for case in cases] == [{"not_run": "there is no C compiler `cc` to build it"}] * 3
