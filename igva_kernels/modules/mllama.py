"""Mllama's interleaved concatenation as a permutation of the next Linear's columns."""

from __future__ import annotations

from torch import Tensor


def columns_to_blocks(weight: Tensor, num_interleaved: int = 5, num_leading_blocks: int = 1) -> Tensor:
    """Columns for interleaved layers, put in the order of the blocks that :meth:`FusionPlan.mllama` gives.

    Published (transformers, ``models/mllama/modeling_mllama.py``): ``[final, stack(layers, dim=-1).flatten(-2)]``, so that
    channel d of layer k is channel ``D + d*M + k``. The plan gives ``[final, layer 0, ..., layer M-1]``, channel
    ``D + k*D + d``. For a Linear with the published weight W, ``linear(published, W)`` is ``linear(blocks,
    columns_to_blocks(W))``: convert the weight once, when a checkpoint is loaded. Any dtype; values are moved, not computed.

    Args:
        weight: (..., (R + M)*D), for instance the (4096, 7680) of Llama 3.2 Vision's ``multi_modal_projector.weight``.
        num_interleaved: M, the layers that are interleaved.
        num_leading_blocks: R, the blocks before them that are not.

    Returns:
        A new contiguous tensor of the shape and dtype of ``weight``.

    Raises:
        ValueError: the last dimension is not divisible by R + M, M is below 1, or R is negative.
    """
    lead, tail = _split(weight, num_interleaved, num_leading_blocks)
    blocks = tail.unflatten(-1, (-1, num_interleaved)).transpose(-1, -2).flatten(-2)
    return _join(weight, lead, blocks)


def columns_to_interleaved(weight: Tensor, num_interleaved: int = 5, num_leading_blocks: int = 1) -> Tensor:
    """The inverse of :func:`columns_to_blocks`: back to the published order, to save a checkpoint for others.

    It also turns features: ``columns_to_interleaved(fuse(...))`` is what Mllama's vision model returns. Arguments, Returns,
    Raises: as there.
    """
    lead, tail = _split(weight, num_interleaved, num_leading_blocks)
    interleaved = tail.unflatten(-1, (num_interleaved, -1)).transpose(-1, -2).flatten(-2)
    return _join(weight, lead, interleaved)


def _split(weight: Tensor, num_interleaved: int, num_leading_blocks: int) -> tuple[Tensor, Tensor]:
    if num_interleaved < 1 or num_leading_blocks < 0:
        raise ValueError(
            "num_interleaved must be at least 1 and num_leading_blocks at least 0, "
            f"got {num_interleaved} and {num_leading_blocks}"
        )
    channels, blocks = weight.shape[-1], num_leading_blocks + num_interleaved
    if channels == 0 or channels % blocks:
        raise ValueError(
            f"weight has {channels} columns, which are not {num_leading_blocks} + {num_interleaved} blocks of one width; "
            "pass the numbers of layers that the checkpoint concatenates"
        )
    boundary = num_leading_blocks * (channels // blocks)
    return weight[..., :boundary], weight[..., boundary:]


def _join(weight: Tensor, lead: Tensor, tail: Tensor) -> Tensor:
    joined = weight.new_empty(weight.shape)
    joined[..., : lead.shape[-1]] = lead
    joined[..., lead.shape[-1] :] = tail
    return joined
