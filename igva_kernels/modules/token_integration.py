"""DenseConnector's two changes to the tokens: pooled tokens of shallow layers behind the base, and a smaller map.

Shapes: B images · T tokens with prefix · P prefix tokens · N = T − P patches · D vision width · J pooled layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from igva_kernels.checks import select_states
from igva_kernels.functional import HiddenStates
from igva_kernels.plan import FusionPlan


class SparseTokenIntegration(nn.Module):
    """DenseConnector STI: ``[h_base; AvgPool(h_7); AvgPool(h_15)]`` along the tokens (arXiv 2405.13800, section 3.2).

    HJYao00/DenseConnector, ``dc/model/multimodal_projector/dense_connector.py``: the pooling averages ``strip`` consecutive
    tokens in raster order, and drops the tokens that do not fill a strip. CLIP-L/336 gives 576 + 72 + 72 = 720 tokens,
    SigLIP-so400m/384 gives 729 + 91 + 91 = 911 (the last token is in no strip). It has no parameters.

    There is no kernel for it: with M the bytes of a map, it must read (1 + J)·M and write (1 + J/8)·M, and torch does just that
    in 1 + J launches where it may write into the finished output. Autograd forbids that, so for a tower that is trained the
    pooled tokens are written once more and read once more, 2·J/8·M: 12 % of the traffic of J = 2.

    Args:
        num_layers: L of the tower.
        layers: those that are pooled, in the order of their tokens.
        base: the layer that keeps all its tokens: -2 for CLIP; for SigLIP, whose last block the code deletes, ``num_layers=26,
            base=-1``.
        strip: tokens that are averaged to one.

    Attributes:
        plan: the layers that are read, base first, as a plan: what a tower needs to return.

    Raises:
        TypeError, ValueError: a layer that the tower does not have, no layer to pool, or ``strip`` below 1.
    """

    def __init__(self, num_layers: int = 24, *, layers: Sequence[int] = (7, 15), base: int = -2, strip: int = 8) -> None:
        super().__init__()
        if not layers:
            raise ValueError("layers is empty: there is nothing to pool; use FusionPlan.llava for the base alone")
        if strip < 1:
            raise ValueError(f"strip must be at least 1, got {strip}")
        self.plan = FusionPlan.layers(num_layers, (base, *layers))
        self.strip = strip

    def num_tokens(self, num_patches: int) -> int:
        """Tokens of an image of ``num_patches`` patches: N + J · ⌊N / strip⌋."""
        return num_patches + (self.plan.num_slots - 1) * (num_patches // self.strip)

    def forward(self, hidden_states: HiddenStates, *, num_prefix_tokens: int) -> Tensor:
        """Integrate.

        Args:
            hidden_states, num_prefix_tokens: as for :func:`igva_kernels.fuse`.

        Returns:
            (B, N + J · ⌊N / strip⌋, D) in the dtype of the hidden states, contiguous. Sums of a strip run in float32 at least.

        Raises:
            TypeError, ValueError: as :func:`igva_kernels.fuse`; fewer patches than a strip.
        """
        layers = [slot.index for slot in self.plan.slots]  # type: ignore[union-attr]  # all are Layer
        base, *pooled = (
            state[:, num_prefix_tokens:] for state in select_states(hidden_states, self.plan, layers, num_prefix_tokens)
        )
        patches = base.shape[1]
        pooled_patches = patches // self.strip
        if not pooled_patches:
            raise ValueError(f"an image of {patches} patches has no strip of {self.strip} tokens; use a smaller strip")
        strips = [state[:, : pooled_patches * self.strip].unflatten(1, (pooled_patches, self.strip)) for state in pooled]
        needs_graph = torch.is_grad_enabled() and any(state.requires_grad for state in (base, *pooled))
        if needs_graph or torch.compiler.is_compiling():
            return torch.cat([base, *(strip.mean(dim=2) for strip in strips)], dim=1)
        out = base.new_empty(base.shape[0], self.num_tokens(patches), base.shape[2])
        places = out.split([patches] + [pooled_patches] * len(strips), dim=1)
        places[0].copy_(base)
        for strip, place in zip(strips, places[1:], strict=True):
            torch.mean(strip, dim=2, out=place)
        return out

    def extra_repr(self) -> str:
        return f"plan={self.plan.slots}, strip={self.strip}"


def reduce_tokens(tokens: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Efficient DenseConnector: a map of tokens at another size, bilinear, ``align_corners=False`` (section 3.3 of the paper).

    It has no parameters and stands behind the projector: 24 x 24 tokens become 12 x 12. The released code does not hold it;
    this is the paper's description. At half the size, bilinear sampling falls between four tokens and is their mean. The tokens
    are read as a channels-last map, so that nothing is transposed.

    Args:
        tokens: (B, height · width, C), row by row.
        grid: their (height, width).
        size: the new (height, width).

    Returns:
        (B, size[0] · size[1], C) in the dtype of ``tokens``; differentiable.

    Raises:
        ValueError: ``grid`` does not have the number of tokens, or a side is below 1.
    """
    if tokens.ndim != 3 or grid[0] * grid[1] != tokens.shape[1]:
        raise ValueError(f"tokens has the shape {tuple(tokens.shape)}, expected (B, N, C) with N = {grid[0]} x {grid[1]}")
    if min(size) < 1:
        raise ValueError(f"size must be at least 1 x 1, got {size[0]} x {size[1]}")
    image = tokens.unflatten(1, grid).permute(0, 3, 1, 2)
    resized = functional.interpolate(image, size, mode="bilinear", align_corners=False)
    return resized.permute(0, 2, 3, 1).flatten(1, 2)
