"""A variant that computes something else is refused before any clock starts, and gets no figure."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.check import Results, WrongResult, backward_of, official, require_correct, run
from benchmarks.context import Context
from benchmarks.parts import kernels
from benchmarks.peers import plain_sum_fuse
from benchmarks.record import DeviceLost
from benchmarks.sizes import TINY, TINY_NO_PREFIX, FuseCase, FuseInputs, make_inputs
from benchmarks.variants import measure_variants

SEED = 7


def wrong_at(case: FuseCase, change: Callable[[Tensor], Tensor]) -> Callable[[FuseInputs], Tensor]:
    right = official(case)
    return lambda inputs: change(right(inputs))


class WrongGradient(torch.autograd.Function):
    """The identity, with a gradient that is off in one element."""

    @staticmethod
    def forward(ctx: object, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad[(-1,) * grad.ndim] += 10
        return grad


@pytest.mark.parametrize("tower", (TINY, TINY_NO_PREFIX), ids=lambda tower: tower.name)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize(("stage", "mode"), [(2, "forward"), (2, "frozen"), (2, "trainable"), (1, "forward"), (1, "trainable")])
def test_the_library_and_the_official_formulation_pass(tower, dtype, stage, mode) -> None:
    case = FuseCase(tower, 5, dtype, stage, mode)  # five images: more than one float64 chunk
    for name in (kernels.OURS, kernels.EAGER):
        require_correct(case, kernels.fuse_variant(case, name), make_inputs(case, torch.device("cpu"), SEED))


@pytest.mark.parametrize(
    "change",
    [
        lambda out: out + 1e-3,
        lambda out: torch.cat(out.chunk(2, dim=-1)[::-1], dim=-1),
        lambda out: out.index_fill(0, torch.tensor([4]), 0),
        lambda out: torch.where(out == out.max(), torch.nan, out),
        lambda out: out[:, 1:],
    ],
    ids=("offset", "slots swapped", "last image zero", "one NaN", "shape"),
)
def test_a_wrong_output_is_refused(change) -> None:
    case = FuseCase(TINY, 5, torch.float32)
    inputs = make_inputs(case, torch.device("cpu"), SEED)
    with pytest.raises(WrongResult, match="output"):
        require_correct(case, wrong_at(case, change), inputs)


@pytest.mark.parametrize("name", ("grad_weights", "grad_states"))
def test_a_wrong_gradient_is_refused(name) -> None:
    case = FuseCase(TINY, 2, torch.float32, mode="trainable")
    inputs = make_inputs(case, torch.device("cpu"), SEED)

    def variant(inputs: FuseInputs) -> Tensor:
        states, weights = inputs.hidden_states, inputs.weights
        if name == "grad_weights":
            weights = WrongGradient.apply(weights)
        else:
            states = [*states[:2], WrongGradient.apply(states[2]), *states[3:]]
        return official(case)(FuseInputs(states, weights, inputs.cotangent))

    with pytest.raises(WrongResult, match=name):
        require_correct(case, variant, inputs)


def test_a_red_check_prints_no_speed(context: Context, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.fuse_variant

    def broken(case: FuseCase, name: str):
        return wrong_at(case, lambda out: out * 1.01) if name == kernels.OURS else right(case, name)

    monkeypatch.setattr(kernels, "fuse_variant", broken)
    kernels.measure_fuse(context, kernels.Job(FuseCase(TINY, 2, torch.float32), (kernels.OURS, kernels.EAGER)))

    ours, eager = json.loads(context.recorder.path.read_text())["cases"]
    assert ours["status"] == "error" and "metrics" not in ours
    assert "WrongResult" in ours["error"]
    assert eager["status"] == "ok" and eager["metrics"]["median_s"] > 0
    (line,) = [line for line in lines if kernels.OURS in line]
    assert "error" in line and "median" not in line and "GB" not in line
    assert context.recorder.finish() == 1


def test_results_are_named_for_the_message() -> None:
    one = torch.zeros(1)
    assert list(Results(one, one, (one, one)).named()) == ["output", "grad_weights", "grad_states[0]", "grad_states[1]"]


def test_a_failure_while_timing_is_recorded_and_the_run_goes_on(context: Context) -> None:
    calls: list[int] = []

    def breaks_down() -> None:
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("out of memory")

    measure_variants(context, "sum", {}, {"a": lambda: [breaks_down], "b": lambda: [lambda: None]})
    measure_variants(context, "next", {}, {"a": lambda: [lambda: None]})
    cases = context.recorder.document["cases"]
    assert [case["status"] for case in cases] == ["error", "error", "ok"]
    assert "out of memory" in cases[0]["error"]


def test_a_lost_device_stops_at_its_variant(context: Context) -> None:
    def lost() -> list:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    prepared: list[str] = []
    with pytest.raises(DeviceLost, match="sum: a"):
        measure_variants(context, "sum", {}, {"a": lost, "b": lambda: prepared.append("b") or [lambda: None]})
    (case,) = context.recorder.document["cases"]
    assert case["name"] == "sum: a" and case["status"] == "error" and not prepared


def test_only_chosen_variants_are_prepared(context: Context) -> None:
    context.recorder.only = re.compile(": b$")
    measure_variants(context, "sum", {}, {"a": lambda: pytest.fail("prepared"), "b": lambda: [lambda: None]})
    assert [case["name"] for case in context.recorder.document["cases"]] == ["sum: b"]


def test_shares_of_both_copies(context: Context) -> None:
    measure_variants(context, "sum", {}, {"a": lambda: [lambda: None]}, floor_bytes=4096)
    (case,) = context.recorder.document["cases"]
    assert case["metrics"]["share_of_copy"] > 0 and case["metrics"]["share_of_copy_of_same_size"] > 0


@pytest.mark.parametrize("mode", ("frozen backward", "trainable backward"))
@pytest.mark.parametrize("name", (kernels.OURS, kernels.EAGER))
def test_the_backward_alone_gives_the_gradients_of_both_passes_again_and_again(mode: str, name: str) -> None:
    case = FuseCase(TINY, 2, torch.float32, mode=mode)
    inputs = make_inputs(case, torch.device("cpu"), SEED)
    forwards: list[int] = []
    variant = kernels.fuse_variant(case, name)

    def counted(inputs: FuseInputs) -> Tensor:
        forwards.append(1)
        return variant(inputs)

    both = run(case, variant, inputs)
    call = backward_of(case, counted, inputs)
    for _ in range(2):
        grad_weights, *grad_states = call()
        torch.testing.assert_close(grad_weights, both.grad_weights)
        assert len(grad_states) == len(both.grad_states) == (4 if case.trains_states else 0)
        for actual, expected in zip(grad_states, both.grad_states, strict=True):
            torch.testing.assert_close(actual, expected)
    assert len(forwards) == 1


@pytest.mark.parametrize("tower", (TINY, TINY_NO_PREFIX), ids=lambda tower: tower.name)
@pytest.mark.parametrize(("stage", "mode"), [(2, "forward"), (2, "trainable"), (1, "trainable")])
def test_the_plain_sum_is_the_formula(tower, stage, mode) -> None:
    case = FuseCase(tower, 5, torch.float32, stage, mode)
    base = tower.num_layers - 1

    def variant(inputs: FuseInputs) -> Tensor:
        return plain_sum_fuse(inputs.hidden_states, tower.groups, base, inputs.weights, tower.num_prefix_tokens)

    require_correct(case, variant, make_inputs(case, torch.device("cpu"), SEED))
