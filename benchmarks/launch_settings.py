"""The forward kernel under launch settings other than those that the library chose: is its choice the right one here?

Triton is imported on first use, as in the library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from .check import Variant
from .sizes import FuseCase, FuseInputs


@dataclass(frozen=True)
class LaunchSetting:
    """How the forward kernel is launched.

    Args:
        num_warps: warps of a program; its block is one 128-bit access a thread and source.
        evict_first: whether the states are streamed past L2.
    """

    num_warps: int
    evict_first: bool

    @property
    def name(self) -> str:
        return f"{self.num_warps} warps, {'evict_first' if self.evict_first else 'default eviction'}"


SETTINGS = tuple(LaunchSetting(warps, evict) for warps in (2, 4, 8, 16) for evict in (True, False))


def launched_with(setting: LaunchSetting, case: FuseCase) -> Variant:
    """The forward of a case under a setting, without the operator around it."""
    from igva_kernels.impl.triton import mix_forward
    from igva_kernels.impl.triton.launch import WARP, Streams, Tile, elements_per_access
    from igva_kernels.impl.triton.schedule import mix_schedule

    tower = case.tower
    plan = tower.plan(case.stage)
    vec = elements_per_access(case.dtype)
    block = vec * WARP * setting.num_warps
    tile = Tile(block=block, vec=vec, num_warps=setting.num_warps, width=tower.vision_dim)
    kernel = _WithOptions(mix_forward.mix_forward_kernel, {"EVICT_FIRST": setting.evict_first})

    def variant(inputs: FuseInputs) -> Tensor:
        states = [inputs.hidden_states[layer] for layer in plan.sources]
        out = torch.empty_like(inputs.cotangent)
        with mock.patch.object(mix_forward, "mix_forward_kernel", kernel):
            mix_forward.launch_mix_forward(
                Streams.of(states, vec),
                mix_schedule(plan.program),
                inputs.weights,
                out,
                None,
                tile=tile,
                num_rows=tower.num_patches,
                first_row=tower.num_prefix_tokens,
            )
        return out

    return variant


class _WithOptions:
    """A kernel whose launches get other keyword arguments."""

    def __init__(self, kernel: Any, options: dict[str, Any]) -> None:
        self.kernel, self.options = kernel, options

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        launch = self.kernel[grid]
        return lambda *arguments, **keywords: launch(*arguments, **(keywords | self.options))
