"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159) without a CUDA extension to build.

Shapes: B images · S cells of all levels together · H heads · C channels of a head · Q queries · L levels · P points.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from igva_kernels import deformable_ops

SpatialShapes = Sequence[tuple[int, int]] | Tensor
Implementation = Literal["auto", "triton", "torch", "reference"]


def multi_scale_deformable_attention(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    impl: Implementation = "auto",
    deterministic: bool | None = None,
) -> Tensor:
    """Each query's weighted sum of the value at a few freely placed points of every level.

    ``out[b, q, h] = Σ_{l,p} attention_weights[b, q, h, l, p] · bilinear(value of level l, sampling_locations[b, q, h, l, p])``
    (arXiv 2010.04159, equation 3). Interpolation is that of ``grid_sample`` with zeros outside of the map and
    ``align_corners=False``: (0, 0) is the outer corner of the first cell, (1, 1) that of the last one. A location a whole cell
    or more outside, an infinite one and NaN read nothing and get no gradient. Levels, heads, points, and the form of each
    map are free; so is the batch, where the CUDA extension wants a multiple of ``im2col_step``.

    The call is that of mmcv's ``multi_scale_deformable_attn_pytorch``; for the calls of the CUDA extension and of transformers
    see :func:`ms_deform_attn` and :class:`MultiScaleDeformableAttention`. Sums run in float32 (float64 if an argument is)
    and are rounded once, so a 16-bit value need not be cast to float32 first. Locations in 16 bits are taken as they are: at 24
    cells a bfloat16 location near 1 is known to a tenth of a cell, so leave them in float32.

    Args:
        value: (B, S, H, C), the levels one after another, each row by row.
        spatial_shapes: the (height, width) of each level, as Python ints. An (L, 2) integer tensor is accepted; one on a GPU
            has to be copied to the host at each call, which waits for the GPU and cannot be captured in a CUDA graph.
        sampling_locations: (B, Q, H, L, P, 2), each (x, y), x along the width.
        attention_weights: (B, Q, H, L, P); usually a softmax over L and P together.
        impl: ``"auto"`` takes the Triton kernels where they can run, else plain torch; a named implementation never gives way.
        deterministic: how the kernels sum the gradient of the value; everything else has a fixed order anyway. True: sorted by
            cell and summed in a fixed order, the same bits on every run. False: atomic additions in float32, unless
            ``torch.use_deterministic_algorithms`` forbids them. None: what is expected to be the better one, at present
            the fixed order (``gathers_value_gradient`` in ``impl/triton/deformable.py`` says why).

    Returns:
        (B, Q, H*C) in the dtype of ``value``, contiguous.

    Raises:
        TypeError: an argument that is no tensor, not floating point, or spatial shapes that are no integers.
        ValueError: shapes that do not fit each other, tensors on different devices, ``impl`` unknown or unable to run these.
    """
    sizes = _check_spatial_shapes(spatial_shapes)
    _check_tensors(value, sizes, sampling_locations, attention_weights)
    if impl != "auto" and impl not in deformable_ops.MODULES:
        raise ValueError(f"impl must be one of 'auto', {', '.join(map(repr, deformable_ops.MODULES))}, got {impl!r}")
    flat = [size for shape in sizes for size in shape]
    return torch.ops.igva.deformable_attention(value, flat, sampling_locations, attention_weights, deterministic, impl)


def ms_deform_attn(
    value: Tensor,
    value_spatial_shapes: SpatialShapes,
    value_level_start_index: Sequence[int] | Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int | None = None,
) -> Tensor:
    """:func:`multi_scale_deformable_attention` with the arguments of Deformable DETR's CUDA extension, in their order.

    It stands in for ``MSDeformAttnFunction.apply`` (Deformable DETR, MMFuser) and mmcv's
    ``MultiScaleDeformableAttnFunction.apply``.

    Args:
        value, value_spatial_shapes, sampling_locations, attention_weights: as for :func:`multi_scale_deformable_attention`.
        value_level_start_index: (L,), the first cell of each level. It follows from the spatial shapes; a sequence or a CPU
            tensor is compared with them, a GPU tensor is not read, since that would wait for the GPU.
        im2col_step: how many images the CUDA extension takes at a time. Ignored: there is no such limit here.

    Raises:
        TypeError, ValueError: as :func:`multi_scale_deformable_attention`; also levels that do not lie one after another.
    """
    sizes = _check_spatial_shapes(value_spatial_shapes)
    _check_level_start_index(value_level_start_index, sizes)
    return multi_scale_deformable_attention(value, sizes, sampling_locations, attention_weights)


class MultiScaleDeformableAttention(nn.Module):
    """The class of that name in transformers (``models/deformable_detr`` and its relatives), which has no parameters.

    An instance may replace ``attn`` of transformers' ``DeformableDetrMultiscaleDeformableAttention``:
    ``layer.attn = MultiScaleDeformableAttention()``.
    """

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor | None,
        value_spatial_shapes_list: Sequence[tuple[int, int]],
        level_start_index: Sequence[int] | Tensor | None,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int | None = None,
    ) -> Tensor:
        """(B, Q, H*C), as :func:`ms_deform_attn`.

        ``value_spatial_shapes`` is the tensor of what ``value_spatial_shapes_list`` says in Python ints, and is not read.
        """
        return ms_deform_attn(
            value, value_spatial_shapes_list, level_start_index, sampling_locations, attention_weights, im2col_step
        )


def _check_spatial_shapes(spatial_shapes: SpatialShapes) -> tuple[tuple[int, int], ...]:
    if isinstance(spatial_shapes, Tensor):
        if spatial_shapes.ndim != 2 or spatial_shapes.shape[1] != 2 or spatial_shapes.is_floating_point():
            raise ValueError(
                "spatial_shapes must be (L, 2) integers, the (height, width) of each level, got a tensor of shape "
                f"{tuple(spatial_shapes.shape)} and {spatial_shapes.dtype}"
            )
        spatial_shapes = spatial_shapes.tolist()
    sizes = tuple(map(tuple, spatial_shapes))
    if not sizes or any(len(size) != 2 for size in sizes):
        raise ValueError(f"spatial_shapes must hold the (height, width) of at least one level, got {spatial_shapes!r}")
    for level, size in enumerate(sizes):
        if not all(isinstance(extent, int | torch.SymInt) and not isinstance(extent, bool) for extent in size):
            raise TypeError(f"spatial_shapes[{level}] must be two ints (height, width), got {size!r}")
        if size[0] < 1 or size[1] < 1:
            raise ValueError(f"spatial_shapes[{level}] = {size} has no cell; height and width must be at least 1")
    return sizes


def _check_level_start_index(level_start_index: Sequence[int] | Tensor | None, sizes: Sequence[tuple[int, int]]) -> None:
    if level_start_index is None or (isinstance(level_start_index, Tensor) and level_start_index.device.type != "cpu"):
        return
    given = level_start_index.tolist() if isinstance(level_start_index, Tensor) else list(level_start_index)
    starts = [sum(height * width for height, width in sizes[:level]) for level in range(len(sizes))]
    if given != starts:
        raise ValueError(
            f"level_start_index is {given}, but levels of {list(sizes)} cells that lie one after another begin at {starts}; "
            "order the value so, and pass None"
        )


def _check_tensors(value: Tensor, sizes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> None:
    named = {"value": (value, 4), "sampling_locations": (locations, 6), "attention_weights": (weights, 5)}
    for name, (tensor, ndim) in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor.ndim != ndim:
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, expected {ndim} dimensions: {_EXPECTED[name]}")
        if tensor.device != value.device:
            raise ValueError(f"{name} is on {tensor.device}, value on {value.device}; move one of them")
    batch, num_cells, heads, channels = value.shape
    total = sum(height * width for height, width in sizes)
    if num_cells != total:
        raise ValueError(f"value has S = {num_cells} cells, but the levels {list(sizes)} have {total} together")
    if heads < 1 or channels < 1:
        raise ValueError(f"value has the shape {tuple(value.shape)}; heads and channels (B, S, H, C) must be at least 1")
    queries, points = locations.shape[1], locations.shape[4]
    expected = (batch, queries, heads, len(sizes), points)
    if tuple(locations.shape) != (*expected, 2):
        raise ValueError(
            f"sampling_locations has the shape {tuple(locations.shape)}, expected (B, Q, H, L, P, 2) = {(*expected, 2)} "
            f"for value {tuple(value.shape)} and {len(sizes)} levels"
        )
    if points < 1:
        raise ValueError("sampling_locations has no point: P = 0")
    if tuple(weights.shape) != expected:
        raise ValueError(
            f"attention_weights has the shape {tuple(weights.shape)}, expected (B, Q, H, L, P) = {expected}, "
            "that of sampling_locations without its last dimension"
        )


_EXPECTED = {
    "value": "(B, S, H, C), the cells of all levels one after another",
    "sampling_locations": "(B, Q, H, L, P, 2)",
    "attention_weights": "(B, Q, H, L, P)",
}
