"""The calls of other code bases."""

import pytest
import torch

from igva_kernels.deformable import MultiScaleDeformableAttention, ms_deform_attn
from igva_kernels.deformable import multi_scale_deformable_attention as attention

SHAPES = [(4, 3), (2, 2)]


def test_a_tensor_of_shapes(make_inputs):
    value, _, locations, weights = make_inputs(SHAPES)
    shapes = torch.tensor(SHAPES)
    expected = attention(value, SHAPES, locations, weights)
    assert torch.equal(attention(value, shapes, locations, weights), expected)
    assert torch.equal(ms_deform_attn(value, shapes, torch.tensor([0, 12]), locations, weights, 64), expected)


def test_three_images_need_no_im2col_step_that_divides_them(make_inputs):
    inputs = make_inputs(SHAPES, batch=3)
    out = ms_deform_attn(inputs.value, SHAPES, None, inputs.locations, inputs.weights, 2)
    assert torch.equal(out, attention(*inputs))


def test_in_the_detector_of_transformers(assert_as_exact_as):
    """A layer of transformers with its ``attn`` replaced: the same output, and the same gradient of every parameter."""
    detr = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    config = detr.DeformableDetrConfig(d_model=16, num_feature_levels=2, encoder_attention_heads=4)
    layer = detr.DeformableDetrMultiscaleDeformableAttention(config, num_heads=4, n_points=3)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    cells, queries = sum(height * width for height, width in SHAPES), 5
    call = {
        "hidden_states": torch.randn(2, queries, 16),
        "encoder_hidden_states": torch.randn(2, cells, 16),
        "reference_points": torch.rand(2, queries, 2, 2),
        "spatial_shapes": torch.tensor(SHAPES),
        "spatial_shapes_list": SHAPES,
        "level_start_index": torch.tensor([0, 12]),
    }

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        layer.to(dtype).zero_grad()
        cast = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in call.items()}
        output, _ = layer(**cast)
        output.square().sum().backward()
        return [output.detach(), *(parameter.grad.clone() for parameter in layer.parameters())]

    exact, same = run(torch.float64), run(torch.float32)
    assert type(layer.attn).__name__ == MultiScaleDeformableAttention.__name__
    layer.attn = MultiScaleDeformableAttention()
    names = ["output", *(name for name, _ in layer.named_parameters())]
    for name, got, own, want in zip(names, run(torch.float32), same, exact, strict=True):
        assert_as_exact_as(got, own, want, slack=8, what=name)


def test_importing_needs_neither_triton_nor_transformers():
    import subprocess
    import sys

    code = "import sys, igva_kernels.deformable; print(sorted({'triton', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
