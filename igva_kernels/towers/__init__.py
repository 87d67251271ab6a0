"""Running a vision tower layer by layer.

    from igva_kernels.towers import StreamingTower

    tower = StreamingTower(hugging_face_tower)
    group_means = tower(pixel_values, plan=plan)  # no tuple of hidden states
    fused = mix(group_means, plan, weights)

Towers are those of transformers, known by ``config.model_type`` and taken as they are: nothing here imports transformers.
"""

from igva_kernels.towers.layouts import num_prefix_tokens_of, unsupported_reason
from igva_kernels.towers.reduction import ReduceAt
from igva_kernels.towers.streaming import StreamingTower, selected_hidden_states, stream_group_means

__all__ = [
    "ReduceAt",
    "StreamingTower",
    "num_prefix_tokens_of",
    "selected_hidden_states",
    "stream_group_means",
    "unsupported_reason",
]
