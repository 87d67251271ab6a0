"""The tiles in which plain torch walks over maps on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

TILE_ELEMENTS = 1 << 20
"""Elements of one tile: 4 MiB of float32 accumulator, which the last-level cache holds while the states stream through. Smaller
tiles fit a nearer cache, but pay thirty calls and, with several threads, thirty barriers each. Measured for CLIP-L on two AVX2
cores with 2^15, 2^17 and 2^20 elements: 19.5, 9.4 and 6.2 ms (float32, B = 1), 71, 35 and 21 ms (bfloat16, B = 4)."""

Tile = tuple[slice, slice]


def tiles(like: Tensor, elements: int | None = None) -> Iterator[Tile]:
    """Slices (images, patches) that cover a (B, N, D) map; the whole map at once off the CPU, where launches are dear.

    Args:
        elements: of a tile at most, if it has more than one row; None for :data:`TILE_ELEMENTS`.
    """
    elements = TILE_ELEMENTS if elements is None else elements
    batch, num_patches, width = like.shape
    if like.numel() == 0:
        return
    if like.device.type != "cpu":
        yield slice(None), slice(None)
        return
    images = max(1, elements // (num_patches * width))
    rows = num_patches if images > 1 else max(1, elements // width)
    for first_image in range(0, batch, images):
        for first_row in range(0, num_patches, rows):
            yield slice(first_image, first_image + images), slice(first_row, first_row + rows)
