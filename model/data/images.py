"""Opening pictures and making them square, the shape that vision towers take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError


def open_image(path: str | Path) -> Image.Image:
    """Read a picture as RGB.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no picture, damaged, or of a size that Pillow takes for a decompression bomb.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no image at {path}")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as error:
        raise ValueError(f"cannot read the image {path}: {error}") from error


def make_square(image: Image.Image, aspect_ratio: str, mean: Sequence[float]) -> Image.Image:
    """Bring an RGB picture to a square.

    Args:
        image: W x H picture.
        aspect_ratio: ``pad`` centres it on a square of the colour ``mean`` (LLaVA's ``image_aspect_ratio=pad``),
            ``crop`` keeps the middle (LLaVA's default, ``square``), ``stretch`` stretches the shorter side.
        mean: the image processor's mean, three numbers in 0 .. 1; after normalisation the padding is zero.
    """
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
