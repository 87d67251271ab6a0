"""Opening pictures, and turning each into the square images that vision towers take."""

from __future__ import annotations

import math
import struct
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from model.data.problems import MissingImageError, SampleError

#: Pixels above which Pillow warns of a decompression bomb: a quarter of a gibibyte in RGB.
MAX_IMAGE_PIXELS = 89_478_485

#: Rows and columns of tiles that a picture may be cut into: LLaVA-NeXT's ``image_grid_pinpoints`` in units of the tower's size.
ANYRES_GRIDS = ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))

#: What Pillow raises for damaged files, beside its own errors, which are OSErrors.
_DAMAGE = (OSError, SyntaxError, ValueError, TypeError, IndexError, EOFError, OverflowError, struct.error, zlib.error)


def open_image(path: str | Path, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Read a picture as RGB; of an animation the first frame.

    Args:
        path: the file.
        max_pixels: a picture with more is refused by its header, before anything is decoded. Pillow's own limit, twice the
            default, stays in force.

    Raises:
        FileNotFoundError: there is no such file (a :class:`model.data.problems.MissingImageError`).
        ValueError: the file is no picture, damaged, or too large (a :class:`model.data.problems.SampleError`).
    """
    with _opened(path, max_pixels) as image:
        try:
            return image.convert("RGB")
        except _DAMAGE as error:
            raise SampleError("damaged_image", f"cannot read the image {path}: {error}") from error


def image_size(path: str | Path, max_pixels: int = MAX_IMAGE_PIXELS) -> tuple[int, int]:
    """Width and height of a picture by its header; raises as :func:`open_image`, except for damage behind the header."""
    with _opened(path, max_pixels) as image:
        return image.size


def _opened(path: str | Path, max_pixels: int) -> Image.Image:
    if not Path(path).is_file():
        raise MissingImageError("missing_image", f"no image at {path}")
    try:
        with warnings.catch_warnings():
            # The limit below says it, and says the name.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
    except Image.DecompressionBombError as error:
        raise SampleError("oversized_image", f"cannot read the image {path}: {error}") from error
    except _DAMAGE as error:
        raise SampleError("damaged_image", f"cannot read the image {path}: {error}") from error
    width, height = image.size
    if width * height > max_pixels:
        image.close()
        raise SampleError(
            "oversized_image", f"the image {path} has {width} x {height} pixels, more than max_image_pixels {max_pixels:,}"
        )
    return image


def make_square(image: Image.Image, aspect_ratio: str, mean: Sequence[float]) -> Image.Image:
    """Bring an RGB picture to a square, one with more than :data:`MAX_IMAGE_PIXELS` scaled down to that before.

    Args:
        image: W x H picture.
        aspect_ratio: ``pad`` centres it on a square of the colour ``mean`` (LLaVA's ``image_aspect_ratio=pad``),
            ``crop`` keeps the middle (LLaVA's default, ``square``), ``stretch`` stretches the shorter side.
        mean: the image processor's mean, three numbers in 0 .. 1; after normalisation the padding is zero.
    """
    if max(image.size) ** 2 > MAX_IMAGE_PIXELS:
        # A strip of 50,000 x 1 pixels would become a square of 7.5 GB.
        image = image.copy()
        image.thumbnail((math.isqrt(MAX_IMAGE_PIXELS),) * 2, Image.Resampling.BICUBIC)
    width, height = image.size
    side = max(width, height)
    if width == height:
        return image
    if aspect_ratio == "stretch":
        return image.resize((side, side), Image.Resampling.BICUBIC)
    if aspect_ratio == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        return image.crop((left, top, left + side, top + side))
    if aspect_ratio != "pad":
        raise ValueError(f"aspect_ratio must be 'pad', 'crop' or 'stretch', got {aspect_ratio!r}")
    canvas = Image.new("RGB", (side, side), tuple(int(255 * channel) for channel in mean))
    canvas.paste(image, ((side - width) // 2, (side - height) // 2))
    return canvas


def num_views(size: tuple[int, int], aspect_ratio: str, side: int, grids: Sequence[Sequence[int]] = ANYRES_GRIDS) -> int:
    """How many images of the tower :func:`views` makes of a picture.

    Args:
        size: width and height of the picture.
        aspect_ratio, side, grids: as for :func:`views`.
    """
    if aspect_ratio != "anyres":
        return 1
    rows, columns = best_grid(size, side, grids)
    return 1 + rows * columns


def views(
    image: Image.Image,
    aspect_ratio: str,
    mean: Sequence[float],
    side: int,
    grids: Sequence[Sequence[int]] = ANYRES_GRIDS,
) -> list[Image.Image]:
    """The images of the tower that stand for a picture.

    ``anyres`` is LLaVA-NeXT's (LLaVA-VL/LLaVA-NeXT, llava/mm_utils.py, ``process_anyres_image``): first the whole picture,
    stretched to one square, then the tiles of the picture row by row, after it was scaled to fit the best grid and centred on
    black. Their tokens follow one another in this order (``mm_patch_merge_type=flat``; the variant that drops the tokens of the
    black margin and marks ends of rows is not offered). Other aspect ratios give one image.

    Args:
        image: the picture.
        aspect_ratio: ``anyres``, or as for :func:`make_square`.
        mean: as for :func:`make_square`.
        side: of the tower's images in pixels.
        grids: rows and columns that ``anyres`` may cut the picture into.
    """
    if aspect_ratio != "anyres":
        return [make_square(image, aspect_ratio, mean)]
    rows, columns = best_grid(image.size, side, grids)
    canvas = _fitted(image, columns * side, rows * side)
    corners = [(column * side, row * side) for row in range(rows) for column in range(columns)]
    tiles = [canvas.crop((left, top, left + side, top + side)) for left, top in corners]
    return [image.resize((side, side), Image.Resampling.BICUBIC), *tiles]


def best_grid(size: tuple[int, int], side: int, grids: Sequence[Sequence[int]] = ANYRES_GRIDS) -> tuple[int, int]:
    """Rows and columns whose canvas keeps most pixels of a picture, and of several such the one with the least margin.

    Args:
        size: width and height of the picture.
        side: of a tile in pixels.
        grids: rows and columns to choose from.
    """
    from transformers.image_processing_utils import select_best_resolution

    width, height = size
    canvases = [(rows * side, columns * side) for rows, columns in grids]
    best_height, best_width = select_best_resolution((height, width), canvases)
    return best_height // side, best_width // side


def _fitted(image: Image.Image, width: int, height: int) -> Image.Image:
    """The picture scaled to fit, centred on black."""
    scale_width, scale_height = width / image.width, height / image.height
    if scale_width < scale_height:
        size = (width, min(math.ceil(image.height * scale_width), height))
    else:
        size = (min(math.ceil(image.width * scale_height), width), height)
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image.resize(size, Image.Resampling.BICUBIC), ((width - size[0]) // 2, (height - size[1]) // 2))
    return canvas
