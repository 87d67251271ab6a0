"""Which attention the language model runs, and torch's own attention over packed rows as one that transformers can run.

A packed row holds several samples end to end, and no token may see one of another sample. Three ways to do that:

* flash-attn 2 or 3, where installed, gets the boundaries of the samples (``cu_seq_lens``) from transformers.
* ``varlen`` is ``torch.nn.attention.varlen`` (CUDA, fp16 and bf16), which gets the same boundaries: registered here, for
  machines without flash-attn.
* ``sdpa`` and ``eager`` get a dense mask, which transformers builds from position ids that restart. It has (length, length)
  elements, and no fast kernel takes it: for CPUs and tests.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import varlen
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

Attention = Literal["auto", "sdpa", "eager", "varlen", "flash_attention_2", "flash_attention_3"]

VARLEN = "varlen"

#: What ``varlen_attn`` must take: the form it has had since windows came to it, in torch 2.11.
_VARLEN_PARAMETERS = {"scale", "window_size"}

_parameters_here = inspect.signature(varlen.varlen_attn).parameters.keys()

#: Whether ``varlen_attn`` takes fewer heads of keys than of queries. torch 2.11 documents one number of heads for all three;
#: there the heads of keys and values are repeated.
_GROUPED_HEADS = "enable_gqa" in _parameters_here


@dataclass(frozen=True)
class AttentionChoice:
    """The attention of a run and why it was taken."""

    name: str
    reason: str


def choose_attention(setting: Attention, device: torch.device, *, packing: bool, half_precision: bool) -> AttentionChoice:
    """Resolve ``auto`` and refuse what cannot run, or would run with a mask of (length, length) on a GPU.

    Args:
        setting: ``auto`` takes flash-attn 3 (from Hopper on) or 2 where installed. Else it takes ``varlen`` for packed rows
            on CUDA, and ``sdpa`` for everything else.
        device: where the model runs.
        packing: whether rows hold several samples.
        half_precision: whether attention runs in bf16 or fp16, which flash-attn and ``varlen`` need.

    Raises:
        ValueError: an attention that does not exist, does not run on the device or in the precision, or is not installed.
    """
    if setting not in get_args(Attention):
        raise ValueError(f"attention must be one of {', '.join(get_args(Attention))}, got {setting!r}")
    on_gpu = device.type == "cuda"
    fast = {
        "flash_attention_3": is_flash_attn_3_available() and on_gpu and torch.cuda.get_device_capability(device)[0] >= 9,
        "flash_attention_2": is_flash_attn_2_available() and on_gpu,
        VARLEN: varlen_is_available() and on_gpu,
    }
    if setting in fast:
        if not fast[setting]:
            raise ValueError(
                f"attention is {setting}, which is not installed or does not run on {device.type}; "
                f"{_remedy(setting)}, or set attention to auto"
            )
        if not half_precision:
            raise ValueError(f"attention is {setting}, which needs bf16, but the precision is fp32; set precision to bf16")
        return AttentionChoice(setting, "set by the recipe")
    if setting in ("sdpa", "eager"):
        if packing and on_gpu:
            raise ValueError(
                f"attention is {setting} and data.packing is on: on a GPU that would take a mask of (length, length) for each "
                "row; set attention to auto, or data.packing to false"
            )
        return AttentionChoice(setting, "set by the recipe")
    usable = [name for name, available in fast.items() if available and (packing or name != VARLEN)]
    if half_precision and usable:
        return AttentionChoice(usable[0], "the fastest one that is installed")
    if packing and on_gpu:
        remedy = _remedy(VARLEN) if half_precision else "set precision to bf16"
        raise ValueError(
            f"data.packing is on, but no attention for packed rows can run here; {remedy}, or set data.packing to false"
        )
    return AttentionChoice("sdpa", "a dense mask keeps packed samples apart" if packing else "nothing else is needed")


def varlen_is_available() -> bool:
    """Whether this torch has ``varlen_attn`` in the form that is used here."""
    return _parameters_here >= _VARLEN_PARAMETERS


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sample of packed rows, in the form of transformers' AttentionInterface.

    Rows that are not packed go to ``sdpa``, which also serves generate().

    Args:
        module: the attention layer.
        query: (rows, heads, T, head width), fp16 or bf16.
        key, value: (rows, key heads, T, head width); heads must be a multiple of key heads.
        attention_mask: from :func:`varlen_mask`.
        dropout: must be 0.
        scaling: factor of the scores; None: 1 / sqrt(head width).
        sliding_window: tokens that each token sees, itself included; None: all before it.
        cu_seq_lens_q, cu_seq_lens_k: (samples + 1,) int32, where each sample begins among the rows x T positions, and their
            end.
        max_length_q, max_length_k: tokens of the longest sample.

    Returns:
        (rows, T, heads, head width), and None for the attention weights.

    Raises:
        ValueError: packed rows without their boundaries, with dropout, or with a soft cap.
        TypeError: query is neither fp16 nor bf16.
    """
    if not _marks_packed_rows(attention_mask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    boundaries = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    if any(value is None for value in boundaries):
        raise ValueError(
            "position_ids restart within a row, but cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k are not all "
            "given; pass them as model.data.collator.PackingCollator makes them"
        )
    if dropout or kwargs.get("softcap") is not None:
        raise ValueError(
            f"varlen attention has no dropout and no softcap, got {dropout} and {kwargs.get('softcap')}; use flash-attn"
        )
    if query.dtype not in (torch.float16, torch.bfloat16):
        raise TypeError(f"varlen attention needs fp16 or bf16, got {query.dtype}; set precision to bf16")
    rows, heads, length, width = query.shape
    grouped = key.shape[1] != heads
    if grouped and not _GROUPED_HEADS:
        key, value = (tensor.repeat_interleave(heads // tensor.shape[1], dim=1) for tensor in (key, value))
    flat = [tensor.transpose(1, 2).reshape(-1, tensor.shape[1], tensor.shape[3]) for tensor in (query, key, value)]
    out = _varlen_attn()(
        *flat,
        *boundaries,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),  # 0 to the right: causal
        **({"enable_gqa": grouped} if _GROUPED_HEADS else {}),
    )
    return out.view(rows, length, heads, width), None


def varlen_mask(*args: Any, attention_mask: Tensor | None = None, allow_is_causal_skip: bool = True, **kwargs: Any) -> Any:
    """The mask of :func:`varlen_attention`, in the form of transformers' AttentionMaskInterface.

    transformers forbids to skip a causal mask for packed rows, which it knows by position ids that restart and the absence of
    a mask for padding. There an empty tensor takes the mask's place: whoever takes it for a mask fails, and does not attend
    across samples.
    """
    if attention_mask is None and not allow_is_causal_skip:
        return torch.empty(0, dtype=torch.bool, device=kwargs.get("device"))
    return sdpa_mask(*args, attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, **kwargs)


def _marks_packed_rows(attention_mask: Tensor | None) -> bool:
    return attention_mask is not None and attention_mask.numel() == 0


def _varlen_attn() -> Callable[..., Any]:
    # By attribute: torch.compile traces that, and not an import.
    return varlen.varlen_attn


def _remedy(setting: str) -> str:
    if setting == VARLEN:
        return "install flash-attn or torch 2.11 or newer with CUDA"
    return "install flash-attn" + (" 3 (Hopper or newer)" if setting == "flash_attention_3" else "")


AttentionInterface.register(VARLEN, varlen_attention)
AttentionMaskInterface.register(VARLEN, varlen_mask)
