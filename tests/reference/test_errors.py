"""Bad arguments: each names the argument, what was got, what was expected."""

import pytest
import torch

from igva_kernels import FusionPlan, fuse, group_summaries, mix, reduce_groups

PLAN = FusionPlan.igva(4, 2)


@pytest.fixture
def states(make_states):
    return make_states(PLAN, batch=2, tokens=5, width=8, dtype=torch.float32)


@pytest.fixture
def weights():
    return torch.rand(2, 2)


def replaced(states, index, value):
    return [value if i == index else state for i, state in enumerate(states)]


def expect(error, words, call):
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value), f"{word!r} is missing in: {caught.value}"


def test_wrong_number_of_hidden_states(states, weights):
    expect(
        ValueError,
        ["hidden_states has 4 entries", "4 layers needs 5", "num_hidden_layers"],
        lambda: fuse(states[1:], PLAN, weights, num_prefix_tokens=1),
    )


def test_a_layer_that_is_read_is_none(states, weights):
    expect(
        ValueError,
        ["hidden_states[3] is None", "[1, 2, 3, 4]"],
        lambda: fuse(replaced(states, 3, None), PLAN, weights, num_prefix_tokens=1),
    )


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (torch.zeros(2, 5, 8, dtype=torch.bfloat16), ["hidden_states[2]", "bfloat16", "float32"]),
        (torch.zeros(2, 6, 8), ["hidden_states[2]", "(2, 6, 8)", "(2, 5, 8)"]),
        (torch.zeros(2, 5, 8, device="meta"), ["hidden_states[2]", "meta", "cpu"]),
    ],
)
def test_states_that_differ(states, weights, other, words):
    expect(ValueError, words, lambda: fuse(replaced(states, 2, other), PLAN, weights, num_prefix_tokens=1))


def test_wrong_rank_of_a_state_and_of_a_stack(states, weights):
    flat = [state[0] for state in states]
    expect(ValueError, ["(B, T, D)", "(5, 8)"], lambda: fuse(flat, PLAN, weights, num_prefix_tokens=1))
    expect(ValueError, ["(L+1, B, T, D)"], lambda: fuse(states[0], PLAN, weights, num_prefix_tokens=1))


def test_integers_are_refused(states, weights):
    whole = [state.int() for state in states]
    expect(TypeError, ["floating point", "int32"], lambda: fuse(whole, PLAN, weights, num_prefix_tokens=1))
    expect(TypeError, ["weights", "int64"], lambda: fuse(states, PLAN, weights.long(), num_prefix_tokens=1))


def test_something_else_than_a_tensor_or_a_plan(states, weights):
    expect(TypeError, ["plan", "str"], lambda: fuse(states, "igva", weights, num_prefix_tokens=1))
    expect(TypeError, ["weights", "list"], lambda: fuse(states, PLAN, [0.5, 0.5], num_prefix_tokens=1))
    expect(
        TypeError,
        ["hidden_states[2]", "list"],
        lambda: fuse(replaced(states, 2, [1.0]), PLAN, weights, num_prefix_tokens=1),
    )


def test_weights_missing_superfluous_or_of_a_wrong_shape(states, weights):
    expect(
        ValueError,
        ["weights is None", "2 weighted groups", "igva_average"],
        lambda: fuse(states, PLAN, num_prefix_tokens=1),
    )
    expect(
        ValueError,
        ["no weighted slot"],
        lambda: fuse(states, FusionPlan.llava(4), weights, num_prefix_tokens=1),
    )
    expect(
        ValueError,
        ["(3, 2)", "(K,) = (2,)", "(B, K) = (2, 2)", "(B, N, K) = (2, 4, 2)"],
        lambda: fuse(states, PLAN, torch.rand(3, 2), num_prefix_tokens=1),
    )
    expect(
        ValueError,
        ["weights is on meta"],
        lambda: fuse(states, PLAN, weights.to("meta"), num_prefix_tokens=1),
    )


@pytest.mark.parametrize("prefix", [-1, 5, 9])
def test_prefix_tokens_out_of_range(states, weights, prefix):
    expect(
        ValueError, [f"num_prefix_tokens={prefix}", "5 tokens"], lambda: fuse(states, PLAN, weights, num_prefix_tokens=prefix)
    )


def test_prefix_tokens_of_a_wrong_type(states, weights):
    expect(TypeError, ["num_prefix_tokens", "1.0"], lambda: fuse(states, PLAN, weights, num_prefix_tokens=1.0))


def test_unknown_implementation_and_summary(states, weights):
    expect(ValueError, ["'cuda'", "'triton'"], lambda: fuse(states, PLAN, weights, num_prefix_tokens=1, impl="cuda"))
    expect(
        ValueError,
        ["'max'", "mean_patch"],
        lambda: group_summaries(states, PLAN, num_prefix_tokens=1, summary="max"),
    )


def test_cls_summary_of_a_tower_without_cls(states):
    expect(ValueError, ["no CLS token", "mean_patch"], lambda: group_summaries(states, PLAN, num_prefix_tokens=0))


def test_mixing_with_another_plan_than_the_reduced_one(states, weights):
    reduced = reduce_groups(states, PLAN, num_prefix_tokens=1)
    expect(
        ValueError,
        ["2 means", "4 groups"],
        lambda: mix(reduced, FusionPlan.igva(4, 4), torch.rand(2, 4)),
    )


def test_triton_by_name_on_a_cpu_says_why_it_cannot_run(states, weights):
    expect(ValueError, ['impl="triton"'], lambda: fuse(states, PLAN, weights, num_prefix_tokens=1, impl="triton"))
