"""MMFuser (arXiv 2410.11829): a deep layer looks up the detail in shallow ones by deformable attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt

import torch
from torch import Tensor, nn

from igva_kernels.deformable import Implementation
from igva_kernels.modules.deformable_attention import DeformableAttention, centres_of_cells

OFFICIAL_NAMES = {"cross_scale": "gamma1", "self_scale": "gamma2"}
"""Our names of the layer scales and those of the released code. transformers renames what contains "gamma" when it loads a
checkpoint, so the released names are lost there; the other parameters have the same names here and there."""


class MMFuserFusion(nn.Module):
    """The block of MMFuser: N patches of several layers in, N patches out, for a plain LLaVA projector.

    With q the patches of the last of ``layers``, F those of the others, one after another:

        a   = cross_attention(LN(q), LN(F))           each patch looks at all the other layers around its place
        r   = self_attention(LN(a), LN(a))            and then around its place in what was found
        out = q + cross_scale * (a + self_scale * r)  both scales begin at 0, so that the block begins as the identity

    Maths, initial values and, but for the two scales (:data:`OFFICIAL_NAMES`), parameter names are those of the released
    ``MSCrossAttnBlock`` (yuecao0119/MMFuser, ``llava/model/multimodal_projector/ms_cross_attn.py``). The released module needs
    a CUDA extension, a square map, and the attention's operands in float32; this one none of them.

    Args:
        layers: the layers F and, last, q, as indices of hidden states; negative ones count from the end. The default is the
            released ``list-22/-17/-12/-7/-2``, layers 3, 8, 13, 18 and 23 of 24.
        vision_dim: D, divisible by ``num_heads``.
        num_heads: heads of both attentions.
        num_points: points of a level that a head of a patch looks at.
        num_layers: L of the tower.
        impl, deterministic: as for :func:`igva_kernels.multi_scale_deformable_attention`.

    Raises:
        ValueError: fewer than two layers, a layer that the tower does not have, or sizes that do not fit each other.
    """

    def __init__(
        self,
        layers: Sequence[int] = (-22, -17, -12, -7, -2),
        vision_dim: int = 1024,
        num_heads: int = 16,
        num_points: int = 4,
        *,
        num_layers: int = 24,
        impl: Implementation = "auto",
        deterministic: bool | None = None,
    ) -> None:
        super().__init__()
        if len(layers) < 2:
            raise ValueError(
                f"layers must name at least one layer to look at and, last, the one that looks, got {list(layers)}"
            )
        for layer in layers:
            if not -num_layers - 1 <= layer <= num_layers:
                raise ValueError(
                    f"layers names {layer}, but a tower of {num_layers} layers has the hidden states 0 to {num_layers}"
                )
        self.num_layers, self.vision_dim = num_layers, vision_dim
        self.layers = tuple(layer % (num_layers + 1) for layer in layers)
        self.cross_attn = DeformableAttention(
            vision_dim, len(layers) - 1, num_heads, num_points, impl=impl, deterministic=deterministic
        )
        self.query_norm = nn.LayerNorm(vision_dim, eps=1e-6)
        self.feat_norm = nn.LayerNorm(vision_dim, eps=1e-6)
        self.cross_scale = nn.Parameter(torch.zeros(vision_dim))
        self.norm1 = nn.LayerNorm(vision_dim, eps=1e-6)
        self.self_attn = DeformableAttention(vision_dim, 1, num_heads, num_points, impl=impl, deterministic=deterministic)
        self.self_scale = nn.Parameter(torch.zeros(vision_dim))

    def reset_parameters(self) -> None:
        """The released code's initial values of scales and attentions; the norms reset themselves."""
        nn.init.zeros_(self.cross_scale)
        nn.init.zeros_(self.self_scale)
        self.cross_attn.reset_parameters()
        self.self_attn.reset_parameters()

    def forward(
        self, hidden_states: Sequence[Tensor | None], *, num_prefix_tokens: int, grid: tuple[int, int] | None = None
    ) -> Tensor:
        """Fuse.

        Args:
            hidden_states: the L + 1 hidden states as Hugging Face gives them, each (B, T, D); those that are not among
                ``layers`` may be None.
            num_prefix_tokens: P, the tokens before the patches.
            grid: (height, width) of the map that the N = T - P patches are, row by row; None for a square one.

        Returns:
            (B, N, D) in the dtype of the hidden states, or that of the parameters where it is wider.

        Raises:
            ValueError: a wrong number of hidden states, one that is needed is None, shapes that do not fit each other, or no
                ``grid`` where N is no square.
        """
        patches = self._patches(hidden_states, num_prefix_tokens)
        query, source = patches[-1], torch.cat(patches[:-1], dim=1)
        height, width = _check_grid(grid, query.shape[1])
        centres = centres_of_cells(height, width, query)
        found = self.cross_attn(
            self.query_norm(query), centres, self.feat_norm(source), ((height, width),) * (len(patches) - 1)
        )
        normed = self.norm1(found)
        refined = self.self_attn(normed, centres, normed, ((height, width),))
        return query + self.cross_scale * (found + self.self_scale * refined)

    def load_official_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str = "") -> None:
        """Load the block of a released checkpoint.

        Args:
            state_dict: tensors by name; those that do not begin with ``prefix`` are left alone.
            prefix: what stands before the names of the block: ``"model.mm_projector.0."`` in a released checkpoint, nothing for
                the state dict of the bare block.

        Raises:
            ValueError: ``prefix`` does not occur.
            RuntimeError: names are missing or unknown, or shapes differ (from ``load_state_dict``).
        """
        self.load_state_dict(mmfuser_from_official(state_dict, prefix), strict=True)

    def official_state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """The parameters under the names of the released code, each after ``prefix``."""
        return mmfuser_to_official(self.state_dict(), prefix)

    def extra_repr(self) -> str:
        return f"layers={list(self.layers)}, num_layers={self.num_layers}"

    def _patches(self, hidden_states: Sequence[Tensor | None], num_prefix_tokens: int) -> list[Tensor]:
        if len(hidden_states) != self.num_layers + 1:
            raise ValueError(
                f"hidden_states has {len(hidden_states)} entries, but a tower of {self.num_layers} layers has "
                f"{self.num_layers + 1} (h_0, the embedding output, to h_{self.num_layers}); make the fusion with the tower's "
                "num_hidden_layers as num_layers"
            )
        states: list[Tensor] = []
        for layer in self.layers:
            state = hidden_states[layer]
            if state is None:
                raise ValueError(f"hidden_states[{layer}] is None, but the fusion reads the layers {list(self.layers)}")
            expected = states[0].shape if states else (*state.shape[:2], self.vision_dim)
            if state.ndim != 3 or tuple(state.shape) != tuple(expected):
                raise ValueError(
                    f"hidden_states[{layer}] has the shape {tuple(state.shape)}, expected (B, T, D) = {tuple(expected)}"
                )
            states.append(state)
        if not 0 <= num_prefix_tokens < states[0].shape[1]:
            raise ValueError(f"num_prefix_tokens={num_prefix_tokens} leaves no patch of {states[0].shape[1]} tokens")
        return [state[:, num_prefix_tokens:] for state in states]


def mmfuser_from_official(state_dict: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a released block under our names; see :meth:`MMFuserFusion.load_official_state_dict`.

    Raises:
        ValueError: no name begins with ``prefix``.
    """
    ours = {official: name for name, official in OFFICIAL_NAMES.items()}
    names = [name for name in state_dict if name.startswith(prefix)]
    if not names:
        raise ValueError(
            f"no name in the state dict begins with prefix={prefix!r}; it has {len(state_dict)} names, "
            f"for instance {list(state_dict)[:3]}"
        )
    return {ours.get(bare := name.removeprefix(prefix), bare): state_dict[name] for name in names}


def mmfuser_to_official(state_dict: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The tensors of an :class:`MMFuserFusion` under the names of the released code, each after ``prefix``."""
    return {prefix + OFFICIAL_NAMES.get(name, name): tensor for name, tensor in state_dict.items()}


def _check_grid(grid: tuple[int, int] | None, num_patches: int) -> tuple[int, int]:
    if grid is None:
        side = isqrt(num_patches)
        if side * side != num_patches:
            raise ValueError(f"N = {num_patches} patches are no square map; pass grid=(height, width)")
        return side, side
    height, width = grid
    if height * width != num_patches:
        raise ValueError(f"grid={tuple(grid)} has {height * width} cells, but there are N = {num_patches} patches")
    return height, width
