"""The norm behind the mix in plain torch: rows in the dtype of the sums, and its backward.

**What is kept for the backward**, for each (B, N, S*D) map of M bytes: the mix before its norm, rounded to the dtype of the
output, and mean and 1/deviation of each row in float32, as torch's own norm keeps them. Fused, the forward writes 2 M (the
output and the mix) where mix and norm apart write M, read M and write M. Nothing but the output would do without parameters
or where no weight is zero, but ``(out - bias) / weight`` loses its digits where the weight is small, and the mix is what
torch keeps too.

**The backward** reads the output's gradient and the mix (2 M), writes dL/d(mix) (M) where it is wanted, and the mix's own
backward reads that. dL/d(mix) of a row needs two sums over the row before its first element is known, and dL/d(weight, bias)
sums over all rows: one pass for both would hold gradient, normalised row and partial sums of S*D channels, three times what
the mix's backward holds beside it. It saves 2 M of the 4 M that move here, and none where the tower is frozen and only the
norm learns (VipLlava), as then dL/d(mix) is not made. So it is torch's kernel; for 16-bit maps on a CPU, wide and in tiles.

Shapes: B images, N patches, S slots, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from igva_kernels.impl.cpu_tiles import tiles
from igva_kernels.impl.reference import accumulation_dtype
from igva_kernels.output_norm import OutputNorm

BACKWARD_TILE_ELEMENTS = 1 << 17
"""Elements of a tile of the backward of 16-bit maps on a CPU, which makes a handful of wide copies of it: so small that these
stay in the cache, and that their memory is used again. Fresh pages cost more than all arithmetic."""

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""dL/d(mix), dL/d(weight), dL/d(bias); None for what is not needed."""


def normalise(rows: Tensor, norm: OutputNorm) -> tuple[Tensor, list[Tensor]]:
    """Rows (..., S*D) in the accumulation dtype, normalised, and their statistics (..., 1), the last the factor."""
    weight, bias = (None if each is None else each.detach().to(rows.dtype) for each in (norm.weight, norm.bias))
    if norm.kind == "layer":
        out, mean, factor = torch.native_layer_norm(rows, rows.shape[-1:], weight, bias, norm.eps)
        return out, [mean, factor]
    factor = rows.square().mean(-1, keepdim=True).add_(norm.eps).rsqrt_()
    out = rows * factor
    return out if weight is None else out.mul_(weight), [factor]


def output_norm_backward(
    grad_out: Tensor, mixed: Tensor, statistics: Tensor, norm: OutputNorm, needs: tuple[bool, bool, bool]
) -> Gradients:
    """The vector-Jacobian product of the norm.

    Args:
        grad_out: (B, N, S*D), in any layout.
        mixed: (B, N, S*D), the mix before its norm, in the dtype of ``grad_out``.
        statistics: (1 or 2, B, N, 1) in the accumulation dtype, from the forward.
        needs: which of the three gradients.

    Returns:
        The gradients, in the dtypes of ``mixed`` and of the parameters. Sums over rows run in the accumulation dtype, in an
        order that depends on shapes and, on a CPU, on the number of threads.
    """
    needs = (needs[0], needs[1] and norm.weight is not None, needs[2] and norm.bias is not None)
    wide = accumulation_dtype(mixed.dtype)
    if grad_out.device.type != "cpu" or mixed.dtype == wide:
        grads = _rows_backward(grad_out.contiguous(), mixed, list(statistics), norm.weight, norm.bias, norm, needs)
        return _as_parameters(*grads, norm)
    # For 16-bit maps torch's own kernel for a CPU adds up the gradients of the parameters in 16 bits.
    weight, bias = (None if each is None else each.detach().to(wide) for each in (norm.weight, norm.bias))
    grad_mixed = mixed.new_empty(mixed.shape) if needs[0] else None
    grad_weight, grad_bias = (mixed.new_zeros(mixed.shape[2], dtype=wide) if need else None for need in needs[1:])
    for tile in tiles(mixed, BACKWARD_TILE_ELEMENTS):
        of_tile = [kept[tile].contiguous() for kept in statistics]
        grad_tile, mixed_tile = (each[tile].to(wide).contiguous() for each in (grad_out, mixed))
        to_mixed, to_weight, to_bias = _rows_backward(grad_tile, mixed_tile, of_tile, weight, bias, norm, needs)
        for total, part in ((grad_weight, to_weight), (grad_bias, to_bias)):
            if total is not None and part is not None:
                total += part
        if grad_mixed is not None and to_mixed is not None:
            grad_mixed[tile].copy_(to_mixed)
    return _as_parameters(grad_mixed, grad_weight, grad_bias, norm)


def _as_parameters(
    grad_mixed: Tensor | None, grad_weight: Tensor | None, grad_bias: Tensor | None, norm: OutputNorm
) -> Gradients:
    if grad_weight is not None and norm.weight is not None:
        grad_weight = grad_weight.to(norm.weight.dtype)
    if grad_bias is not None and norm.bias is not None:
        grad_bias = grad_bias.to(norm.bias.dtype)
    return grad_mixed, grad_weight, grad_bias


def _rows_backward(
    grad: Tensor,
    rows: Tensor,
    statistics: list[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    norm: OutputNorm,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    if norm.kind == "layer":
        mean, factor = statistics
        return torch.ops.aten.native_layer_norm_backward(grad, rows, rows.shape[-1:], mean, factor, weight, bias, needs)
    (factor,) = statistics
    wide = factor.dtype
    normalised, grad = rows.to(wide) * factor, grad.to(wide)
    grad_weight = (grad * normalised).sum((0, 1)) if needs[1] else None
    if not needs[0]:
        return None, grad_weight, None
    through = grad if weight is None else grad * weight.to(wide)
    slope = (through * normalised).mean(-1, keepdim=True)
    return (through - normalised.mul_(slope)).mul_(factor).to(rows.dtype), grad_weight, None
