"""The picture of what a recipe or a checkpoint mixes: :mod:`igva_kernels.picture` for the model's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from igva_kernels.picture import Sharing, save_picture
from model.fusions import Fusion

if TYPE_CHECKING:
    from model.configuration import IgvaLlavaConfig


def save_fusion_picture(config: IgvaLlavaConfig, path: str | Path, *, stage: int | None = None) -> None:
    """Draw the plan of a model's fusion.

    Args:
        config: of the model.
        path: file that ends in ``.svg`` or ``.png``.
        stage: 1 or 2 for IGVA; by default the configured one.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a fusion that is no mix of layers token by token, or another ending of the file.
    """
    fusion = config.make_fusion()
    name = config.fusion["type"]
    if name == "mmfuser" or fusion.pooled_layers:
        read = ", ".join(f"h{layer}" for layer in fusion.plan().sources)
        raise ValueError(
            f"the fusion {name!r} reads {read} and is no mix of layers token by token, so it has no picture of one; "
            "leave --picture away, see docs/plans.md for what is a plan"
        )
    title = name if stage is None or not fusion.has_stages else f"{name}, stage {stage}"
    plan = config.fusion_plan(stage)
    save_picture(plan, path, weights=_sharing(fusion, name) if plan.num_groups else None, title=title)


def _sharing(fusion: Fusion, name: str) -> Sharing:
    if name == "scalar_mix":
        return "all"
    return "token" if name == "mixture_of_layers" and fusion.options["level"] != "layer" else "image"
