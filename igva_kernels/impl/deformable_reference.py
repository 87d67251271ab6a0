"""The definition of "correct" for multi-scale deformable attention: plain torch, one formula, any dtype up to float64.

    out[b, q, h] = Σ_{l,p} weights[b, q, h, l, p] * bilinear(value of level l, locations[b, q, h, l, p])

(Deformable DETR, arXiv 2010.04159, equation 3.) A location (x, y) in [0, 1] is the point (x*W - 1/2, y*H - 1/2) between the
centres of the cells, which stand at the integers; cells beyond the map are zeros. A location a whole cell or more outside, an
infinite one and NaN read nothing and have the gradient zero.

The gradients come from autograd, so that there is no second formula that could be wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Shapes: B images, S cells of all levels together, H heads, C channels of a head, Q queries, L levels, P points.

SpatialShapes = Sequence[tuple[int, int]]


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if anything is (so that gradcheck means something), float32 for everything narrower."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def check_supported(value: Tensor, spatial_shapes: SpatialShapes, locations: Tensor, weights: Tensor) -> str | None:
    """The reference runs everything: None."""
    return None


def attention_forward(value: Tensor, spatial_shapes: SpatialShapes, locations: Tensor, weights: Tensor) -> Tensor:
    """``value`` (B, S, H, C), ``locations`` (B, Q, H, L, P, 2) and ``weights`` (B, Q, H, L, P) to (B, Q, H*C)."""
    wide = accumulation_dtype(value, locations, weights)
    batch, queries, heads, _, _, _ = locations.shape
    total = value.new_zeros(batch, queries, heads, value.shape[3], dtype=wide)
    first = 0
    for level, (height, width) in enumerate(spatial_shapes):
        cells = value[:, first : first + height * width].unflatten(1, (height, width)).to(wide)
        sampled = _bilinear(cells, locations[:, :, :, level].to(wide))  # (B, Q, H, P, C)
        total = total + (weights[:, :, :, level, :, None].to(wide) * sampled).sum(dim=3)
        first += height * width
    return total.flatten(2).to(value.dtype)


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

    ``deterministic`` asks nothing of a definition: the order of its sums is torch's.
    """
    leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip((value, locations, weights), needs, strict=True)]
    with torch.enable_grad():
        out = attention_forward(leaves[0], spatial_shapes, leaves[1], leaves[2])
    grads = iter(torch.autograd.grad(out, [leaf for leaf in leaves if leaf.requires_grad], grad_out))
    value_grad, locations_grad, weights_grad = (next(grads) if need else None for need in needs)
    return value_grad, locations_grad, weights_grad


def _bilinear(cells: Tensor, locations: Tensor) -> Tensor:
    """``cells`` (B, height, width, H, C) at ``locations`` (B, Q, H, P, 2): (B, Q, H, P, C)."""
    batch, height, width, heads, _ = cells.shape
    image = torch.arange(batch, device=cells.device).view(-1, 1, 1, 1)
    head = torch.arange(heads, device=cells.device).view(1, 1, -1, 1)
    x, y = locations[..., 0] * width - 0.5, locations[..., 1] * height - 0.5
    inside = (x > -1) & (x < width) & (y > -1) & (y < height)  # False for NaN
    x, y = x.where(inside, 0), y.where(inside, 0)
    left, top = x.detach().floor(), y.detach().floor()
    total = torch.zeros((), dtype=cells.dtype, device=cells.device)
    for row, row_share in ((top, top + 1 - y), (top + 1, y - top)):
        for column, column_share in ((left, left + 1 - x), (left + 1, x - left)):
            exists = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            index = row.clamp(0, height - 1).long(), column.clamp(0, width - 1).long()
            corner = cells[image, *index, head].where(exists[..., None], 0)
            total = total + (row_share * column_share)[..., None] * corner
    return total
