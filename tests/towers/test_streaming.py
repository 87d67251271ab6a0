"""Streaming gives the numbers of the tuple path, holds no more than it must and runs no more than it must."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, ViTMAEConfig, ViTMAEModel

from igva_kernels import FusionPlan, Layer, Mean, fuse, group_summaries, mix
from igva_kernels.towers import StreamingTower, num_prefix_tokens_of, stream_group_means

ORDERS = ("group", "layer")


def summary_of(case) -> str:
    return "cls" if case.num_prefix_tokens else "mean_patch"


# ---- numbers ------------------------------------------------------------------------------------------------------------


def test_prefix_tokens_come_from_the_config(case):
    assert num_prefix_tokens_of(case.tower.config) == case.num_prefix_tokens
    assert StreamingTower(case.tower).num_prefix_tokens == case.num_prefix_tokens


@pytest.mark.parametrize("reduce_at", ORDERS)
def test_every_tower_gives_the_bits_of_fuse(case, tuple_of, make_weights, reduce_at):
    plan = FusionPlan.igva(4, 2)
    weights, states = make_weights(plan), tuple_of(case)
    group_means = stream_group_means(case.tower, case.pixel_values, plan, reduce_at=reduce_at, **case.inputs)
    prefix = case.num_prefix_tokens
    assert torch.equal(mix(group_means, plan, weights), fuse(states, plan, weights, num_prefix_tokens=prefix))
    expected = group_summaries(states, plan, num_prefix_tokens=prefix, summary=summary_of(case))
    if reduce_at == "group" or prefix:
        assert torch.equal(group_means.summaries, expected)
    else:
        torch.testing.assert_close(group_means.summaries, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("reduce_at", ORDERS)
def test_every_plan_gives_the_bits_of_fuse(make_case, tuple_of, make_weights, plan, reduce_at, dtype):
    case = make_case("dinov2_with_registers", dtype=dtype)
    weights, states = make_weights(plan), tuple_of(case)
    group_means = stream_group_means(case.tower, case.pixel_values, plan, reduce_at=reduce_at)
    assert group_means.dtype == dtype
    assert all(mean.dtype == torch.promote_types(dtype, torch.float32) for mean in group_means.means)
    fused = mix(group_means, plan, weights)
    assert fused.dtype == dtype
    assert torch.equal(fused, fuse(states, plan, weights, num_prefix_tokens=4))
    if plan.num_groups:
        assert torch.equal(group_means.summaries, group_summaries(states, plan, num_prefix_tokens=4))
    else:
        assert group_means.summaries is None


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_the_implementation_that_is_named_is_the_one_that_reduces(make_case, tuple_of, make_weights, plan, impl):
    case = make_case("clip_vision_model", dtype=torch.bfloat16)
    weights = make_weights(plan)
    group_means = stream_group_means(case.tower, case.pixel_values, plan, impl=impl)
    expected = fuse(tuple_of(case), plan, weights, num_prefix_tokens=1, impl=impl)
    assert torch.equal(mix(group_means, plan, weights, impl=impl), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduce_at", ORDERS)
def test_means_of_16_bits_stay_within_the_stated_tolerance(make_case, tuple_of, make_weights, dtype, reduce_at):
    # Each mean is rounded once: u of its value. The output's own rounding adds u of the output, to either path.
    plan = FusionPlan.igva(4, 2)
    case = make_case("dinov2", dtype=dtype)
    states, weights = tuple_of(case), make_weights(plan)
    group_means = stream_group_means(case.tower, case.pixel_values, plan, means_dtype=None, reduce_at=reduce_at)
    assert all(mean.dtype == dtype for mean in group_means.means)
    width = states[0].shape[2]
    fused = mix(group_means, plan, weights).double()[..., :width]
    exact = [torch.stack([states[layer][:, 1:].double() for layer in group]).mean(0) for group in plan.groups]
    terms = [weights[:, k, None, None].double() * mean for k, mean in enumerate(exact)]
    unit = torch.finfo(dtype).eps / 2
    # 1.01 is for the second-order terms and the float32 sums.
    allowed = 1.01 * unit * (sum(term.abs() for term in terms) + sum(terms).abs()) + torch.finfo(dtype).tiny
    error = (fused - sum(terms)).abs()
    assert (error <= allowed).all()
    assert (error > 0).any()


def test_both_orders_give_the_same_16_bit_means(make_case, plan):
    case = make_case("vit", dtype=torch.bfloat16)
    first, second = (
        stream_group_means(case.tower, case.pixel_values, plan, means_dtype=None, reduce_at=order) for order in ORDERS
    )
    assert all(torch.equal(a, b) for a, b in zip(first.means, second.means, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first.copies, second.copies, strict=True))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations_are_those_of_the_tower(make_case, tuple_of, make_weights, attention):
    for name in ("siglip2_vision_model", "dinov2", "vit"):
        case = make_case(name)
        case.encoder.set_attn_implementation(attention)
        plan = FusionPlan.igva(4, 2)
        weights = make_weights(plan)
        fused = mix(stream_group_means(case.tower, case.pixel_values, plan, **case.inputs), plan, weights)
        assert torch.equal(fused, fuse(tuple_of(case), plan, weights, num_prefix_tokens=case.num_prefix_tokens)), name


@pytest.mark.parametrize("name", ["clip_vision_model", "siglip_vision_model", "vit", "dinov2"])
def test_other_resolutions(make_case, name):
    case = make_case(name)
    pixel_values = torch.randn(2, 3, 28, 56)
    inputs = {} if name == "dinov2" else {"interpolate_pos_encoding": True}
    states = case.encoder(pixel_values, output_hidden_states=True, **inputs).hidden_states
    plan = FusionPlan.igva_average(4, 2)
    fused = mix(stream_group_means(case.tower, pixel_values, plan, **inputs), plan)
    assert fused.shape[1] == 8
    assert torch.equal(fused, fuse(states, plan, num_prefix_tokens=case.num_prefix_tokens))


# ---- what is held, what is run ------------------------------------------------------------------------------------------


class Recorder:
    """Weak references to what the blocks return, and which of those are alive whenever a block starts."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        self.maps: list[weakref.ref] = []
        self.alive: list[list[int]] = []
        for block in blocks:
            block.register_forward_pre_hook(self._before)
            block.register_forward_hook(self._after)

    def _before(self, module: nn.Module, args: tuple) -> None:
        self.alive.append(self.living())

    def _after(self, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        self.maps.append(weakref.ref(output))

    def living(self) -> list[int]:
        return [number for number, reference in enumerate(self.maps, start=1) if reference() is not None]


@pytest.fixture
def deep_tower() -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=8, num_attention_heads=2, image_size=28, patch_size=14
    )
    return CLIPVisionModel(config).eval().requires_grad_(False)


def test_only_one_group_is_held(deep_tower):
    recorder = Recorder(deep_tower.encoder.layers)
    plan = FusionPlan.igva(8, 2, base=0)
    group_means = stream_group_means(deep_tower, torch.randn(2, 3, 28, 28), plan)
    assert recorder.alive == [[], [1], [1, 2], [1, 2, 3], [4], [5], [5, 6], [5, 6, 7]]  # h_4 is the input of block 5
    assert recorder.living() == []
    assert group_means.means[0]._base is None or group_means.means[0]._base.numel() == group_means.means[0].numel()


def test_nothing_but_the_current_state_is_held_when_layers_are_added_up(deep_tower):
    recorder = Recorder(deep_tower.encoder.layers)
    stream_group_means(deep_tower, torch.randn(2, 3, 28, 28), FusionPlan.igva(8, 2, base=0), reduce_at="layer")
    assert recorder.alive == [[], [1], [2], [3], [4], [5], [6], [7]]
    assert recorder.living() == []


def test_overlapping_groups_hold_what_the_later_one_needs(deep_tower):
    recorder = Recorder(deep_tower.encoder.layers)
    plan = FusionPlan(8, (Mean((2, 3)), Mean((3, 5)), Layer(1)))
    group_means = stream_group_means(deep_tower, torch.randn(2, 3, 28, 28), plan)
    assert recorder.alive == [[], [1], [1, 2], [1, 3], [1, 3, 4]]
    del group_means
    assert recorder.living() == []


@pytest.mark.parametrize(("plan", "count"), [(FusionPlan.llava(8), 7), (FusionPlan.llava(8, layer=0), 0)])
@pytest.mark.parametrize("reduce_at", ORDERS)
def test_blocks_that_the_plan_does_not_read_are_not_run(deep_tower, plan, count, reduce_at):
    recorder = Recorder(deep_tower.encoder.layers)
    stream_group_means(deep_tower, torch.randn(2, 3, 28, 28), plan, reduce_at=reduce_at)
    assert len(recorder.alive) == count


def test_no_graph_is_built(make_case, plan):
    case = make_case("clip_vision_model")
    pixel_values = case.pixel_values.requires_grad_()
    group_means = stream_group_means(case.tower, pixel_values, plan)
    kept = [*group_means.means, *group_means.copies, *([] if group_means.summaries is None else [group_means.summaries])]
    assert not any(tensor.requires_grad for tensor in kept)


def test_hooks_of_the_blocks_run_as_they_do_in_the_tower(make_case):
    case = make_case("dinov2")
    seen = []
    case.tower.encoder.layer[1].register_forward_hook(lambda module, args, output: seen.append(output))
    stream_group_means(case.tower, case.pixel_values, FusionPlan.igva(4, 2))
    # transformers' own capturing of hidden states does not collect what it was not asked for
    outputs = case.tower(case.pixel_values)
    assert len(seen) == 2 and outputs.hidden_states is None


# ---- the module ---------------------------------------------------------------------------------------------------------


def test_module_and_function_agree_and_keep_the_towers_names(make_case, make_weights):
    case = make_case("siglip_vision_model")
    plan = FusionPlan.igva(4, 2)
    module = StreamingTower(case.tower, reduce_at="layer", impl="torch")
    names = {f"tower.{name}" for name in case.tower.state_dict()}
    assert set(module.state_dict()) == names
    ours = module(case.pixel_values, plan=plan)
    expected = stream_group_means(case.tower, case.pixel_values, plan, reduce_at="layer", impl="torch")
    assert torch.equal(ours.summaries, expected.summaries)
    assert all(torch.equal(a, b) for a, b in zip(ours.means, expected.means, strict=True))


def test_gradients_of_the_weights_flow_through_the_mix(make_case, tuple_of):
    case = make_case("clip_vision_model")
    plan = FusionPlan.igva(4, 2)
    grads = []
    for source in ("stream", "tuple"):
        weights = torch.linspace(0.1, 0.9, 6).reshape(3, 2).requires_grad_()
        if source == "stream":
            fused = mix(stream_group_means(case.tower, case.pixel_values, plan), plan, weights)
        else:
            fused = fuse(tuple_of(case), plan, weights, num_prefix_tokens=1)
        fused.square().sum().backward()
        grads.append(weights.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


# ---- errors -------------------------------------------------------------------------------------------------------------


def test_unknown_towers_are_refused_with_what_helps():
    tower = ViTMAEModel(ViTMAEConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32))
    with pytest.raises(ValueError, match=r"'vit_mae' are not known \(known: \['clip'.*output_hidden_states=True"):
        StreamingTower(tower)


def test_wrapped_towers_are_refused(make_case):
    case = make_case("clip_vision_model")
    compiled = torch.compile(case.tower, backend="eager")
    with pytest.raises(ValueError, match="does not hold the embeddings and blocks"):
        stream_group_means(compiled, case.pixel_values, FusionPlan.igva(4, 2))


def test_trainable_towers_are_refused_in_grad_mode(make_case):
    case = make_case("clip_vision_model")
    plan = FusionPlan.igva(4, 2)
    case.tower.encoder.layers[0].mlp.fc1.bias.requires_grad_()
    with pytest.raises(ValueError, match="selected_hidden_states"):
        stream_group_means(case.tower, case.pixel_values, plan)
    with torch.no_grad():
        stream_group_means(case.tower, case.pixel_values, plan)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"plan": FusionPlan.igva(8, 2)}, "tower has 4 blocks; make the plan with num_layers=4"),
        ({"summary": "cls"}, 'use summary="mean_patch"'),
        ({"summary": "max"}, "'cls' or 'mean_patch', got 'max'"),
        ({"means_dtype": torch.bfloat16}, "means_dtype must be torch.float32 or None"),
        ({"reduce_at": "end"}, "reduce_at must be one of 'group', 'layer', got 'end'"),
        ({"impl": "magic"}, "impl must be one of"),
        ({"spatial_shapes": None}, r"takes \['interpolate_pos_encoding'\] beside pixel_values, got \['spatial_shapes'\]"),
        ({"num_prefix_tokens": 4}, "leaves no patch of 4 tokens"),
    ],
)
def test_wrong_arguments(make_case, arguments, message):
    case = make_case("siglip_vision_model")
    arguments = {"plan": FusionPlan.igva(4, 2), **arguments}
    with pytest.raises(ValueError, match=message):
        stream_group_means(case.tower, case.pixel_values, **arguments)


def test_plan_must_be_a_plan(make_case):
    case = make_case("vit")
    with pytest.raises(TypeError, match="plan must be a FusionPlan"):
        stream_group_means(case.tower, case.pixel_values, (1, 2))
