"""Streaming under torch.compile, in one graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from igva_kernels import FusionPlan, mix
from igva_kernels.towers import StreamingTower


class Fused(nn.Module):
    def __init__(self, tower: nn.Module, plan: FusionPlan, **options) -> None:
        super().__init__()
        self.tower, self.plan = StreamingTower(tower, **options), plan

    def forward(self, pixel_values: Tensor, weights: Tensor, inputs: dict) -> Tensor:
        return mix(self.tower(pixel_values, plan=self.plan, **inputs), self.plan, weights)


@pytest.fixture(autouse=True)
def _forget_compiled_code():
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "reduce_at"),
    [("clip_vision_model", "group"), ("siglip_vision_model", "layer")],
)
def test_one_graph_gives_the_same_bits(make_case, make_weights, name, reduce_at):
    case = make_case(name)
    plan = FusionPlan.igva(4, 2)  # a new object: its schedule is made while the graph is traced
    module, weights = Fused(case.tower, plan, reduce_at=reduce_at), make_weights(plan)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    result = compiled(case.pixel_values, weights, case.inputs)
    assert torch.equal(result, module(case.pixel_values, weights, case.inputs))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["clip", "clip_with_projection", "siglip", "siglip2_vision_model", "dinov2", "dinov3_vit", "vit"]
)
def test_one_graph_of_every_tower(make_case, make_weights, name):
    test_one_graph_gives_the_same_bits(make_case, make_weights, name, "group")


@pytest.mark.slow
def test_group_means_leave_the_graph(make_case):
    case = make_case("dinov2")
    plan = FusionPlan.igva(4, 2)
    module = StreamingTower(case.tower)
    expected = module(case.pixel_values, plan=plan)
    result = torch.compile(module, fullgraph=True, backend="aot_eager")(case.pixel_values, plan=plan)
    assert torch.equal(result.summaries, expected.summaries) and result.dtype == expected.dtype
    assert all(torch.equal(a, b) for a, b in zip(result.means, expected.means, strict=True))


@pytest.mark.slow
def test_inductor(make_case, make_weights):
    case = make_case("clip_vision_model")
    plan = FusionPlan.igva(4, 2)
    module, weights = Fused(case.tower, plan, reduce_at="layer"), make_weights(plan)
    result = torch.compile(module, fullgraph=True)(case.pixel_values, weights, case.inputs)
    # The blocks are compiled here as well: float32 sums in another order.
    torch.testing.assert_close(result, module(case.pixel_values, weights, case.inputs), rtol=1e-4, atol=1e-5)
