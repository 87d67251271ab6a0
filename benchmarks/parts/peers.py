"""The fusion, the allocator, the vision side and deformable attention against torch.compile in its default mode."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..context import Context
from ..sizes import CLIP_L_336, DINOV2_L_518, SIGLIP_SO400M_384, TINY, FuseCase
from .family import measure_deformable_attention
from .kernels import COMPILE, COMPILE_SUM, EAGER, OURS, Job, measure_allocator, measure_fuse
from .vision import measure_vision

MEASURES = """\
torch.compile in its default mode, of the official formulation and of the same formula as a plain running sum, beside
igva_kernels and the official eager formulation in the same rounds: fuse for CLIP-L/14-336 at B = 1, 4, 16 in every mode, for
SigLIP-so400m/14-384 and DINOv2-L/14-518 at B = 16 forward and with a trainable tower, in bfloat16;
the weight allocator, the fusion of a vision side and deformable attention, compiled."""

VARIANTS = (OURS, EAGER, COMPILE, COMPILE_SUM)
CALLS = ("forward", "frozen", "trainable")


def jobs(device: torch.device, tiny: bool) -> Iterator[FuseCase]:
    """The most telling first: what does not fit into the time budget is at the end."""
    bf16 = torch.bfloat16
    if tiny:
        yield FuseCase(TINY, 2, bf16, mode="frozen")
    elif device.type == "cpu":
        for batch in (1, 4):
            for dtype in (torch.float32, bf16):
                yield from (FuseCase(CLIP_L_336, batch, dtype, mode=mode) for mode in CALLS)
                yield FuseCase(CLIP_L_336, batch, dtype, stage=1)
    else:
        for batch in (16, 1):
            yield from (FuseCase(CLIP_L_336, batch, bf16, mode=mode) for mode in CALLS)
        for tower in (SIGLIP_SO400M_384, DINOV2_L_518):
            yield from (FuseCase(tower, 16, bf16, mode=mode) for mode in ("forward", "trainable"))
        yield from (FuseCase(CLIP_L_336, 4, bf16, mode=mode) for mode in CALLS)


def run_part(context: Context) -> None:
    """Record every case of the part."""
    for case in jobs(context.device, context.tiny):
        measure_fuse(context, Job(case, VARIANTS))
    batch = 16 if context.device.type == "cuda" and not context.tiny else 1
    # compilation is most of a tiny run: on a CPU one of the three shows that the code around it runs
    dry = context.tiny and context.device.type == "cpu"
    for images in sorted({1, batch}):
        measure_allocator(context, images, (OURS, EAGER) if dry else (OURS, EAGER, COMPILE))
    measure_vision(context, batch, (OURS, EAGER) if dry else (OURS, EAGER, COMPILE))
    for mode in ("forward",) if dry else ("forward", "trainable"):
        measure_deformable_attention(context, batch, mode, compile_peer=True)
