"""What the kernels are compared with: the official eager formulation, written by us from the formula, and torch.compile of it
and of the same formula as one running sum.

The steps are those of the released IGVA code (YiZheng-zy/IGVA, ``encode_images`` and ``Aggregator`` at 6fa8d84): a stack and
a mean per group with the prefix rows included, a stack of the groups' patches, a product with the weights, a sum over the
groups, a concatenation, base first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Groups = Sequence[Sequence[int]]


def official_fuse(
    hidden_states: Sequence[Tensor], groups: Groups, base: int, weights: Tensor | None, num_prefix_tokens: int
) -> Tensor:
    """Stage 2, or stage 1 when ``weights`` is None.

    Args:
        hidden_states: L + 1 tensors (B, T, D).
        groups: K groups of hidden states.
        base: the layer that is concatenated.
        weights: (B, K); cast to the dtype of the hidden states, as the released code runs its allocator in the model's dtype.
        num_prefix_tokens: P rows that are dropped (the released code: 1).

    Returns:
        (B, N, 2D), base first, in the dtype of the hidden states.
    """
    patches_of_groups = []
    for group in groups:  # the last stack stays alive to the end, as in the released code: it belongs to its peak memory
        stacked = torch.stack([hidden_states[layer] for layer in group])
        mean = stacked.mean(dim=0)
        patches_of_groups.append(mean[:, num_prefix_tokens:])
    patches = torch.stack(patches_of_groups)
    del patches_of_groups  # the released code gives the name to the stack
    if weights is None:
        fused = patches.mean(dim=0)
    else:
        weighted = patches * weights.to(patches.dtype).t()[:, :, None, None]
        fused = weighted.sum(dim=0)
    return torch.cat((hidden_states[base][:, num_prefix_tokens:], fused), dim=-1)


def plain_sum_fuse(
    hidden_states: Sequence[Tensor], groups: Groups, base: int, weights: Tensor | None, num_prefix_tokens: int
) -> Tensor:
    """The formula of :func:`official_fuse` as a running sum, for a compiler: arguments and result as there.

    Without a stack there is nothing that Inductor would have to write to memory first: it makes one kernel of all loads. Of the
    stacks in the official formulation it copies the states into one buffer a group.
    """
    mixed: Tensor | None = None
    for index, group in enumerate(groups):
        total = hidden_states[group[0]][:, num_prefix_tokens:]
        for layer in group[1:]:
            total = total + hidden_states[layer][:, num_prefix_tokens:]
        mean = total / len(group)
        share = mean / len(groups) if weights is None else mean * weights.to(mean.dtype)[:, index, None, None]
        mixed = share if mixed is None else mixed + share
    return torch.cat((hidden_states[base][:, num_prefix_tokens:], mixed), dim=-1)


def official_summaries(hidden_states: Sequence[Tensor], groups: Groups) -> Tensor:
    """The CLS row of every group mean, (B, K, D), by the means of the whole maps as the released code takes them."""
    return torch.stack([torch.stack([hidden_states[layer] for layer in group]).mean(dim=0)[:, 0] for group in groups], dim=1)


def compiled(function: Callable[..., Tensor], mode: str | None = None) -> Callable[..., Tensor]:
    """``torch.compile`` of a peer: static shapes and no graph breaks, the best that it can do here.

    Args:
        mode: None for the default, or "max-autotune-no-cudagraphs". Plain "max-autotune" adds CUDA graphs, which copy inputs
            that change their address and would then be timed with the copy; CUDA graphs are measured on their own.
    """
    return torch.compile(function, mode=mode, dynamic=False, fullgraph=True)


class OfficialAllocator(nn.Module):
    """The released weight allocator in stock modules, with the released parameter names: the peer of ``WeightAllocator``.

    Shapes: summaries (B, K, D), instruction_embeds (B, E) -> weights (B, K).
    """

    def __init__(
        self,
        num_groups: int = 4,
        vision_dim: int = 1024,
        text_dim: int = 768,
        hidden_dim: int = 1024,
        num_blocks: int = 4,
        num_heads: int = 4,
    ) -> None:
        super().__init__()
        self.sentence_proj = nn.Linear(text_dim, hidden_dim)
        self.cls_proj = nn.Linear(vision_dim, hidden_dim)
        self.transformers = nn.ModuleList(_OfficialBlock(hidden_dim, num_heads) for _ in range(num_blocks))
        self.linear = nn.Linear(hidden_dim, num_groups)

    def forward(self, summaries: Tensor, instruction_embeds: Tensor) -> Tensor:
        query = self.sentence_proj(instruction_embeds)[:, None]
        keys = self.cls_proj(summaries)
        for block in self.transformers:
            query = block(query, keys)
        return self.linear(query).softmax(-1).squeeze(1)


class _OfficialBlock(nn.Module):
    """Cross-attention and feed-forward, each with a residual and a LayerNorm after it."""

    def __init__(self, hidden_dim: int, num_heads: int) -> None:
        super().__init__()
        self.cross_attention = nn.MultiheadAttention(hidden_dim, num_heads, batch_first=True)
        self.ffn = nn.Sequential(nn.Linear(hidden_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, hidden_dim))
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.norm2 = nn.LayerNorm(hidden_dim)

    def forward(self, query: Tensor, keys: Tensor) -> Tensor:
        attended, _ = self.cross_attention(query, keys, keys)
        query = self.norm1(attended + query)
        return self.norm2(self.ffn(query) + query)


def grid_sample_deformable_attention(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Multi-scale deformable attention by ``grid_sample``, one call a level: Deformable DETR's ``ms_deform_attn_core_pytorch``,
    which MMFuser (yuecao0119/MMFuser, ``ms_deform_attn_func.py``) and transformers run where the CUDA extension is absent.

    Shapes: value (B, S, H, C), sampling_locations (B, Q, H, L, P, 2), attention_weights (B, Q, H, L, P) -> (B, Q, H*C).
    """
    batch, _, heads, width = value.shape
    _, queries, _, levels, points, _ = sampling_locations.shape
    grids = 2 * sampling_locations - 1
    sampled = []
    for level, (part, (height, breadth)) in enumerate(
        zip(value.split([height * breadth for height, breadth in spatial_shapes], dim=1), spatial_shapes, strict=True)
    ):
        maps = part.flatten(2).transpose(1, 2).reshape(batch * heads, width, height, breadth)
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)  # (B*H, Q, P, 2)
        sampled.append(F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    weights = attention_weights.transpose(1, 2).reshape(batch * heads, 1, queries, levels * points)
    mixed = (torch.stack(sampled, dim=-2).flatten(-2) * weights).sum(-1)  # (B*H, C, Q)
    return mixed.view(batch, heads * width, queries).transpose(1, 2).contiguous()
