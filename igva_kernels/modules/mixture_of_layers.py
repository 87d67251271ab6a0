"""MoL: which few layers does this token need, given the text?"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from igva_kernels.checks import select_states
from igva_kernels.functional import HiddenStates, Implementation, SparseWeights, group_summaries
from igva_kernels.plan import FusionPlan
from igva_kernels.slots import resolve_layer

RoutingLevel = Literal["layer", "patch", "hybrid"]


class MixtureOfLayersRouting(NamedTuple):
    """Args:
    weights: what :func:`igva_kernels.fuse` takes: values (B, N, k) in float32 and their columns, k = top_k, or top_k + 1 with
        the reserve layer last.
    probabilities: before the top-k, for a load-balancing loss: (B, K) of the image (``"layer"``), or (B, N, K).
    reserve_gates: (B, N), the share of the reserve layer; None unless ``"hybrid"``.
    """

    weights: SparseWeights
    probabilities: Tensor
    reserve_gates: Tensor | None


class MixtureOfLayersRouter(nn.Module):
    """Per-token weights of the few layers that the text asks for (MoL, arXiv 2610.09440).

    With q = W_Q t of the text, k = W_K h of a token and s[n, l] = q·k[n, l] / (sqrt(d) * temperature):

    * ``"layer"``: p = softmax_l of the mean token's scores; top-k, renormalised; the same for all tokens of an image.
    * ``"patch"``: p[n] = softmax_l(s[n]); top-k of each token, renormalised.
    * ``"hybrid"``: q[n] is proportional to p_image^(1 - b) * p_patch[n]^b with b = sigmoid(w·t + c); top-k, renormalised,
      times 1 - g[n]; and the reserve layer with the weight g[n] = sigmoid(w_d * KL(p_patch[n] || p_image) + b_d). An entry of
      the top-k may name the reserve layer too: the two add up.

    The authors' code is not published: the parameter names and the initialisation (blend and gate at 1/2) are ours. The text
    vector must come from an encoder that is aligned with the tower (CLIP's text tower for CLIP). Keys are never made: s needs
    only h·(W_K^T q), one product a layer over states that are not copied; it is rounded to their dtype.

    Args:
        plan: :meth:`FusionPlan.mixture_of_layers`: groups of one layer each, un-normalised.
        vision_dim: D.
        text_dim: width of the text vector; 768 for CLIP-L.
        level: see above.
        top_k: layers a token; the paper tries 1 to 4.
        key_dim: d; None for ``vision_dim``.
        reserve: for ``"hybrid"``, one of the plan's layers.
        temperature: of the softmaxes; the paper anneals it from 2 to 1 by setting the attribute.
        impl: as for :func:`igva_kernels.fuse`, for the mean tokens of ``"layer"``.

    Raises:
        ValueError: an unknown ``level``, ``top_k`` outside 1 .. K, a plan whose groups are not single layers, or a reserve
            layer that is none of them.
    """

    def __init__(
        self,
        plan: FusionPlan,
        vision_dim: int = 1024,
        text_dim: int = 768,
        *,
        level: RoutingLevel = "hybrid",
        top_k: int = 2,
        key_dim: int | None = None,
        reserve: int = -2,
        temperature: float = 1.0,
        impl: Implementation = "auto",
    ) -> None:
        super().__init__()
        if level not in get_args(RoutingLevel):
            raise ValueError(f"level must be one of {', '.join(map(repr, get_args(RoutingLevel)))}, got {level!r}")
        if plan.program.has_norms or not plan.groups or any(len(group) > 1 for group in plan.groups):
            raise ValueError(
                f"the router scores single, un-normalised layers, but the plan has the slots {plan.slots}; "
                "use FusionPlan.mixture_of_layers(...)"
            )
        if not 1 <= top_k <= plan.num_groups:
            raise ValueError(f"top_k must be 1 .. {plan.num_groups}, the layers of the plan, got {top_k}")
        self.plan, self.level, self.top_k, self.impl = plan, level, top_k, impl
        self.temperature = temperature
        key_dim = vision_dim if key_dim is None else key_dim
        self.query = nn.Linear(text_dim, key_dim, bias=False)
        # Not a Linear: it is never called, and a sharding wrapper gathers only what the module that runs holds itself.
        self.key_weight = nn.Parameter(torch.empty(key_dim, vision_dim))
        if level == "hybrid":
            self.reserve_column = self._column_of(reserve)
            self.blend = nn.Linear(text_dim, 1)
            self.reserve_gate = nn.Linear(1, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Keys as those of a Linear, the gates at 1/2; the query's Linear resets itself."""
        nn.init.kaiming_uniform_(self.key_weight, a=5**0.5)
        if self.level == "hybrid":
            for gate in (self.blend, self.reserve_gate):
                nn.init.zeros_(gate.weight)
                nn.init.zeros_(gate.bias)

    def _column_of(self, reserve: int) -> int:
        layer = resolve_layer(reserve, self.plan.num_layers, "reserve")
        if (layer,) not in self.plan.groups:
            raise ValueError(
                f"reserve: layer {layer} is none of the plan's layers {[group[0] for group in self.plan.groups]}; "
                "add it to FusionPlan.mixture_of_layers(layers=...)"
            )
        return self.plan.groups.index((layer,))

    def forward(self, hidden_states: HiddenStates, text_embeds: Tensor, *, num_prefix_tokens: int) -> MixtureOfLayersRouting:
        """Route.

        Args:
            hidden_states: as for :func:`igva_kernels.fuse`; the layers of the plan are read.
            text_embeds: (B, text_dim), one vector an image; cast to the dtype of the parameters.
            num_prefix_tokens: P; prefix tokens are neither scored nor averaged.

        Raises:
            ValueError: as :func:`igva_kernels.fuse`; ``text_embeds`` of another shape.
        """
        if text_embeds.ndim != 2 or text_embeds.shape[1] != self.query.in_features:
            raise ValueError(
                f"text_embeds has the shape {tuple(text_embeds.shape)}, expected (B, {self.query.in_features}): "
                "one vector for each image"
            )
        text_embeds = text_embeds.to(self.query.weight.dtype)
        states = select_states(hidden_states, self.plan, [group[0] for group in self.plan.groups], num_prefix_tokens)
        # q·(W_K h) = (W_K^T q)·h
        direction = self.query(text_embeds) @ self.key_weight / self.key_weight.shape[0] ** 0.5  # (B, D)
        if self.level == "layer":
            means = group_summaries(
                hidden_states, self.plan, num_prefix_tokens=num_prefix_tokens, summary="mean_patch", impl=self.impl
            )
            return self._route_image(means, direction, states[0].shape[1] - num_prefix_tokens)
        vector = direction.to(states[0].dtype).unsqueeze(-1)
        scores = torch.cat([state[:, num_prefix_tokens:] @ vector for state in states], dim=-1)  # (B, N, K)
        scores = _wide(scores) / self.temperature
        of_patch = scores.log_softmax(-1)
        if self.level == "patch":
            return MixtureOfLayersRouting(SparseWeights(*_renormalised_top(of_patch, self.top_k)), of_patch.exp(), None)
        # The mean token's scores are the mean of the scores: they are linear in the token.
        of_image = scores.mean(dim=1, keepdim=True).log_softmax(-1)
        return self._route_hybrid(of_patch, of_image, text_embeds)

    def _route_image(self, means: Tensor, direction: Tensor, num_patches: int) -> MixtureOfLayersRouting:
        scores = _wide((means.to(direction.dtype) * direction.unsqueeze(1)).sum(-1)) / self.temperature
        of_image = scores.log_softmax(-1)  # (B, K)
        of_token = [part.unsqueeze(1).repeat(1, num_patches, 1) for part in _renormalised_top(of_image, self.top_k)]
        return MixtureOfLayersRouting(SparseWeights(*of_token), of_image.exp(), None)

    def _route_hybrid(self, of_patch: Tensor, of_image: Tensor, text_embeds: Tensor) -> MixtureOfLayersRouting:
        """From log probabilities (B, N, K) and (B, 1, K)."""
        share = _wide(self.blend(text_embeds)).sigmoid().unsqueeze(-1)  # (B, 1, 1)
        blended = ((1 - share) * of_image + share * of_patch).log_softmax(-1)
        values, columns = _renormalised_top(blended, self.top_k)
        divergence = functional.kl_div(of_image.expand_as(of_patch), of_patch, reduction="none", log_target=True)
        divergence = divergence.sum(-1, keepdim=True)  # (B, N, 1), KL(p_patch || p_image)
        gates = _wide(self.reserve_gate(divergence.to(self.reserve_gate.weight.dtype))).sigmoid()
        values = torch.cat([(1 - gates) * values, gates], dim=-1)
        columns = torch.cat([columns, torch.full_like(columns[..., :1], self.reserve_column)], dim=-1)
        return MixtureOfLayersRouting(SparseWeights(values, columns), blended.exp(), gates.squeeze(-1))

    def extra_repr(self) -> str:
        return f"level={self.level!r}, top_k={self.top_k}, num_layers={self.plan.num_layers}"


def _renormalised_top(log_probabilities: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The k largest and their columns; the softmax of log probabilities is their renormalisation."""
    values, columns = log_probabilities.topk(top_k, dim=-1)
    return values.softmax(-1), columns


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
