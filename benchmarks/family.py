"""The other published mixes, each in the plain torch of its released code, and the public kernels that do the same work.

Peers take the hidden states, the weights in the form that the library takes, and P; their steps are those of the files named,
at the commits of DenseConnector 0f8936c, s3prl ec8064b, TGIF 7b1be25. MoL's code is not published; its mix is written as its
paper states it (arXiv 2610.09440). What follows a mix with parameters of its own (the LayerNorm of TGIF and of VipLlava) is
measured apart, in :data:`MIXES_WITH_NORMS`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from igva_kernels import FusionPlan, Norm, SparseWeights
from igva_kernels.program import CopySlot

from .roofline import (
    Traffic,
    backward_traffic,
    forward_traffic,
    norm_backward_traffic,
    normalised_forward_traffic,
)
from .sizes import Tower

Weights = Tensor | SparseWeights | None
Peer = Callable[[Sequence[Tensor], Weights, int], Tensor]


@dataclass(frozen=True)
class Mix:
    """One published mix.

    Args:
        name: printed in tables.
        plan: of a tower with that many layers.
        peer: hidden states, weights and P to (B, N, S*D).
        sharing: "all", "image" or "token", whom a row of weights belongs to; "sparse" for ``num_columns`` values a token; None.
        modes: what is measured, see :class:`benchmarks.sizes.FuseCase`.
        num_columns: k of sparse weights.
    """

    name: str
    plan: Callable[[int], FusionPlan]
    peer: Callable[[FusionPlan], Peer]
    sharing: str | None
    modes: tuple[str, ...]
    num_columns: int = 0


def dense_connector_sci(plan: FusionPlan) -> Peer:
    """``dense_connector_sci``: a concatenation of the base and two layers."""
    base, *others = (slot.index for slot in plan.slots)

    def peer(hidden_states: Sequence[Tensor], weights: None, num_prefix_tokens: int) -> Tensor:
        features = torch.cat([hidden_states[layer][:, num_prefix_tokens:] for layer in others], dim=-1)
        return torch.cat((hidden_states[base][:, num_prefix_tokens:], features), dim=-1)

    return peer


def dense_connector_dci(plan: FusionPlan) -> Peer:
    """``dense_connector_dci``: a stack, a sum and a division for each group."""
    base, *groups = plan.slots

    def peer(hidden_states: Sequence[Tensor], weights: None, num_prefix_tokens: int) -> Tensor:
        features = []
        for group in groups:
            stacked = torch.stack([hidden_states[layer][:, num_prefix_tokens:] for layer in group.layers], dim=0)
            features.append(torch.sum(stacked, dim=0) / len(group.layers))
        return torch.cat((hidden_states[base.index][:, num_prefix_tokens:], torch.cat(features, dim=-1)), dim=-1)

    return peer


def s3prl_featurizer(plan: FusionPlan) -> Peer:
    """``Featurizer._weighted_sum``: a stack, ``F.layer_norm`` of it with ``normalize=True``, a product and a sum.

    The code's weights are float32 and its features as well; here the weights are cast to the features' dtype, or a product in
    bfloat16 would become float32.
    """
    (slot,) = plan.slots

    def peer(hidden_states: Sequence[Tensor], weights: Tensor, num_prefix_tokens: int) -> Tensor:
        stacked = torch.stack([hidden_states[layer][:, num_prefix_tokens:] for (layer,) in slot.groups], dim=0)
        if slot.norm is not None:
            stacked = F.layer_norm(stacked, (stacked.shape[-1],))
        _, *origin_shape = stacked.shape
        stacked = stacked.view(len(slot.groups), -1)
        return (weights.to(stacked.dtype).unsqueeze(-1) * stacked).sum(dim=0).view(*origin_shape)

    return peer


def allennlp_scalar_mix(plan: FusionPlan) -> Peer:
    """``ScalarMix.forward`` without layer norm: a Python sum of products (allenai/allennlp, ``modules/scalar_mix.py``)."""
    (slot,) = plan.slots

    def peer(hidden_states: Sequence[Tensor], weights: Tensor, num_prefix_tokens: int) -> Tensor:
        pieces = [
            weight * hidden_states[layer][:, num_prefix_tokens:]
            for weight, (layer,) in zip(weights.to(hidden_states[0].dtype).unbind(), slot.groups, strict=True)
        ]
        return sum(pieces)

    return peer


def tgif(plan: FusionPlan) -> Peer:
    """``layer_selection.py``: a stack (B, L, N, D), a product, a sum, and the base added."""
    (slot,) = plan.slots

    def peer(hidden_states: Sequence[Tensor], weights: Tensor, num_prefix_tokens: int) -> Tensor:
        stacked = torch.stack([hidden_states[layer][:, num_prefix_tokens:] for (layer,) in slot.groups], dim=1)
        mixed = (weights.to(stacked.dtype)[:, :, None, None] * stacked).sum(dim=1)
        return hidden_states[slot.plus][:, num_prefix_tokens:] + mixed

    return peer


def mixture_of_layers(plan: FusionPlan) -> Peer:
    """``sum over top-k of q * h``, per token: a stack, a gather of the chosen layers, a product and a sum."""
    (slot,) = plan.slots

    def peer(hidden_states: Sequence[Tensor], weights: SparseWeights, num_prefix_tokens: int) -> Tensor:
        values, indices = weights
        stacked = torch.stack([hidden_states[layer][:, num_prefix_tokens:] for (layer,) in slot.groups], dim=2)  # (B, N, L, D)
        chosen = stacked.gather(2, indices.long()[..., None].expand(*indices.shape, stacked.shape[-1]))  # (B, N, k, D)
        return (values.to(chosen.dtype)[..., None] * chosen).sum(dim=2)

    return peer


def mean_of_normalised_layers(plan: FusionPlan) -> Peer:
    """RAEv2's multi-layer sum: a norm without parameters of each layer, a stack, a mean (nanovisionx/RAEv2)."""
    (slot,) = plan.slots

    def peer(hidden_states: Sequence[Tensor], weights: None, num_prefix_tokens: int) -> Tensor:
        patches = [hidden_states[layer][:, num_prefix_tokens:] for layer in slot.layers]
        return torch.stack([F.layer_norm(patch, patch.shape[-1:]) for patch in patches]).mean(dim=0)

    return peer


MIXES = (
    Mix("DenseConnector DCI", FusionPlan.dense_connector_dci, dense_connector_dci, None, ("forward", "trainable")),
    Mix("MoL per token", FusionPlan.mixture_of_layers, mixture_of_layers, "sparse", ("forward", "frozen"), num_columns=3),
    Mix("TGIF", FusionPlan.tgif, tgif, "image", ("forward", "frozen")),
    Mix("s3prl weighted sum", FusionPlan.scalar_mix, s3prl_featurizer, "all", ("forward", "frozen")),
    Mix(
        "s3prl weighted sum, normalised",
        lambda num_layers: FusionPlan.scalar_mix(num_layers, norm=Norm("layer")),
        s3prl_featurizer,
        "all",
        ("forward", "frozen"),
    ),
    Mix(
        "mean of normalised layers",
        FusionPlan.mean_of_normalised_layers,
        mean_of_normalised_layers,
        None,
        ("forward", "trainable"),
    ),
    Mix("ScalarMix", FusionPlan.scalar_mix, allennlp_scalar_mix, "all", ("forward", "frozen")),
    Mix(
        "DenseConnector SCI",
        # the published layers of CLIP-L, and for a smaller tower the same thirds
        lambda num_layers: FusionPlan.dense_connector_sci(num_layers, layers=(num_layers // 3 - 1, 2 * num_layers // 3 - 1)),
        dense_connector_sci,
        None,
        ("forward",),
    ),
)
"""The most telling first."""


def layers(plan: FusionPlan) -> Peer:
    """``torch.cat`` of the layers, as transformers' VipLlava has it."""

    def peer(hidden_states: Sequence[Tensor], weights: None, num_prefix_tokens: int) -> Tensor:
        return torch.cat([hidden_states[slot.index][:, num_prefix_tokens:] for slot in plan.slots], dim=-1)

    return peer


MIXES_WITH_NORMS = (
    Mix("TGIF and its LayerNorm", FusionPlan.tgif, tgif, "image", ("forward", "frozen")),
    Mix(
        "VipLlava and its LayerNorm",
        # the published layers of CLIP-L, and some of a smaller tower
        lambda num_layers: FusionPlan.layers(num_layers, (-2, -5, -8, -11, 6) if num_layers > 10 else (-2, -1, 1)),
        layers,
        None,
        ("forward", "frozen"),
    ),
)
"""With a LayerNorm over the channels of the output behind the mix; the tower is frozen, norm and weights learn."""


def normalised_traffic(mix: Mix, tower: Tower, map_bytes: int, mode: str) -> Traffic:
    """The least traffic of a mix with its norm in the same pass, and of the backward as two passes."""
    program = mix.plan(tower.num_layers).program
    forward = normalised_forward_traffic(program, map_bytes, training=mode != "forward")
    if mode == "forward":
        return forward
    weights = mix.sharing is not None
    traffic = forward + norm_backward_traffic(program, map_bytes, mix=weights)
    return traffic + backward_traffic(program, map_bytes, weights=weights, states=False, saved_means=False)


def mix_traffic(mix: Mix, tower: Tower, map_bytes: int, mode: str) -> Traffic:
    """The least traffic of a mode. Of layers with sparse weights each token reads its k rows."""
    program = mix.plan(tower.num_layers).program
    forward = forward_traffic(program, map_bytes)
    if mix.sharing == "sparse":
        forward = Traffic(min(mix.num_columns, program.num_sources), forward.writes, map_bytes)
    if mode == "forward":
        return forward
    states, weights = mode == "trainable", mix.sharing is not None
    backward = backward_traffic(
        program, map_bytes, weights=weights, states=states, saved_means=False, token_ratio=tower.num_tokens / tower.num_patches
    )
    reads = backward.reads
    if mix.sharing == "sparse":
        mixed = sum(not isinstance(slot, CopySlot) for slot in program.slots)
        reads = mixed + forward.reads
    elif program.has_norms and not weights:  # dL/dh depends on the values
        reads += len({source for group in program.groups for source in group})
    return forward + Traffic(reads, backward.writes, map_bytes, backward.extra_bytes)


# ---- attention residuals: the same mix, with weights that the kernel makes itself ---------------------------------------


ATTN_RES_EPS = 1e-6


def attn_res_weights(states: Sequence[Tensor], query: Tensor, norm: Tensor) -> Tensor:
    """The weights (B, N, L) of attention residuals (arXiv 2603.15031): ``softmax_l(query · (rms_norm(h_l) * norm))``."""
    keys = [F.rms_norm(state, state.shape[-1:], norm, ATTN_RES_EPS) for state in states]
    return torch.stack([key @ query for key in keys], dim=-1).softmax(-1)


def attn_res_eager(states: Sequence[Tensor], query: Tensor, norm: Tensor) -> Tensor:
    """The formula in plain torch, as fla's ``naive_attnres`` and Liger's test write it: a stack, a norm, two contractions."""
    stacked = torch.stack(tuple(states)).float() if states[0].dtype != torch.float64 else torch.stack(tuple(states))
    keys = F.rms_norm(stacked, stacked.shape[-1:], norm.to(stacked.dtype), ATTN_RES_EPS)
    weights = torch.einsum("lbnd,d->lbn", keys, query.to(stacked.dtype)).softmax(0)
    return torch.einsum("lbn,lbnd->bnd", weights, stacked).to(states[0].dtype)


def fla_attn_res(states: Sequence[Tensor], query: Tensor, norm: Tensor) -> Tensor:
    """fla-org/flash-linear-attention, ``fla/ops/attnres/fused.py`` (read at bc3b101): one launch, each state read once."""
    from fla.ops.attnres import fused_attnres

    return fused_attnres(query, tuple(states), norm, rms_eps=ATTN_RES_EPS)


def liger_attn_res(states: Sequence[Tensor], query: Tensor, norm: Tensor) -> Tensor:
    """linkedin/Liger-Kernel, ``liger_kernel/ops/attn_res.py`` (at ead96b6): a stack, then one launch that reads it twice."""
    from liger_kernel.transformers.functional import liger_attn_res as attn_res

    return attn_res(list(states), query, norm, ATTN_RES_EPS)


@dataclass(frozen=True)
class PublicKernel:
    """A kernel of another project.

    Args:
        name: printed in tables.
        package: the module to import.
        function: states of (B, N, D), query (D,), norm (D,) to (B, N, D).
    """

    name: str
    package: str
    function: Callable[[Sequence[Tensor], Tensor, Tensor], Tensor]

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot run here; None if it can."""
        if importlib.util.find_spec(self.package) is None:
            return "not installed"
        return None if device.type == "cuda" else "needs a GPU"


PUBLIC_KERNELS = (
    PublicKernel("fla AttnRes", "fla", fla_attn_res),
    PublicKernel("Liger AttnRes", "liger_kernel", liger_attn_res),
)


def make_weights(mix: Mix, plan: FusionPlan, batch: int, num_patches: int, like: Tensor, generator: Any) -> Weights:
    """Random weights of a mix, with values that bfloat16 holds exactly: a softmax over the columns, float32."""
    if mix.sharing is None:
        return None
    columns = mix.num_columns if mix.sharing == "sparse" else plan.num_groups
    leading = {"all": (), "image": (batch,)}.get(mix.sharing, (batch, num_patches))
    values = torch.randn(*leading, columns, generator=generator, device=like.device).softmax(-1).bfloat16().float()
    if mix.sharing != "sparse":
        return values
    scores = torch.rand(*leading, plan.num_groups, generator=generator, device=like.device)
    return SparseWeights(values, scores.topk(columns, dim=-1).indices)
