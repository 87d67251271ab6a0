"""Running something in place of the ``forward`` of a module that FSDP2 shards."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

_METHOD = "_igva_as_forward"


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether FSDP2's ``fully_shard`` was applied to this very module."""
    # One of the methods that it adds; to ask for its class would import torch.distributed.fsdp.
    return hasattr(module, "set_reshard_after_forward")


def as_forward(module: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """``function(module, *args)``, as a forward of ``module``.

    ``fully_shard`` gathers a module's parameters in hooks around its ``forward``; a loop from outside over its children would
    meet sharded ones. So the call is registered as a further forward method of the module, once. Elsewhere it is a plain call.

    Args:
        module: any module; one that ``fully_shard`` was applied to gets the attribute ``_igva_as_forward``.
        function: takes the module and ``args``; its result passes through the hooks as that of a ``forward`` does.
    """
    if not is_fully_sharded(module):
        return function(module, *args)
    if not hasattr(module, _METHOD):
        from torch.distributed.fsdp import register_fsdp_forward_method

        setattr(module, _METHOD, MethodType(_call, module))
        register_fsdp_forward_method(module, _METHOD)
    return getattr(module, _METHOD)(function, *args)


def _call(module: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    return function(module, *args)
