"""The recipe's step and ours: the same loss and gradients in every line, and one part more in each."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from benchmarks import training_step
from benchmarks.step_cases import TINY
from benchmarks.training_step import (
    KERNELS_ONLY,
    LINES,
    RECIPE,
    build,
    count,
    make_batches,
    make_samples,
    make_step,
    require_same,
)

CPU = torch.device("cpu")


@pytest.fixture(params=TINY, ids=lambda setup: f"stage{setup.stage}")
def trained(request):
    return build(request.param, CPU)


def test_each_line_is_the_one_before_with_one_part_more() -> None:
    for before, line in itertools.pairwise(LINES):
        first, second = dataclasses.asdict(before.switches), dataclasses.asdict(line.switches)
        assert sum(first[name] != second[name] for name in first) == 1, line.name
        changed = next(name for name in first if first[name] != second[name])
        assert line.part == ("kernels" if changed == "vision" else "loop")
    assert LINES[0] is RECIPE and KERNELS_ONLY.switches.layout == "random" and not KERNELS_ONLY.switches.chunked_loss


def test_all_lines_take_the_step_of_the_recipe(trained) -> None:
    samples = make_samples(trained)
    losses = require_same(trained, samples, (*LINES, KERNELS_ONLY))
    assert list(losses.values()) == pytest.approx([losses[RECIPE.name]] * len(losses), rel=1e-5)
    counts = [count(make_batches(trained, samples, layout)) for layout in ("random", "grouped", "packed")]
    for name in ("tokens", "labels", "samples"):
        assert len({counted[name] for counted in counts}) == 1
    positions = [counted["positions"] for counted in counts]
    assert positions[0] > positions[1] > positions[2] == counts[2]["tokens"]


def test_a_line_that_computes_another_step_is_an_error(trained, monkeypatch) -> None:
    samples = make_samples(trained)
    official = training_step.official_fuse
    monkeypatch.setattr(training_step, "official_fuse", lambda *args: 1.5 * official(*args))
    with pytest.raises(RuntimeError, match=r"computes another step: loss .* gradients of projector and allocator off by"):
        require_same(trained, samples, LINES)


def test_the_recipe_keeps_all_hidden_states_and_full_logits_and_ours_does_neither(trained, monkeypatch) -> None:
    samples, seen = make_samples(trained), []
    network = trained.network
    vocabulary = network.lm_head.out_features

    def watch(module, args, out) -> None:
        if torch.is_tensor(out) and out.shape[-1:] == (vocabulary,):
            seen.append(out.shape[:-1].numel())

    network.lm_head.register_forward_hook(watch)
    make_step(trained, samples, RECIPE.switches)()
    assert sum(seen) == count(make_batches(trained, samples, "random"))["positions"]
    seen.clear()
    monkeypatch.setattr(training_step, "eager_vision", lambda *args: pytest.fail("the eager fusion ran"))
    make_step(trained, samples, LINES[-1].switches)()
    assert not seen
