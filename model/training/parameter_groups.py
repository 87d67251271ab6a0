"""Which parameters share a learning rate and a weight decay."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

PROJECTOR = "model.multi_modal_projector."
ALLOCATOR = "model.fusion."


def parameter_groups(
    model: nn.Module,
    decayed: Collection[str],
    *,
    learning_rate: float,
    part_learning_rates: Mapping[str, float | None],
    weight_decay: float,
) -> list[dict[str, Any]]:
    """The groups of an optimizer, for the parameters that learn.

    Args:
        model: the model; a wrapper such as DistributedDataParallel may put a prefix before the names.
        decayed: names of parameters that weight decay is applied to.
        learning_rate: of everything that has none of its own.
        part_learning_rates: learning rates by a part of the name (:data:`PROJECTOR`, :data:`ALLOCATOR`); None: the general one.
        weight_decay: of the decayed parameters; the others have 0.
    """

    def rate_of(name: str) -> float:
        for part, rate in part_learning_rates.items():
            if part in name and rate is not None:
                return rate
        return learning_rate

    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((rate_of(name), weight_decay if name in decayed else 0.0), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]
