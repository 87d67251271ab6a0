"""One case through one implementation: values, gradients, and what a call must leave alone."""

from __future__ import annotations

import torch
from fuzz.cases import Case, Limits
from fuzz.formula import Results, exact_results, magnitudes
from fuzz.inputs import Inputs, make_inputs
from fuzz.poison import poisoned_empty
from torch import Tensor

from igva_kernels import fuse, group_summaries, mix, reduce_groups


def check_fuse(case: Case, impl: str, limits: Limits, device: str = "cpu") -> None:
    """Output and gradients of ``fuse`` against float64, and the same output without autograd."""
    inputs = make_inputs(case, device)
    before = [bits(tensor) for tensor in inputs.tensors()]
    with poisoned_empty():
        out = run_fuse(case, inputs, impl)
        grads = differentiate(case, inputs, out)
        with torch.no_grad():
            again = run_fuse(case, inputs, impl)
    assert all(torch.equal(old, bits(new)) for old, new in zip(before, inputs.tensors(), strict=True)), (
        "an input was written to"
    )
    assert torch.equal(bits(out), bits(again)), "without autograd the output is another one"

    assert out.shape == (case.batch, case.patches, len(case.plan.slots) * case.width)
    assert out.dtype == case.out_dtype and out.is_contiguous()
    assert out.requires_grad == (case.weights_need or any(case.states_need) or case.norm_needs)
    compare(case, Results(out.detach(), *grads), inputs, limits)


def check_two_steps(case: Case, impl: str, limits: Limits, device: str = "cpu") -> None:
    """``mix`` of ``reduce_groups`` and its gradients: with wide means the bits of ``fuse``, else one more rounding."""
    inputs = make_inputs(case, device)
    wide = torch.promote_types(case.dtype, torch.float32)
    with poisoned_empty():
        one = run_fuse(case, inputs, impl)
        two = run_two_steps(case, inputs, impl, wide)
        grads = differentiate(case, inputs, two)
        narrow = run_two_steps(case, inputs, impl, None)
    # With a norm behind the mix, rows are summed in the order of a tile: that of Triton depends on the width of what is loaded,
    # and so on the dtype; and means of transposed states are not transposed, so that "auto" may run them elsewhere.
    same_sum = case.norm is None or (impl != "triton" and (impl != "auto" or "transposed" not in (case.layouts or ())))
    if same_sum:
        assert torch.equal(bits(one), bits(two)), "with wide means two steps give other bits than one"
    assert narrow.dtype == case.out_dtype and narrow.is_contiguous()
    # The gradient of a mean is stored in the dtype of the states, and so are the two parts of that of a layer that is copied as
    # well as averaged, before they are added.
    compare(case, Results(two.detach(), *grads), inputs, limits, states_stored=2)
    exact, magnitude = exact_results(case, inputs).out, magnitudes(case, inputs).out
    within("output of 16-bit means", narrow.detach(), exact, magnitude, roundings_of_a_mix(case), limits, stored=(case.dtype,))


def check_summaries(case: Case, impl: str, limits: Limits, summary: str, device: str = "cpu") -> None:
    """``group_summaries`` and the gradient of the states; their norms play no part in it."""
    inputs = make_inputs(case, device)
    rows = slice(0, 1) if summary == "cls" else slice(case.prefix, None)
    generator = torch.Generator(device).manual_seed(case.seed)
    states = {layer: inputs.hidden_states[layer].detach() for layer in case.plan.summary_sources}
    for state in states.values():  # the poison is where the summary may not look
        state.copy_(torch.full_like(state, float("nan")))
        state[:, rows] = torch.randn(state[:, rows].shape, generator=generator, device=device).to(case.dtype)
    grad = torch.randn(case.batch, case.plan.num_groups, case.width, generator=generator, device=device).to(case.dtype)
    with poisoned_empty():
        summaries = group_summaries(inputs.hidden_states, case.plan, num_prefix_tokens=case.prefix, summary=summary, impl=impl)
        needed = [layer for layer in states if case.layouts is not None and inputs.hidden_states[layer].requires_grad]
        grads = torch.autograd.grad(summaries, [inputs.hidden_states[layer] for layer in needed], grad) if needed else ()

    assert summaries.dtype == case.dtype and summaries.shape == grad.shape
    rounds = 8 + case.patches + max(map(len, case.plan.groups))
    for column, group in enumerate(case.plan.groups):
        members = torch.stack([states[layer][:, rows].double() for layer in group])
        exact, magnitude = members.mean((0, 2)), members.abs().mean((0, 2))
        within(f"summary {column}", summaries[:, column].detach(), exact, magnitude, rounds, limits)
    for layer, actual in zip(needed, grads, strict=True):
        exact = torch.zeros(actual.shape, dtype=torch.float64, device=device)
        magnitude = torch.zeros(actual.shape, dtype=torch.float64, device=device)
        for column, group in enumerate(case.plan.groups):
            if layer in group:
                share = grad[:, column, None].double() / (len(group) * len(range(*rows.indices(case.tokens))))
                exact[:, rows] += share
                magnitude[:, rows] += share.abs()
        within(f"gradient of layer {layer}", actual, exact, magnitude, rounds, limits)


RUNS = 20


def check_determinism(case: Case, impl: str) -> None:
    """Output and every gradient, the same bits at each of :data:`RUNS` runs."""
    inputs = make_inputs(case)

    def run() -> list[Tensor]:
        out = run_fuse(case, inputs, impl)
        grad_values, grad_states, grad_norm = differentiate(case, inputs, out)
        tensors = (out, grad_values, *grad_states.values(), *grad_norm.values())
        return [bits(tensor) for tensor in tensors if tensor is not None]

    first = run()
    for _ in range(RUNS - 1):
        assert all(map(torch.equal, first, run())), "the bits differ between two runs"


def run_two_steps(case: Case, inputs: Inputs, impl: str, means_dtype: torch.dtype | None) -> Tensor:
    means = reduce_groups(
        inputs.hidden_states,
        case.plan,
        num_prefix_tokens=case.prefix,
        summary="cls" if case.prefix else "mean_patch",
        means_dtype=means_dtype,
        impl=impl,
    )
    return mix(means, case.plan, inputs.weights, output_norm=inputs.norm, impl=impl)


def run_fuse(case: Case, inputs: Inputs, impl: str) -> Tensor:
    return fuse(
        inputs.hidden_states,
        case.plan,
        inputs.weights,
        num_prefix_tokens=case.prefix,
        output_norm=inputs.norm,
        impl=impl,
    )


def differentiate(case: Case, inputs: Inputs, out: Tensor) -> tuple[Tensor | None, dict[int, Tensor], dict[str, Tensor]]:
    """The gradients that the case asks for, of weights, states and the norm behind; prefix rows and unread layers have zeros,
    and are cut off here."""
    stacked = isinstance(inputs.hidden_states, Tensor)
    leaves: dict[int | str, Tensor] = {"values": inputs.values} if case.weights_need else {}
    if case.norm_needs:
        leaves |= inputs.norm_parameters
    if stacked and any(case.states_need):
        leaves["stacked"] = inputs.hidden_states
    elif not stacked:
        leaves |= {
            layer: inputs.hidden_states[layer]
            for layer, needs in zip(case.plan.sources, case.states_need, strict=True)
            if needs
        }
    if not leaves:
        return None, {}, {}
    grads = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), inputs.grad_out), strict=True))
    for name, grad in grads.items():
        assert grad.shape == leaves[name].shape and grad.dtype == leaves[name].dtype, f"gradient of {name}"
    grad_values = grads.pop("values", None)
    grad_norm = {name: grads.pop(name) for name in inputs.norm_parameters if name in grads}
    if "stacked" in grads:
        grads = dict(enumerate(grads["stacked"].unbind(0)))
        for layer in set(grads) - set(case.plan.sources):
            assert (grads.pop(layer) == 0).all(), f"layer {layer} is not read and has a gradient"
    for layer, grad in grads.items():
        assert (grad[:, : case.prefix] == 0).all(), f"a prefix row of layer {layer} has a gradient"
    return grad_values, {layer: grad[:, case.prefix :] for layer, grad in grads.items()}, grad_norm


def compare(case: Case, actual: Results, inputs: Inputs, limits: Limits, states_stored: int = 0) -> None:
    """Every element within its bound, see :mod:`fuzz.formula`; the gradients of the states are stored so often on their way."""
    exact, magnitude = exact_results(case, inputs), magnitudes(case, inputs)
    terms = roundings_of_a_mix(case)
    within("output", actual.out, exact.out, magnitude.out, terms, limits)
    # Between mix and norm, the backward stores the mix, which is in both factors of a product of the norm's gradient, and its
    # own gradient, once in the dtype of the output and once in that of the states.
    behind = () if case.norm is None else (case.out_dtype,) * 3 + (case.dtype,)
    rows = case.batch * case.patches
    for name, grad in actual.grad_norm.items():
        expected = exact.grad_norm[name], magnitude.grad_norm[name]
        within(f"gradient of the norm's {name}", grad, *expected, terms + 4 * round(rows**0.5), limits, stored=behind)
    for layer, grad in actual.grad_states.items():
        expected = exact.grad_states[layer], magnitude.grad_states[layer]
        within(f"gradient of layer {layer}", grad, *expected, terms, limits, stored=(case.dtype,) * states_stored + behind)
    if actual.grad_values is not None:
        per_token = case.sharing in ("token", "sparse")
        images = case.batch if case.sharing == "all" else 1
        products = case.width * (1 if per_token else case.patches) * images
        within(
            "gradient of the weights",
            actual.grad_values,
            exact.grad_values,
            magnitude.grad_values,
            terms
            + 4
            * round(products**0.5),  # a long sum in any order but the worst (Higham and Mary, SIAM J. Sci. Comput. 41, 2019)
            limits,
            stored=(case.dtype, *behind),  # the group means, which a frozen tower keeps for the backward
        )


def roundings_of_a_mix(case: Case) -> int:
    """Roundings that a term of a slot, or of a gradient, can take part in."""
    largest = max((len(group) for group in case.plan.program.groups), default=0)
    norms = 2 * case.width + 16 if case.plan.program.has_norms else 0
    norms += 2 * case.width * len(case.plan.slots) + 16 if case.norm is not None else 0
    return largest + case.plan.num_groups + len(case.plan.slots) + case.num_columns + 8 + norms


def within(
    what: str,
    actual: Tensor,
    exact: Tensor,
    magnitude: Tensor,
    roundings: int,
    limits: Limits,
    stored: tuple[torch.dtype, ...] = (),
) -> None:
    """Assert the bound: roundings of the arithmetic times the magnitude, and one rounding of the result at its store.

    Args:
        stored: the dtypes in which factors of the products, or parts of the sum, were stored in between.
    """
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)} instead of {tuple(exact.shape)}"
    assert actual.isfinite().all(), f"{what}: not finite"
    arithmetic = torch.float64 if {actual.dtype, *stored} == {torch.float64} else torch.float32
    bound = roundings * unit(arithmetic) * magnitude
    for dtype in stored:
        bound = bound + store_unit(dtype, limits) * magnitude
    bound = bound + store_unit(actual.dtype, limits) * (exact.abs() + bound) + smallest(actual.dtype)
    error = (actual.double() - exact).abs()
    assert (error <= bound).all(), (
        f"{what}: {(error / bound).max():.3g} times the error that rounding allows; worst error {error.max():.3e}"
    )


def unit(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def store_unit(dtype: torch.dtype, limits: Limits) -> float:
    return unit(dtype) * (2 if limits.truncates and dtype == torch.bfloat16 else 1)


def smallest(dtype: torch.dtype) -> float:
    """What the dtype cannot resolve near zero: its smallest subnormal, or the smallest normal where that is negligible."""
    return min(torch.finfo(dtype).smallest_normal, 2.0**-24)


def bits(tensor: Tensor) -> Tensor:
    """A copy to compare bit for bit, NaN included."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    return tensor.detach().clone(memory_format=torch.contiguous_format).view(integer)
