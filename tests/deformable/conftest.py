"""Inputs for multi-scale deformable attention, and the formula that everybody else uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES = {
    "one_level": [(4, 4)],
    "mmfuser": [(3, 3)] * 4,
    "pyramid": [(5, 7), (3, 4), (2, 2)],
    "thin": [(1, 6), (6, 1), (1, 1)],
}


class Inputs(NamedTuple):
    """Args:
    value: (B, S, H, C).
    shapes: (height, width) of each level.
    locations: (B, Q, H, L, P, 2).
    weights: (B, Q, H, L, P).
    """

    value: Tensor
    shapes: list[tuple[int, int]]
    locations: Tensor
    weights: Tensor

    def to(self, dtype: torch.dtype, locations: torch.dtype | None = None) -> Inputs:
        wide = locations or dtype
        return self._replace(value=self.value.to(dtype), locations=self.locations.to(wide), weights=self.weights.to(wide))

    def leaves(self) -> Inputs:
        tensors = (tensor.detach().clone().requires_grad_() for tensor in (self.value, self.locations, self.weights))
        value, locations, weights = tensors
        return Inputs(value, self.shapes, locations, weights)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.value, self.locations, self.weights

    @property
    def sizes(self) -> list[int]:
        return [size for shape in self.shapes for size in shape]


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def shapes(request: pytest.FixtureRequest) -> list[tuple[int, int]]:
    return request.param


@pytest.fixture
def make_inputs() -> Callable[..., Inputs]:
    """Random inputs in float64, locations up to two cells outside of each level.

    A location keeps a twentieth of a cell from all cell centres: the interpolation has a kink there, and rounding decides
    which of two gradients is meant.
    """

    def make(
        shapes: Sequence[tuple[int, int]],
        batch: int = 2,
        queries: int = 5,
        heads: int = 3,
        points: int = 2,
        channels: int = 6,
        softmax: bool = True,
    ) -> Inputs:
        levels, num_cells = len(shapes), sum(height * width for height, width in shapes)
        per_level = []
        for height, width in shapes:
            extent = torch.tensor([width, height])
            cell = torch.floor(torch.rand(batch, queries, heads, points, 2, dtype=torch.float64) * (extent + 4)) - 3
            inner = 0.05 + 0.9 * torch.rand_like(cell)
            per_level.append((cell + inner + 0.5) / extent)
        weights = torch.randn(batch, queries, heads, levels * points, dtype=torch.float64)
        weights = (weights.softmax(-1) if softmax else weights).view(batch, queries, heads, levels, points)
        value = torch.randn(batch, num_cells, heads, channels, dtype=torch.float64)
        return Inputs(value, list(shapes), torch.stack(per_level, dim=3), weights)

    return make


def _formula(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """``grid_sample`` on each level, the formulation of the papers' code bases; in the dtype of its arguments."""
    batch, _, heads, channels = value.shape
    total = value.new_zeros(batch * heads, channels, locations.shape[1])
    for level, part in enumerate(value.split([height * width for height, width in shapes], dim=1)):
        maps = part.permute(0, 2, 3, 1).reshape(batch * heads, channels, *shapes[level])
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)  # (B*H, Q, P, 2)
        sampled = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)  # (B*H, C, Q, P)
        total = total + (sampled * weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]).sum(-1)
    return total.view(batch, heads * channels, -1).transpose(1, 2)


@pytest.fixture
def formula() -> Callable[..., Tensor]:
    return _formula
