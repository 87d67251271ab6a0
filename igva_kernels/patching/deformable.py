"""Deformable attention by a CUDA extension or by ``grid_sample``: modules of MMFuser, Deformable DETR and transformers."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from igva_kernels.deformable import ms_deform_attn, multi_scale_deformable_attention
from igva_kernels.functional import Implementation
from igva_kernels.patching.report import Replacement

_LAYERS = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
_SIZES = ("d_model", "n_levels", "n_heads", "n_points")
_FORWARD = (
    "query",
    "reference_points",
    "input_flatten",
    "input_spatial_shapes",
    "input_level_start_index",
    "input_padding_mask",
)
_CORE = (
    "value",
    "value_spatial_shapes",
    "value_spatial_shapes_list",
    "level_start_index",
    "sampling_locations",
    "attention_weights",
    "im2col_step",
)


def deformable_attention(module: Any, impl: Implementation) -> Replacement | str | None:
    """Deformable DETR's ``MSDeformAttn`` (MMFuser has a copy), or transformers' ``MultiScaleDeformableAttention``."""
    parameters = tuple(inspect.signature(type(module).forward).parameters)[1:]
    if parameters == _FORWARD and all(hasattr(module, name) for name in (*_LAYERS, *_SIZES)):
        what = "value, locations and weights meet in one kernel, forward and backward, without an extension"
        return Replacement("forward", _ms_deform_attn_forward(impl), what)
    if parameters == _CORE and not module._parameters and not module._modules:
        what = "one kernel in place of a grid_sample a level and a product"
        return Replacement("forward", _core_forward, what)
    return None


def _ms_deform_attn_forward(impl: Implementation) -> Any:
    def forward(
        self: Any,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: Tensor,
        input_level_start_index: Tensor | None,
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """(B, Q, d_model); arguments as for the module's own ``forward``."""
        batch, num_queries, _ = query.shape
        value = self.value_proj(input_flatten)
        if input_padding_mask is not None:
            value = value.masked_fill(input_padding_mask[..., None], 0.0)
        value = value.unflatten(-1, (self.n_heads, -1))
        offsets = self.sampling_offsets(query).view(batch, num_queries, self.n_heads, self.n_levels, self.n_points, 2).float()
        weights = self.attention_weights(query).view(batch, num_queries, self.n_heads, -1).float().softmax(-1)
        weights = weights.view(batch, num_queries, self.n_heads, self.n_levels, self.n_points)
        reference = reference_points[:, :, None, :, None, :].float()
        if reference_points.shape[-1] == 2:
            extent = input_spatial_shapes.flip(-1)[None, None, None, :, None, :]  # (width, height)
            locations = reference + offsets / extent
        elif reference_points.shape[-1] == 4:
            locations = reference[..., :2] + offsets / self.n_points * reference[..., 2:] * 0.5
        else:
            raise ValueError(f"reference_points must end in 2 (x, y) or 4 (x, y, width, height), got {reference_points.shape}")
        sampled = multi_scale_deformable_attention(
            value, input_spatial_shapes, locations, weights, impl="auto" if impl == "native" else impl
        )
        return self.output_proj(sampled.to(self.output_proj.weight.dtype))

    return forward


def _core_forward(
    self: Any,
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_spatial_shapes_list: list[tuple[int, int]],
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    return ms_deform_attn(
        value, value_spatial_shapes_list, level_start_index, sampling_locations, attention_weights, im2col_step
    )
