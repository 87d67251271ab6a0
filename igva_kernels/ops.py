"""The operators: schemas, fake tensors, autograd. What torch.compile, export and autograd see of this library.

Each operator is opaque and hands its tensors to one of the implementations in :mod:`igva_kernels.impl`; none of them is
imported before it is used, and triton only by its own. ``plan`` is the ``int[]`` of :meth:`MixProgram.encode`; ``states`` are
the hidden states that the program reads, each (B, T, D).

The gradient of the states is one tensor a *gradient class* (all layers of one group share theirs), so that the backward
writes five maps for IGVA's 24 layers. Gradients of gradients are not defined.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from igva_kernels.program import MixProgram, decode_program

MODULES = {"reference": "reference", "torch": "cpu", "triton": "triton"}
"""Name of an implementation, as users write it, and its module in :mod:`igva_kernels.impl`."""

torch.library.define(
    "igva::fuse",
    "(Tensor[] states, Tensor? weights, int[] plan, int num_prefix_tokens, bool save_means, str impl) -> (Tensor, Tensor)",
)
torch.library.define(
    "igva::fuse_backward",
    "(Tensor grad_out, Tensor[] states, Tensor? means, Tensor? weights, int[] plan, int num_prefix_tokens, "
    "SymInt num_tokens, bool needs_weights, bool needs_states, str impl) -> (Tensor, Tensor[])",
)
torch.library.define("igva::reduce_groups", "(Tensor[] states, int[] plan, int num_prefix_tokens, str impl) -> Tensor")
torch.library.define(
    "igva::reduce_groups_backward",
    "(Tensor grad_means, int[] plan, int num_prefix_tokens, SymInt num_tokens, str impl) -> Tensor[]",
)
torch.library.define(
    "igva::group_summaries",
    "(Tensor[] states, int[] plan, int num_prefix_tokens, str summary, str impl) -> Tensor",
)
torch.library.define(
    "igva::group_summaries_backward",
    "(Tensor grad, int[] plan, int num_prefix_tokens, SymInt num_tokens, str summary, str impl) -> Tensor[]",
)


# ---- choosing the implementation ----------------------------------------------------------------------------------------


@cache
def implementation(name: str) -> ModuleType:
    """The module behind ``"reference"``, ``"torch"`` or ``"triton"``.

    Raises:
        ValueError: triton is asked for and not installed.
    """
    if name == "triton" and not _triton_installed():
        raise ValueError(
            'impl="triton": the package triton is not installed; CUDA builds of torch bring it, else '
            '`pip install "igva-kernels[triton]"`, or use impl="auto" or "torch"'
        )
    return importlib.import_module(f"igva_kernels.impl.{MODULES[name]}")


@cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _resolve(
    impl: str, states: Sequence[Tensor], weights: Tensor | None, program: MixProgram, num_prefix_tokens: int
) -> ModuleType:
    """The implementation that runs these tensors; a named one never gives way to another."""
    if impl == "auto":
        if states[0].is_cuda and _triton_installed():
            triton = implementation("triton")
            if triton.check_supported(states, weights, program, num_prefix_tokens) is None:
                return triton
        return implementation("torch")
    module = implementation(impl)
    reason = module.check_supported(states, weights, program, num_prefix_tokens)
    if reason is not None:
        raise ValueError(f'impl="{impl}" cannot run this input: {reason}; use impl="auto" or "torch"')
    return module


# ---- fuse ---------------------------------------------------------------------------------------------------------------


@torch.library.impl("igva::fuse", "default")
def _fuse(
    states: Sequence[Tensor],
    weights: Tensor | None,
    plan: Sequence[int],
    num_prefix_tokens: int,
    save_means: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    program = decode_program(plan)
    module = _resolve(impl, states, weights, program, num_prefix_tokens)
    with torch.no_grad():
        return module.fuse_forward(states, weights, program, num_prefix_tokens, save_means)


@torch.library.register_fake("igva::fuse")
def _fuse_fake(
    states: Sequence[Tensor],
    weights: Tensor | None,
    plan: Sequence[int],
    num_prefix_tokens: int,
    save_means: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    program = decode_program(plan)
    batch, tokens, width = states[0].shape
    num_patches = tokens - num_prefix_tokens
    out = states[0].new_empty(batch, num_patches, len(program.slots) * width)
    means = (program.num_weighted_groups, batch, num_patches, width) if save_means else (0,)
    return out, states[0].new_empty(means)


@torch.library.impl("igva::fuse_backward", "default")
def _fuse_backward(
    grad_out: Tensor,
    states: Sequence[Tensor],
    means: Tensor | None,
    weights: Tensor | None,
    plan: Sequence[int],
    num_prefix_tokens: int,
    num_tokens: int,
    needs_weights: bool,
    needs_states: bool,
    impl: str,
) -> tuple[Tensor, list[Tensor]]:
    program = decode_program(plan)
    num_slots = len(program.slots)
    if means is not None:
        maps = list(means.unbind(0))
    else:  # where nothing had to be saved, an empty map of the gradients' shape stands for what will be written
        maps = list(states) or [grad_out.new_empty(0, grad_out.shape[1], grad_out.shape[2] // num_slots)]
    module = _resolve(impl, maps, weights, program, 0)
    with torch.no_grad():
        grad_weights, grad_states = module.fuse_backward(
            grad_out, states, means, weights, program, num_prefix_tokens, num_tokens, needs_weights, needs_states
        )
    return grad_out.new_empty(0) if grad_weights is None else grad_weights, list(grad_states)


@torch.library.register_fake("igva::fuse_backward")
def _fuse_backward_fake(
    grad_out: Tensor,
    states: Sequence[Tensor],
    means: Tensor | None,
    weights: Tensor | None,
    plan: Sequence[int],
    num_prefix_tokens: int,
    num_tokens: int,
    needs_weights: bool,
    needs_states: bool,
    impl: str,
) -> tuple[Tensor, list[Tensor]]:
    program = decode_program(plan)
    wide = torch.float64 if grad_out.dtype == torch.float64 else torch.float32
    grad_weights = grad_out.new_empty(0)
    if needs_weights and weights is not None:
        grad_weights = weights.new_empty(weights.shape, dtype=wide)
    width = grad_out.shape[2] // len(program.slots)
    return grad_weights, _empty_grads(grad_out, program, num_tokens, width) if needs_states else []


def _fuse_setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    states, weights, plan, num_prefix_tokens, save_means, impl = inputs
    ctx.set_materialize_grads(False)
    ctx.plan, ctx.num_prefix_tokens, ctx.impl = plan, num_prefix_tokens, impl
    ctx.num_tokens = states[0].shape[1]
    # dL/dh is linear in the weights alone; only dL/dw needs the means, or the states to sum them from again.
    # (ctx.needs_input_grad is still flat here: one entry a state.)
    weights_need = weights is not None and weights.requires_grad
    ctx.num_saved_states = len(states) if weights_need and not save_means else 0
    ctx.saves_means = weights_need and save_means
    saved = [output[1]] if ctx.saves_means else list(states[: ctx.num_saved_states])
    ctx.save_for_backward(*saved, *(() if weights is None else (weights,)))


def _fuse_vjp(ctx: Any, grad_out: Tensor | None, _grad_means: Tensor | None) -> tuple:
    needs_states, needs_weights = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
    nothing = [None] * len(needs_states), None, None, None, None, None
    if grad_out is None:
        return nothing
    saved = list(ctx.saved_tensors)
    means = saved.pop(0) if ctx.saves_means else None
    states = [saved.pop(0) for _ in range(ctx.num_saved_states)]
    weights = saved.pop(0) if saved else None
    grad_weights, grads = torch.ops.igva.fuse_backward(
        grad_out,
        states,
        means,
        weights,
        ctx.plan,
        ctx.num_prefix_tokens,
        ctx.num_tokens,
        needs_weights,
        any(needs_states),
        ctx.impl,
    )
    grad_weights = grad_weights.to(weights.dtype) if needs_weights and weights is not None else None
    return _per_source(grads, ctx.plan, needs_states), grad_weights, None, None, None, None


torch.library.register_autograd("igva::fuse", _fuse_vjp, setup_context=_fuse_setup_context)


# ---- reduce_groups ------------------------------------------------------------------------------------------------------


@torch.library.impl("igva::reduce_groups", "default")
def _reduce_groups(states: Sequence[Tensor], plan: Sequence[int], num_prefix_tokens: int, impl: str) -> Tensor:
    program = decode_program(plan)
    module = _resolve(impl, states, None, program, num_prefix_tokens)
    with torch.no_grad():
        return module.reduce_forward(states, program, num_prefix_tokens)


@torch.library.register_fake("igva::reduce_groups")
def _reduce_groups_fake(states: Sequence[Tensor], plan: Sequence[int], num_prefix_tokens: int, impl: str) -> Tensor:
    batch, tokens, width = states[0].shape
    return states[0].new_empty(len(decode_program(plan).groups), batch, tokens - num_prefix_tokens, width)


@torch.library.impl("igva::reduce_groups_backward", "default")
def _reduce_groups_backward(
    grad_means: Tensor, plan: Sequence[int], num_prefix_tokens: int, num_tokens: int, impl: str
) -> list[Tensor]:
    program = decode_program(plan)
    grad_means = grad_means.contiguous()
    module = _resolve(impl, list(grad_means.unbind(0)), None, program, 0)
    with torch.no_grad():
        return list(module.reduce_backward(grad_means, program, num_prefix_tokens, num_tokens))


@torch.library.register_fake("igva::reduce_groups_backward")
def _reduce_groups_backward_fake(
    grad_means: Tensor, plan: Sequence[int], num_prefix_tokens: int, num_tokens: int, impl: str
) -> list[Tensor]:
    return _empty_grads(grad_means[0], decode_program(plan), num_tokens, grad_means.shape[3])


def _reduce_groups_setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    states, ctx.plan, ctx.num_prefix_tokens, ctx.impl = inputs
    ctx.num_tokens = states[0].shape[1]


def _reduce_groups_vjp(ctx: Any, grad_means: Tensor) -> tuple:
    grads = torch.ops.igva.reduce_groups_backward(grad_means, ctx.plan, ctx.num_prefix_tokens, ctx.num_tokens, ctx.impl)
    return _per_source(grads, ctx.plan, ctx.needs_input_grad[0]), None, None, None


torch.library.register_autograd("igva::reduce_groups", _reduce_groups_vjp, setup_context=_reduce_groups_setup_context)


# ---- group_summaries ----------------------------------------------------------------------------------------------------


@torch.library.impl("igva::group_summaries", "default")
def _group_summaries(states: Sequence[Tensor], plan: Sequence[int], num_prefix_tokens: int, summary: str, impl: str) -> Tensor:
    program = decode_program(plan)
    module = _resolve(impl, states, None, program, num_prefix_tokens)
    with torch.no_grad():
        return module.summaries_forward(states, program, num_prefix_tokens, summary)


@torch.library.register_fake("igva::group_summaries")
def _group_summaries_fake(
    states: Sequence[Tensor], plan: Sequence[int], num_prefix_tokens: int, summary: str, impl: str
) -> Tensor:
    batch, _, width = states[0].shape
    return states[0].new_empty(batch, decode_program(plan).num_weights, width)


@torch.library.impl("igva::group_summaries_backward", "default")
def _group_summaries_backward(
    grad: Tensor, plan: Sequence[int], num_prefix_tokens: int, num_tokens: int, summary: str, impl: str
) -> list[Tensor]:
    program = decode_program(plan)
    grad = grad.contiguous()
    module = _resolve(impl, [grad], None, program, 0)
    with torch.no_grad():
        return list(module.summaries_backward(grad, program, num_prefix_tokens, num_tokens, summary))


@torch.library.register_fake("igva::group_summaries_backward")
def _group_summaries_backward_fake(
    grad: Tensor, plan: Sequence[int], num_prefix_tokens: int, num_tokens: int, summary: str, impl: str
) -> list[Tensor]:
    return _empty_grads(grad, decode_program(plan), num_tokens, grad.shape[2])


def _group_summaries_setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    states, ctx.plan, ctx.num_prefix_tokens, ctx.summary, ctx.impl = inputs
    ctx.num_tokens = states[0].shape[1]


def _group_summaries_vjp(ctx: Any, grad: Tensor) -> tuple:
    grads = torch.ops.igva.group_summaries_backward(
        grad, ctx.plan, ctx.num_prefix_tokens, ctx.num_tokens, ctx.summary, ctx.impl
    )
    return _per_source(grads, ctx.plan, ctx.needs_input_grad[0]), None, None, None, None


torch.library.register_autograd("igva::group_summaries", _group_summaries_vjp, setup_context=_group_summaries_setup_context)


# ---- shared -------------------------------------------------------------------------------------------------------------


def _empty_grads(like: Tensor, program: MixProgram, num_tokens: int, width: int) -> list[Tensor]:
    return [like.new_empty(like.shape[0], num_tokens, width) for _ in program.gradient_classes]


def _per_source(grads: Sequence[Tensor], plan: Sequence[int], needed: Sequence[bool]) -> list[Tensor | None]:
    """The gradient of each source: all members of a class get the same tensor."""
    if not grads:
        return [None] * len(needed)
    classes = decode_program(plan).class_of_source
    return [grads[classes[source]] if need else None for source, need in enumerate(needed)]
