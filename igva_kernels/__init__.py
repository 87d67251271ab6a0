"""Fused kernels for mixing the layers of a vision transformer.

    from igva_kernels import FusionPlan, fuse

    plan = FusionPlan.igva(num_layers=24, num_groups=4)
    fused = fuse(hidden_states, plan, weights, num_prefix_tokens=1)  # (B, N, 2*D)

Importing this needs torch alone: neither triton nor a GPU nor transformers.
"""

from typing import TYPE_CHECKING, Any

from igva_kernels.deformable import MultiScaleDeformableAttention, ms_deform_attn, multi_scale_deformable_attention
from igva_kernels.functional import (
    GroupMeans,
    SparseWeights,
    fuse,
    group_summaries,
    group_summaries_and_states,
    mix,
    reduce_groups,
)
from igva_kernels.output_norm import OutputNorm
from igva_kernels.plan import FusionPlan, Layer, Mean, Weighted
from igva_kernels.program import Norm

if TYPE_CHECKING:
    from igva_kernels.patching import patch

__version__ = "0.1.0"

__all__ = [
    "FusionPlan",
    "GroupMeans",
    "Layer",
    "Mean",
    "MultiScaleDeformableAttention",
    "Norm",
    "OutputNorm",
    "SparseWeights",
    "Weighted",
    "fuse",
    "group_summaries",
    "group_summaries_and_states",
    "mix",
    "ms_deform_attn",
    "multi_scale_deformable_attention",
    "patch",
    "reduce_groups",
]


def __getattr__(name: str) -> Any:
    """``patch`` is imported when it is asked for: it brings the modules with it, which mixing layers does not need."""
    if name != "patch":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from igva_kernels.patching import patch

    return patch
