"""The weight allocator and IGVAFusion: layout, maths, shapes. Equality with the official module is in tests/golden."""

import pytest
import torch

from igva_kernels import FusionPlan, fuse
from igva_kernels.allocator_layout import AllocatorSizes, first_parameter, row_matrix
from igva_kernels.modules import IGVAFusion, WeightAllocator

SMALL = {"num_groups": 2, "vision_dim": 8, "text_dim": 6, "hidden_dim": 12, "num_blocks": 2, "num_heads": 3}


def test_default_sizes_have_the_official_parameter_count_and_names():
    with torch.device("meta"):
        allocator = WeightAllocator()
    assert sum(parameter.numel() for parameter in allocator.parameters()) == 27_047_940
    names = set(allocator.state_dict())
    block = {f"transformers.3.cross_attention.{name}" for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight")}
    block |= {f"transformers.3.{name}" for name in ("ffn.0.weight", "ffn.2.bias", "norm1.weight", "norm2.bias")}
    assert block | {"sentence_proj.weight", "cls_proj.bias", "linear.weight", "linear.bias"} <= names


def test_weights_are_a_distribution_in_float32():
    allocator = WeightAllocator(**SMALL).bfloat16()
    weights = allocator(torch.randn(5, 2, 8).bfloat16(), torch.randn(5, 6))
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(1), torch.ones(5))
    assert (weights > 0).all()


def test_the_maths_is_the_published_block_written_out():
    allocator = WeightAllocator(**SMALL).double()
    summaries, embeds = torch.randn(3, 2, 8, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    key_value = summaries @ allocator.cls_proj.weight.T + allocator.cls_proj.bias
    query = embeds @ allocator.sentence_proj.weight.T + allocator.sentence_proj.bias
    for block in allocator.transformers:
        q, k, v = block.cross_attention.in_proj_weight.chunk(3)
        bq, bk, bv = block.cross_attention.in_proj_bias.chunk(3)
        heads = lambda x: x.unflatten(-1, (3, 4))  # noqa: E731
        scores = torch.einsum("bhd,bkhd->bhk", heads(query @ q.T + bq), heads(key_value @ k.T + bk)) / 2.0
        attended = torch.einsum("bhk,bkhd->bhd", scores.softmax(-1), heads(key_value @ v.T + bv)).flatten(1)
        query = block.norm1(block.cross_attention.out_proj(attended) + query)
        query = block.norm2(block.ffn[2](block.ffn[0](query).relu()) + query)
    expected = allocator.linear(query).softmax(-1)
    torch.testing.assert_close(allocator(summaries, embeds), expected, rtol=1e-12, atol=1e-14)


def test_every_parameter_gets_a_gradient():
    allocator = WeightAllocator(**SMALL)
    allocator(torch.randn(3, 2, 8), torch.randn(3, 6))[:, 0].sum().backward()
    for name, parameter in allocator.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("sizes", "words"),
    [({"hidden_dim": 10}, ["hidden_dim=10", "num_heads=3"]), ({"num_blocks": 0}, ["num_blocks", "got 0"])],
)
def test_bad_sizes_are_refused(sizes, words):
    with pytest.raises(ValueError) as error:
        WeightAllocator(**{**SMALL, **sizes})
    assert all(word in str(error.value) for word in words)


def test_auto_is_the_stock_modules_on_a_cpu_and_an_unknown_impl_is_refused():
    auto, stock = WeightAllocator(**SMALL), WeightAllocator(**SMALL, impl="torch")
    stock.load_state_dict(auto.state_dict())
    summaries, embeds = torch.randn(3, 2, 8), torch.randn(3, 6)
    assert torch.equal(auto(summaries, embeds), stock(summaries, embeds))
    with pytest.raises(ValueError, match="impl must be one of 'auto', 'triton', 'torch', got 'cuda'"):
        WeightAllocator(**SMALL, impl="cuda")
    with pytest.raises(ValueError, match=r'impl="triton" cannot run this allocator: .*impl="auto" or "torch"'):
        WeightAllocator(**SMALL, impl="triton")(summaries, embeds)


def test_the_layout_of_the_kernels_is_that_of_the_parameters():
    """Sizes read from shapes, shapes in the order of the parameters, offsets that tile a flat buffer of all of them."""
    allocator = WeightAllocator(**SMALL)
    parameters = allocator._parameters_in_order()
    sizes = AllocatorSizes.of(parameters, num_heads=3)
    assert sizes == allocator.sizes == AllocatorSizes(**SMALL)
    assert sizes.parameter_shapes == tuple(tuple(parameter.shape) for parameter in parameters)
    assert {id(parameter) for parameter in parameters} == {id(parameter) for parameter in allocator.parameters()}
    numels = [parameter.numel() for parameter in parameters]
    assert sizes.parameter_offsets == tuple(sum(numels[:i]) for i in range(len(numels) + 1))
    for block, module in enumerate(allocator.transformers):
        assert parameters[first_parameter(block)] is module.cross_attention.in_proj_weight
    assert row_matrix(1, "query") - row_matrix(0, "query") == row_matrix(0, "normalised2") - row_matrix(-1, "normalised2")
    assert row_matrix(-1, "normalised2") == 0 and row_matrix(1, "normalised2") == sizes.num_row_matrices - 1


def test_inputs_that_do_not_fit_are_refused():
    allocator = WeightAllocator(**SMALL)
    with pytest.raises(ValueError, match=r"summaries has the shape \(3, 3, 8\)"):
        allocator(torch.randn(3, 3, 8), torch.randn(3, 6))
    with pytest.raises(ValueError, match=r"instruction_embeds has the shape \(1, 6\)"):
        allocator(torch.randn(3, 2, 8), torch.randn(1, 6))


@pytest.fixture
def fusion():
    return IGVAFusion(FusionPlan.igva(4, 2), WeightAllocator(**SMALL))


def test_fusion_gives_the_mix_under_the_allocated_weights(fusion):
    states, embeds = [torch.randn(3, 5, 8) for _ in range(5)], torch.randn(3, 6)
    out = fusion(states, embeds, num_prefix_tokens=1)
    assert out.fused.shape == (3, 4, 16) and out.weights.shape == (3, 2)
    assert torch.equal(out.fused, fuse(states, fusion.plan, out.weights, num_prefix_tokens=1))
    other = fusion(states, embeds.flip(0), num_prefix_tokens=1)
    assert not torch.allclose(other.weights, out.weights)


def test_without_an_instruction_the_fusion_is_the_average_of_stage_one(fusion):
    states = [torch.randn(3, 5, 8) for _ in range(5)]
    out = fusion(states, None, num_prefix_tokens=1)
    assert torch.equal(out.weights, torch.full((3, 2), 0.5))
    average = fuse(states, FusionPlan.igva_average(4, 2), num_prefix_tokens=1)
    torch.testing.assert_close(out.fused, average)


def test_gradients_reach_the_allocator_and_a_trainable_tower(fusion):
    states = [torch.randn(3, 5, 8, requires_grad=True) for _ in range(5)]
    fusion(states, torch.randn(3, 6), num_prefix_tokens=1).fused.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in fusion.named_parameters() if "in_proj_bias" not in name)
    assert states[1].grad[:, 0].abs().sum() > 0  # through the CLS summary
    assert states[1].grad[:, 1:].abs().sum() > 0


def test_a_tower_without_cls_uses_the_mean_patch():
    fusion = IGVAFusion(FusionPlan.igva(4, 2), WeightAllocator(**SMALL), summary="mean_patch")
    states = [torch.randn(3, 5, 8) for _ in range(5)]
    assert fusion(states, torch.randn(3, 6), num_prefix_tokens=0).fused.shape == (3, 5, 16)


def test_allocator_and_plan_must_agree():
    with pytest.raises(ValueError, match="4 weighted groups, the allocator gives 2"):
        IGVAFusion(FusionPlan.igva(4, 4), WeightAllocator(**SMALL))


def test_fusion_compiles_in_one_graph(fusion):
    states, embeds = [torch.randn(3, 5, 8) for _ in range(5)], torch.randn(3, 6)
    compiled = torch.compile(fusion, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(states, embeds, num_prefix_tokens=1).fused, fusion(states, embeds, num_prefix_tokens=1).fused
    )
