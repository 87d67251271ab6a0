"""The MMFuser block and the attention layer that it is made of. Their equality with the released code is in tests/golden."""

import math

import pytest
import torch

from igva_kernels.modules import DeformableAttention, MMFuserFusion
from igva_kernels.modules.deformable_attention import centres_of_cells

LAYERS, DEPTH, WIDTH = (1, 2, 4), 4, 8


@pytest.fixture
def fusion():
    fusion = MMFuserFusion(LAYERS, WIDTH, num_heads=2, num_points=2, num_layers=DEPTH)
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return fusion


def states_of(patches, prefix=1, batch=2, dtype=torch.float32):
    return [torch.randn(batch, prefix + patches, WIDTH, dtype=dtype) if i in LAYERS else None for i in range(DEPTH + 1)]


def test_sizes_of_the_released_block():
    fusion = MMFuserFusion()
    assert fusion.layers == (3, 8, 13, 18, 23)
    assert sum(parameter.numel() for parameter in fusion.parameters()) == 5_190_592


def test_begins_as_the_identity_and_learns_the_outer_scale_first():
    fusion = MMFuserFusion(LAYERS, WIDTH, num_heads=2, num_layers=DEPTH)
    states = states_of(9)
    output = fusion(states, num_prefix_tokens=1)
    assert torch.equal(output, states[4][:, 1:])
    output.sum().backward()
    assert {name for name, parameter in fusion.named_parameters() if parameter.grad.any()} == {"cross_scale"}


def test_initial_offsets_are_a_ring_and_weights_equal():
    attention = DeformableAttention(16, num_levels=2, num_heads=8, num_points=3)
    ring = attention.sampling_offsets.bias.view(8, 2, 3, 2)
    for head in range(8):
        direction = torch.tensor([math.cos(head * math.pi / 4), math.sin(head * math.pi / 4)])
        direction /= direction.abs().max()
        for point in range(3):
            torch.testing.assert_close(ring[head, :, point], ((point + 1) * direction).expand(2, 2), atol=1e-5, rtol=0)
    assert not attention.sampling_offsets.weight.any() and not attention.attention_weights.weight.any()


def test_state_dict_of_transformers_loads_unchanged():
    detr = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    config = detr.DeformableDetrConfig(d_model=16, num_feature_levels=2, encoder_attention_heads=4)
    theirs = detr.DeformableDetrMultiscaleDeformableAttention(config, num_heads=4, n_points=3)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = DeformableAttention(16, num_levels=2, num_heads=4, num_points=3)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    shapes, query, source, points = [(4, 3), (2, 2)], torch.randn(2, 5, 16), torch.randn(2, 16, 16), torch.rand(2, 5, 2, 2)
    expected, _ = theirs(
        hidden_states=query,
        encoder_hidden_states=source,
        reference_points=points,
        spatial_shapes=torch.tensor(shapes),
        spatial_shapes_list=shapes,
        level_start_index=None,
    )
    torch.testing.assert_close(ours(query, points, source, shapes), expected)


def test_centres_of_cells_are_x_then_y_row_by_row():
    centres = centres_of_cells(2, 4, torch.empty(0))
    assert centres.shape == (1, 8, 1, 2)
    assert centres[0, 5, 0].tolist() == [1.5 / 4, 1.5 / 2]


def test_a_map_that_is_not_square(fusion):
    """Turning the map, the offsets and all sources turns the output."""
    states = states_of(6, prefix=0)
    out = fusion(states, num_prefix_tokens=0, grid=(2, 3)).view(2, 2, 3, WIDTH)

    def turn(state):
        return None if state is None else state.view(2, 2, 3, WIDTH).transpose(1, 2).flatten(1, 2)

    with torch.no_grad():
        for attention in (fusion.cross_attn, fusion.self_attn):
            for parameter in attention.sampling_offsets.parameters():
                parameter.copy_(parameter.unflatten(0, (-1, 2)).flip(1).flatten(0, 1))
    turned = fusion([turn(state) for state in states], num_prefix_tokens=0, grid=(3, 2)).view(2, 3, 2, WIDTH)
    torch.testing.assert_close(turned.transpose(1, 2), out)


def test_prefix_rows_are_not_read(fusion):
    states = states_of(9, prefix=2)
    out = fusion(states, num_prefix_tokens=2)
    for state in states:
        if state is not None:
            state[:, :2] = float("nan")
    assert torch.equal(fusion(states, num_prefix_tokens=2), out)


def test_16_bits_throughout(fusion):
    states = [None if state is None else state.double() for state in states_of(9)]
    exact = fusion.double()(states, num_prefix_tokens=1)
    low = [None if state is None else state.bfloat16() for state in states]
    out = fusion.bfloat16()(low, num_prefix_tokens=1)
    assert out.dtype == torch.bfloat16
    assert (out.double() - exact).abs().max() < 0.05 * exact.abs().max()  # parameters and states are rounded


def test_under_autocast(fusion):
    states = states_of(9)
    exact = fusion(states, num_prefix_tokens=1)
    with torch.autocast("cpu", torch.bfloat16):
        out = fusion(states, num_prefix_tokens=1)
    assert (out - exact).abs().max() < 0.05 * exact.abs().max()


def test_compiled_in_one_graph_equals_eager_with_gradients(fusion):
    states, cotangent = states_of(9), torch.randn(2, 9, WIDTH)

    def gradients(function):
        out = function(states, num_prefix_tokens=1)
        return [out, *torch.autograd.grad(out, list(fusion.parameters()), cotangent)]

    torch.testing.assert_close(gradients(torch.compile(fusion, fullgraph=True, backend="aot_eager")), gradients(fusion))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (3,)}, "at least one layer to look at"),
        ({"layers": (3, 25)}, "layers names 25, but a tower of 24 layers has the hidden states 0 to 24"),
        ({"layers": (3, -26)}, "layers names -26"),
        ({"vision_dim": 1000}, "dim=1000 is not divisible by num_heads=16"),
        ({"num_points": 0}, "num_points must be at least 1, got 0"),
    ],
)
def test_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        MMFuserFusion(**options)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda s: s[:-1], {}, "hidden_states has 4 entries, but a tower of 4 layers has 5"),
        (lambda s: [None, None, *s[2:]], {}, r"hidden_states\[1\] is None, but the fusion reads the layers \[1, 2, 4\]"),
        (lambda s: [*s[:4], s[4][:, 1:]], {}, r"hidden_states\[4\] has the shape .* expected \(B, T, D\) = \(2, 7, 8\)"),
        (lambda s: [None, s[1][..., :4], *s[2:]], {}, r"hidden_states\[1\] has the shape \(2, 7, 4\)"),
        (lambda s: s, {}, r"N = 6 patches are no square map; pass grid=\(height, width\)"),
        (lambda s: s, {"grid": (2, 4)}, r"grid=\(2, 4\) has 8 cells, but there are N = 6 patches"),
        (lambda s: s, {"num_prefix_tokens": 7}, "num_prefix_tokens=7 leaves no patch of 7 tokens"),
    ],
)
def test_refused_at_the_call(change, options, message, fusion):
    with pytest.raises(ValueError, match=message):
        fusion(change(states_of(6)), **{"num_prefix_tokens": 1, **options})
