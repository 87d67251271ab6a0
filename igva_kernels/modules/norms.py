"""Norm layers behind a mix: what of them can be fused with it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from igva_kernels.output_norm import OutputNorm
from igva_kernels.program import NormKind

_KINDS: dict[type[nn.Module], NormKind] = {nn.LayerNorm: "layer", nn.RMSNorm: "rms"}


def output_norm_of(module: nn.Module) -> OutputNorm | None:
    """The norm layer as :func:`igva_kernels.fuse` takes it, or None where it has to be called as a module.

    That is where it is not exactly torch's ``LayerNorm`` or ``RMSNorm`` over the channels (an adapter's wrapper, another
    library's kernel), where it leaves ``eps`` to torch, and where somebody waits for its call: a hook, which is also how ZeRO-3
    gathers its parameters, or parameters that are shards (FSDP) or quantised.
    """
    kind = _KINDS.get(type(module))
    if kind is None or not isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return None
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    bias = getattr(module, "bias", None)
    parameters = [each for each in (module.weight, bias) if each is not None]
    plain = all(each.shape == module.normalized_shape and not is_traceable_wrapper_subclass(each) for each in parameters)
    if module.eps is None or len(module.normalized_shape) != 1 or any(hooks) or not plain:
        return None
    return OutputNorm(module.weight, bias, module.eps, kind)


def normalised(module: nn.Module, mix: Callable[[OutputNorm | None], Tensor]) -> Tensor:
    """``module(mix(None))``, or ``mix`` with the norm in the same pass where it can be fused."""
    norm = output_norm_of(module)
    return module(mix(None)) if norm is None else mix(norm)
