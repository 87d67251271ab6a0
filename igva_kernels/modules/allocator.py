"""The weight allocator of IGVA: which groups of layers does this instruction need?"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from igva_kernels.allocator_layout import AllocatorSizes
from igva_kernels.allocator_ops import allocate, unsupported

AllocatorImplementation = Literal["auto", "triton", "torch"]


class WeightAllocator(nn.Module):
    """Group summaries and a sentence embedding to one weight a group (arXiv 2501.08443, "Weight allocator").

    The sentence is the query; the group summaries are the keys and values of every block. Parameter names and maths are those
    of the official ``Aggregator`` (``llava/model/multimodal_aggregator/aggregator.py``), so its state dict loads unchanged.
    Nothing but the head's output index ties a weight to its group: the trunk does not see their order.

    The modules in it are stock, and ``impl="torch"`` calls them. The kernels read their parameters instead and need 19
    launches where the modules take 60 (:mod:`igva_kernels.impl.triton.allocator_forward`). They compute in the dtype of
    the parameters whatever autocast says, as the official model does; forward hooks of the children do not run, and children
    of another class than the stock one (an adapter, a quantised layer) are left to ``impl="torch"``. Under ZeRO-3 the read of
    a child's parameter gathers it, and the allocator need not be marked as a leaf.

    Args:
        num_groups: K.
        vision_dim: D, the width of the summaries.
        text_dim: E, the width of the sentence embeddings (768 for all-mpnet-base-v2).
        hidden_dim: width of the blocks, divisible by ``num_heads``.
        num_blocks: number of cross-attention blocks.
        num_heads: heads of the cross-attention.
        impl: ``"auto"`` takes the Triton kernels on a CUDA or ROCm device where they can run these sizes, else the stock
            modules; ``"triton"`` and ``"torch"`` never give way.

    Raises:
        ValueError: a size below 1, ``hidden_dim`` not divisible by ``num_heads``, or an unknown ``impl``.
    """

    def __init__(
        self,
        num_groups: int = 4,
        vision_dim: int = 1024,
        text_dim: int = 768,
        hidden_dim: int = 1024,
        num_blocks: int = 4,
        num_heads: int = 4,
        *,
        impl: AllocatorImplementation = "auto",
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
        if impl not in ("auto", "triton", "torch"):
            raise ValueError(f"impl must be one of 'auto', 'triton', 'torch', got {impl!r}")
        self.num_groups, self.vision_dim, self.text_dim = num_groups, vision_dim, text_dim
        self.sizes, self.impl = AllocatorSizes(**sizes), impl
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
            ValueError: a shape that does not fit the module, or ``impl="triton"`` cannot run it.
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
        parameters = self._parameters_for_kernels(summaries)
        if parameters is not None:
            eps = self._blocks()[0].norm1.eps
            return allocate(summaries, instruction_embeds, parameters, num_heads=self.sizes.num_heads, eps=eps)
        dtype = self.cls_proj.weight.dtype
        key_value = self.cls_proj(summaries.to(dtype))  # (B, K, hidden)
        query = self.sentence_proj(instruction_embeds.to(dtype))  # (B, hidden)
        for block in self._blocks():
            query = block(query, key_value)
        logits = self.linear(query)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)

    def _parameters_for_kernels(self, summaries: Tensor) -> list[Tensor] | None:
        """What the kernels take, or None where the stock modules run."""
        if self.impl == "torch" or (self.impl == "auto" and not summaries.is_cuda):
            return None
        parameters: list[Tensor] = []
        reason = self._foreign_child() or unsupported(self.sizes, summaries.shape[0], self.cls_proj.weight.dtype)
        if reason is None:
            parameters = self._parameters_in_order()
            reason = _unfit(parameters)
        if reason is None:
            return parameters
        if self.impl == "triton":
            raise ValueError(f'impl="triton" cannot run this allocator: {reason}; use impl="auto" or "torch"')
        return None

    def _foreign_child(self) -> str | None:
        """The first child whose class is not the stock one, so that its parameters alone do not say what it computes."""
        children: list[tuple[str, Any, type[nn.Module]]] = [
            ("sentence_proj", self.sentence_proj, nn.Linear),
            ("cls_proj", self.cls_proj, nn.Linear),
            ("linear", self.linear, nn.Linear),
        ]
        for number, block in enumerate(self._blocks()):
            of_block: tuple[tuple[str, Any, type[nn.Module]], ...] = (
                ("cross_attention", block.cross_attention, nn.MultiheadAttention),
                ("cross_attention.out_proj", block.cross_attention.out_proj, NonDynamicallyQuantizableLinear),
                ("ffn.0", block.ffn[0], nn.Linear),
                ("ffn.2", block.ffn[2], nn.Linear),
                ("norm1", block.norm1, nn.LayerNorm),
                ("norm2", block.norm2, nn.LayerNorm),
            )
            children += [(f"transformers.{number}.{name}", child, stock) for name, child, stock in of_block]
        for name, child, stock in children:
            if type(child) is not stock:
                return f"{name} is a {type(child).__name__}, and the kernels know what a {stock.__name__} computes"
        return None

    def _parameters_in_order(self) -> list[Tensor]:
        """All parameters, in the order of :attr:`AllocatorSizes.parameter_shapes`, read as attributes.

        Reading them so, in this forward, is what lets DeepSpeed's ZeRO-3 see the access and gather them.
        """
        parameters = [*_weight_and_bias(self.sentence_proj), *_weight_and_bias(self.cls_proj)]
        for block in self._blocks():
            attention = block.cross_attention
            parameters += [attention.in_proj_weight, attention.in_proj_bias]
            for layer in (attention.out_proj, block.ffn[0], block.ffn[2], block.norm1, block.norm2):
                parameters += _weight_and_bias(layer)
        return [*parameters, *_weight_and_bias(self.linear)]

    def _blocks(self) -> list[Any]:
        return list(self.transformers)


def _weight_and_bias(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.weight, layer.bias


def _unfit(parameters: list[Tensor]) -> str | None:
    """Why the kernels cannot read these parameters, or None if they can."""
    dtype = parameters[0].dtype
    for parameter in parameters:
        if parameter.dtype != dtype:
            return f"it has parameters of {dtype} and of {parameter.dtype}"
        if not parameter.is_contiguous():
            return f"a parameter of shape {tuple(parameter.shape)} is not contiguous"
        if hasattr(parameter, "placements"):
            return "its parameters are sharded (DTensor) in its forward; shard the allocator as one module"
    return None


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
