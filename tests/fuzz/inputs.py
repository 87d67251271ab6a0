"""The tensors of a case, as they lie in memory, with NaN and infinity wherever nothing may be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from fuzz.cases import Case
from torch import Tensor

from igva_kernels import Layer, Mean, OutputNorm, SparseWeights, Weighted


@dataclass
class Inputs:
    """What a call gets.

    Args:
        hidden_states: L + 1 entries, each (B, T, D) or None, or one (L + 1, B, T, D) tensor.
        values: the weights, or the values of sparse ones; None for a plan without weights.
        indices: of sparse weights, else None.
        norm: behind the mix, or None.
        grad_out: (B, N, S*D), in the dtype of the output.
        patches: for each layer that is read its (B, N, D) values in float64, without the poison.
    """

    hidden_states: Sequence[Tensor | None] | Tensor
    values: Tensor | None
    indices: Tensor | None
    norm: OutputNorm | None
    grad_out: Tensor
    patches: dict[int, Tensor]

    @property
    def weights(self) -> Tensor | SparseWeights | None:
        return self.values if self.indices is None else SparseWeights(self.values, self.indices)

    def tensors(self) -> list[Tensor]:
        """All tensors, to see whether one was written to."""
        states = [self.hidden_states] if isinstance(self.hidden_states, Tensor) else self.hidden_states
        tensors = (*states, self.values, self.indices, self.grad_out, *self.norm_parameters.values())
        return [tensor for tensor in tensors if tensor is not None]

    @property
    def norm_parameters(self) -> dict[str, Tensor]:
        """Those that there are."""
        named = {} if self.norm is None else {"weight": self.norm.weight, "bias": self.norm.bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def make_inputs(case: Case, device: str = "cpu") -> Inputs:
    """Draw the values of a case on a CPU, with poison wherever nothing may be read, and move them to ``device``.

    Prefix rows hold infinity and NaN in turn, unread layers NaN, and so does what lies between rows. With sparse weights the
    patches of a layer that their token does not name hold NaN as well.
    """
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    values = indices = None
    if case.sharing is not None:
        columns = case.num_columns if case.sharing == "sparse" else case.plan.num_groups
        leading = {"all": (), "image": (case.batch,)}.get(case.sharing, (case.batch, case.patches))
        values = normal(*leading, columns, dtype=case.weights_dtype).to(device).requires_grad_(case.weights_need)
        if case.sharing == "sparse":
            shape = (case.batch, case.patches, columns)
            # one index below and one above the range: padding
            indices = torch.randint(-1, case.plan.num_groups + 1, shape, generator=generator)
            indices = indices.to(device, (torch.int64, torch.int32)[case.seed % 2])

    states: list[Tensor] = []
    patches: dict[int, Tensor] = {}
    for layer in range(case.plan.num_layers + 1):
        state = normal(case.batch, case.tokens, case.width).to(device)
        state[:, : case.prefix] = (float("inf"), float("nan"), -float("inf"))[layer % 3]
        if layer in case.plan.sources:
            patches[layer] = state[:, case.prefix :].to(torch.float64, copy=True)
            state[:, case.prefix :][~_reached(case, layer, indices, device)] = float("nan")
        else:
            state.fill_(float("nan"))
        states.append(state)

    hidden_states: list[Tensor | None] | Tensor
    if case.layouts is None:
        hidden_states = torch.stack(states).requires_grad_(any(case.states_need))
    else:
        hidden_states = [None if case.unread == "None" else state for state in states]
        for layer, layout, needs in zip(case.plan.sources, case.layouts, case.states_need, strict=True):
            hidden_states[layer] = laid_out(states[layer], layout).requires_grad_(needs)

    shape = (case.batch, case.patches, len(case.plan.slots) * case.width)
    if case.grad_layout == "expanded":
        grad_out = normal(1, 1, 1).to(device).expand(shape)
    else:
        grad_out = laid_out(normal(*shape).to(device), case.grad_layout)
    norm = None
    if case.norm is not None:
        weight, bias = (
            normal(shape[2], dtype=case.out_dtype).to(device).requires_grad_(case.norm.needs) if present else None
            for present in (case.norm.weight, case.norm.bias)
        )
        norm = OutputNorm(weight, bias, case.norm.eps, case.norm.kind)
    return Inputs(hidden_states, values, indices, norm, grad_out.to(case.out_dtype), patches)


def _reached(case: Case, layer: int, indices: Tensor | None, device: str) -> Tensor:
    """(B, N): the tokens whose output depends on the layer."""
    if indices is None:
        return torch.ones(case.batch, case.patches, dtype=torch.bool, device=device)
    always = any(
        (isinstance(slot, Layer) and slot.index == layer)
        or (isinstance(slot, Mean) and layer in slot.layers)
        or (isinstance(slot, Weighted) and slot.plus == layer)
        for slot in case.plan.slots
    )
    columns = torch.tensor([column for column, group in enumerate(case.plan.groups) if layer in group]).to(indices)
    return torch.isin(indices, columns).any(-1) | always


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The (B, T, D) tensor in another layout: a leaf of the same values."""
    batch, tokens, width = tensor.shape
    spare = 8  # rows or channels; a multiple of 16 bytes in every dtype
    if layout == "contiguous":
        return tensor
    if layout == "transposed":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "channels of a wider map" or layout == "odd row stride":
        wider = tensor.new_full((batch, tokens, width + (spare if layout.startswith("channels") else 3)), float("nan"))
        view = wider[..., :width]
    else:
        longer = tensor.new_full((batch, tokens + spare, width), float("nan"))
        view = longer[:, :tokens] if layout == "first rows of a longer sequence" else longer[:, spare:]
    view.copy_(tensor)
    return view.detach()
