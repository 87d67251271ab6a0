"""IGVAFusion over group means, and images that share a sentence."""

from __future__ import annotations

import pytest
import torch

from igva_kernels import FusionPlan, reduce_groups
from igva_kernels.modules import IGVAFusion, WeightAllocator
from igva_kernels.towers import stream_group_means

PLAN = FusionPlan.igva(4, 2)


@pytest.fixture
def fusion() -> IGVAFusion:
    return IGVAFusion(PLAN, WeightAllocator(num_groups=2, vision_dim=32, text_dim=6, hidden_dim=16, num_blocks=2, num_heads=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_instruction", [True, False])
def test_a_streaming_tower_gives_the_result_of_the_tuple(make_case, tuple_of, fusion, dtype, with_instruction):
    case = make_case("dinov2", dtype=dtype)
    embeds = torch.randn(3, 6) if with_instruction else None
    ours = fusion.mix(stream_group_means(case.tower, case.pixel_values, PLAN), embeds)
    expected = fusion(tuple_of(case), embeds, num_prefix_tokens=1)
    assert torch.equal(ours.weights, expected.weights) and torch.equal(ours.fused, expected.fused)


def test_tiles_of_a_picture_share_its_sentence(make_case, tuple_of, fusion):
    # Two pictures: three tiles of the first, two of the second; the sentences are three, one without a picture.
    case = make_case("clip_vision_model", batch=5)
    embeds, owner = torch.randn(3, 6), torch.tensor([2, 2, 2, 0, 0])
    states = tuple_of(case)
    repeated = fusion(states, embeds[owner], num_prefix_tokens=1)
    assert not torch.allclose(repeated.weights[0], repeated.weights[1])  # each tile is weighed by its own summary
    for result in (
        fusion(states, embeds, num_prefix_tokens=1, image_to_sentence=owner),
        fusion.mix(stream_group_means(case.tower, case.pixel_values, PLAN), embeds, image_to_sentence=owner),
    ):
        assert torch.equal(result.weights, repeated.weights) and torch.equal(result.fused, repeated.fused)


def test_gradient_of_a_shared_sentence_is_the_sum_over_its_images(make_case, fusion):
    case = make_case("clip_vision_model", batch=5)
    group_means = stream_group_means(case.tower, case.pixel_values, PLAN)
    owner = torch.tensor([1, 0, 1, 1, 0])
    embeds = torch.randn(2, 6, dtype=torch.float64).requires_grad_()
    fusion.double()
    fusion.mix(group_means, embeds, image_to_sentence=owner).weights.square().sum().backward()
    each = embeds.detach()[owner].requires_grad_()
    fusion.mix(group_means, each).weights.square().sum().backward()
    torch.testing.assert_close(embeds.grad, torch.zeros(2, 6, dtype=torch.float64).index_add(0, owner, each.grad))


def test_gradients_reach_the_allocator(make_case, fusion):
    case = make_case("vit")
    fusion.mix(stream_group_means(case.tower, case.pixel_values, PLAN), torch.randn(3, 6)).fused.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in fusion.named_parameters() if "in_proj_bias" not in name)


@pytest.mark.parametrize(
    ("embeds", "owner", "error", "message"),
    [
        (None, torch.zeros(3, dtype=torch.long), ValueError, "without instruction_embeds"),
        (torch.zeros(2, 6), torch.zeros(3, dtype=torch.int32), TypeError, r"must be int64, got torch.int32"),
        (torch.zeros(2, 6), torch.zeros(2, dtype=torch.long), ValueError, r"shape \(2,\), expected \(B,\) = \(3,\)"),
        (torch.zeros(2, 6), torch.tensor([0, 1, 2]), IndexError, "out of range"),
        (torch.zeros(2, 6), None, ValueError, r"instruction_embeds has the shape \(2, 6\)"),
    ],
)
def test_maps_that_do_not_fit_are_refused(fusion, embeds, owner, error, message):
    states = [torch.randn(3, 5, 32) for _ in range(5)]
    with pytest.raises(error, match=message):
        fusion(states, embeds, num_prefix_tokens=1, image_to_sentence=owner)


def test_group_means_of_a_plan_without_weights_are_refused(fusion):
    states = [torch.randn(3, 5, 32) for _ in range(5)]
    with pytest.raises(ValueError, match="group_means has no summaries"):
        fusion.mix(reduce_groups(states, FusionPlan.igva_average(4, 2), num_prefix_tokens=1), None)
