"""Configuration of the IGVA-LLaVA model: a vision tower, a fusion of its layers, a projector and a language model."""

from __future__ import annotations

import copy
from dataclasses import field
from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from igva_kernels import FusionPlan
from igva_kernels.towers import num_prefix_tokens_of
from model.fusions import Fusion, complete_options, make_fusion
from model.image_tokens import ImageTokens


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

            Other types, with their options in :mod:`model.fusions`: ``llava``, ``layers``, ``vip_llava``, ``dense_connector``
            (``variant`` ``dci``, ``sci`` or ``sti``), ``mmfuser``, ``tgif``, ``scalar_mix``, ``mixture_of_layers``,
            ``multi_layer_sum``. The projector's width and the number of image tokens follow from the type.

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
            the pooling cannot divide, a plan that does not fit the tower's depth, a pooling of tokens that are no map.
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
        self.fusion = complete_options(self.fusion)
        if self.num_prefix_tokens is None:
            self.num_prefix_tokens = num_prefix_tokens_of(self.vision_config)
        if self.image_size is None:
            self.image_size = _int_of(self.vision_config, "image_size")
        super().__post_init__(**kwargs)
        # Settings that contradict each other are refused here, and not in the first batch.
        self._check_tokens()
        if self.num_prefix_tokens == 0 and self.fusion.get("summary") == "cls":
            raise ValueError(
                f"a {self.vision_config.model_type!r} tower has no CLS token to summarise layers by; "
                "set fusion={'summary': 'mean_patch', ...}"
            )

    def _check_tokens(self) -> None:
        tokens = self.image_tokens
        if tokens.pooled_layers and self.token_pooling is not None:
            raise ValueError(
                f"token_pooling={self.token_pooling} averages squares of a map, but the tokens of DenseConnector STI are none; "
                "leave one of the two out"
            )
        tokens.count(self.image_size, self.image_size)

    @property
    def patch_size(self) -> int:
        """Side of the tower's patches in pixels."""
        return _int_of(self.vision_config, "patch_size")

    @property
    def image_tokens(self) -> ImageTokens:
        """How many tokens an image becomes."""
        fusion = self.make_fusion()
        return ImageTokens(self.patch_size, self.token_pooling, fusion.token_reduction, fusion.pooled_layers, fusion.strip)

    @property
    def num_image_tokens(self) -> int:
        """Placeholders of one image of ``image_size``."""
        return self.image_tokens.count(self.image_size, self.image_size)

    def make_fusion(self) -> Fusion:
        """The configured fusion for the configured tower; it has no parameters itself."""
        return make_fusion(self.fusion, self.vision_config.num_hidden_layers, self.vision_config.hidden_size)

    def fusion_plan(self, stage: int | None = None) -> FusionPlan:
        """The plan of the configured fusion.

        Args:
            stage: 1 or 2 for IGVA; by default the configured one. Stage 1 with groups of unequal size has no plan of its own:
                it is the plan of stage 2 with the weights 1/K, which is what this returns.
        """
        return self.make_fusion().plan(self.fusion.get("stage") if stage is None else stage)


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


def _int_of(config: PreTrainedConfig, name: str) -> int:
    value = getattr(config, name, None)
    if not isinstance(value, int):
        raise ValueError(f"the tower's config must give {name} as one int (square images and patches), got {value!r}")
    return value
