"""A norm behind the mix by the compiled kernels: against torch and float64, every dtype, any number of threads."""

import pytest
import torch
from torch.nn import functional

from igva_kernels import FusionPlan, OutputNorm
from igva_kernels.impl import cpu, native, reference


def make_norm(plan, width, dtype, kind):
    channels = plan.num_slots * width
    bias = torch.randn(channels).to(dtype) if kind == "layer" else None
    return OutputNorm(torch.randn(channels).to(dtype), bias, 1e-4, kind)


def run(module, case, norm, *, save=True, indices=None):
    keep_means = save and case.weights is not None and indices is None
    prefix = case.num_prefix_tokens
    return module.normalised_forward(
        case.states, case.weights, norm, case.plan.program, prefix, keep_means, save, indices=indices
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("kind", "width"), [("layer", 40), ("rms", 33), ("layer", 5)])  # steps, and ends of rows
def test_output_and_what_is_kept(plan, dtype, kind, width, make_case, assert_as_exact_as, either_build):
    case, norm = make_case(plan, dtype, width=width), make_norm(plan, width, dtype, kind)
    out, means, mixed, statistics = run(native, case, norm)
    exact = run(reference, case.to(torch.float64), norm._replace(**wide(norm)))
    plain = native.fuse_forward(case.states, case.weights, plan.program, case.num_prefix_tokens, False)[0]
    rows = functional.layer_norm if kind == "layer" else functional.rms_norm
    parameters = (norm.weight, norm.bias) if kind == "layer" else (norm.weight,)
    assert_as_exact_as(out, rows(plain, plain.shape[-1:], *parameters, norm.eps), exact[0], slack=1.0)
    assert torch.equal(mixed, plain)
    assert means.shape == exact[1].shape and means.dtype == dtype
    torch.testing.assert_close(statistics.double(), exact[3], rtol=1e-4, atol=1e-5)
    again, *nothing = run(native, case, norm, save=False)
    assert torch.equal(again, out) and not any(each.numel() for each in nothing)


def wide(norm):
    return {name: None if getattr(norm, name) is None else getattr(norm, name).double() for name in ("weight", "bias")}


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_a_token_does_not_name_does_not_reach_it(poison, make_case, assert_as_exact_as):
    plan = FusionPlan.mixture_of_layers(4)
    case = make_case(plan, shape="per_token")._replace(weights=torch.randn(3, 6, 2))
    indices = torch.randint(0, 3, (3, 6, 2))
    norm = make_norm(plan, 40, torch.float32, "layer")
    expected = run(cpu, case, norm, indices=indices)[0]
    case.states[3].fill_(poison)
    exact = run(reference, case.to(torch.float64), norm._replace(**wide(norm)), indices=indices)[0]
    assert_as_exact_as(run(native, case, norm, indices=indices)[0], expected, exact, slack=4.0)


def test_a_token_that_names_nothing_is_a_row_of_zeros_before_the_norm(make_case):
    plan = FusionPlan.mixture_of_layers(4)
    case = make_case(plan, shape="per_token")._replace(weights=torch.randn(3, 6, 2))
    norm = make_norm(plan, 40, torch.float32, "layer")
    out, _, mixed, _ = run(native, case, norm, indices=torch.full((3, 6, 2), -1))
    assert not mixed.any() and torch.equal(out, norm.bias.expand_as(out))


def test_a_row_far_from_zero(make_case, assert_as_exact_as):
    """The difference of two moments would leave no digit of the deviation."""
    plan = FusionPlan.layers(4, (1, 2))
    case = make_case(plan)
    case = case._replace(states=[state + 4096 for state in case.states])
    norm = make_norm(plan, 40, torch.float32, "layer")
    exact = run(reference, case.to(torch.float64), norm._replace(**wide(norm)))[0]
    assert_as_exact_as(run(native, case, norm)[0], run(cpu, case, norm)[0], exact, slack=64.0)


def test_the_same_bits_on_any_number_of_threads(plan, make_case, many_threads):
    case, norm = make_case(plan, torch.bfloat16, tokens=40), make_norm(plan, 40, torch.bfloat16, "layer")
    many_threads(1)
    first = run(native, case, norm)
    many_threads(3)
    for _ in range(5):
        assert all(map(torch.equal, run(native, case, norm), first))
