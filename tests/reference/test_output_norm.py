"""A norm behind the mix: values, gradients, operators, errors."""

import pytest
import torch
from torch.nn import functional

from igva_kernels import FusionPlan, OutputNorm, SparseWeights, fuse, mix, reduce_groups

IMPLEMENTATIONS = ["reference", "torch", "auto"]
TGIF, VIP_LLAVA = FusionPlan.tgif(4), FusionPlan.layers(4, (-2, -3, 1))
NORMS = ["layer", "layer without bias", "layer without parameters", "rms", "rms without weight"]


def make_norm(form, num_channels, dtype=torch.float64, **options):
    kind = form.split()[0]
    weight = None if form in ("layer without parameters", "rms without weight") else torch.randn(num_channels).to(dtype)
    bias = torch.randn(num_channels).to(dtype) if form == "layer" else None
    return OutputNorm(weight, bias, kind=kind, **options)


def normalised(rows, norm):
    """torch's own, in the dtype of its arguments."""
    if norm.kind == "rms":
        return functional.rms_norm(rows, rows.shape[-1:], norm.weight, norm.eps)
    return functional.layer_norm(rows, rows.shape[-1:], norm.weight, norm.bias, norm.eps)


def cast(norm, dtype):
    return norm._replace(
        **{name: None if getattr(norm, name) is None else getattr(norm, name).to(dtype) for name in ("weight", "bias")}
    )


def parameters_of(norm):
    return [each for each in (norm.weight, norm.bias) if each is not None]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("form", NORMS)
def test_is_the_published_formula(plan, impl, form, make_states, make_weights, formula):
    states, weights = make_states(plan), make_weights(plan)
    norm = make_norm(form, plan.num_slots * 6, eps=1e-3)
    out = fuse(states, plan, weights, num_prefix_tokens=1, output_norm=norm, impl=impl)
    expected = normalised(formula(states, plan, weights, 1), norm)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert out.is_contiguous()
    means = reduce_groups(states, plan, num_prefix_tokens=1, summary="mean_patch", impl=impl)
    assert torch.equal(mix(means, plan, weights, output_norm=norm, impl=impl), out)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["layer", "rms"])
def test_is_as_exact_as_mix_and_norm_apart_with_all_gradients(
    impl, dtype, form, plan, make_states, make_weights, formula, assert_as_exact_as
):
    states, weights = make_states(plan, width=37, dtype=dtype), make_weights(plan, dtype=torch.float32)
    norm = make_norm(form, plan.num_slots * 37, dtype)

    def results(one_pass, dtype, weights_dtype):
        leaves = [state.to(dtype).requires_grad_() for state in states]
        w = None if weights is None else weights.to(weights_dtype).requires_grad_()
        own = cast(norm, dtype)
        learned = [each.requires_grad_() for each in parameters_of(own)]
        out = one_pass(leaves, w, own)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        wanted = [leaves[layer] for layer in plan.sources] + learned + ([] if w is None else [w])
        return [out, *torch.autograd.grad(out, wanted, cotangent.to(dtype))]

    def fused(leaves, w, own):
        return fuse(leaves, plan, w, num_prefix_tokens=1, output_norm=own, impl=impl)

    def apart(leaves, w, own):
        return normalised(fuse(leaves, plan, w, num_prefix_tokens=1, impl="torch"), own)

    def exact(leaves, w, own):
        return normalised(formula(leaves, plan, w, 1), own)

    actual, same_dtype = results(fused, dtype, torch.float32), results(apart, dtype, torch.float32)
    for position, (one, two, true) in enumerate(
        zip(actual, same_dtype, results(exact, torch.float64, torch.float64), strict=True)
    ):
        # Four more roundings: mix and gradient are kept in the dtype between norm and mix, here as there, and sums over
        # rows and channels run in another order. They move the gradient of weights in float32 as well.
        slack = 4.0 * torch.finfo(dtype).eps / torch.finfo(one.dtype).eps
        assert_as_exact_as(one.detach(), two.detach(), true.detach(), slack=slack, what=f"result {position}")
    assert actual[0].dtype == dtype


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_sum_is_not_rounded_before_the_norm(impl, make_states):
    """Close to a large mean, bfloat16 has no digits left for what the norm is to bring out."""
    states = [1000 + state for state in make_states(TGIF, width=64, dtype=torch.float32)]
    weights = torch.full((4,), 0.25)
    states = [state.bfloat16() for state in states]
    exact = normalised(sum(state[:, 1:].double() * 0.25 for state in states[1:]) + states[3][:, 1:].double(), OutputNorm())
    out = fuse(states, TGIF, weights, num_prefix_tokens=1, output_norm=OutputNorm(), impl=impl)
    apart = normalised(fuse(states, TGIF, weights, num_prefix_tokens=1, impl=impl), OutputNorm())
    assert (out - exact).abs().max() < 2**-6 < (apart - exact).abs().max()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_leaves_in_the_dtype_of_its_parameters(impl, make_states):
    states = make_states(VIP_LLAVA, width=8, dtype=torch.bfloat16)
    norm = make_norm("layer", 24, torch.float32)
    out = fuse(states, VIP_LLAVA, num_prefix_tokens=1, output_norm=norm, impl=impl)
    concatenated = torch.cat([states[layer][:, 1:].float() for layer in (3, 2, 1)], -1)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, normalised(concatenated, norm))
    out = fuse(states, VIP_LLAVA, num_prefix_tokens=1, output_norm=OutputNorm(), impl=impl)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize("impl", IMPLEMENTATIONS[:2])
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("plan_of_case", [TGIF, VIP_LLAVA], ids=["tgif", "vip_llava"])
def test_gradcheck_whatever_needs_a_gradient(impl, kind, plan_of_case, make_states, make_weights):
    plan = plan_of_case
    states = make_states(plan, batch=2, tokens=3, width=2)
    weights = make_weights(plan, batch=2)
    norm = make_norm(kind, plan.num_slots * 2)
    values = [*states, *parameters_of(norm), *([] if weights is None else [weights])]
    names = ["states"] * len(states) + ["norm"] * len(parameters_of(norm)) + ["weights"]

    def function(*values):
        values = list(values)
        own = values[: len(states)]
        parameters = values[len(states) : len(states) + len(parameters_of(norm))]
        w = values[-1] if weights is not None else None
        moved = norm._replace(weight=parameters[0], bias=parameters[1] if len(parameters) > 1 else None)
        return fuse(own, plan, w, num_prefix_tokens=1, output_norm=moved, impl=impl)

    for needed in ({"states", "norm", "weights"}, {"norm"}, {"weights"}, {"states"}):
        leaves = [value.detach().requires_grad_(name in needed) for value, name in zip(values, names, strict=False)]
        if any(leaf.requires_grad for leaf in leaves):
            assert torch.autograd.gradcheck(function, leaves, fast_mode=True), needed


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_sparse_weights_and_what_no_token_names(impl, make_states, formula):
    plan = FusionPlan.mixture_of_layers(4)
    states = make_states(plan, dtype=torch.float32)
    indices = torch.randint(0, 3, (3, 6, 2))  # never column 3, which is h4
    states[4].fill_(float("inf"))
    states[0].fill_(float("nan"))  # not in the plan
    for state in states:
        state[:, 0] = float("nan")  # the prefix
    values = torch.randn(3, 6, 2, requires_grad=True)
    norm = cast(make_norm("layer", 6), torch.float32)
    out = fuse(states, plan, SparseWeights(values, indices), num_prefix_tokens=1, output_norm=norm, impl=impl)
    dense = torch.zeros(3, 6, 4).scatter_add(2, indices, values)
    clean = [torch.zeros_like(state) if n in (0, 4) else state for n, state in enumerate(states)]
    expected = normalised(formula([state[:, 1:] for state in clean], plan, dense, 0), norm)
    torch.testing.assert_close(out, expected)
    cotangent = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, values, cotangent)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, values, cotangent)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("batch", [0, 1])
def test_no_image_and_one_image(impl, batch, make_states, make_weights):
    states = make_states(TGIF, batch=batch, dtype=torch.float32)
    weights = make_weights(TGIF, batch=batch, dtype=torch.float32).requires_grad_()
    norm = cast(make_norm("layer", 6), torch.float32)
    norm.weight.requires_grad_()
    out = fuse(states, TGIF, weights, num_prefix_tokens=1, output_norm=norm, impl=impl)
    assert out.shape == (batch, 6, 6)
    out.sum().backward()
    assert weights.grad.shape == weights.shape and norm.weight.grad.isfinite().all()


@pytest.mark.parametrize("form", ["layer", "rms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_of_any_size_give_the_same(dtype, form, monkeypatch, make_states, make_weights):
    from igva_kernels.impl import cpu_tiles, output_norm

    states, weights = make_states(TGIF, dtype=dtype), make_weights(TGIF, "per_token", dtype=torch.float32)
    norm = cast(make_norm(form, 6), dtype)
    norm.weight.requires_grad_()

    def run():
        out = fuse(states, TGIF, weights, num_prefix_tokens=1, output_norm=norm, impl="torch")
        return out, torch.autograd.grad(out.square().sum(), norm.weight)[0]

    whole, whole_grad = run()
    for elements in (1, 20, 60):
        monkeypatch.setattr(cpu_tiles, "TILE_ELEMENTS", elements)
        monkeypatch.setattr(output_norm, "BACKWARD_TILE_ELEMENTS", elements)
        out, grad = run()
        torch.testing.assert_close(out, whole)
        torch.testing.assert_close(grad, whole_grad)


# ---- operators ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["layer", "rms without weight"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("plan_of_case", [TGIF, VIP_LLAVA], ids=["tgif", "vip_llava"])
def test_opcheck(form, frozen, plan_of_case, make_states, make_weights):
    plan = plan_of_case
    states, weights = make_states(plan), make_weights(plan)
    norm = make_norm(form, plan.num_slots * 6)
    needed = [*parameters_of(norm), *([] if weights is None else [weights]), *([] if frozen else states)]
    for tensor in needed:
        tensor.requires_grad_()
    read = [states[layer] for layer in plan.sources]
    save_means = frozen and weights is not None
    arguments = (read, weights, None, *norm, plan.program.encode(), 1, save_means, True, None, "auto")
    torch.library.opcheck(torch.ops.igva.fuse_normalised.default, arguments)
    out, _, mixed, statistics = torch.ops.igva.fuse_normalised(*arguments)
    backward = (torch.randn_like(out), mixed.detach(), statistics.detach(), *norm, not frozen, True, True, "auto")
    torch.library.opcheck(torch.ops.igva.output_norm_backward.default, backward, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("trainable_tower", [False, True])
@pytest.mark.parametrize("form", ["layer", "rms without weight"])
def test_compiled_in_one_graph_equals_eager_with_gradients(trainable_tower, form, make_states, make_weights):
    states = [state.requires_grad_(trainable_tower) for state in make_states(TGIF, dtype=torch.float32)]
    weights = make_weights(TGIF, dtype=torch.float32).requires_grad_()
    norm = cast(make_norm(form, 6), torch.float32)
    learned = [each.requires_grad_() for each in parameters_of(norm)]

    def function(hidden_states, weights, norm):
        means = reduce_groups(hidden_states, TGIF, num_prefix_tokens=1, summary="mean_patch")
        fused = fuse(hidden_states, TGIF, weights, num_prefix_tokens=1, output_norm=norm)
        return fused.sin() + mix(means, TGIF, weights, output_norm=norm)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    inputs = [weights, *learned, *(states[1:] if trainable_tower else [])]
    actual, expected = compiled(states, weights, norm), function(states, weights, norm)
    torch.testing.assert_close(actual, expected)
    cotangent = torch.randn_like(expected)
    for got, want in zip(
        torch.autograd.grad(actual, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_export_keeps_the_operator(make_states):
    class Fusion(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.LayerNorm(18, dtype=torch.float64)

        def forward(self, hidden_states):
            norm = OutputNorm(self.norm.weight, self.norm.bias)
            return fuse(hidden_states, VIP_LLAVA, num_prefix_tokens=1, output_norm=norm)

    states, module = make_states(VIP_LLAVA), Fusion()
    exported = torch.export.export(module, (states,))
    assert any(node.target is torch.ops.igva.fuse_normalised.default for node in exported.graph.nodes)
    assert torch.equal(exported.module()(states), module(states))


# ---- errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "error", "words"),
    [
        ((torch.ones(18), None), TypeError, ["output_norm", "OutputNorm", "tuple"]),
        (OutputNorm(torch.ones(6)), ValueError, ["output_norm.weight", "(6,)", "(18,)"]),
        (OutputNorm(None, torch.ones(18, device="meta")), ValueError, ["output_norm.bias", "meta", "cpu"]),
        (OutputNorm([1.0] * 18), TypeError, ["output_norm.weight", "list"]),
        (OutputNorm(torch.ones(18, dtype=torch.int32)), TypeError, ["output_norm.weight", "int32"]),
        (OutputNorm(torch.ones(18).double()), ValueError, ["output_norm.weight", "float64", "float32", ".float()"]),
        (OutputNorm(torch.ones(18), torch.ones(18).bfloat16()), ValueError, ["float32", "bfloat16", "agree"]),
        (OutputNorm(None, torch.ones(18), kind="rms"), ValueError, ["output_norm.bias", "rms"]),
        (OutputNorm(kind="batch"), ValueError, ["output_norm.kind", "'layer'", "'rms'", "'batch'"]),
        (OutputNorm(eps=-1.0), ValueError, ["output_norm.eps", "-1.0"]),
    ],
)
def test_what_does_not_fit_is_named(norm, error, words, make_states):
    states = make_states(VIP_LLAVA, dtype=torch.float32)
    calls = (
        lambda: fuse(states, VIP_LLAVA, num_prefix_tokens=1, output_norm=norm),
        lambda: mix(reduce_groups(states, VIP_LLAVA, num_prefix_tokens=1), VIP_LLAVA, output_norm=norm),
    )
    for call in calls:
        with pytest.raises(error) as caught:
            call()
        for word in words:
            assert word in str(caught.value), f"{word!r} is missing in: {caught.value}"
