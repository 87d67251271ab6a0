"""A norm behind the mix: what the caller says of it, and what is asked of that."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from igva_kernels.program import NORM_KINDS, NormKind


class OutputNorm(NamedTuple):
    """A norm over all S*D channels of each token of the output, in the same pass as the mix.

    ``"layer"`` is ``(x - mean) / sqrt(var + eps) * weight + bias`` with the biased variance, as
    ``torch.nn.functional.layer_norm``; ``"rms"`` is ``x / sqrt(mean(x²) + eps) * weight``, as ``torch.nn.functional.rms_norm``.
    x is the mix as it was summed: in float32 (float64 for float64 states), not rounded to the dtype of the hidden states in
    between, copied layers among it. So are the statistics. What leaves is rounded once, to the dtype of the parameters, or of
    the hidden states where there are none.

    Args:
        weight: (S*D,), any floating dtype (float64 for float64 states alone), on the device of the states; None for 1.
        bias: (S*D,) like the weight; None for 0. Not for ``"rms"``.
        eps: added under the root, not negative.
        kind: ``"layer"`` or ``"rms"``.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5
    kind: NormKind = "layer"

    def dtype_of(self, mixed: torch.dtype) -> torch.dtype:
        """The dtype of the output, where ``mixed`` is that of the hidden states."""
        parameter = self.weight if self.weight is not None else self.bias
        return mixed if parameter is None else parameter.dtype


def statistics_of(norm: OutputNorm) -> int:
    """How many numbers of each row the backward needs: mean and 1/deviation of a LayerNorm, 1/deviation of an RMSNorm."""
    return 2 if norm.kind == "layer" else 1


def check_output_norm(norm: OutputNorm, num_channels: int, dtype: torch.dtype, device: torch.device) -> None:
    """The norm fits an output of ``num_channels`` = S*D channels of states in ``dtype`` on ``device``.

    Raises:
        TypeError: no :class:`OutputNorm`, a parameter that is no floating-point tensor.
        ValueError: shape, device or dtypes of the parameters, another kind, a negative ``eps``.
    """
    if not isinstance(norm, OutputNorm):
        raise TypeError(f"output_norm must be an OutputNorm or None, got {type(norm).__name__}; OutputNorm(weight, bias, eps)")
    if norm.kind not in NORM_KINDS:
        raise ValueError(f"output_norm.kind must be one of {', '.join(map(repr, NORM_KINDS))}, got {norm.kind!r}")
    if not norm.eps >= 0:
        raise ValueError(f"output_norm.eps must not be negative, got {norm.eps!r}")
    if norm.kind == "rms" and norm.bias is not None:
        raise ValueError('output_norm.bias is given, but kind="rms" has no bias; pass None')
    for name in ("weight", "bias"):
        _check_parameter(f"output_norm.{name}", getattr(norm, name), num_channels, dtype, device)
    if norm.weight is not None and norm.bias is not None and norm.weight.dtype != norm.bias.dtype:
        raise ValueError(f"output_norm.weight is {norm.weight.dtype}, output_norm.bias {norm.bias.dtype}; they must agree")


def _check_parameter(name: str, parameter: Tensor | None, num_channels: int, dtype: torch.dtype, device: torch.device) -> None:
    if parameter is None:
        return
    if not isinstance(parameter, Tensor) or not parameter.is_floating_point():
        got = parameter.dtype if isinstance(parameter, Tensor) else type(parameter).__name__
        raise TypeError(f"{name} must be a floating-point tensor or None, got {got}")
    if tuple(parameter.shape) != (num_channels,):
        raise ValueError(f"{name} has the shape {tuple(parameter.shape)}, expected (S*D,) = ({num_channels},)")
    if parameter.device != device:
        raise ValueError(f"{name} is on {parameter.device}, the hidden states on {device}; move one of them")
    if parameter.dtype == torch.float64 and dtype != torch.float64:
        raise ValueError(f"{name} is float64, but the sums of {dtype} states run in float32; convert it with .float()")
