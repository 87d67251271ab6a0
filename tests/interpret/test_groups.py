"""reduce_forward, summaries_forward and their backwards against a float64 formula."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from igva_kernels.plan import FusionPlan

SLACK = {torch.float64: 2.0, torch.float32: 2.0, torch.float16: 0.5, torch.bfloat16: 1.0}  # as in test_mix.py
DTYPES = list(SLACK)


def layers_of_groups(plan: FusionPlan) -> list[tuple[int, ...]]:
    return [tuple(plan.sources[source] for source in group) for group in plan.program.groups]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_means_of_every_group(kernels, plan, dtype, make_states, assert_as_exact_as) -> None:
    states = make_states(plan, patches=13, dtype=dtype)
    means = kernels.reduce_forward([states[layer] for layer in plan.sources], plan.program, 1)
    assert means.shape == (len(plan.program.groups), 2, 13, 40) and means.dtype == dtype
    for mean, layers in zip(means, layers_of_groups(plan), strict=True):
        members = torch.stack([states[layer][:, 1:] for layer in layers])
        assert_as_exact_as(mean, members.sum(0) / len(layers), members.double().mean(0), slack=SLACK[dtype])


def test_gradients_of_the_means(kernels, plan, assert_as_exact_as) -> None:
    program = plan.program
    grad_means = torch.randn(len(program.groups), 2, 13, 40)
    grads = kernels.reduce_backward(grad_means, program, 2, 15)
    assert len(grads) == len(program.gradient_classes)
    for grad, (_, groups) in zip(grads, program.gradient_classes, strict=True):
        exact = torch.zeros(2, 15, 40, dtype=torch.float64)
        for group in groups:
            exact[:, 2:] += grad_means[group].double() / len(program.groups[group])
        assert_as_exact_as(grad, exact.float(), exact, slack=2)


@pytest.mark.parametrize("summary", ["cls", "mean_patch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_summaries(kernels, weighted_plan, summary, dtype, make_states, assert_as_exact_as) -> None:
    """Also where two columns have the same group, and the patches are no multiple of what a program adds up."""
    states = make_states(weighted_plan, patches=19, dtype=dtype, finite_prefix=summary == "cls")
    sources = [states[layer] for layer in weighted_plan.summary_sources]
    summaries = kernels.summaries_forward(sources, weighted_plan.summary_program, 1, summary)
    assert summaries.shape == (2, weighted_plan.num_groups, 40) and summaries.dtype == dtype
    rows = slice(0, 1) if summary == "cls" else slice(1, None)
    for column, group in enumerate(weighted_plan.groups):
        members = torch.stack([states[layer][:, rows] for layer in group])
        exact = members.double().mean((0, 2))
        assert_as_exact_as(summaries[:, column], members.mean(0).mean(1), exact, slack=SLACK[dtype])


def test_mean_patch_of_wide_states(kernels, make_states, assert_as_exact_as) -> None:
    """More columns than a program holds, a width that is no power of two, more patches than are added at a time."""
    plan = FusionPlan.igva(2, 2)
    states = make_states(plan, batch=1, patches=300, width=72, prefix=0)
    summaries = kernels.summaries_forward(states[1:], plan.summary_program, 0, "mean_patch")
    exact = torch.stack([state.double().mean(1) for state in states[1:]], dim=1)
    assert_as_exact_as(summaries, exact.float(), exact, slack=6)


def test_the_mean_patch_of_an_image_does_not_depend_on_its_batch(kernels, make_states) -> None:
    plan = FusionPlan.igva(4, 2)
    states = make_states(plan, batch=3, patches=140, width=40)[1:]
    together = kernels.summaries_forward(states, plan.summary_program, 1, "mean_patch")
    for image in range(3):
        alone = kernels.summaries_forward([state[image : image + 1] for state in states], plan.summary_program, 1, "mean_patch")
        assert torch.equal(alone[0], together[image])


@pytest.mark.parametrize("summary", ["cls", "mean_patch"])
def test_summaries_are_one_launch_and_nothing_else(kernels, weighted_plan, summary, monkeypatch) -> None:
    """Of the public function: neither a second kernel nor an operator of torch, but for the allocation."""
    from igva_kernels import group_summaries
    from igva_kernels.impl.triton import mix_forward, patch_means

    launches, operators = [], []

    class Notes(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, arguments=(), options=None):
            operators.append(operator)
            return operator(*arguments, **(options or {}))

    def launch(kernel, grid, *arguments, **constants) -> None:
        launches.append((kernel, grid))

    for module in (mix_forward, patch_means):
        monkeypatch.setattr(module, "launch_recorded", launch)
    states = [torch.randn(2, 8, 40) for _ in range(weighted_plan.num_layers + 1)]
    group_summaries(states, weighted_plan, num_prefix_tokens=1, summary=summary, impl="triton")
    assert len(launches) == 1
    sources = [states[layer] for layer in weighted_plan.summary_sources]
    with Notes():
        kernels.summaries_forward(sources, weighted_plan.summary_program, 1, summary)
    names = {operator._schema.name.removeprefix("aten::") for operator in operators}
    assert len(launches) == 2 and names <= {"full", "slice", "view", "new_empty", "empty", "fill_"}  # conftest.py, ``guarded``


@pytest.mark.parametrize("summary", ["cls", "mean_patch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_the_summaries(kernels, weighted_plan, summary, dtype, assert_as_exact_as) -> None:
    program = weighted_plan.summary_program
    grad = torch.randn(2, weighted_plan.num_groups, 40).to(dtype)
    grads = kernels.summaries_backward(grad, program, 2, 9, summary)
    columns = [program.groups.index(tuple(weighted_plan.summary_sources.index(i) for i in g)) for g in weighted_plan.groups]
    rows = slice(0, 1) if summary == "cls" else slice(2, None)
    for actual, (_, groups) in zip(grads, program.gradient_classes, strict=True):
        exact = torch.zeros(2, 9, 40, dtype=torch.float64)
        for column, group in enumerate(columns):
            if group in groups:
                share = grad[:, column].double() / len(program.groups[group])
                exact[:, rows] += share[:, None] / (1 if summary == "cls" else 7)
        assert actual.dtype == dtype
        assert_as_exact_as(actual, exact.to(dtype), exact, slack=SLACK[dtype])


@pytest.mark.parametrize("summary", ["cls", "mean_patch"])
def test_no_images_to_summarise(kernels, summary, make_states) -> None:
    plan = FusionPlan.igva(4, 2)
    program = plan.summary_program
    assert kernels.summaries_forward(make_states(plan, batch=0)[1:], program, 1, summary).shape == (0, 2, 40)
    grads = kernels.summaries_backward(torch.zeros(0, 2, 40), program, 1, 6, summary)
    assert [grad.shape for grad in grads] == [(0, 6, 40)] * 2
