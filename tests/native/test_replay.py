"""Calls of the compiled kernels that repeat: the recorded call with other addresses."""

import gc
import threading

import pytest
import torch

from igva_kernels import FusionPlan, Layer, Weighted, fuse
from igva_kernels.impl import native
from igva_kernels.impl.native import replay, structs
from igva_kernels.quick import signatures_of

pytestmark = pytest.mark.usefixtures("_built")


@pytest.fixture
def small_plan() -> FusionPlan:
    """A plan of this test's own: what is recorded is kept with the plan."""
    return FusionPlan.igva(6, 3)


@pytest.fixture
def long_ways(monkeypatch) -> list[int]:
    """One entry for each call that filled its structs anew."""
    made = []
    forward = native._run_forward
    monkeypatch.setattr(native, "_run_forward", lambda *arguments: (made.append(1), forward(*arguments))[1])
    return made


def inputs(plan, seed, dtype=torch.float32, batch=2, tokens=7, width=40):
    generator = torch.Generator().manual_seed(seed)
    states = [torch.randn(batch, tokens, width, generator=generator).to(dtype) for _ in range(plan.num_layers + 1)]
    return states, torch.rand(batch, plan.program.num_weights, generator=generator)


def both(states, plan, weights, prefix=1):
    """The result of the public call, and that of the long way."""
    fused = fuse(states, plan, weights, num_prefix_tokens=prefix, impl="native")
    read = [states[source] for source in plan.sources]
    expected = native.fuse_forward(read, weights.detach(), plan.program, prefix, False)[0]
    return fused, expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 40, 64])
def test_a_replay_has_the_bits_of_the_long_way(small_plan, long_ways, dtype, width):
    for seed in range(3):
        fused, expected = both(*_with_plan(small_plan, inputs(small_plan, seed, dtype, width=width)))
        assert torch.equal(fused, expected)
    assert len(long_ways) == 1 + 3  # the first public call, and the expected ones


def _with_plan(plan, made):
    states, weights = made
    return states, plan, weights


@pytest.mark.parametrize("form", ["bfloat16", "strided", "for all images", "per token"])
def test_weights_that_mix_c_cannot_read_as_they_are(small_plan, long_ways, form):
    for seed in range(3):
        states, weights = inputs(small_plan, seed)
        if form == "bfloat16":
            weights = weights.bfloat16()
        elif form == "strided":
            weights = torch.stack((weights, -weights), dim=-1)[..., 0]
        elif form == "for all images":
            weights = weights[0].clone()
        else:
            weights = torch.rand(2, 6, small_plan.program.num_weights, generator=torch.Generator().manual_seed(seed))
        fused, expected = both(states, small_plan, weights)
        assert torch.equal(fused, expected)
    assert len(long_ways) == 1 + 3


def test_a_plan_without_weights(long_ways):
    plan = FusionPlan(3, (Layer(1), Layer(-1)))
    for seed in range(3):
        states, _ = inputs(plan, seed)
        fused = fuse(states, plan, num_prefix_tokens=1, impl="native")
        assert torch.equal(fused, torch.cat((states[1], states[3]), dim=-1)[:, 1:])
    assert len(long_ways) == 1


def test_gradients_of_the_weights_flow_through_a_replay(small_plan, long_ways):
    for seed in range(3):
        states, weights = inputs(small_plan, seed)
        gradients = {}
        for impl in ("native", "reference"):
            leaf = weights.clone().requires_grad_()
            fuse(states, small_plan, leaf, num_prefix_tokens=1, impl=impl).square().sum().backward()
            gradients[impl] = leaf.grad
        torch.testing.assert_close(gradients["native"], gradients["reference"])
    assert len(long_ways) == 1


def test_states_that_lie_otherwise_in_memory(small_plan, long_ways):
    """Strides are part of the signature; a layout that repeats is replayed as well."""
    for seed in range(3):
        states, weights = inputs(small_plan, seed)
        states = [torch.cat((state, state), dim=1)[:, :7] for state in states]
        fused, expected = both(states, small_plan, weights)
        assert torch.equal(fused, expected)
    assert len(long_ways) == 1 + 3


def test_another_number_of_threads_takes_the_long_way(small_plan, long_ways):
    """The scratch was made for as many as torch had."""
    before = torch.get_num_threads()
    states, weights = inputs(small_plan, 0)
    try:
        for threads in (1, 1, 3, 3):
            torch.set_num_threads(threads)
            fuse(states, small_plan, weights, num_prefix_tokens=1, impl="native")
    finally:
        torch.set_num_threads(before)
    assert len(long_ways) == 2


def test_an_empty_batch_is_not_recorded(small_plan):
    states, weights = inputs(small_plan, 0, batch=0)
    for _ in range(2):
        assert fuse(states, small_plan, weights, num_prefix_tokens=1, impl="native").shape == (0, 6, 80)
    assert not signatures_of(small_plan)._prepared


def test_what_was_recorded_needs_none_of_the_first_call(long_ways):
    """Neither its tensors nor the cache of layouts."""
    plan = FusionPlan(6, (Weighted(((1, 2, 3), (4, 5))), Layer(0)))
    states, weights = inputs(plan, 0)
    fuse(states, plan, weights, num_prefix_tokens=1, impl="native")
    del states
    structs.forward_layout.cache_clear()
    gc.collect()
    ballast = [torch.full((2, 7, 40), float("nan")) for _ in range(64)]  # what was freed is written over
    states, weights = inputs(plan, 1)
    fused = fuse(states, plan, weights, num_prefix_tokens=1, impl="native")
    assert len(long_ways) == 1 and len(ballast) == 64
    assert torch.equal(fused, both(states, plan, weights)[1])


def test_replays_on_several_threads_do_not_meet(small_plan):
    """Each has a job and a scratch of its own."""
    made = [inputs(small_plan, seed, batch=3, tokens=50, width=64) for seed in range(4)]
    expected = [both(states, small_plan, weights)[1] for states, weights in made]
    wrong = []

    def work(index):
        states, weights = made[index]
        for _ in range(50):
            fused = fuse(states, small_plan, weights, num_prefix_tokens=1, impl="native")
            if not torch.equal(fused, expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_nobody_records_by_default(small_plan):
    states, weights = inputs(small_plan, 0)
    native.fuse_forward([states[source] for source in small_plan.sources], weights, small_plan.program, 1, False)
    assert not replay.recorder.is_recording
