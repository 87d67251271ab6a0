"""The official DenseConnector code (HJYao00/DenseConnector at 0f8936c, ``dc/model/llava_arch.py``): its ``encode_images``."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor

from igva_kernels.functional import Implementation, fuse
from igva_kernels.patching.report import Replacement
from igva_kernels.plan import FusionPlan, Layer, Mean


def dense_connector(module: Any, impl: Implementation) -> Replacement | str | None:
    """A model whose config names ``mm_dense_connector_type`` and whose ``encode_images`` reads it."""
    if not all(callable(getattr(module, name, None)) for name in ("encode_images", "get_model", "is_siglip")):
        return None
    config = getattr(module.get_model(), "config", None)
    kind = getattr(config, "mm_dense_connector_type", None)
    if kind not in ("sti", "sci", "dci"):
        return None
    if kind == "sti":
        return "sparse token integration pools and concatenates tokens; it is no mix of layers per token"

    def encode_images(self: Any, images: Tensor) -> Tensor:
        """(B, N, H) image features of (B, 3, height, width)."""
        model = self.get_model()
        tower = model.get_vision_tower()
        if isinstance(images, list):
            raise TypeError("images must be one tensor (B, 3, height, width), got a list; concatenate them as the model does")
        image_features, outputs = tower(images)
        siglip = self.is_siglip()
        base = -1 if siglip else tower.select_layer
        plan = _plan(model.config.mm_dense_connector_type, len(outputs.hidden_states) - 1, base, siglip)
        fused = fuse(outputs.hidden_states, plan, num_prefix_tokens=0 if siglip else 1, impl=impl)
        features = model.mm_projector(fused.to(image_features.dtype))
        return self.temporal_aggregation(features) if model.config.is_video else features

    what = "three layers beside each other" if kind == "sci" else "two means and the base beside each other"
    return Replacement("encode_images", encode_images, f"{what}, in one pass (base first)")


@lru_cache(maxsize=64)
def _plan(kind: str, num_layers: int, base: int, siglip: bool) -> FusionPlan:
    """The official indices, which are written for towers of 24 (CLIP) and 26 (SigLIP) blocks whatever the tower is."""
    if kind == "sci":
        return FusionPlan(num_layers, (Layer(base), Layer(7), Layer(15)))
    half = 13 if siglip else 12
    return FusionPlan(num_layers, (Layer(base), Mean(tuple(range(half))), Mean(tuple(range(half, 2 * half)))))
