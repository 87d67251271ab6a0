"""The operator of multi-scale deformable attention: schema, fake tensors, autograd.

Opaque, as those of :mod:`igva_kernels.ops`; none of its implementations is imported before it is used. ``sizes`` are the
spatial shapes one after another: H_0, W_0, H_1, W_1, ... Gradients of gradients are not defined.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from igva_kernels.dispatch import module_of, triton_installed

MODULES = {"reference": "deformable_reference", "torch": "deformable_cpu", "triton": "triton.deformable"}
"""Name of an implementation, as users write it, and its module in :mod:`igva_kernels.impl`."""

torch.library.define(
    "igva::deformable_attention",
    "(Tensor value, SymInt[] sizes, Tensor locations, Tensor weights, bool? deterministic, str impl) -> Tensor",
)
torch.library.define(
    "igva::deformable_attention_backward",
    "(Tensor grad_out, Tensor value, SymInt[] sizes, Tensor locations, Tensor weights, bool[] needs, "
    "bool? deterministic, str impl) -> (Tensor, Tensor, Tensor)",
)


@cache
def _implementation(name: str) -> ModuleType:
    return module_of(name, MODULES)


def _resolve(
    impl: str, value: Tensor, spatial_shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> ModuleType:
    """The implementation that runs these tensors; a named one never gives way to another."""
    if impl == "auto":
        if value.is_cuda and triton_installed():
            triton = _implementation("triton")
            if triton.check_supported(value, spatial_shapes, locations, weights) is None:
                return triton
        return _implementation("torch")
    module = _implementation(impl)
    reason = module.check_supported(value, spatial_shapes, locations, weights)
    if reason is not None:
        raise ValueError(f'impl="{impl}" cannot run this input: {reason}; use impl="auto" or "torch"')
    return module


def _spatial_shapes(sizes: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple(zip(sizes[::2], sizes[1::2], strict=True))


@torch.library.impl("igva::deformable_attention", "default")
def _attention(
    value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor, deterministic: bool | None, impl: str
) -> Tensor:
    spatial_shapes = _spatial_shapes(sizes)
    module = _resolve(impl, value, spatial_shapes, locations, weights)
    with torch.no_grad():
        return module.attention_forward(value, spatial_shapes, locations, weights)


@torch.library.register_fake("igva::deformable_attention")
def _attention_fake(
    value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor, deterministic: bool | None, impl: str
) -> Tensor:
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


@torch.library.impl("igva::deformable_attention_backward", "default")
def _attention_backward(
    grad_out: Tensor,
    value: Tensor,
    sizes: Sequence[int],
    locations: Tensor,
    weights: Tensor,
    needs: Sequence[bool],
    deterministic: bool | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    spatial_shapes = _spatial_shapes(sizes)
    module = _resolve(impl, value, spatial_shapes, locations, weights)
    with torch.no_grad():
        grads = module.attention_backward(grad_out, value, spatial_shapes, locations, weights, tuple(needs), deterministic)
    value_grad, locations_grad, weights_grad = (grad_out.new_empty(0) if grad is None else grad for grad in grads)
    return value_grad, locations_grad, weights_grad


@torch.library.register_fake("igva::deformable_attention_backward")
def _attention_backward_fake(
    grad_out: Tensor,
    value: Tensor,
    sizes: Sequence[int],
    locations: Tensor,
    weights: Tensor,
    needs: Sequence[bool],
    deterministic: bool | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    value_grad, locations_grad, weights_grad = (
        tensor.new_empty(tensor.shape) if need else grad_out.new_empty(0)
        for tensor, need in zip((value, locations, weights), needs, strict=True)
    )
    return value_grad, locations_grad, weights_grad


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    value, ctx.sizes, locations, weights, ctx.deterministic, ctx.impl = inputs
    ctx.save_for_backward(value, locations, weights)


def _vjp(ctx: Any, grad_out: Tensor) -> tuple:
    value, locations, weights = ctx.saved_tensors
    needs = [ctx.needs_input_grad[position] for position in (0, 2, 3)]
    grads = torch.ops.igva.deformable_attention_backward(
        grad_out, value, ctx.sizes, locations, weights, needs, ctx.deterministic, ctx.impl
    )
    value_grad, locations_grad, weights_grad = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return value_grad, None, locations_grad, weights_grad, None, None


torch.library.register_autograd("igva::deformable_attention", _vjp, setup_context=_setup_context)
