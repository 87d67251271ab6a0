"""What torch sees of the operators: schemas, fake tensors, autograd, torch.compile, autocast."""

import pytest
import torch

from igva_kernels import FusionPlan, fuse, group_summaries, mix, reduce_groups


def leaves_of(states, weights):
    return [state.requires_grad_() for state in states], None if weights is None else weights.requires_grad_()


@pytest.mark.parametrize("frozen", [False, True])
def test_opcheck_of_fuse(plan, frozen, make_states, make_weights):
    states, weights = make_states(plan), make_weights(plan)
    read = [states[layer] for layer in plan.sources]
    if not frozen:
        read, weights = leaves_of(read, weights)
    elif weights is not None:
        weights.requires_grad_()
    save_means = frozen and weights is not None
    torch.library.opcheck(
        torch.ops.igva.fuse.default, (read, weights, None, plan.program.encode(), 1, save_means, None, "auto")
    )


@pytest.mark.parametrize("summary", ["cls", "mean_patch"])
def test_opcheck_of_summaries_and_reduction(summary, make_states):
    plan = FusionPlan.igva(4, 2)
    states = [state.requires_grad_() for state in make_states(plan)[1:]]
    torch.library.opcheck(torch.ops.igva.group_summaries.default, (states, plan.summary_program.encode(), 1, summary, "auto"))
    torch.library.opcheck(torch.ops.igva.reduce_groups.default, (states, plan.program.encode(), 1, None, "auto"))


def test_opcheck_of_the_backward_operators(make_states, make_weights):
    plan = FusionPlan.igva(4, 2)
    states, weights, program = make_states(plan)[1:], make_weights(plan), plan.program.encode()
    grad = torch.randn(3, 6, 12, dtype=torch.float64)
    means = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    # Opaque to autograd: gradients of gradients are not defined, so only schema and fake tensors are checked.
    checks = ("test_schema", "test_faketensor")
    ops = torch.ops.igva
    torch.library.opcheck(
        ops.fuse_backward.default, (grad, states, None, weights, None, program, 1, 7, True, True, "auto"), test_utils=checks
    )
    torch.library.opcheck(
        ops.fuse_backward.default, (grad, [], means, weights, None, program, 1, 7, True, False, "auto"), test_utils=checks
    )
    torch.library.opcheck(ops.reduce_groups_backward.default, (means, [], program, 1, 7, "auto"), test_utils=checks)
    torch.library.opcheck(
        ops.group_summaries_backward.default,
        (torch.randn(3, 2, 6, dtype=torch.float64), plan.summary_program.encode(), 1, 7, "cls", "auto"),
        test_utils=checks,
    )


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("shape", ["shared", "per_image", "per_token"])
def test_gradcheck(impl, shape, make_states, make_weights):
    plan = FusionPlan.igva(4, 2)
    states = make_states(plan, batch=2, tokens=4, width=3)
    states, weights = leaves_of(states, make_weights(plan, shape, batch=2, patches=3))
    assert torch.autograd.gradcheck(
        lambda w, *h: fuse(h, plan, w, num_prefix_tokens=1, impl=impl), (weights, *states), fast_mode=False
    )
    frozen = [state.detach() for state in states]
    assert torch.autograd.gradcheck(lambda w: fuse(frozen, plan, w, num_prefix_tokens=1, impl=impl), (weights,))
    assert torch.autograd.gradcheck(lambda *h: group_summaries(h, plan, num_prefix_tokens=1, impl=impl), tuple(states))


@pytest.mark.parametrize("trainable_tower", [False, True])
def test_compiled_in_one_graph_equals_eager_with_gradients(trainable_tower, make_states, make_weights):
    plan = FusionPlan.igva(4, 2)
    states, weights = make_states(plan, dtype=torch.float32), make_weights(plan, dtype=torch.float32).requires_grad_()
    for state in states:
        state.requires_grad_(trainable_tower)

    def function(hidden_states, weights):
        summaries = group_summaries(hidden_states, plan, num_prefix_tokens=1)
        two_steps = mix(reduce_groups(hidden_states, plan, num_prefix_tokens=1), plan, weights)
        return fuse(hidden_states, plan, weights * summaries.mean(), num_prefix_tokens=1).sin() + two_steps

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    inputs = [weights, *(states[1:] if trainable_tower else [])]
    actual, expected = compiled(states, weights), function(states, weights)
    torch.testing.assert_close(actual, expected)
    cotangent = torch.randn_like(expected)
    for got, want in zip(
        torch.autograd.grad(actual, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_a_compiled_fuse_takes_another_batch_size(make_states, make_weights):
    plan = FusionPlan.igva(4, 2)
    compiled = torch.compile(
        lambda h, w: fuse(h, plan, w, num_prefix_tokens=1), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for batch in (2, 3, 5):
        states, weights = make_states(plan, batch=batch), make_weights(plan, batch=batch)
        assert torch.equal(compiled(states, weights), fuse(states, plan, weights, num_prefix_tokens=1))


def test_export_keeps_the_operator(make_states, make_weights):
    plan = FusionPlan.igva(4, 2)

    class Fusion(torch.nn.Module):
        def forward(self, hidden_states, weights):
            return fuse(hidden_states, plan, weights, num_prefix_tokens=1)

    states, weights = make_states(plan), make_weights(plan)
    exported = torch.export.export(Fusion(), (states, weights))
    assert any(node.target is torch.ops.igva.fuse.default for node in exported.graph.nodes)
    assert torch.equal(exported.module()(states, weights), fuse(states, plan, weights, num_prefix_tokens=1))


def test_autocast_leaves_dtypes_and_values_alone(make_states, make_weights):
    plan = FusionPlan.igva(4, 2)
    states, weights = make_states(plan, dtype=torch.float32), make_weights(plan, dtype=torch.float32).requires_grad_()
    expected = fuse(states, plan, weights, num_prefix_tokens=1)
    with torch.autocast("cpu", torch.bfloat16):
        out = fuse(states, plan, weights, num_prefix_tokens=1)
        summaries = group_summaries(states, plan, num_prefix_tokens=1)
    assert out.dtype == summaries.dtype == torch.float32
    assert torch.equal(out, expected)


def test_weights_keep_float32_beside_bfloat16_states(make_states, formula, make_weights):
    plan = FusionPlan.igva(4, 2)
    states = make_states(plan, dtype=torch.bfloat16)
    weights = make_weights(plan, dtype=torch.float32).requires_grad_()
    out = fuse(states, plan, weights, num_prefix_tokens=1)
    exact = formula([state.double() for state in states], plan, weights.detach().double(), 1)
    # Half a bfloat16 epsilon relative to each value: the weights were not rounded on the way.
    assert ((out.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()
    out.float().sum().backward()
    assert weights.grad.dtype == torch.float32


def test_nothing_is_saved_and_nothing_warned_without_gradients(make_states, make_weights, recwarn):
    plan = FusionPlan.igva(4, 2)
    states, weights = make_states(plan), make_weights(plan).requires_grad_()
    with torch.no_grad():
        out = fuse(states, plan, weights, num_prefix_tokens=1)
    assert out.grad_fn is None
    assert not recwarn.list
