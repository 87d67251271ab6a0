"""Multi-scale deformable attention in plain torch, without its intermediates: what runs on a CPU, and anywhere that the Triton
kernels cannot run.

The bilinear corners of all levels and points of a query are rows of one table, the value as it lies, and the output is
their weighted sum: torch's ``embedding_bag``. So nothing of Q*L*P*C elements is made, where the usual formulation in
``grid_sample`` makes two maps of that size and a transposed copy of the value. The gradient of the value is an
``embedding_bag`` as well: of the rows of the output's gradient that touch a cell, once they are sorted by cell. Its order
follows from the locations alone. Sums run in float32 (float64 if an argument is) and are rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from igva_kernels.impl.deformable_reference import accumulation_dtype

# Shapes: B images, S cells of all levels together, H heads, C channels of a head, Q queries, L levels, P points.

SpatialShapes = Sequence[tuple[int, int]]

TILE_ELEMENTS = 1 << 18
"""Elements of the rows that are gathered at a time for the gradients of locations and weights: 1 MiB of float32, which a
core's cache holds."""


def check_supported(value: Tensor, spatial_shapes: SpatialShapes, locations: Tensor, weights: Tensor) -> str | None:
    """Plain torch runs everything: None."""
    return None


def attention_forward(value: Tensor, spatial_shapes: SpatialShapes, locations: Tensor, weights: Tensor) -> Tensor:
    """``value`` (B, S, H, C), ``locations`` (B, Q, H, L, P, 2) and ``weights`` (B, Q, H, L, P) to (B, Q, H*C)."""
    batch, queries, heads, _, _, _ = locations.shape
    wide = accumulation_dtype(value, locations, weights)
    corners = _corners_of(value, spatial_shapes, locations.to(wide))
    shares = corners.shares(weights.to(wide))
    out = F.embedding_bag(_as_bags(corners.rows), _table_of(value, wide), per_sample_weights=_as_bags(shares), mode="sum")
    return out.view(batch, queries, heads * value.shape[3]).to(value.dtype)


def attention_backward(
    grad_out: Tensor,
    value: Tensor,
    spatial_shapes: SpatialShapes,
    locations: Tensor,
    weights: Tensor,
    needs: tuple[bool, bool, bool],
    deterministic: bool | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of ``value``, ``locations`` and ``weights``, each where ``needs`` asks for it, in their dtypes.

    The sums have one order whatever ``deterministic`` says.
    """
    wide = accumulation_dtype(value, locations, weights)
    corners = _corners_of(value, spatial_shapes, locations.to(wide))
    grad_rows = grad_out.to(wide).reshape(-1, value.shape[3])  # (B*Q*H, C)
    value_grad = locations_grad = weights_grad = None
    if needs[0]:
        shares = corners.shares(weights.to(wide))
        value_grad = _grad_of_rows(grad_rows, corners.rows, shares, num_rows=value.shape[:3].numel())
        value_grad = value_grad.view(value.shape).to(value.dtype)
    if needs[1] or needs[2]:
        products = _products_with_rows(grad_rows, corners.rows, _table_of(value, wide))
        if needs[1]:
            locations_grad = corners.slopes(products, weights.to(wide)).to(locations.dtype)
        if needs[2]:
            weights_grad = corners.interpolate(products).to(weights.dtype)
    return value_grad, locations_grad, weights_grad


class _Corners(NamedTuple):
    """The four cells around each location, in the order upper left, upper right, lower left, lower right.

    Attributes:
        rows: (B, Q, H, L, P, 4), the row of each in the table, the last one for what is outside.
        down, right: (B, Q, H, L, P), how far the location is towards the lower and the right ones, in [0, 1).
        heights, widths: (L, 1) of the levels.
    """

    rows: Tensor
    down: Tensor
    right: Tensor
    heights: Tensor
    widths: Tensor

    def shares(self, weights: Tensor) -> Tensor:
        """(B, Q, H, L, P, 4), the share of each corner in the output."""
        lower = weights * self.down
        upper = weights - lower
        lower_right, upper_right = lower * self.right, upper * self.right
        return torch.stack((upper - upper_right, upper_right, lower - lower_right, lower_right), dim=-1)

    def interpolate(self, corners: Tensor) -> Tensor:
        """What (B, Q, H, L, P, 4) numbers at the corners are at the locations."""
        upper_left, upper_right, lower_left, lower_right = corners.unbind(-1)
        upper = torch.lerp(upper_left, upper_right, self.right)
        return torch.lerp(upper, torch.lerp(lower_left, lower_right, self.right), self.down)

    def slopes(self, corners: Tensor, weights: Tensor) -> Tensor:
        """Their derivative by the location, times the weight: (B, Q, H, L, P, 2)."""
        upper_left, upper_right, lower_left, lower_right = corners.unbind(-1)
        by_x = torch.lerp(upper_right - upper_left, lower_right - lower_left, self.down) * self.widths
        by_y = torch.lerp(lower_left - upper_left, lower_right - upper_right, self.right) * self.heights
        return torch.stack((by_x * weights, by_y * weights), dim=-1)


def _corners_of(value: Tensor, spatial_shapes: SpatialShapes, locations: Tensor) -> _Corners:
    batch, num_cells, num_heads, _ = value.shape
    device = value.device
    outside = batch * num_cells * num_heads
    integer = torch.int32 if outside < 2**31 else torch.int64  # sorting the narrower one takes a quarter of the time
    heights = torch.tensor([[height] for height, _ in spatial_shapes], device=device, dtype=integer)  # (L, 1)
    widths = torch.tensor([[width] for _, width in spatial_shapes], device=device, dtype=integer)
    x, y = locations[..., 0] * widths - 0.5, locations[..., 1] * heights - 0.5  # (B, Q, H, L, P)
    inside = (x > -1) & (x < widths) & (y > -1) & (y < heights)  # False for NaN
    x, y = x.where(inside, 0), y.where(inside, 0)
    left, top = x.floor(), y.floor()
    column, row = left.to(integer), top.to(integer)

    image = torch.arange(batch, device=device, dtype=integer).view(-1, 1, 1, 1, 1)
    head = torch.arange(num_heads, device=device, dtype=integer).view(1, 1, -1, 1, 1)
    first = (heights * widths).cumsum(0, dtype=integer) - heights * widths  # (L, 1), the first cell of each level
    upper_left = ((row * widths + column + first) + image * num_cells) * num_heads + head
    upper, lower = inside & (row >= 0), inside & (row + 1 < heights)
    on_the_left, on_the_right = column >= 0, column + 1 < widths
    rows = torch.stack(
        (
            upper_left.where(upper & on_the_left, outside),
            (upper_left + num_heads).where(upper & on_the_right, outside),
            (upper_left + widths * num_heads).where(lower & on_the_left, outside),
            (upper_left + (widths + 1) * num_heads).where(lower & on_the_right, outside),
        ),
        dim=-1,
    )
    return _Corners(rows, y - top, x - left, heights, widths)


def _table_of(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows of the value, (B*S*H + 1, C). The last one is zero and stands for all that is outside, so that whatever the
    value holds, even NaN, has no part in a sum unless a location is near it."""
    table = value.new_empty(value.shape[:3].numel() + 1, value.shape[3], dtype=dtype)
    table[:-1].view(value.shape).copy_(value)
    table[-1].zero_()
    return table


def _as_bags(corners: Tensor) -> Tensor:
    """(B, Q, H, L, P, 4) to (B*Q*H, L*P*4): what a head of a query sums."""
    return corners.flatten(3).flatten(0, 2)


def _grad_of_rows(grad_rows: Tensor, rows: Tensor, shares: Tensor, num_rows: int) -> Tensor:
    """(num_rows, C): for each row of the table, the sum of the ``grad_rows`` that it has a share in, by ascending query."""
    per_bag = rows[0, 0, 0].numel() if rows.numel() else 1
    sorted_rows, order = rows.flatten().sort(stable=True)
    starts = torch.searchsorted(sorted_rows, torch.arange(num_rows + 1, device=rows.device, dtype=rows.dtype))
    return F.embedding_bag(order // per_bag, grad_rows, starts, per_sample_weights=shares.flatten()[order], mode="sum")[
        :-1
    ]  # the last bag is what is outside


def _products_with_rows(grad_rows: Tensor, rows: Tensor, table: Tensor) -> Tensor:
    """The product of each corner's row with the gradient of its bag, in the shape of ``rows``."""
    bags = _as_bags(rows)
    (num_bags, per_bag), channels = bags.shape, table.shape[1]
    products = table.new_empty(bags.shape)
    step = max(1, TILE_ELEMENTS // (per_bag * channels))
    gathered = table.new_empty(min(step, num_bags) * per_bag, channels)  # one buffer, which stays in the cache
    for start in range(0, num_bags, step):
        tile = bags[start : start + step]
        values = torch.index_select(table, 0, tile.flatten(), out=gathered[: tile.numel()]).view(*tile.shape, channels)
        torch.linalg.vecdot(values, grad_rows[start : start + step, None], out=products[start : start + step])
    return products.view(rows.shape)
