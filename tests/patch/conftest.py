"""Small stand-ins with the signatures of the public code bases, written from their formulas.

They hold what :mod:`igva_kernels.patching` looks for and nothing else: the tower that returns hidden states, the configuration,
and ``encode_images`` in the formulation of the release.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

DEPTH, TOKENS, WIDTH, TEXT, LANGUAGE = 8, 10, 16, 12, 20


class Tower(nn.Module):
    """``forward(images)`` to the tuple of hidden states (B, T, D) of a random tower; images (B, 3, H, W)."""

    select_layer = -2

    def __init__(self, depth: int, returns_features: bool) -> None:
        super().__init__()
        self.stem = nn.Linear(3 * 4, TOKENS * WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))
        self.config = SimpleNamespace(model_type="clip_vision_model")
        self.returns_features = returns_features
        self.requires_grad_(False)

    def forward(self, images: Tensor):
        states = [self.stem(images.flatten(1)).unflatten(1, (TOKENS, WIDTH))]
        for block in self.blocks:
            states.append(states[-1] + block(states[-1]).tanh())
        if not self.returns_features:
            return tuple(states)
        return states[self.select_layer][:, 1:].to(images.dtype), SimpleNamespace(hidden_states=tuple(states))


class Meta(nn.Module):
    """What ``get_model()`` returns."""

    def __init__(self, config: SimpleNamespace, tower: Tower, num_slots: int) -> None:
        super().__init__()
        self.config, self.vision_tower = config, tower
        self.mm_projector = nn.Sequential(nn.Linear(num_slots * WIDTH, LANGUAGE), nn.GELU(), nn.Linear(LANGUAGE, LANGUAGE))

    def get_vision_tower(self) -> Tower:
        return self.vision_tower


class Aggregator(nn.Module):
    """Any network with the official signature: the patch calls it and does not look into it."""

    def __init__(self, num_groups: int) -> None:
        super().__init__()
        self.layers = nn.Linear(WIDTH, 1)
        self.sentence = nn.Linear(TEXT, num_groups)

    def forward(self, cls_features: Tensor, sentence_embed: Tensor) -> Tensor:
        return (self.layers(cls_features)[..., 0] + self.sentence(sentence_embed)).softmax(-1)


class OfficialIgva(nn.Module):
    def __init__(self, groups: str, base: int, average: bool) -> None:
        super().__init__()
        config = SimpleNamespace(vit_aggregate_groups=groups, vit_base_layer=base, aggregate_by_average=average)
        self.model = Meta(config, Tower(DEPTH, returns_features=False), num_slots=2)
        if not average:
            self.model.vision_aggregator = Aggregator(groups.count("[") - 1)

    def get_model(self) -> Meta:
        return self.model

    def encode_images(self, images: Tensor, sentence_embeds: Tensor | None = None) -> Tensor:
        import ast

        states = self.model.get_vision_tower()(images)
        means = [torch.stack([states[layer] for layer in group]).mean(0) for group in ast.literal_eval(self.groups)]
        patches = torch.stack([mean[:, 1:] for mean in means])
        if self.model.config.aggregate_by_average:
            mixed = patches.mean(0)
        else:
            cls = torch.stack([mean[:, 0] for mean in means], dim=1)
            weights = self.model.vision_aggregator(cls_features=cls, sentence_embed=sentence_embeds)
            mixed = (patches * weights.t()[:, :, None, None]).sum(0)
        return self.model.mm_projector(torch.cat((states[self.model.config.vit_base_layer][:, 1:], mixed), dim=-1))

    @property
    def groups(self) -> str:
        return self.model.config.vit_aggregate_groups


class OfficialDenseConnector(nn.Module):
    def __init__(self, kind: str, depth: int, siglip: bool) -> None:
        super().__init__()
        tower = Tower(depth, returns_features=True)
        if siglip:
            tower.select_layer = -1
        config = SimpleNamespace(mm_dense_connector_type=kind, is_video=False)
        self.model = Meta(config, tower, num_slots=1 if kind == "sti" else 3)
        self.siglip = siglip

    def get_model(self) -> Meta:
        return self.model

    def is_siglip(self) -> bool:
        return self.siglip

    def temporal_aggregation(self, features: Tensor) -> Tensor:
        return features.flatten(0, 1)[None]

    def encode_images(self, images: Tensor) -> Tensor:
        features, outputs = self.model.get_vision_tower()(images)
        skip = 0 if self.siglip else 1
        states = [state[:, skip:] for state in outputs.hidden_states]
        if self.siglip:
            features = states[-1]
        if self.model.config.mm_dense_connector_type == "sci":
            parts = [features, states[7], states[15]]
        else:
            half = 13 if self.siglip else 12
            parts = [features, torch.stack(states[:half]).sum(0) / half, torch.stack(states[half : 2 * half]).sum(0) / half]
        encoded = self.model.mm_projector(torch.cat(parts, dim=-1))
        return self.temporal_aggregation(encoded) if self.model.config.is_video else encoded


class MSDeformAttn(nn.Module):
    """Deformable DETR's module by its formula, with ``grid_sample`` in place of the CUDA extension."""

    def __init__(self, d_model: int, n_levels: int, n_heads: int, n_points: int) -> None:
        super().__init__()
        self.d_model, self.n_levels, self.n_heads, self.n_points, self.im2col_step = d_model, n_levels, n_heads, n_points, 64
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)

    def forward(
        self,
        query,
        reference_points,
        input_flatten,
        input_spatial_shapes,
        input_level_start_index,
        input_padding_mask=None,
    ):
        batch, queries, _ = query.shape
        value = self.value_proj(input_flatten)
        if input_padding_mask is not None:
            value = value.masked_fill(input_padding_mask[..., None], 0.0)
        offsets = self.sampling_offsets(query).view(batch, queries, self.n_heads, self.n_levels, self.n_points, 2)
        weights = self.attention_weights(query).view(batch, queries, self.n_heads, -1).softmax(-1)
        weights = weights.view(batch, queries, self.n_heads, self.n_levels, self.n_points)
        out = query.new_zeros(batch, queries, self.n_heads, self.d_model // self.n_heads)
        start = 0
        for level, (height, width) in enumerate(input_spatial_shapes.tolist()):
            points = reference_points[:, :, None, min(level, reference_points.shape[2] - 1), None]
            if reference_points.shape[-1] == 2:
                locations = points + offsets[:, :, :, level] / torch.tensor([width, height])
            else:
                locations = points[..., :2] + offsets[:, :, :, level] / self.n_points * points[..., 2:] * 0.5
            cells = value[:, start : start + height * width].unflatten(-1, (self.n_heads, -1))
            start += height * width
            for head in range(self.n_heads):
                image = cells[:, :, head].transpose(1, 2).unflatten(2, (height, width))
                sampled = nn.functional.grid_sample(image, 2 * locations[:, :, head] - 1, align_corners=False)
                out[:, :, head] += (sampled * weights[:, None, :, head, level]).sum(-1).transpose(1, 2)
        return self.output_proj(out.flatten(2))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 2, 2)


@pytest.fixture
def sentences() -> Tensor:
    return torch.randn(3, TEXT)


@pytest.fixture
def make_igva():
    def make(groups: str = "[[1,2],[3,4],[5,6],[7,8]]", base: int = -2, average: bool = False) -> OfficialIgva:
        return OfficialIgva(groups, base, average)

    return make


@pytest.fixture
def make_dense_connector():
    def make(kind: str, siglip: bool = False) -> OfficialDenseConnector:
        return OfficialDenseConnector(kind, depth=26 if siglip else 24, siglip=siglip)

    return make


@pytest.fixture
def make_deformable():
    return MSDeformAttn
