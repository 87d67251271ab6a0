"""The fusion against the most that torch.compile can be asked for."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..context import Context
from ..sizes import CLIP_L_336, TINY, FuseCase
from .kernels import AUTOTUNE, AUTOTUNE_SUM, OURS, Job, measure_fuse

MEASURES = """\
torch.compile max-autotune, of the official formulation and of the same formula as a plain running sum, beside igva_kernels in
the same rounds: fuse for CLIP-L/14-336 in bfloat16, forward and with a trainable tower at B = 16, forward at B = 1. Compilation
takes most of the part."""


def jobs(device: torch.device, tiny: bool) -> Iterator[FuseCase]:
    """The most telling first: what does not fit into the time budget is at the end."""
    if tiny:
        yield FuseCase(TINY, 2, torch.float32)
        return
    large = 16 if device.type == "cuda" else 4
    for batch, mode in ((large, "forward"), (large, "trainable"), (1, "forward")):
        yield FuseCase(CLIP_L_336, batch, torch.bfloat16, mode=mode)


def run_part(context: Context) -> None:
    """Record every case of the part."""
    for case in jobs(context.device, context.tiny):
        measure_fuse(context, Job(case, (OURS, AUTOTUNE_SUM, AUTOTUNE)))
