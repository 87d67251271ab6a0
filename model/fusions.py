"""The ways to fuse a tower's layers that a model can be configured with: one small class each, by name in :data:`FUSIONS`.

A class knows its options, which layers the tower must give, the module with its parameters (if it has any), how wide and how
many the fused tokens are, and whether it reads the instruction. All of them run on frozen towers layer by layer
(``streaming``): those that mix group means get the means, the others the layers that they name and no more.

Shapes: B images · N patches · N' fused tokens · D vision width · L blocks · K weights · S slots · E text width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.utils import logging

from igva_kernels import FusionPlan, GroupMeans, Norm, OutputNorm, SparseWeights, fuse, mix
from igva_kernels.modules import (
    IGVAFusion,
    MixtureOfLayersRouter,
    MMFuserFusion,
    MultiLayerSum,
    ScalarMix,
    SparseTokenIntegration,
    TGIFFusion,
    VipLlavaFusion,
    WeightAllocator,
)
from igva_kernels.modules.igva import sentence_of_each_image

logger = logging.get_logger(__name__)

Maps = GroupMeans | Sequence[Tensor | None]
"""What a tower gives: group means, or its L + 1 hidden states."""


@dataclass(frozen=True)
class FusionInputs:
    """What a fusion may read beside the tower's maps.

    Args:
        num_prefix_tokens: P; not read for group means.
        grid: rows and columns of the patches.
        stage: 1 or 2 for fusions with stages, else None.
        instruction_embeds, image_to_sentence: see :meth:`model.modeling.IgvaLlavaModel.get_image_features`.
        output_norm: the norm that follows, for fusions that take it into their pass; see :attr:`Fusion.takes_output_norm`.
    """

    num_prefix_tokens: int
    grid: tuple[int, int]
    stage: int | None = None
    instruction_embeds: Tensor | None = None
    image_to_sentence: Tensor | None = None
    output_norm: OutputNorm | None = None


class Fusion(ABC):
    """One way to fuse. Objects hold options and no parameters.

    Args:
        options: all options of the type, from :func:`complete_options`.
        num_layers: L of the tower.
        vision_dim: D.

    Attributes:
        has_stages: whether there is a plain average (stage 1) beside the learned weights (stage 2).
        takes_output_norm: whether the fused map leaves one pass over the layers, which can normalise it as well.
        pooled_layers, strip, token_reduction: see :class:`model.image_tokens.ImageTokens`.

    Raises:
        TypeError, ValueError: layers that the tower does not have, or options that do not fit each other.
    """

    has_stages: ClassVar[bool] = False
    takes_output_norm: bool = False
    pooled_layers: int = 0
    strip: int = 8
    token_reduction: int | None = None

    def __init__(self, options: Mapping[str, Any], num_layers: int, vision_dim: int) -> None:
        self.options, self.num_layers, self.vision_dim = options, num_layers, vision_dim
        self._plan = self._make_plan()
        self._layers_read = FusionPlan.layers(num_layers, self._plan.sources)

    @classmethod
    @abstractmethod
    def defaults(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options that the type knows, with their defaults; ``options`` are those given, which may decide."""

    @classmethod
    def check(cls, options: dict[str, Any]) -> None:
        """Refuse values that no tower could make right; ValueError names option and choices. Here: none."""
        return

    @abstractmethod
    def _make_plan(self) -> FusionPlan: ...

    def plan(self, stage: int | None = None) -> FusionPlan:
        """What is mixed how; for fusions that are no mix, the layers that they read."""
        return self._plan

    def tower_plan(self, stage: int | None = None) -> FusionPlan:
        """What the tower must give: group means of this plan, or the hidden states that it reads."""
        return self._layers_read

    @property
    def width(self) -> int:
        """Channels of a fused token."""
        return self._plan.num_slots * self.vision_dim

    def reads_instruction(self, stage: int | None = None) -> bool:
        """Whether the fusion depends on ``instruction_embeds``."""
        return False

    def make_module(self) -> nn.Module | None:
        """The module that holds the parameters, newly initialised; None where there are none."""
        return None

    @abstractmethod
    def __call__(self, module: Any, maps: Maps, inputs: FusionInputs) -> tuple[Tensor, Tensor | None]:
        """Fuse.

        Args:
            module: that of :meth:`make_module`, None where there is none.
            maps: of :meth:`tower_plan`.
            inputs: the rest.

        Returns:
            (B, N', width), and the weights (B, K) in float32 where the instruction gives weights, else None.
        """

    def _states(self, maps: Maps, inputs: FusionInputs) -> tuple[Sequence[Tensor | None], int]:
        """L + 1 hidden states and their prefix tokens; what a streaming tower kept has lost its prefix already."""
        if not isinstance(maps, GroupMeans):
            return maps, inputs.num_prefix_tokens
        states: list[Tensor | None] = [None] * (self.num_layers + 1)
        for layer, state in zip(self._layers_read.sources, maps.copies, strict=True):
            states[layer] = state
        return states, 0


class PlainMix(Fusion):
    """A plan without weights: layers and means beside each other."""

    takes_output_norm = True

    def tower_plan(self, stage: int | None = None) -> FusionPlan:
        return self._plan

    def __call__(self, module: Any, maps: Maps, inputs: FusionInputs) -> tuple[Tensor, Tensor | None]:
        return _mix(maps, self._plan, inputs), None


class Llava(PlainMix):
    """LLaVA-1.5: one layer (arXiv 2310.03744)."""

    @classmethod
    def defaults(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"layer": -2}

    def _make_plan(self) -> FusionPlan:
        return FusionPlan.llava(self.num_layers, layer=self.options["layer"])


class Layers(PlainMix):
    """Layers beside each other on the channels: transformers' ``vision_feature_layer`` as a list."""

    @classmethod
    def defaults(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"layers": None}

    @classmethod
    def check(cls, options: dict[str, Any]) -> None:
        if not options["layers"]:
            raise ValueError("fusion type 'layers' needs layers, for instance {'type': 'layers', 'layers': [-2, -5]}")

    def _make_plan(self) -> FusionPlan:
        return FusionPlan.layers(self.num_layers, self.options["layers"])


class Igva(Fusion):
    """Instruction-guided fusion (arXiv 2501.08443), and its plain average in stage 1."""

    has_stages = True
    takes_output_norm = True

    @classmethod
    def defaults(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "num_groups": 4,
            "groups": None,
            "base": -2,
            "order": "fused_first",
            "stage": 2,
            "summary": "cls",
            "text_dim": 768,
            "hidden_dim": 1024,
            "num_blocks": 4,
            "num_heads": 4,
        }

    @classmethod
    def check(cls, options: dict[str, Any]) -> None:
        check_stage(options["stage"])
        _check_choice("summary", options["summary"], ("cls", "mean_patch"))
        if options["groups"] is not None:
            options["num_groups"] = len(options["groups"])

    def _make_plan(self) -> FusionPlan:
        shape = {key: self.options[key] for key in ("num_groups", "groups", "base", "order")}
        plan = FusionPlan.igva(self.num_layers, **shape)
        # Groups of unequal size have no plan of stage 1: there it is the plan of stage 2 with the weights 1/K.
        self._average = FusionPlan.igva_average(self.num_layers, **shape) if _is_even_partition(plan.groups) else plan
        return plan

    def plan(self, stage: int | None = None) -> FusionPlan:
        return self._average if stage == 1 else self._plan

    def tower_plan(self, stage: int | None = None) -> FusionPlan:
        return self.plan(stage)

    def reads_instruction(self, stage: int | None = None) -> bool:
        return stage == 2

    def make_module(self) -> nn.Module:
        sizes = {name: self.options[name] for name in ("text_dim", "hidden_dim", "num_blocks", "num_heads")}
        allocator = WeightAllocator(num_groups=self._plan.num_groups, vision_dim=self.vision_dim, **sizes)
        return IGVAFusion(self._plan, allocator, summary=self.options["summary"])

    def __call__(self, module: Any, maps: Maps, inputs: FusionInputs) -> tuple[Tensor, Tensor | None]:
        plan = self.plan(inputs.stage)
        common = {"num_prefix_tokens": inputs.num_prefix_tokens, "output_norm": inputs.output_norm}
        if not plan.num_groups:
            return _mix(maps, plan, inputs), None
        if inputs.stage == 1:
            return module(maps, None, **common).fused, None
        if inputs.instruction_embeds is None:
            _warn_without_instruction()
        return module(
            maps,
            inputs.instruction_embeds,
            image_to_sentence=inputs.image_to_sentence,
            **common,
        )


class DenseConnector(Fusion):
    """DenseConnector (arXiv 2405.13800): ``dci`` means of layers, ``sci`` layers, ``sti`` pooled tokens of layers."""

    @classmethod
    def defaults(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        variant = options.get("variant", "dci")
        _check_choice("variant", variant, ("sti", "sci", "dci"))
        if variant == "sti":
            return {"variant": "dci", "layers": [7, 15], "base": -2, "strip": 8}
        channels = {"layers": [7, 15]} if variant == "sci" else {"num_groups": 2, "groups": None}
        return {"variant": "dci", **channels, "base": -2, "order": "base_first", "token_reduction": None}

    @classmethod
    def check(cls, options: dict[str, Any]) -> None:
        reduction = options.get("token_reduction")
        if reduction is not None and (not isinstance(reduction, int) or reduction < 1):
            raise ValueError(f"fusion token_reduction must be None or an int of at least 1, got {reduction!r}")

    def _make_plan(self) -> FusionPlan:
        options, variant = self.options, self.options["variant"]
        self.takes_output_norm = variant != "sti"
        self.token_reduction = options.get("token_reduction")
        if variant == "sti":
            self._integration = SparseTokenIntegration(
                self.num_layers, layers=options["layers"], base=options["base"], strip=options["strip"]
            )
            self.pooled_layers, self.strip = len(options["layers"]), options["strip"]
            return self._integration.plan
        if variant == "sci":
            return FusionPlan.dense_connector_sci(
                self.num_layers, layers=options["layers"], base=options["base"], order=options["order"]
            )
        shape = {key: options[key] for key in ("num_groups", "groups", "base", "order")}
        return FusionPlan.dense_connector_dci(self.num_layers, **shape)

    def tower_plan(self, stage: int | None = None) -> FusionPlan:
        return self._layers_read if self.pooled_layers else self._plan

    @property
    def width(self) -> int:
        return self.vision_dim if self.pooled_layers else super().width

    def __call__(self, module: Any, maps: Maps, inputs: FusionInputs) -> tuple[Tensor, Tensor | None]:
        if not self.pooled_layers:
            return _mix(maps, self._plan, inputs), None
        states, num_prefix_tokens = self._states(maps, inputs)
        return self._integration(states, num_prefix_tokens=num_prefix_tokens), None


class MMFuser(Fusion):
    """MMFuser (arXiv 2410.11829): the last layer looks detail up in the others by deformable attention."""

    @classmethod
    def defaults(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"layers": [-22, -17, -12, -7, -2], "num_heads": 16, "num_points": 4}

    def _make_plan(self) -> FusionPlan:
        return FusionPlan.layers(self.num_layers, self.options["layers"])

    @property
    def width(self) -> int:
        return self.vision_dim

    def make_module(self) -> nn.Module:
        sizes = {name: self.options[name] for name in ("num_heads", "num_points")}
        return MMFuserFusion(self.options["layers"], self.vision_dim, num_layers=self.num_layers, **sizes)

    def __call__(self, module: Any, maps: Maps, inputs: FusionInputs) -> tuple[Tensor, Tensor | None]:
        states, num_prefix_tokens = self._states(maps, inputs)
        return module(states, num_prefix_tokens=num_prefix_tokens, grid=inputs.grid), None


class Tgif(Fusion):
    """TGIF (arXiv 2601.03100): the text weighs every layer. Its official text vector is the mean of the language model's token
    embeddings; here it is ``instruction_embeds``, of width ``text_dim``."""

    @classmethod
    def defaults(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"base": -2, "text_dim": 768, "router_dim": 512}

    def _make_plan(self) -> FusionPlan:
        return FusionPlan.tgif(self.num_layers, base=self.options["base"])

    def reads_instruction(self, stage: int | None = None) -> bool:
        return True

    def make_module(self) -> nn.Module:
        return TGIFFusion(self._plan, self.vision_dim, self.options["text_dim"], self.options["router_dim"])

    def __call__(self, module: Any, maps: Maps, inputs: FusionInputs) -> tuple[Tensor, Tensor | None]:
        states, num_prefix_tokens = self._states(maps, inputs)
        text = _text_of_each_image(states, inputs)
        if text is None:
            weights = _equal_weights(states, self._plan)
            return module.mix(states, weights, num_prefix_tokens=num_prefix_tokens), weights
        return module(states, text, num_prefix_tokens=num_prefix_tokens)


class MixtureOfLayers(Fusion):
    """MoL (arXiv 2610.09440): each token takes the few layers that the text asks for. The weights that it reports are the
    router's probabilities before the top-k, averaged over the tokens."""

    takes_output_norm = True

    @classmethod
    def defaults(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "layers": None,
            "level": "hybrid",
            "top_k": 2,
            "key_dim": None,
            "reserve": -2,
            "temperature": 1.0,
            "text_dim": 768,
        }

    @classmethod
    def check(cls, options: dict[str, Any]) -> None:
        _check_choice("level", options["level"], ("layer", "patch", "hybrid"))

    def _make_plan(self) -> FusionPlan:
        return FusionPlan.mixture_of_layers(self.num_layers, layers=self.options["layers"])

    def reads_instruction(self, stage: int | None = None) -> bool:
        return True

    def make_module(self) -> nn.Module:
        options = {name: self.options[name] for name in ("level", "top_k", "key_dim", "reserve", "temperature")}
        return MixtureOfLayersRouter(self._plan, self.vision_dim, self.options["text_dim"], **options)

    def __call__(self, module: Any, maps: Maps, inputs: FusionInputs) -> tuple[Tensor, Tensor | None]:
        states, num_prefix_tokens = self._states(maps, inputs)
        text = _text_of_each_image(states, inputs)
        if text is None:
            weights = _equal_weights(states, self._plan)
            return self._fuse(states, weights, num_prefix_tokens, inputs), weights
        routing = module(states, text, num_prefix_tokens=num_prefix_tokens)
        fused = self._fuse(states, routing.weights, num_prefix_tokens, inputs)
        probabilities = routing.probabilities
        return fused, probabilities.mean(dim=1) if probabilities.ndim == 3 else probabilities

    def _fuse(
        self,
        states: Sequence[Tensor | None],
        weights: Tensor | SparseWeights,
        num_prefix_tokens: int,
        inputs: FusionInputs,
    ) -> Tensor:
        return fuse(states, self._plan, weights, num_prefix_tokens=num_prefix_tokens, output_norm=inputs.output_norm)


class LearnedMix(Fusion):
    """A module over the hidden states that reads no text."""

    def __call__(self, module: Any, maps: Maps, inputs: FusionInputs) -> tuple[Tensor, Tensor | None]:
        states, num_prefix_tokens = self._states(maps, inputs)
        return module(states, num_prefix_tokens=num_prefix_tokens), None


class GlobalScalarMix(LearnedMix):
    """ELMo's scalar mix (arXiv 1802.05365), SUPERB's featurizer with ``scale: false`` (arXiv 2105.01051)."""

    takes_output_norm = True

    @classmethod
    def defaults(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"layers": None, "norm": None, "scale": True}

    @classmethod
    def check(cls, options: dict[str, Any]) -> None:
        _check_choice("norm", options["norm"], (None, "layer", "rms"))

    def _make_plan(self) -> FusionPlan:
        return FusionPlan.scalar_mix(self.num_layers, layers=self.options["layers"], norm=_norm(self.options["norm"]))

    def make_module(self) -> nn.Module:
        return ScalarMix(self._plan, scale=self.options["scale"])

    def __call__(self, module: Any, maps: Maps, inputs: FusionInputs) -> tuple[Tensor, Tensor | None]:
        states, num_prefix_tokens = self._states(maps, inputs)
        return module(states, num_prefix_tokens=num_prefix_tokens, output_norm=inputs.output_norm), None


class VipLlava(LearnedMix):
    """VipLlava (arXiv 2312.00784): five layers and a LayerNorm over all of them."""

    @classmethod
    def defaults(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"layers": [-2, -5, -8, -11, 6], "eps": 1e-5}

    def _make_plan(self) -> FusionPlan:
        return FusionPlan.layers(self.num_layers, self.options["layers"])

    def make_module(self) -> nn.Module:
        return VipLlavaFusion(self._plan, self.vision_dim, eps=self.options["eps"])


class NormalisedSum(Fusion):
    """RAEv2's multi-layer sum (arXiv 2605.18324): a mean of normalised layers, and the mean patch of the last."""

    @classmethod
    def defaults(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"layers": None, "norm": "layer"}

    @classmethod
    def check(cls, options: dict[str, Any]) -> None:
        _check_choice("norm", options["norm"], ("layer", "rms"))

    def _make_plan(self) -> FusionPlan:
        options = self.options
        plan = FusionPlan.mean_of_normalised_layers(self.num_layers, layers=options["layers"], norm=_norm(options["norm"]))
        self._sum = MultiLayerSum(plan)
        return plan

    def __call__(self, module: Any, maps: Maps, inputs: FusionInputs) -> tuple[Tensor, Tensor | None]:
        states, num_prefix_tokens = self._states(maps, inputs)
        return self._sum(states, num_prefix_tokens=num_prefix_tokens), None


FUSIONS: dict[str, type[Fusion]] = {
    "dense_connector": DenseConnector,
    "igva": Igva,
    "layers": Layers,
    "llava": Llava,
    "mixture_of_layers": MixtureOfLayers,
    "mmfuser": MMFuser,
    "multi_layer_sum": NormalisedSum,
    "scalar_mix": GlobalScalarMix,
    "tgif": Tgif,
    "vip_llava": VipLlava,
}
"""Every fusion type by the name that a config gives."""


def complete_options(fusion: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options of a fusion with defaults filled in, as JSON gives them back: lists, no tuples.

    Args:
        fusion: ``{"type": ..., option: value, ...}``; None or no type for ``"igva"``. Every type has the option ``streaming``.

    Raises:
        TypeError: no dict.
        ValueError: an unknown type or option, or a value that is none of the choices; the text lists what there is.
    """
    given = {} if fusion is None else fusion
    if not isinstance(given, Mapping):
        raise TypeError(f"fusion must be a dict such as {{'type': 'igva'}}, got {fusion!r}")
    name = given.get("type", "igva")
    kind = fusion_class(name)
    defaults = {"type": name, **kind.defaults(given), "streaming": "auto"}
    if unknown := sorted(set(given) - set(defaults)):
        what = f"type {name!r}" + (f", variant {given['variant']!r}," if "variant" in given else "")
        raise ValueError(f"fusion has the unknown keys {unknown}; {what} knows {sorted(defaults)}")
    complete = {key: _as_json(value) for key, value in {**defaults, **given}.items()}
    _check_choice("streaming", complete["streaming"], (True, False, "auto"))
    kind.check(complete)
    return complete


def fusion_class(name: str) -> type[Fusion]:
    """The class of a type.

    Raises:
        ValueError: an unknown name; the text lists all.
    """
    if name not in FUSIONS:
        raise ValueError(f"fusion type {name!r} is unknown, expected one of {sorted(FUSIONS)}")
    return FUSIONS[name]


def takes_text(fusion: Mapping[str, Any] | None) -> bool:
    """Whether a fusion has a part that reads text embeddings, and so the option ``text_dim``."""
    given = fusion or {}
    return "text_dim" in fusion_class(given.get("type", "igva")).defaults(given)


def make_fusion(options: Mapping[str, Any], num_layers: int, vision_dim: int) -> Fusion:
    """The fusion of complete options; arguments and Raises as for :class:`Fusion`."""
    return fusion_class(options["type"])(options, num_layers, vision_dim)


def check_stage(stage: int) -> None:
    """Raises ValueError unless ``stage`` is 1 or 2."""
    if stage not in (1, 2):
        raise ValueError(f"stage must be 1 (plain average) or 2 (weights of the instruction), got {stage!r}")


def _mix(maps: Maps, plan: FusionPlan, inputs: FusionInputs) -> Tensor:
    if isinstance(maps, GroupMeans):
        return mix(maps, plan, output_norm=inputs.output_norm)
    return fuse(maps, plan, num_prefix_tokens=inputs.num_prefix_tokens, output_norm=inputs.output_norm)


def _text_of_each_image(states: Sequence[Tensor | None], inputs: FusionInputs) -> Tensor | None:
    if inputs.instruction_embeds is None and inputs.image_to_sentence is None:
        _warn_without_instruction()
        return None
    if inputs.image_to_sentence is None:
        return inputs.instruction_embeds
    return sentence_of_each_image(inputs.instruction_embeds, inputs.image_to_sentence, len(_first(states)))


def _equal_weights(states: Sequence[Tensor | None], plan: FusionPlan) -> Tensor:
    state = _first(states)
    wide = torch.promote_types(state.dtype, torch.float32)
    return state.new_full((len(state), plan.num_groups), 1 / plan.num_groups, dtype=wide)


def _first(states: Sequence[Tensor | None]) -> Tensor:
    return next(state for state in states if state is not None)


def _warn_without_instruction() -> None:
    logger.warning_once(
        "No instruction_embeds given: every group of layers gets the same weight, as in stage 1. "
        "Pass instruction_embeds (one per image) to let the instruction choose."
    )


def _norm(name: str | None) -> Norm | None:
    return None if name is None else Norm(name)  # type: ignore[arg-type]  # checked among the choices


def _is_even_partition(groups: tuple[tuple[int, ...], ...]) -> bool:
    layers = [layer for group in groups for layer in group]
    return len({len(group) for group in groups}) == 1 and len(set(layers)) == len(layers)


def _check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise ValueError(f"fusion {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _as_json(value: Any) -> Any:
    return [_as_json(entry) for entry in value] if isinstance(value, (list, tuple)) else value
