"""Llava and VipLlava of transformers (5.10 to 5.23) with ``vision_feature_layer`` as a list: their ``get_image_features``.

The concatenation itself moves the same bytes as ``torch.cat``. What is saved is the tuple of hidden states: the tower runs
layer by layer, keeps the layers of the list alone, and stops after the last of them. VipLlava's norm stays a call of its own:
it is the first line of the projector's forward, which is the model's.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor

from igva_kernels.functional import Implementation, fuse
from igva_kernels.patching.report import Replacement
from igva_kernels.plan import FusionPlan
from igva_kernels.towers import selected_hidden_states, unsupported_reason
from igva_kernels.towers.layouts import blocks_of

MODEL_TYPES = {"llava": "vision_feature_layer", "vipllava": "vision_feature_layers"}
"""Known types, and the name of the list: VipLlava's in transformers before 5.23, which later versions still take."""


def layer_list(module: Any, impl: Implementation) -> Replacement | str | None:
    """The base model of Llava or VipLlava: tower, projector and language model."""
    config = getattr(module, "config", None)
    model_type = getattr(config, "model_type", None)
    parts = ("vision_tower", "multi_modal_projector", "language_model")
    if model_type not in MODEL_TYPES or any(part not in module._modules for part in parts):
        return None
    layers = _default_layers(config)
    if isinstance(layers, int):
        return f"vision_feature_layer is the single layer {layers}: there is nothing to fuse"
    reason = unsupported_reason(module.get_submodule("vision_tower"))
    if reason is not None:
        return f"its tower cannot run layer by layer: {reason}"
    original = module.get_image_features
    output_class = inspect.unwrap(type(module).get_image_features).__globals__["BaseModelOutputWithPooling"]

    def get_image_features(
        self: Any,
        pixel_values: Tensor,
        vision_feature_layer: int | Sequence[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the model's own; a call that asks for a single layer, or for more than the features, goes to that."""
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        asked = kwargs.pop("vision_feature_layers", vision_feature_layer)
        layers = _default_layers(self.config) if asked is None else asked
        if isinstance(layers, int) or kwargs.keys() - {"return_dict"}:
            given = {MODEL_TYPES[model_type]: asked, "vision_feature_select_strategy": vision_feature_select_strategy}
            return original(pixel_values, **{name: value for name, value in given.items() if value is not None}, **kwargs)
        strategy = vision_feature_select_strategy or getattr(self.config, "vision_feature_select_strategy", "default")
        plan = _plan(len(blocks_of(self.vision_tower)), tuple(layers))
        hidden_states = selected_hidden_states(self.vision_tower, pixel_values, plan)
        fused = fuse(hidden_states, plan, num_prefix_tokens=1 if strategy == "default" else 0, impl=impl)
        features = self.multi_modal_projector(fused)
        outputs = output_class(pooler_output=list(features) if model_type == "llava" else features)  # as the two differ
        return outputs if kwargs.get("return_dict", True) else outputs.to_tuple()

    what = f"the tower keeps the layers {list(layers)} alone and stops after the last of them"
    return Replacement("get_image_features", get_image_features, what)


def _default_layers(config: Any) -> int | Sequence[int]:
    newer = getattr(config, "vision_feature_layer", None)
    return config.vision_feature_layers if newer is None else newer


@lru_cache(maxsize=64)
def _plan(num_layers: int, layers: tuple[int, ...]) -> FusionPlan:
    return FusionPlan.layers(num_layers, layers)
