"""The weight allocator of IGVA: which groups of layers does this instruction need?"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class WeightAllocator(nn.Module):
    """Group summaries and a sentence embedding to one weight a group (arXiv 2501.08443, "Weight allocator").

    The sentence is the query; the group summaries are the keys and values of every block. Parameter names and maths are those
    of the official ``Aggregator`` (``llava/model/multimodal_aggregator/aggregator.py``), so its state dict loads unchanged.
    Nothing but the head's output index ties a weight to its group: the trunk does not see their order.

    Args:
        num_groups: K.
        vision_dim: D, the width of the summaries.
        text_dim: E, the width of the sentence embeddings (768 for all-mpnet-base-v2).
        hidden_dim: width of the blocks, divisible by ``num_heads``.
        num_blocks: number of cross-attention blocks.
        num_heads: heads of the cross-attention.

    Raises:
        ValueError: a size below 1, or ``hidden_dim`` not divisible by ``num_heads``.
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
        sizes = {
            "num_groups": num_groups,
            "vision_dim": vision_dim,
            "text_dim": text_dim,
            "hidden_dim": hidden_dim,
            "num_blocks": num_blocks,
            "num_heads": num_heads,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if hidden_dim % num_heads:
            raise ValueError(f"hidden_dim={hidden_dim} is not divisible by num_heads={num_heads}")
        self.num_groups, self.vision_dim, self.text_dim = num_groups, vision_dim, text_dim
        self.sentence_proj = nn.Linear(text_dim, hidden_dim)
        self.cls_proj = nn.Linear(vision_dim, hidden_dim)
        self.transformers = nn.ModuleList(AllocatorBlock(hidden_dim, num_heads) for _ in range(num_blocks))
        self.linear = nn.Linear(hidden_dim, num_groups)

    def forward(self, summaries: Tensor, instruction_embeds: Tensor) -> Tensor:
        """The weights of the groups.

        Args:
            summaries: (B, K, D), one vector a group; cast to the dtype of the parameters.
            instruction_embeds: (B, E), one sentence embedding an image; cast likewise.

        Returns:
            (B, K) in float32 (float64 for float64 parameters): a softmax over the groups, so each row sums to 1.

        Raises:
            ValueError: a shape that does not fit the module.
        """
        if summaries.ndim != 3 or tuple(summaries.shape[1:]) != (self.num_groups, self.vision_dim):
            raise ValueError(
                f"summaries has the shape {tuple(summaries.shape)}, expected (B, K, D) = "
                f"(B, {self.num_groups}, {self.vision_dim})"
            )
        if tuple(instruction_embeds.shape) != (summaries.shape[0], self.text_dim):
            raise ValueError(
                f"instruction_embeds has the shape {tuple(instruction_embeds.shape)}, expected (B, E) = "
                f"({summaries.shape[0]}, {self.text_dim}): one embedding for each image"
            )
        dtype = self.cls_proj.weight.dtype
        key_value = self.cls_proj(summaries.to(dtype))  # (B, K, hidden)
        query = self.sentence_proj(instruction_embeds.to(dtype))  # (B, hidden)
        for block in self.transformers:
            query = block(query, key_value)
        logits = self.linear(query)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)


class AllocatorBlock(nn.Module):
    """One block: cross-attention with a single query, then a feed-forward layer, each with residual and LayerNorm after it."""

    def __init__(self, hidden_dim: int, num_heads: int) -> None:
        super().__init__()
        self.cross_attention = nn.MultiheadAttention(hidden_dim, num_heads, batch_first=True)
        self.ffn = nn.Sequential(nn.Linear(hidden_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, hidden_dim))
        self.norm1 = nn.LayerNorm(hidden_dim)
        self.norm2 = nn.LayerNorm(hidden_dim)

    def forward(self, query: Tensor, key_value: Tensor) -> Tensor:
        """``query`` (B, hidden) and ``key_value`` (B, K, hidden) to (B, hidden)."""
        attended, _ = self.cross_attention(query[:, None], key_value, key_value, need_weights=False)
        query = self.norm1(attended[:, 0] + query)
        return self.norm2(self.ffn(query) + query)
