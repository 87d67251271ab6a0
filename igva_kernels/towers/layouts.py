"""What each type of tower does around its blocks, by ``config.model_type``.

A layout does what the ``forward`` of that model does in transformers 5.10 to 5.23 before and between the blocks, and nothing
after them: the last norm and the pooling head are no hidden state. Modules are called, never their ``forward``, so that hooks,
activation checkpointing and sharded blocks work as they do there.

Shapes: B images · T tokens with prefix · D vision width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from igva_kernels.towers.sharding import is_fully_sharded

Embedded = tuple[Tensor, tuple[Any, ...], dict[str, Any]]
"""h_0, and the positional and named arguments that each block takes after the hidden state."""


@dataclass(frozen=True)
class TowerLayout:
    """One type of tower.

    Args:
        embed: ``(tower, pixel_values, **inputs)`` to what the first block is called with.
        blocks: dotted path of the list of blocks.
        inputs: what ``embed`` takes beside the pixels, as the tower's own ``forward`` names it.
        num_prefix_tokens: tokens before the patches without registers.
        has_registers: whether the config counts register tokens, which come after the CLS token.
    """

    embed: Callable[..., Embedded]
    blocks: str
    inputs: tuple[str, ...]
    num_prefix_tokens: int
    has_registers: bool = False


def _embed_clip(tower: Any, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Embedded:
    hidden = tower.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
    return tower.pre_layrnorm(hidden), (None,), {}  # (their spelling)


def _embed_siglip(tower: Any, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Embedded:
    return tower.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding), (None,), {}


def _embed_siglip2(
    tower: Any, pixel_values: Tensor, spatial_shapes: Tensor, pixel_attention_mask: Tensor | None = None
) -> Embedded:
    hidden = tower.embeddings(pixel_values, spatial_shapes)
    return hidden, (_bidirectional_mask(tower, hidden, pixel_attention_mask),), {}


def _embed_dinov2(
    tower: Any, pixel_values: Tensor, bool_masked_pos: Tensor | None = None, attention_mask: Tensor | None = None
) -> Embedded:
    hidden = tower.embeddings(pixel_values, bool_masked_pos=bool_masked_pos)
    if _mask_function(tower) is None:  # up to 5.17 the blocks take no mask
        if attention_mask is not None:
            raise ValueError("attention_mask: the blocks of this version of transformers take none; pass None or upgrade it")
        return hidden, (), {}
    return hidden, (_bidirectional_mask(tower, hidden, attention_mask),), {}


def _embed_dinov3(tower: Any, pixel_values: Tensor, bool_masked_pos: Tensor | None = None) -> Embedded:
    pixel_values = pixel_values.to(tower.embeddings.patch_embeddings.weight.dtype)
    hidden = tower.embeddings(pixel_values, bool_masked_pos=bool_masked_pos)
    return hidden, (), {"position_embeddings": tower.rope_embeddings(pixel_values)}


def _embed_vit(
    tower: Any,
    pixel_values: Tensor,
    interpolate_pos_encoding: bool | None = None,
    bool_masked_pos: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Embedded:
    pixel_values = pixel_values.to(tower.embeddings.patch_embeddings.projection.weight.dtype)
    hidden = tower.embeddings(pixel_values, bool_masked_pos=bool_masked_pos, interpolate_pos_encoding=interpolate_pos_encoding)
    return hidden, (_bidirectional_mask(tower, hidden, attention_mask),), {}


_CLIP = TowerLayout(_embed_clip, "encoder.layers", ("interpolate_pos_encoding",), num_prefix_tokens=1)
_SIGLIP = TowerLayout(_embed_siglip, "encoder.layers", ("interpolate_pos_encoding",), num_prefix_tokens=0)
_SIGLIP2 = TowerLayout(_embed_siglip2, "encoder.layers", ("spatial_shapes", "pixel_attention_mask"), num_prefix_tokens=0)
_DINOV2 = TowerLayout(_embed_dinov2, "encoder.layer", ("bool_masked_pos", "attention_mask"), num_prefix_tokens=1)

LAYOUTS = {
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "siglip2": _SIGLIP2,
    "siglip2_vision_model": _SIGLIP2,
    "dinov2": _DINOV2,
    "dinov2_with_registers": TowerLayout(_DINOV2.embed, _DINOV2.blocks, _DINOV2.inputs, 1, has_registers=True),
    "dinov3_vit": TowerLayout(_embed_dinov3, "model.layer", ("bool_masked_pos",), 1, has_registers=True),
    "vit": TowerLayout(_embed_vit, "layers", ("interpolate_pos_encoding", "bool_masked_pos", "attention_mask"), 1),
}
"""Layouts by ``config.model_type``. ``clip``, ``siglip`` and ``siglip2`` are models of text and vision: their ``vision_model``
is the tower."""


def num_prefix_tokens_of(config: Any) -> int:
    """P of a tower, from its config: the CLS and register tokens before the patches.

    CLIP, DINOv2, DINOv3 and ViT have a CLS token; SigLIP pools by attention and has none.

    Args:
        config: the tower's configuration, with ``model_type`` and, where the type has registers, ``num_register_tokens``.

    Raises:
        ValueError: a model type that is not in the table; guessing would shift every patch.
    """
    layout = LAYOUTS.get(config.model_type)
    if layout is None:
        raise ValueError(
            f"the number of prefix tokens of a {config.model_type!r} tower is not known (known: {sorted(LAYOUTS)}); "
            "pass num_prefix_tokens=..., the count of CLS and register tokens before the patches"
        )
    return layout.num_prefix_tokens + (config.num_register_tokens if layout.has_registers else 0)


def vision_part(tower: nn.Module) -> nn.Module:
    """The module that has the embeddings and the blocks: the ``vision_model`` of a model that has one, else the tower."""
    part = getattr(tower, "vision_model", None)
    return tower if part is None else part


def unsupported_reason(tower: nn.Module) -> str | None:
    """Why a tower cannot be run layer by layer from outside its ``forward``; None if it can.

    That is an unknown ``config.model_type``; a wrapper (DDP, FSDP1, torch.compile's), behind which the blocks are not reached
    as the wrapper wants it; or hooks on the tower itself, which would not run (ZeRO-3, accelerate's offloading, a user's own).
    Hooks on its parts are no obstacle, and FSDP2's ``fully_shard`` is none, see :mod:`igva_kernels.towers.sharding`.
    """
    model_type = getattr(getattr(tower, "config", None), "model_type", None)
    if model_type not in LAYOUTS:
        return f"towers of the type {model_type!r} are not known (known: {sorted(LAYOUTS)})"
    part = vision_part(tower)
    if "embeddings" not in part._modules or LAYOUTS[model_type].blocks.split(".")[0] not in part._modules:
        return f"{type(tower).__name__} does not hold the embeddings and blocks of a {model_type!r} tower itself"
    for module in (tower, part):
        if not is_fully_sharded(module) and (module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook")):
            return f"the forward of this {type(module).__name__} has hooks, which a loop over its blocks would not call"
    return None


def layout_of(tower: Any) -> TowerLayout:
    """The layout of a tower.

    Raises:
        ValueError: see :func:`unsupported_reason`.
    """
    reason = unsupported_reason(tower)
    if reason is not None:
        raise ValueError(
            f"tower cannot be run layer by layer: {reason}; call the tower with output_hidden_states=True and give the tuple "
            "to fuse() or reduce_groups()"
        )
    return LAYOUTS[tower.config.model_type]


def blocks_of(tower: nn.Module) -> Sequence[nn.Module]:
    """The blocks of a known tower: block l turns h_(l-1) into h_l."""
    return attrgetter(layout_of(tower).blocks)(vision_part(tower))


def run_blocks(tower: Any, pixel_values: Tensor, last: int, take: Callable[[int, Tensor], None], **inputs: Any) -> None:
    """Run the embedding and the blocks 1 .. ``last``, and hand over each hidden state as soon as it is there.

    Args:
        tower: a known tower, or its vision part.
        pixel_values: as the tower's ``forward`` takes them.
        last: the last hidden state that is needed; blocks after it are not run.
        take: is called with l and h_l (B, T, D), in the order of l, beginning with h_0. Nothing here holds an earlier state.
        inputs: further inputs of the tower's ``forward``.

    Raises:
        ValueError: an unknown tower, or an input that it does not take.
    """
    layout = layout_of(tower)
    if unknown := sorted(set(inputs) - set(layout.inputs)):
        raise ValueError(
            f"a {tower.config.model_type!r} tower takes {list(layout.inputs)} beside pixel_values, got {unknown}; remove them"
        )
    hidden, arguments, keywords = layout.embed(vision_part(tower), pixel_values, **inputs)
    take(0, hidden)
    for index, block in zip(range(1, last + 1), blocks_of(tower), strict=False):
        hidden = block(hidden, *arguments, **keywords)
        if isinstance(hidden, tuple):  # (hidden state, attention maps)
            hidden = hidden[0]
        take(index, hidden)


def _mask_function(tower: Any) -> Callable[..., Tensor | None] | None:
    """The function that the tower's own ``forward`` makes its attention mask with, where its version has one."""
    return inspect.unwrap(type(tower).forward).__globals__.get("create_bidirectional_mask")


def _bidirectional_mask(tower: Any, hidden: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    make_mask = _mask_function(tower)
    if make_mask is None:
        raise ValueError(
            f"{type(tower).__name__}.forward makes its attention mask in a way that is not known here; transformers 5.10 to "
            "5.23 are; call the tower with output_hidden_states=True and give the tuple to fuse()"
        )
    return make_mask(config=tower.config, inputs_embeds=hidden, attention_mask=attention_mask)
