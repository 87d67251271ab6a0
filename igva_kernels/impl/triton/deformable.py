"""Multi-scale deformable attention as Triton kernels, for CUDA and ROCm.

Interface and semantics are those of :mod:`igva_kernels.impl.deformable_reference`. Each kernel stands with its launcher in a
file of its own; this file allocates outputs and chooses how the gradient of the value is summed.

Shapes: B images, S cells of all levels together, H heads, C channels of a head, Q queries, L levels, P points.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from igva_kernels.impl.deformable_reference import accumulation_dtype
from igva_kernels.impl.triton.deformable_backward import launch_attention_backward
from igva_kernels.impl.triton.deformable_forward import launch_attention_forward
from igva_kernels.impl.triton.deformable_value_gradient import launch_value_gradient, num_bases

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

MAX_OFFSET = 2**31
"""Offsets inside one image are int32, as are the numbers of samples and of bases of the whole batch."""

MAX_BATCH = 2**16 - 1
"""Images are the third dimension of the grid, heads the second, and CUDA has no more blocks there."""

MAX_CHANNELS = 4096
"""A row is held by one program, of 1024 threads at most."""

SpatialShapes = Sequence[tuple[int, int]]


def check_supported(value: Tensor, spatial_shapes: SpatialShapes, locations: Tensor, weights: Tensor) -> str | None:
    """Why the kernels cannot run these tensors, or None if they can."""
    if not (value.is_cuda or triton.knobs.runtime.interpret):
        return f"the tensors are on {value.device}, and Triton needs a CUDA or ROCm device"
    for name, tensor in (("value", value), ("sampling_locations", locations), ("attention_weights", weights)):
        if tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}, and the kernels take {', '.join(map(str, DTYPES))}"
    batch, num_cells, heads, channels = value.shape
    _, num_queries, _, levels, points, _ = locations.shape
    if batch > MAX_BATCH or heads > MAX_BATCH:
        return f"B={batch} images of H={heads} heads are more than the {MAX_BATCH} of one launch"
    if channels > MAX_CHANNELS:
        return f"C={channels} channels of a head are more than {MAX_CHANNELS}"
    samples = num_queries * heads * levels * points
    offsets = {
        "B*Q*H*L*P": batch * samples,
        "B*H*(cells with borders)": batch * heads * num_bases(spatial_shapes),
        "S*H*C": num_cells * heads * channels,
        "Q*H*C": num_queries * heads * channels,
        "Q*H*L*P*2": 2 * samples,
    }
    for name, size in offsets.items():
        if size >= MAX_OFFSET:
            return f"{name} = {size}, and these offsets are 32 bits wide"
    return None


def attention_forward(value: Tensor, spatial_shapes: SpatialShapes, locations: Tensor, weights: Tensor) -> Tensor:
    """``value`` (B, S, H, C), ``locations`` (B, Q, H, L, P, 2) and ``weights`` (B, Q, H, L, P) to (B, Q, H*C)."""
    batch, _, heads, channels = value.shape
    out = value.new_empty(batch, locations.shape[1], heads * channels)
    launch_attention_forward(value.contiguous(), spatial_shapes, locations.contiguous(), weights.contiguous(), out)
    return out


def attention_backward(
    grad_out: Tensor,
    value: Tensor,
    spatial_shapes: SpatialShapes,
    locations: Tensor,
    weights: Tensor,
    needs: tuple[bool, bool, bool],
    deterministic: bool | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of ``value``, ``locations`` and ``weights``, each where ``needs`` asks for it, in their dtypes."""
    grad_out, value, locations, weights = (tensor.contiguous() for tensor in (grad_out, value, locations, weights))
    wide = accumulation_dtype(value, locations, weights)
    gathers = needs[0] and gathers_value_gradient(deterministic)
    summed = value.new_zeros(value.shape, dtype=wide) if needs[0] and not gathers else None
    grad_locations = locations.new_empty(locations.shape) if needs[1] else None
    grad_weights = weights.new_empty(weights.shape) if needs[2] else None
    if summed is not None or needs[1] or needs[2]:
        launch_attention_backward(grad_out, value, spatial_shapes, locations, weights, summed, grad_locations, grad_weights)
    grad_value = None if summed is None else summed.to(value.dtype)
    if gathers:
        grad_value = value.new_empty(value.shape)
        launch_value_gradient(grad_out, spatial_shapes, locations, weights, grad_value, wide)
    return grad_value, grad_locations, grad_weights


def gathers_value_gradient(deterministic: bool | None) -> bool:
    """Whether cells gather what was read from them, in a fixed order, or samples add to them, atomically.

    Predicted for MMFuser's cross-attention (B = 16, Q = 576, 16 heads, 4 levels, 4 points, C = 64, bfloat16: 2.4 million
    samples): adding sends 2.4 GB of float32 to the atomic units of the L2 cache, beside 0.4 GB to fill the sums with zeros
    and to round them; gathering reads 1.2 GB of bfloat16 and 0.3 GB of samples, mostly from that cache, beside 0.3 GB for
    the sort. That is 0.6 to 1.0 ms against 0.8 ms, no difference that a prediction could tell, and so the order that is the
    same on every run is the default.
    """
    return deterministic is not False or torch.are_deterministic_algorithms_enabled()
