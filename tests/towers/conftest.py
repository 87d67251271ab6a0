"""Tiny random towers of every known type, and plans that a schedule could get wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from igva_kernels import FusionPlan, Layer, Mean, Norm, Weighted

NUM_LAYERS = 4
SIZES = {"hidden_size": 32, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4}
SQUARE = {**SIZES, "image_size": 28, "patch_size": 14}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}


class Case(NamedTuple):
    """``encoder`` gives the tuple of hidden states to compare with: the tower itself, or the vision half of a whole model."""

    tower: nn.Module
    encoder: nn.Module
    pixel_values: Tensor
    inputs: dict[str, Any]
    num_prefix_tokens: int


def _whole(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    return model, model.vision_model


def _alone(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    return model, model


TOWERS: dict[str, tuple[Callable[[], tuple[nn.Module, nn.Module]], int]] = {
    "clip": (lambda: _whole(CLIPModel(CLIPConfig(vision_config=_clip().to_dict(), text_config=TEXT))), 1),
    "clip_vision_model": (lambda: _alone(CLIPVisionModel(_clip())), 1),
    "clip_with_projection": (lambda: _alone(CLIPVisionModelWithProjection(_clip())), 1),
    "siglip": (lambda: _whole(SiglipModel(SiglipConfig(vision_config=_siglip().to_dict(), text_config=TEXT))), 0),
    "siglip_vision_model": (lambda: _alone(SiglipVisionModel(_siglip())), 0),
    "siglip2_vision_model": (
        lambda: _alone(Siglip2VisionModel(Siglip2VisionConfig(**SIZES, intermediate_size=64, patch_size=14, num_patches=4))),
        0,
    ),
    "dinov2": (lambda: _alone(Dinov2Model(Dinov2Config(**SQUARE, mlp_ratio=2))), 1),
    "dinov2_with_registers": (
        lambda: _alone(Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SQUARE, mlp_ratio=2, num_register_tokens=3))),
        4,
    ),
    "dinov3_vit": (lambda: _alone(DINOv3ViTModel(DINOv3ViTConfig(**SQUARE, intermediate_size=64, num_register_tokens=2))), 3),
    "vit": (lambda: _alone(ViTModel(ViTConfig(**SQUARE, intermediate_size=64))), 1),
}

PLANS = {
    "igva": FusionPlan.igva(4, 2),
    "base_before_the_groups": FusionPlan.igva(4, 2, base=0),
    "last_block_unused": FusionPlan.igva(4, groups=[[1], [2, 3]], base=1),
    "average": FusionPlan.igva_average(4, 2),
    "llava": FusionPlan.llava(4),
    "embedding_only": FusionPlan.llava(4, layer=0),
    "overlapping": FusionPlan(4, (Weighted(((0, 1, 2), (2, 3), (0, 4))), Mean((1, 2)), Layer(2), Layer(0))),
    "group_twice": FusionPlan(4, (Weighted(((1, 2), (3, 4), (1, 2))), Layer(2), Layer(2))),
    "normalised": FusionPlan(4, (Weighted(((1, 2), (3, 4)), norm=Norm("layer")), Mean((1, 3), norm=Norm("rms")), Mean((1, 3)))),
    "layer_beside_the_sum": FusionPlan(4, (Weighted(((1,), (2,), (3,)), plus=-1),)),
}


def _clip() -> CLIPVisionConfig:
    return CLIPVisionConfig(**SQUARE, intermediate_size=64, projection_dim=32)


def _siglip() -> SiglipVisionConfig:
    return SiglipVisionConfig(**SQUARE, intermediate_size=64)


@pytest.fixture
def make_case() -> Callable[..., Case]:
    """``make_case(name, batch=3, dtype=torch.float32)``: a frozen tower in eval mode and a batch for it."""

    def make(name: str, batch: int = 3, dtype: torch.dtype = torch.float32) -> Case:
        torch.manual_seed(7)
        build, num_prefix_tokens = TOWERS[name]
        tower, encoder = build()
        tower.eval().requires_grad_(False).to(dtype)
        inputs: dict[str, Any] = {}
        if name == "siglip2_vision_model":  # pictures of 2 x 3 patches, every other one of 2 x 2 and padding
            pixel_values = torch.randn(batch, 6, 3 * 14 * 14)
            mask = torch.ones(batch, 6, dtype=torch.long)
            shapes = torch.tensor([[2, 3]] * batch)
            mask[1::2, 4:], shapes[1::2] = 0, 2
            inputs = {"spatial_shapes": shapes, "pixel_attention_mask": mask}
        else:
            pixel_values = torch.randn(batch, 3, 28, 28)
        return Case(tower, encoder, pixel_values.to(dtype), inputs, num_prefix_tokens)

    return make


@pytest.fixture(params=TOWERS, ids=str)
def case(request: pytest.FixtureRequest, make_case: Callable[..., Case]) -> Case:
    return make_case(request.param)


@pytest.fixture(params=PLANS, ids=str)
def plan(request: pytest.FixtureRequest) -> FusionPlan:
    return PLANS[request.param]


@pytest.fixture
def tuple_of() -> Callable[[Case], tuple[Tensor, ...]]:
    """The hidden states as transformers gives them."""

    def states(case: Case) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return case.encoder(case.pixel_values, output_hidden_states=True, **case.inputs).hidden_states

    return states


@pytest.fixture
def make_weights() -> Callable[..., Tensor | None]:
    """Random weights (B, K), or None where the plan takes none."""

    def make(plan: FusionPlan, batch: int = 3) -> Tensor | None:
        return torch.randn(batch, plan.num_groups) if plan.num_groups else None

    return make
