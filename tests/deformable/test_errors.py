"""What is refused, and that the message names the argument, what it is, and what it should be."""

import pytest
import torch

from igva_kernels.deformable import MultiScaleDeformableAttention, ms_deform_attn
from igva_kernels.deformable import multi_scale_deformable_attention as attention

SHAPES = [(2, 3), (1, 2)]


@pytest.fixture
def arguments(make_inputs):
    inputs = make_inputs(SHAPES)
    return dict(zip(("value", "spatial_shapes", "sampling_locations", "attention_weights"), inputs, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"value": [1.0]}, TypeError, "value must be a tensor, got list"),
        ({"value": torch.zeros(2, 8, 3, 6, dtype=torch.int32)}, TypeError, "value must be floating point, got torch.int32"),
        ({"value": torch.zeros(2, 8, 18)}, ValueError, r"value has the shape \(2, 8, 18\), expected 4 dimensions"),
        ({"value": torch.zeros(2, 9, 3, 6)}, ValueError, "S = 9 cells, but the levels .* have 8 together"),
        ({"value": torch.zeros(2, 8, 3, 0)}, ValueError, "heads and channels .* must be at least 1"),
        ({"value": torch.zeros(2, 8, 3, 6, device="meta")}, ValueError, "sampling_locations is on cpu, value on meta"),
        ({"spatial_shapes": []}, ValueError, "at least one level"),
        ({"spatial_shapes": [(2, 3, 1), (1, 2)]}, ValueError, "height, width"),
        ({"spatial_shapes": [(2.0, 3), (1, 2)]}, TypeError, r"spatial_shapes\[0\] must be two ints"),
        ({"spatial_shapes": [(8, 1), (0, 2)]}, ValueError, r"spatial_shapes\[1\] = \(0, 2\) has no cell"),
        ({"spatial_shapes": torch.zeros(2, 2)}, ValueError, r"spatial_shapes must be \(L, 2\) integers.*torch.float32"),
        ({"spatial_shapes": [(2, 4)]}, ValueError, r"sampling_locations has the shape .* and 1 levels"),
        ({"sampling_locations": torch.zeros(2, 5, 3, 2, 2, 3)}, ValueError, r"expected \(B, Q, H, L, P, 2\)"),
        ({"sampling_locations": torch.zeros(2, 5, 3, 2, 0, 2)}, ValueError, "P = 0"),
        ({"attention_weights": torch.zeros(2, 5, 3, 2, 1)}, ValueError, r"attention_weights has the shape .*\(2, 5, 3, 2, 2\)"),
        ({"impl": "cuda"}, ValueError, "impl must be one of 'auto', 'reference', 'torch', 'triton', got 'cuda'"),
    ],
)
def test_refused(change, error, message, arguments):
    with pytest.raises(error, match=message):
        attention(**{**arguments, **change})


def test_level_start_index_must_be_that_of_the_shapes(make_inputs):
    value, _, locations, weights = make_inputs(SHAPES)
    expected = attention(value, SHAPES, locations, weights)
    for right in (None, [0, 6], torch.tensor([0, 6])):
        assert torch.equal(ms_deform_attn(value, SHAPES, right, locations, weights, 64), expected)
    for wrong in ([0, 5], torch.tensor([2, 0])):
        with pytest.raises(ValueError, match=r"level_start_index is .*begin at \[0, 6\]"):
            ms_deform_attn(value, SHAPES, wrong, locations, weights, 64)
        with pytest.raises(ValueError, match="level_start_index"):
            MultiScaleDeformableAttention()(value, None, SHAPES, wrong, locations, weights, 64)


def test_a_named_implementation_does_not_give_way(make_inputs):
    """Here without a GPU and without the interpreter; with a GPU the tensors are still on the CPU."""
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match=r'impl="triton" cannot run this input.*cpu'):
        attention(*make_inputs(SHAPES), impl="triton")
