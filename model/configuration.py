"""Configuration of the IGVA-LLaVA model: a vision tower, a fusion of its layers, a projector and a language model."""

from __future__ import annotations

import copy
from dataclasses import field
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from igva_kernels import FusionPlan
from igva_kernels.towers import num_prefix_tokens_of

_IGVA_DEFAULTS: dict[str, Any] = {
    "type": "igva",
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
    "streaming": "auto",
}
_LLAVA_DEFAULTS: dict[str, Any] = {"type": "llava", "layer": -2, "streaming": "auto"}
_FUSION_DEFAULTS = {"igva": _IGVA_DEFAULTS, "llava": _LLAVA_DEFAULTS}


class IgvaLlavaConfig(PreTrainedConfig):
    """Configuration of :class:`model.modeling.IgvaLlavaForConditionalGeneration`.

    Args:
        vision_config: config of the tower, as an object or a dict with ``model_type`` (default ``clip_vision_model``). Of a
            config that holds a vision part (CLIP, SigLIP) that part is taken.
        text_config: config of the causal language model, as an object or a dict with ``model_type`` (default ``llama``).
        fusion: which layers are mixed, and how; missing keys take their defaults, unknown keys are refused.

            ``{"type": "igva", "num_groups": 4, "groups": None, "base": -2, "order": "fused_first", "stage": 2, "summary":
            "cls", "text_dim": 768, "hidden_dim": 1024, "num_blocks": 4, "num_heads": 4, "streaming": "auto"}``: the plan as in
            :meth:`igva_kernels.FusionPlan.igva`; ``stage`` 1 is the plain average (the allocator is not run), 2 the weights of
            the instruction; ``text_dim`` is the width of the sentence embeddings (768 for all-mpnet-base-v2); the other sizes
            are those of :class:`igva_kernels.modules.WeightAllocator`.

            ``{"type": "llava", "layer": -2, "streaming": "auto"}``: one layer, as LLaVA-1.5.

            ``streaming`` says how the tower runs: layer by layer, where a frozen tower's groups are reduced as soon as they are
            complete and layers that the plan does not read are neither run nor held (``True``, which raises for towers that
            cannot), by its own ``forward``, which returns all hidden states (``False``), or the first where it can be done
            (``"auto"``, see :func:`igva_kernels.towers.unsupported_reason`). The result is the same.
        image_token_id: id of ``<image>`` in the tokenizer; every placeholder with it is overwritten by an image feature.
        image_size: side of the square images that the processor makes; by default the one that the tower was trained with.
        num_prefix_tokens: tokens before the patches; None takes it from the tower's model type. Needed for types that the
            library does not know.
        token_pooling: side of the square of fused tokens that is averaged before the projector; None for none, 2 leaves a
            quarter.
        projector_hidden_act: activation between the projector's two linear layers.
        projector_input_norm: LayerNorm before the projector. The slots of the fused map differ in scale; with few training
            steps the norms decide whether a projector trained from nothing learns anything.
        projector_output_norm: LayerNorm after the projector, which brings the features to the scale of word embeddings.
        balance_loss_weight: λ, the weight of the negative entropy of the fusion weights in the loss.
        legacy_double_softmax: take the entropy of ``softmax(weights)``, as the released code does (the weights are a softmax
            already, so that λ acts about 16 times weaker near uniform weights).
        tie_word_embeddings: taken from ``text_config`` where that ties.

    Raises:
        TypeError: ``fusion`` is no dict.
        ValueError: an unknown fusion type, key or stage, a tower whose prefix tokens are unknown, an image that the tower or
            the pooling cannot divide, a plan that does not fit the tower's depth.
    """

    model_type = "igva_llava"
    sub_configs: ClassVar[dict[str, Any]] = {"vision_config": AutoConfig, "text_config": AutoConfig}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "image_hidden_states", "fusion_weights"]

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    fusion: dict[str, Any] = field(default_factory=dict)
    image_token_id: int = 32000
    image_size: int = None  # type: ignore[assignment]  # filled in from the tower
    num_prefix_tokens: int = None  # type: ignore[assignment]  # filled in from the tower
    token_pooling: int | None = None
    projector_hidden_act: str = "gelu"
    projector_input_norm: bool = False
    projector_output_norm: bool = False
    balance_loss_weight: float = 0.0
    legacy_double_softmax: bool = False
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_config = _vision_part(_sub_config(self.vision_config, "clip_vision_model"))
        self.text_config = _sub_config(self.text_config, "llama")
        self.tie_word_embeddings = self.tie_word_embeddings or bool(getattr(self.text_config, "tie_word_embeddings", False))
        self.fusion = _complete_fusion(self.fusion)
        if self.num_prefix_tokens is None:
            self.num_prefix_tokens = num_prefix_tokens_of(self.vision_config)
        if self.image_size is None:
            self.image_size = _int_of(self.vision_config, "image_size")
        super().__post_init__(**kwargs)
        # Settings that contradict each other are refused here, and not in the first batch.
        self.fusion_plan()
        self.image_grid(self.image_size, self.image_size)
        if self.num_prefix_tokens == 0 and self.fusion.get("summary") == "cls":
            raise ValueError(
                f"a {self.vision_config.model_type!r} tower has no CLS token to summarise layers by; "
                "set fusion={'summary': 'mean_patch', ...}"
            )

    @property
    def patch_size(self) -> int:
        """Side of the tower's patches in pixels."""
        return _int_of(self.vision_config, "patch_size")

    @property
    def num_image_tokens(self) -> int:
        """Placeholders of one image of ``image_size``, after the token pooling."""
        rows, columns = self.image_grid(self.image_size, self.image_size)
        return rows * columns

    def image_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the image tokens of an image of ``height`` x ``width`` pixels.

        Raises:
            ValueError: the patches do not divide by ``token_pooling``, or there is not even one.
        """
        return image_grid(height, width, self.patch_size, self.token_pooling)

    def fusion_plan(self, stage: int | None = None) -> FusionPlan:
        """The plan of the configured fusion.

        Args:
            stage: 1 or 2 for IGVA; by default the configured one. Stage 1 with groups of unequal size has no plan of its own:
                it is the plan of stage 2 with the weights 1/K, which is what this returns.
        """
        num_layers = self.vision_config.num_hidden_layers
        fusion = self.fusion
        if fusion["type"] == "llava":
            return FusionPlan.llava(num_layers, layer=fusion["layer"])
        shape = {key: fusion[key] for key in ("num_groups", "groups", "base", "order")}
        plan = FusionPlan.igva(num_layers, **shape)
        if (fusion["stage"] if stage is None else stage) == 1 and _is_even_partition(plan.groups):
            return FusionPlan.igva_average(num_layers, **shape)
        return plan


def image_grid(height: int, width: int, patch_size: int, token_pooling: int | None) -> tuple[int, int]:
    """Rows and columns of the image tokens of an image of ``height`` x ``width`` pixels.

    Raises:
        ValueError: the patches do not divide by ``token_pooling``, or there is not even one.
    """
    rows, columns = height // patch_size, width // patch_size
    if rows < 1 or columns < 1:
        raise ValueError(f"an image of {height} x {width} pixels holds no patch of {patch_size} x {patch_size}")
    if token_pooling is None:
        return rows, columns
    if rows % token_pooling or columns % token_pooling:
        raise ValueError(
            f"token_pooling={token_pooling} does not divide the {rows} x {columns} patches of an image of {height} x {width} "
            f"pixels (patches of {patch_size}); choose an image_size that is a multiple of {patch_size * token_pooling}"
        )
    return rows // token_pooling, columns // token_pooling


def _sub_config(config: dict | PreTrainedConfig | None, default_type: str) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        # A composite config sets the attention of its parts to its own, which would reach into a loaded part.
        return copy.deepcopy(config)
    values = dict(config or {})
    model_type = values.pop("model_type", default_type)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"model_type {model_type!r} is not known to transformers; import the package that registers it first")
    return CONFIG_MAPPING[model_type](**values)


def _vision_part(config: PreTrainedConfig) -> PreTrainedConfig:
    part = getattr(config, "vision_config", None)
    return config if part is None else part


def _complete_fusion(fusion: dict | None) -> dict[str, Any]:
    if fusion is None:
        return dict(_IGVA_DEFAULTS)
    if not isinstance(fusion, dict):
        raise TypeError(f"fusion must be a dict such as {{'type': 'igva'}}, got {fusion!r}")
    kind = fusion.get("type", "igva")
    if kind not in _FUSION_DEFAULTS:
        raise ValueError(f"fusion type {kind!r} is unknown, expected one of {sorted(_FUSION_DEFAULTS)}")
    defaults = _FUSION_DEFAULTS[kind]
    if unknown := sorted(set(fusion) - set(defaults)):
        raise ValueError(f"fusion has the unknown keys {unknown}; type {kind!r} knows {sorted(defaults)}")
    complete = {**defaults, **fusion}
    if complete["streaming"] not in (True, False, "auto"):
        raise ValueError(f"fusion streaming must be True, False or 'auto', got {complete['streaming']!r}")
    if kind == "igva":
        check_stage(complete["stage"])
        if complete["summary"] not in ("cls", "mean_patch"):
            raise ValueError(f"fusion summary must be 'cls' or 'mean_patch', got {complete['summary']!r}")
        if complete["groups"] is not None:
            # Lists, as JSON gives them back, so that a config equals its reloaded self.
            complete["groups"] = [list(group) for group in complete["groups"]]
            complete["num_groups"] = len(complete["groups"])
    return complete


def check_stage(stage: int) -> None:
    """Raises ValueError unless ``stage`` is 1 or 2."""
    if stage not in (1, 2):
        raise ValueError(f"stage must be 1 (plain average) or 2 (weights of the instruction), got {stage!r}")


def _is_even_partition(groups: tuple[tuple[int, ...], ...]) -> bool:
    layers = [layer for group in groups for layer in group]
    return len({len(group) for group in groups}) == 1 and len(set(layers)) == len(layers)


def _int_of(config: PreTrainedConfig, name: str) -> int:
    value = getattr(config, name, None)
    if not isinstance(value, int):
        raise ValueError(f"the tower's config must give {name} as one int (square images and patches), got {value!r}")
    return value
