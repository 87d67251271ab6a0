"""Multi-scale deformable attention with its projections, as Deformable DETR defines it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from igva_kernels.deformable import Implementation, multi_scale_deformable_attention


class DeformableAttention(nn.Module):
    """Each query looks at a few points of every level, which it chooses itself (arXiv 2010.04159, section 4.1).

    Parameter names, initial values and maths are those of ``MSDeformAttn`` of Deformable DETR, so that state dicts load
    unchanged: offsets begin as a ring of directions, one a head, at the distances 1 to P; weights begin equal. Locations and
    the softmax are computed in float32 (float64 for float64 parameters), and nothing else is cast to it.

    Args:
        dim: D, of queries, source and output; divisible by ``num_heads``.
        num_levels: L.
        num_heads: H.
        num_points: P, the points of a level that a head of a query looks at.
        impl, deterministic: as for :func:`igva_kernels.multi_scale_deformable_attention`.

    Raises:
        ValueError: a size below 1, or ``dim`` not divisible by ``num_heads``.
    """

    def __init__(
        self,
        dim: int = 256,
        num_levels: int = 4,
        num_heads: int = 8,
        num_points: int = 4,
        *,
        impl: Implementation = "auto",
        deterministic: bool | None = None,
    ) -> None:
        super().__init__()
        sizes = {"dim": dim, "num_levels": num_levels, "num_heads": num_heads, "num_points": num_points}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if dim % num_heads:
            raise ValueError(f"dim={dim} is not divisible by num_heads={num_heads}")
        self.num_levels, self.num_heads, self.num_points = num_levels, num_heads, num_points
        self.impl, self.deterministic = impl, deterministic
        self.sampling_offsets = nn.Linear(dim, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(dim, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initial values of Deformable DETR."""
        angles = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        directions = torch.stack((angles.cos(), angles.sin()), dim=-1)
        directions /= directions.abs().amax(dim=-1, keepdim=True)
        distances = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        ring = directions[:, None, None] * distances[:, None]  # (H, 1, P, 2)
        with torch.no_grad():
            self.sampling_offsets.weight.zero_()
            self.sampling_offsets.bias.copy_(ring.expand(-1, self.num_levels, -1, -1).flatten())
            self.attention_weights.weight.zero_()
            self.attention_weights.bias.zero_()
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self, query: Tensor, reference_points: Tensor, source: Tensor, spatial_shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Attend.

        Args:
            query: (B, Q, D).
            reference_points: (B or 1, Q, L or 1, 2), where the offsets of a query begin: (x, y) in [0, 1].
            source: (B, S, D), the levels one after another, each row by row.
            spatial_shapes: the (height, width) of each level.

        Returns:
            (B, Q, D).

        Raises:
            TypeError, ValueError: as :func:`igva_kernels.multi_scale_deformable_attention`.
        """
        batch, num_queries, dim = query.shape
        heads, levels, points = self.num_heads, self.num_levels, self.num_points
        value = self.value_proj(source).unflatten(2, (heads, dim // heads))
        offsets = self.sampling_offsets(query).view(batch, num_queries, heads, levels, points, 2)
        logits = self.attention_weights(query).view(batch, num_queries, heads, levels * points)
        wide = torch.promote_types(offsets.dtype, torch.float32)
        weights = logits.softmax(dim=-1, dtype=wide).view(batch, num_queries, heads, levels, points)
        locations = reference_points[:, :, None, :, None] + offsets.to(wide) / _extents(offsets.to(wide), spatial_shapes)
        attended = multi_scale_deformable_attention(
            value, spatial_shapes, locations, weights, impl=self.impl, deterministic=self.deterministic
        )
        return self.output_proj(attended)

    def extra_repr(self) -> str:
        return f"num_levels={self.num_levels}, num_heads={self.num_heads}, num_points={self.num_points}"


def centres_of_cells(height: int, width: int, like: Tensor) -> Tensor:
    """(1, height*width, 1, 2), the centre (x, y) of each cell of a map in [0, 1], row by row; in float32, or float64 as
    ``like``."""
    wide = torch.promote_types(like.dtype, torch.float32)
    y = (torch.arange(height, device=like.device, dtype=wide) + 0.5) / height
    x = (torch.arange(width, device=like.device, dtype=wide) + 0.5) / width
    return torch.stack((x.expand(height, width), y[:, None].expand(height, width)), dim=-1).view(1, height * width, 1, 2)


def _extents(like: Tensor, spatial_shapes: Sequence[tuple[int, int]]) -> Tensor:
    """(L, 1, 2) or, for levels of one size, (1, 1, 2): the (width, height) of each level.

    Written number by number: a copy from the host could not be captured in a CUDA graph.
    """
    distinct = list(spatial_shapes[:1] if len(set(spatial_shapes)) == 1 else spatial_shapes)
    extents = like.new_empty(len(distinct), 1, 2)
    for level, (height, width) in enumerate(distinct):
        extents[level, 0, 0].fill_(width)
        extents[level, 0, 1].fill_(height)
    return extents
