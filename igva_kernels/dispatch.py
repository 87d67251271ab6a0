"""Which implementation runs these tensors. None is imported before it is used, and triton only by its own."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache
from types import ModuleType

from torch import Tensor

from igva_kernels.program import MixProgram

MODULES = {"reference": "reference", "torch": "cpu", "native": "native", "triton": "triton"}
"""Name of an implementation, as users write it, and its module in :mod:`igva_kernels.impl`."""


PREFERRED = {"cuda": ("triton",), "cpu": ("native",)}
"""What ``"auto"`` tries on a device, before plain torch, which runs everything."""


@cache
def implementation(name: str) -> ModuleType:
    """The module behind the name of an implementation of the mix.

    Raises:
        ValueError: triton is asked for and not installed.
    """
    return module_of(name, MODULES)


def module_of(name: str, modules: Mapping[str, str]) -> ModuleType:
    """The module of :mod:`igva_kernels.impl` that ``modules`` has under this name.

    Raises:
        ValueError: triton is asked for and not installed.
    """
    if name == "triton" and not triton_installed():
        raise ValueError(
            'impl="triton": the package triton is not installed; CUDA builds of torch bring it, else '
            '`pip install "igva-kernels[triton]"`, or use impl="auto" or "torch"'
        )
    return importlib.import_module(f"igva_kernels.impl.{modules[name]}")


@cache
def triton_installed() -> bool:
    """Whether there is a triton to import, found out without importing it."""
    return importlib.util.find_spec("triton") is not None


def resolve(
    impl: str,
    states: Sequence[Tensor],
    weights: Tensor | None,
    program: MixProgram,
    num_prefix_tokens: int,
    indices: Tensor | None = None,
) -> ModuleType:
    """The implementation that runs these tensors; a named one never gives way to another.

    Raises:
        ValueError: a named implementation cannot run them; the text says why.
    """
    if impl == "auto":
        for name in PREFERRED.get(states[0].device.type, ()):
            if name == "triton" and not triton_installed():
                continue
            module = implementation(name)
            if module.check_supported(states, weights, program, num_prefix_tokens, indices=indices) is None:
                return module
        return implementation("torch")
    module = implementation(impl)
    reason = module.check_supported(states, weights, program, num_prefix_tokens, indices=indices)
    if reason is not None:
        raise ValueError(f'impl="{impl}" cannot run this input: {reason}; use impl="auto" or "torch"')
    return module
