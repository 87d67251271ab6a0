"""The weight allocator as one operator: schemas, fake tensors, autograd. The stock modules need none of this.

``parameters`` are those of a :class:`~igva_kernels.modules.WeightAllocator` in the order of
:attr:`~igva_kernels.allocator_layout.AllocatorSizes.parameter_shapes`. The operator runs the Triton kernels and nothing else;
which inputs it takes is :func:`unsupported`. It computes in the dtype of the parameters with float32 sums and knows nothing of
autocast. Gradients of gradients are not defined.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from igva_kernels.allocator_layout import AllocatorSizes
from igva_kernels.dispatch import triton_installed

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Of the parameters; float64 is left to the stock modules."""

WIDTH_MULTIPLE = 16
"""Elements: all widths, those of the heads included, are multiples of it, so that rows begin at 128-bit units in each dtype."""

MAX_GROUPS = 32
"""The kernels unroll the groups."""

MAX_ELEMENTS = 2**30
"""Offsets inside one matrix are 32 bits wide."""

torch.library.define(
    "igva::allocate",
    "(Tensor summaries, Tensor instruction_embeds, Tensor[] parameters, int num_heads, float eps, bool save) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "igva::allocate_backward",
    "(Tensor grad_out, Tensor summaries, Tensor instruction_embeds, Tensor[] parameters, Tensor out, Tensor rows, "
    "Tensor members, Tensor probabilities, Tensor statistics, int num_heads, bool needs_summaries, bool needs_embeds, "
    "bool needs_parameters) -> (Tensor, Tensor, Tensor)",
)


def allocate(
    summaries: Tensor, instruction_embeds: Tensor, parameters: Sequence[Tensor], *, num_heads: int, eps: float
) -> Tensor:
    """The weights of the groups by the kernels: 3 + 4 * blocks launches forward, 9 + 4 * blocks backward.

    Args:
        summaries: (B, K, D), any floating dtype.
        instruction_embeds: (B, E), any floating dtype.
        parameters: see above.
        num_heads: of the cross-attention.
        eps: of all LayerNorms.

    Returns:
        (B, K) in float32.

    Raises:
        ValueError: triton is not installed, or the tensors are not on a CUDA or ROCm device.
    """
    inputs = (summaries, instruction_embeds, *parameters)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    if not needs_grad and not torch.compiler.is_compiling() and type(summaries) is Tensor:
        # the boundary of an operator with some fifty tensors costs as much host time as the launches of a block
        return _allocate(summaries, instruction_embeds, parameters, num_heads, eps, False)[0]
    return torch.ops.igva.allocate(summaries, instruction_embeds, parameters, num_heads, eps, needs_grad)[0]


def unsupported(sizes: AllocatorSizes, batch: int, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run an allocator of these sizes, or None if they can."""
    if not triton_installed():
        return 'the package triton is not installed; CUDA builds of torch bring it, else `pip install "igva-kernels[triton]"`'
    if dtype not in DTYPES:
        return f"the parameters are {dtype}, and the kernels take {', '.join(map(str, DTYPES))}"
    widths = {
        "vision_dim": sizes.vision_dim,
        "text_dim": sizes.text_dim,
        "hidden_dim / num_heads": sizes.head_dim,
    }
    for name, width in widths.items():
        if width % WIDTH_MULTIPLE:
            return f"{name} = {width} is not a multiple of {WIDTH_MULTIPLE}"
    if sizes.num_groups > MAX_GROUPS:
        return f"num_groups = {sizes.num_groups} is more than {MAX_GROUPS}"
    if batch * sizes.num_groups * max(sizes.hidden_dim, sizes.vision_dim, sizes.text_dim) >= MAX_ELEMENTS:
        return f"B = {batch} makes matrices of more than {MAX_ELEMENTS} elements, and offsets inside one are 32 bits wide"
    return None


def _kernels(parameter: Tensor) -> ModuleType:
    if not triton_installed():
        raise ValueError(
            "the fused allocator needs the package triton, which is not installed; "
            '`pip install "igva-kernels[triton]"`, or use impl="torch"'
        )
    module = importlib.import_module("igva_kernels.impl.triton.allocator")
    reason = module.check_device(parameter)
    if reason is not None:
        raise ValueError(f'impl="triton" cannot run this allocator: {reason}; use impl="auto" or "torch"')
    return module


# ---- forward ------------------------------------------------------------------------------------------------------------


def _allocate(
    summaries: Tensor, instruction_embeds: Tensor, parameters: Sequence[Tensor], num_heads: int, eps: float, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    kernels = _kernels(parameters[0])
    with torch.no_grad():
        return kernels.allocate_forward(summaries, instruction_embeds, parameters, num_heads, eps, save)


torch.library.impl("igva::allocate", "default", _allocate)


@torch.library.register_fake("igva::allocate")
def _allocate_fake(
    summaries: Tensor, instruction_embeds: Tensor, parameters: Sequence[Tensor], num_heads: int, eps: float, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sizes = AllocatorSizes.of(parameters, num_heads)
    batch, groups, hidden = summaries.shape[0], sizes.num_groups, sizes.hidden_dim
    weight = parameters[0]
    out = weight.new_empty(batch, groups, dtype=torch.float32)
    if not save:
        nothing, nothing32 = weight.new_empty, lambda: weight.new_empty(0, dtype=torch.float32)
        return out, nothing(0), nothing(0), nothing32(), nothing32()
    return (
        out,
        weight.new_empty(sizes.num_row_matrices, batch, hidden),
        weight.new_empty(sizes.num_member_matrices, batch * groups, hidden),
        weight.new_empty(sizes.num_blocks, batch, groups, num_heads, dtype=torch.float32),
        weight.new_empty(2 * sizes.num_blocks, 2, batch, dtype=torch.float32),
    )


# ---- backward -----------------------------------------------------------------------------------------------------------


@torch.library.impl("igva::allocate_backward", "default")
def _allocate_backward(
    grad_out: Tensor,
    summaries: Tensor,
    instruction_embeds: Tensor,
    parameters: Sequence[Tensor],
    out: Tensor,
    rows: Tensor,
    members: Tensor,
    probabilities: Tensor,
    statistics: Tensor,
    num_heads: int,
    needs_summaries: bool,
    needs_embeds: bool,
    needs_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    kernels = _kernels(parameters[0])
    with torch.no_grad():
        grads = kernels.allocate_backward(
            grad_out,
            summaries,
            instruction_embeds,
            parameters,
            out,
            rows,
            members,
            probabilities,
            statistics,
            num_heads,
            needs_summaries,
            needs_embeds,
            needs_parameters,
        )
    of = (summaries, instruction_embeds, parameters[0])
    grad_summaries, grad_embeds, grad_parameters = (
        like.new_empty(0) if grad is None else grad for grad, like in zip(grads, of, strict=True)
    )
    return grad_summaries, grad_embeds, grad_parameters


@torch.library.register_fake("igva::allocate_backward")
def _allocate_backward_fake(
    grad_out: Tensor,
    summaries: Tensor,
    instruction_embeds: Tensor,
    parameters: Sequence[Tensor],
    out: Tensor,
    rows: Tensor,
    members: Tensor,
    probabilities: Tensor,
    statistics: Tensor,
    num_heads: int,
    needs_summaries: bool,
    needs_embeds: bool,
    needs_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    size = AllocatorSizes.of(parameters, num_heads).parameter_offsets[-1]
    return (
        summaries.new_empty(summaries.shape if needs_summaries else (0,)),
        instruction_embeds.new_empty(instruction_embeds.shape if needs_embeds else (0,)),
        parameters[0].new_empty(size if needs_parameters else 0),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    summaries, instruction_embeds, parameters, ctx.num_heads, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.num_parameters = len(parameters)
    ctx.save_for_backward(summaries, instruction_embeds, *parameters, *output)


def _vjp(ctx: Any, grad_out: Tensor | None, *_: Tensor | None) -> tuple:
    needs_summaries, needs_embeds, needs_parameters = ctx.needs_input_grad[:3]
    if grad_out is None:
        return None, None, [None] * ctx.num_parameters, None, None, None
    summaries, instruction_embeds, *saved = ctx.saved_tensors
    parameters = saved[: ctx.num_parameters]
    grad_summaries, grad_embeds, flat = torch.ops.igva.allocate_backward(
        grad_out,
        summaries,
        instruction_embeds,
        parameters,
        *saved[ctx.num_parameters :],
        ctx.num_heads,
        needs_summaries,
        needs_embeds,
        any(needs_parameters),
    )
    sizes = AllocatorSizes.of(parameters, ctx.num_heads)
    # views of the flat buffer, in which the kernels find the layers of all blocks at equal distances
    grads = [
        flat[begin : begin + parameter.numel()].view(parameter.shape) if need else None
        for begin, parameter, need in zip(sizes.parameter_offsets, parameters, needs_parameters, strict=False)
    ]
    return (grad_summaries if needs_summaries else None, grad_embeds if needs_embeds else None, grads, None, None, None)


torch.library.register_autograd("igva::allocate", _vjp, setup_context=_setup_context)
