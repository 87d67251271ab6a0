"""What torch sees of the operator: schema, fake tensors, autograd, torch.compile, export, autocast."""

import pytest
import torch

from igva_kernels.deformable import multi_scale_deformable_attention as attention

IMPLS = ("reference", "torch")
SHAPES = [(3, 4), (2, 2)]


@pytest.mark.parametrize("impl", IMPLS)
def test_opcheck(impl, make_inputs):
    inputs = make_inputs(SHAPES).leaves()
    operator = torch.ops.igva.deformable_attention.default
    torch.library.opcheck(operator, (inputs.value, inputs.sizes, inputs.locations, inputs.weights, None, impl))


def test_opcheck_of_the_backward_operator(make_inputs):
    inputs = make_inputs(SHAPES)
    grad, tensors = torch.randn(2, 5, 18, dtype=torch.float64), inputs.tensors
    # Opaque to autograd: gradients of gradients are not defined, so only schema and fake tensors are checked.
    for needs in ([True, True, True], [True, False, False], [False, True, False]):
        torch.library.opcheck(
            torch.ops.igva.deformable_attention_backward.default,
            (grad, tensors[0], inputs.sizes, tensors[1], tensors[2], needs, True, "torch"),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.parametrize("impl", IMPLS)
def test_gradcheck(impl, make_inputs):
    inputs = make_inputs(SHAPES, batch=1, queries=3, heads=2, channels=3).leaves()
    assert torch.autograd.gradcheck(
        lambda value, locations, weights: attention(value, SHAPES, locations, weights, impl=impl), inputs.tensors
    )


def test_compiled_in_one_graph_equals_eager_with_gradients(make_inputs):
    inputs = make_inputs(SHAPES).leaves()

    def function(value, locations, weights):
        return attention(value * 2, SHAPES, locations, weights.softmax(-1)).sin()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(*inputs.tensors), function(*inputs.tensors)
    torch.testing.assert_close(actual, expected)
    cotangent = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs.tensors, cotangent), torch.autograd.grad(expected, inputs.tensors, cotangent)
    )


def test_compiled_once_for_maps_of_every_size(make_inputs):
    """A detector's images differ in size: the spatial shapes are data of the operator, not constants."""
    frames = 0

    def count(graph, example_inputs):
        nonlocal frames
        frames += 1
        return graph.forward

    compiled = torch.compile(attention, fullgraph=True, backend=count, dynamic=True)
    for shapes in ([(3, 4), (2, 2)], [(5, 4), (3, 2)], [(7, 9), (4, 5)]):
        value, _, locations, weights = make_inputs(shapes)
        assert torch.equal(compiled(value, shapes, locations, weights), attention(value, shapes, locations, weights))
    assert frames == 1


def test_export_keeps_the_operator(make_inputs):
    class Attention(torch.nn.Module):
        def forward(self, value, locations, weights):
            return attention(value, SHAPES, locations, weights)

    inputs = make_inputs(SHAPES)
    exported = torch.export.export(Attention(), inputs.tensors)
    assert any(node.target is torch.ops.igva.deformable_attention.default for node in exported.graph.nodes)
    assert torch.equal(exported.module()(*inputs.tensors), attention(*inputs))


def test_autocast_leaves_dtypes_and_values_alone(make_inputs):
    inputs = make_inputs(SHAPES).to(torch.float32)
    expected = attention(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(*inputs)
    assert out.dtype == torch.float32
    assert torch.equal(out, expected)
