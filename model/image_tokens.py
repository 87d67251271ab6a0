"""How many tokens a picture becomes: what the model makes and the processor's placeholders must agree on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageTokens:
    """Patches → pooled map → (projector) → reduced map → tokens of pooled layers behind it.

    Args:
        patch_size: side of the tower's patches in pixels.
        token_pooling: side of the square of tokens that is averaged before the projector; None for none.
        token_reduction: factor by which the sides of the map shrink behind the projector (Efficient DenseConnector); None for
            none.
        pooled_layers: layers whose tokens, averaged in strips, follow the map (DenseConnector STI).
        strip: tokens of such a layer that are averaged to one.
    """

    patch_size: int
    token_pooling: int | None = None
    token_reduction: int | None = None
    pooled_layers: int = 0
    strip: int = 8

    def patches(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the patches of an image of ``height`` x ``width`` pixels.

        Raises:
            ValueError: there is not even one.
        """
        rows, columns = height // self.patch_size, width // self.patch_size
        if rows < 1 or columns < 1:
            raise ValueError(f"an image of {height} x {width} pixels holds no patch of {self.patch_size} x {self.patch_size}")
        return rows, columns

    def pooled_map(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the map that the projector gets.

        Raises:
            ValueError: as :meth:`patches`; the patches do not divide by ``token_pooling``.
        """
        return self._divided(self.patches(height, width), "token_pooling", self.token_pooling, self.patch_size)

    def map(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the map that the language model gets.

        Raises:
            ValueError: as :meth:`pooled_map`; that map does not divide by ``token_reduction``.
        """
        side = self.patch_size * (self.token_pooling or 1)
        return self._divided(self.pooled_map(height, width), "token_reduction", self.token_reduction, side)

    def count(self, height: int, width: int) -> int:
        """Placeholders of an image of ``height`` x ``width`` pixels.

        Raises:
            ValueError: as :meth:`map`; fewer patches than a strip.
        """
        rows, columns = self.map(height, width)
        tokens = rows * columns
        if self.pooled_layers and tokens < self.strip:
            raise ValueError(f"an image of {height} x {width} pixels has {tokens} patches, fewer than a strip of {self.strip}")
        return tokens + self.pooled_layers * (tokens // self.strip)

    @staticmethod
    def _divided(grid: tuple[int, int], name: str, factor: int | None, side: int) -> tuple[int, int]:
        rows, columns = grid
        if factor is None:
            return grid
        if rows % factor or columns % factor:
            raise ValueError(
                f"{name}={factor} does not divide the {rows} x {columns} patches of an image of {rows * side} x "
                f"{columns * side} pixels (patches of {side}); choose an image_size that is a multiple of {side * factor}"
            )
        return rows // factor, columns // factor
