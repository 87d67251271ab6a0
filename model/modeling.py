"""IGVA-LLaVA in transformers' native form: vision tower → fused layers → projector → language model.

Shapes: B images · T tokens with prefix · P prefix tokens · N = T − P patches · D vision width · K groups · S slots · E sentence
width · H LLM width; a batch of texts is (rows, length), and one row may hold any number of images.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.utils import logging, torch_compilable_check
from transformers.utils.generic import can_return_tuple

from igva_kernels import FusionPlan, OutputNorm
from igva_kernels.modules import MixtureOfLayersRouter, MMFuserFusion, ScalarMix, output_norm_of, reduce_tokens
from igva_kernels.towers import selected_hidden_states, stream_group_means, unsupported_reason
from model.configuration import IgvaLlavaConfig
from model.cross_entropy import LanguageModelHead
from model.fusions import FusionInputs, Maps, check_stage
from model.loss import token_exact_loss
from model.quantization import only_language_model

logger = logging.get_logger(__name__)

#: What only the first step of generate() reads: later steps see the images through the cache.
_IMAGE_INPUTS = ("pixel_values", "instruction_embeds", "image_to_sentence", "mm_encoder_outputs", "image_to_sample")


#: What tells attention where the samples of packed rows begin, beside position ids that restart: transformers' names.
_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


#: Fusion modules whose parameters do not begin as those of the linear layers in them. Modules without parameters of their own
#: cannot stand here: transformers passes them over.
_FUSION_PARTS = (MixtureOfLayersRouter, MMFuserFusion, ScalarMix)


@dataclass
class IgvaLlavaImageFeatures(BaseModelOutputWithPooling):
    """Image features; ``pooler_output`` is where generate() of transformers looks for them.

    Args:
        pooler_output: (B, N', H), the projected tokens; N' is what :class:`model.image_tokens.ImageTokens` counts.
        fusion_weights: (B, K) in float32; None where the instruction gave none (stage 1, or a fusion that does not read it).
    """

    fusion_weights: Tensor | None = None


@dataclass
class IgvaLlavaModelOutput(BaseModelOutputWithPast):
    """Args:
    image_hidden_states: (B, N', H), the projected image tokens; None without images.
    fusion_weights: as in :class:`IgvaLlavaOutput`.
    """

    image_hidden_states: Tensor | None = None
    fusion_weights: Tensor | None = None


@dataclass
class IgvaLlavaOutput(ModelOutput):
    """Args:
    loss: scalar; None without labels.
    logits: (rows, kept positions, vocabulary); None with labels unless ``return_logits`` is given.
    past_key_values: the cache.
    hidden_states, attentions: those of the language model, where asked for.
    image_hidden_states: (B, N', H), the projected image tokens; None without images.
    fusion_weights: (B, K) in float32, the weight of each group for each image; None without images (in training B is 0
        then), in stage 1 and for fusions that do not read the instruction.
    cross_entropy, balance: the parts of the loss, without gradient; see :class:`model.loss.TokenExactLoss`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    image_hidden_states: Tensor | None = None
    fusion_weights: Tensor | None = None
    cross_entropy: Tensor | None = None
    balance: Tensor | None = None


class IgvaLlavaProjector(nn.Module):
    """Linear–activation–Linear from the C channels of the fused tokens to the H of the language model, norms at will.

    The linear layers have the names of transformers' Llava projector.
    """

    def __init__(self, config: IgvaLlavaConfig) -> None:
        super().__init__()
        in_dim = config.make_fusion().width
        out_dim = config.text_config.hidden_size
        self.input_norm = nn.LayerNorm(in_dim) if config.projector_input_norm else nn.Identity()
        self.linear_1 = nn.Linear(in_dim, out_dim)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(out_dim, out_dim)
        self.output_norm = nn.LayerNorm(out_dim) if config.projector_output_norm else nn.Identity()

    def forward(self, fused: Tensor, *, normalised: bool = False) -> Tensor:
        """(B, N', C) to (B, N', H), in the dtype of the projector.

        Args:
            normalised: the input norm has been applied, by the pass that fused the tokens.
        """
        hidden = fused.to(self.linear_1.weight.dtype)
        hidden = hidden if normalised else self.input_norm(hidden)
        return self.output_norm(self.linear_2(self.act(self.linear_1(hidden))))


class IgvaLlavaPreTrainedModel(PreTrainedModel):
    """What both models share: config class, attention back ends, initialisation."""

    config: IgvaLlavaConfig
    config_class = IgvaLlavaConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ("past_key_values",)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(cls, *args: Any, quantization_config: Any = None, **kwargs: Any) -> Any:
        """As in transformers; a ``quantization_config`` reaches the language model alone (:mod:`model.quantization`).

        Raises:
            ValueError: a kind of quantisation that cannot leave modules out.
        """
        if quantization_config is not None:
            kwargs["quantization_config"] = only_language_model(quantization_config)
        return super().from_pretrained(*args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise one of our own modules; the tower and the language model initialise themselves.

        Allocator and projector start as torch starts them, which is how the official modules start. transformers calls this
        under a guard that leaves parameters alone that a checkpoint has filled, so torch's own routines are safe here.
        """
        if module is self.get_output_embeddings():
            nn.init.normal_(module.get_parameter("weight"), std=getattr(self.config.text_config, "initializer_range", 0.02))
        elif isinstance(module, nn.MultiheadAttention):
            module._reset_parameters()
        elif isinstance(module, (nn.Linear, nn.LayerNorm)) or (isinstance(module, _FUSION_PARTS) and _is_new(module)):
            module.reset_parameters()

    def get_output_embeddings(self) -> nn.Module | None:
        return getattr(self, "lm_head", None)


class IgvaLlavaModel(IgvaLlavaPreTrainedModel):
    """Tower, fusion, projector and language model, without the head.

    Args:
        config: the configuration.
        vision_tower, language_model: loaded parts to use in place of new ones; :func:`model.build.build_model` passes them.
    """

    def __init__(
        self,
        config: IgvaLlavaConfig,
        vision_tower: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        # The config of a loaded part knows how the part attends; a size that changes later must change in one place.
        if vision_tower is not None:
            config.vision_config = vision_tower.config
        if language_model is not None:
            config.text_config = language_model.config
        self.vision_tower = AutoModel.from_config(config.vision_config) if vision_tower is None else vision_tower
        self._method, self._tokens = config.make_fusion(), config.image_tokens
        self.fusion = self._method.make_module()
        self.multi_modal_projector = IgvaLlavaProjector(config)
        self.language_model = AutoModel.from_config(config.text_config) if language_model is None else language_model
        parameters = inspect.signature(self.vision_tower.forward).parameters
        self._tower_interpolates_on_request = "interpolate_pos_encoding" in parameters
        #: Encode a black image for texts without images outside of training too: DeepSpeed's ranks run the same modules.
        self.always_encodes_an_image = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def train(self, mode: bool = True) -> IgvaLlavaModel:
        """As in torch, except that a frozen tower stays in eval mode: no dropout, no checkpointing of what has no gradient."""
        super().train(mode)
        if mode and not _is_trainable(self.vision_tower):
            self.vision_tower.eval()
        return self

    @property
    def fusion_stage(self) -> int | None:
        """1 or 2; None for a fusion without stages."""
        return self.config.fusion.get("stage")

    @property
    def reads_instruction(self) -> bool:
        """Whether the fusion, in its present stage, depends on ``instruction_embeds``."""
        return self._method.reads_instruction(self.fusion_stage)

    @property
    def tower_plan(self) -> FusionPlan:
        """Which hidden states of the tower the fusion reads in its present stage."""
        return self._method.tower_plan(self.fusion_stage)

    def set_fusion_stage(self, stage: int) -> None:
        """Switch IGVA between the plain average (1) and the instruction's weights (2); the config is updated with it.

        Raises:
            ValueError: another stage, or a fusion without stages.
        """
        if self.fusion_stage is None:
            raise ValueError(f"fusion type {self.config.fusion['type']!r} has no stages; only 'igva' has")
        check_stage(stage)
        self.config.fusion = {**self.config.fusion, "stage": stage}

    def get_image_features(
        self,
        pixel_values: Tensor,
        instruction_embeds: Tensor | None = None,
        image_to_sentence: Tensor | None = None,
        **kwargs: Any,
    ) -> IgvaLlavaImageFeatures:
        """Run the tower, fuse its layers, pool and project.

        The tower builds no graph when none of its parameters requires a gradient. ``config.fusion["streaming"]`` says whether
        it runs layer by layer.

        Args:
            pixel_values: (B, 3, height, width); the tiles of one picture are images like any other.
            instruction_embeds: (B, E), one sentence embedding an image, or with ``image_to_sentence`` (sentences, E); not read
                in stage 1 and by fusions without text. Where they are read, None gives every group the weight 1/K.
            image_to_sentence: (B,) in int64, the row of ``instruction_embeds`` for each image; None where there is one each.
            kwargs: taken for the sake of generate(), which passes ``return_dict``; not read.

        Raises:
            TypeError: ``image_to_sentence`` is not int64.
            ValueError: shapes that do not fit the model, or a tower that cannot run layer by layer where streaming is True.
        """
        if pixel_values.ndim != 4:
            raise ValueError(f"pixel_values has the shape {tuple(pixel_values.shape)}, expected (images, 3, height, width)")
        self._check_width(instruction_embeds)
        height, width = pixel_values.shape[-2:]
        maps = self._run_tower(pixel_values, self.tower_plan)
        inputs = FusionInputs(
            self.config.num_prefix_tokens,
            self._tokens.patches(height, width),
            self.fusion_stage,
            instruction_embeds,
            image_to_sentence,
            self._norm_of_the_mix(),
        )
        fused, weights = self._method(self.fusion, maps, inputs)
        of_mix = {} if inputs.output_norm is None else {"normalised": True}
        tokens = self.multi_modal_projector(self._pool(fused, height, width), **of_mix)
        if self._tokens.token_reduction is not None:
            tokens = reduce_tokens(tokens, self._tokens.pooled_map(height, width), self._tokens.map(height, width))
        return IgvaLlavaImageFeatures(pooler_output=tokens, fusion_weights=weights)

    def fusion_weights(self, pixel_values: Tensor, instruction_embeds: Tensor) -> Tensor:
        """The weights that each of several instructions gives each image; the tower runs once.

        Args:
            pixel_values: (B, 3, height, width).
            instruction_embeds: (Q, E), one sentence embedding an instruction.

        Returns:
            (Q, B, K) in float32.

        Raises:
            ValueError: a fusion, or a stage, that reads no instruction, or embeddings of another width.
        """
        if not self.reads_instruction:
            raise ValueError(f"the fusion {self.config.fusion['type']!r} reads no instruction in stage {self.fusion_stage}")
        self._check_width(instruction_embeds)
        grid = self._tokens.patches(*pixel_values.shape[-2:])
        maps = self._run_tower(pixel_values, self.tower_plan)
        rows = []
        for embed in instruction_embeds:
            embeds = embed.expand(len(pixel_values), -1)
            inputs = FusionInputs(self.config.num_prefix_tokens, grid, self.fusion_stage, embeds)
            _, weights = self._method(self.fusion, maps, inputs)
            rows += [] if weights is None else [weights]  # none is None: the instruction is read
        return torch.stack(rows)

    def _check_width(self, instruction_embeds: Tensor | None) -> None:
        """Refuse embeddings of another encoder before the tower runs; what reads them would name shapes alone."""
        expected = self.config.fusion.get("text_dim")
        if instruction_embeds is None or not self.reads_instruction or instruction_embeds.shape[-1] == expected:
            return
        raise ValueError(
            f"instruction_embeds has the shape {tuple(instruction_embeds.shape)}, expected {expected} numbers a sentence "
            "(text_dim of the fusion): they come from another sentence encoder than the model was trained with; use that one"
        )

    def _run_tower(self, pixel_values: Tensor, plan: FusionPlan) -> Maps:
        """The group means of a frozen tower that can run layer by layer; else hidden states."""
        tower, fusion = self.vision_tower, self.config.fusion
        pixel_values = pixel_values.to(tower.dtype)
        options: dict[str, Any] = {}
        native = tower.config.image_size
        if self._tower_interpolates_on_request and tuple(pixel_values.shape[-2:]) != (native, native):
            options["interpolate_pos_encoding"] = True
        trains = torch.is_grad_enabled() and _is_trainable(tower)
        obstacle = unsupported_reason(tower) if fusion["streaming"] else "it is switched off"
        if obstacle is None and trains:
            return selected_hidden_states(tower, pixel_values, plan, **options)
        if obstacle is None:
            num_prefix_tokens = self.config.num_prefix_tokens
            return stream_group_means(
                tower, pixel_values, plan, num_prefix_tokens=num_prefix_tokens, summary=fusion.get("summary"), **options
            )
        if fusion["streaming"] is True:
            raise ValueError(f"the tower cannot run layer by layer: {obstacle}; set fusion={{'streaming': 'auto', ...}}")
        with torch.set_grad_enabled(trains):
            outputs = tower(pixel_values, output_hidden_states=True, return_dict=True, **options)
        return outputs.hidden_states

    def _norm_of_the_mix(self) -> OutputNorm | None:
        """The projector's input norm, where the pass that mixes the layers can apply it and nothing lies between the two."""
        projector = self.multi_modal_projector
        if not (self._method.takes_output_norm and isinstance(projector, IgvaLlavaProjector)) or self._tokens.token_pooling:
            return None
        norm, dtype = output_norm_of(projector.input_norm), projector.linear_1.weight.dtype
        if norm is None or norm.weight is None or norm.weight.dtype != dtype:
            return None
        return norm if dtype != torch.float64 or self.vision_tower.dtype == dtype else None  # else sums run in float32

    def _pool(self, fused: Tensor, height: int, width: int) -> Tensor:
        """(B, N, C) to (B, N', C): the mean of squares of ``token_pooling`` x ``token_pooling`` tokens."""
        size = self._tokens.token_pooling
        rows, columns = self._tokens.patches(height, width)
        expected = rows * columns + self._tokens.pooled_layers * (rows * columns // self._tokens.strip)
        if expected != fused.shape[1]:
            raise ValueError(
                f"the tower gave {fused.shape[1]} tokens after {self.config.num_prefix_tokens} prefix tokens, but images of "
                f"{height} x {width} pixels have {rows} x {columns} patches; check num_prefix_tokens"
            )
        if size is None:
            return fused
        self._tokens.pooled_map(height, width)
        grid = fused.unflatten(1, (rows // size, size, columns // size, size))
        return grid.mean(dim=(2, 4)).flatten(1, 2)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        instruction_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        image_to_sentence: Tensor | None = None,
        mm_encoder_outputs: dict[str, IgvaLlavaImageFeatures] | None = None,
        **kwargs: Any,
    ) -> IgvaLlavaModelOutput:
        """Put the image features into the places of the ``<image>`` tokens and run the language model.

        Args:
            input_ids: (rows, length), with one ``image_token_id`` for each image token.
            pixel_values: (B, 3, height, width), the images of all rows in reading order.
            instruction_embeds: (B, E), one sentence embedding an image, or with ``image_to_sentence`` (sentences, E).
            attention_mask, position_ids, past_key_values: as for the language model.
            inputs_embeds: (rows, length, H) in place of ``input_ids``; then there can be no images.
            image_to_sentence: see :meth:`get_image_features`.
            mm_encoder_outputs: ``{"image": features}``, the result of :meth:`get_image_features`, in place of ``pixel_values``.
            kwargs: passed to the language model.

        Raises:
            ValueError: both or neither of ``input_ids`` and ``inputs_embeds``, images twice or without ``input_ids``, sentence
                embeddings without images, or another number of placeholders than of image features.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        features = self._image_features(pixel_values, instruction_embeds, image_to_sentence, mm_encoder_outputs)
        # Before the embeddings, as images are: ranks must gather sharded weights in the same order.
        black_image = self._black_image(input_ids) if features is None and input_ids is not None else None
        if input_ids is not None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if features is not None:
                inputs_embeds = self._merge(input_ids, inputs_embeds, features)
            else:
                self._check_no_image_is_missing(input_ids, past_key_values)
            if black_image is not None:
                nowhere = torch.zeros(1, dtype=torch.bool, device=inputs_embeds.device)
                inputs_embeds = inputs_embeds.masked_scatter(nowhere, black_image.pooler_output.to(inputs_embeds))
        elif features is not None:
            raise ValueError("images need input_ids, which mark their places; inputs_embeds cannot be searched for them")
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        fusion_weights = None if features is None else features.get("fusion_weights")
        if black_image is not None and black_image.fusion_weights is not None:
            # Of no image, yet with a graph: ranks must run the same modules' backward, that of the balance term included.
            fusion_weights = black_image.fusion_weights[:0]
        return IgvaLlavaModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=None if features is None else features.pooler_output,
            fusion_weights=fusion_weights,
        )

    def _image_features(
        self,
        pixel_values: Tensor | None,
        instruction_embeds: Tensor | None,
        image_to_sentence: Tensor | None,
        mm_encoder_outputs: dict[str, IgvaLlavaImageFeatures] | None,
    ) -> IgvaLlavaImageFeatures | None:
        encoded = (mm_encoder_outputs or {}).get("image")
        if pixel_values is not None:
            if encoded is not None:
                raise ValueError("pass the images once: pixel_values or mm_encoder_outputs, not both")
            return self.get_image_features(pixel_values, instruction_embeds, image_to_sentence)
        if instruction_embeds is not None and encoded is None:
            raise ValueError("instruction_embeds given without pixel_values: there is no image to weigh the layers of")
        return encoded

    def _black_image(self, input_ids: Tensor) -> IgvaLlavaImageFeatures | None:
        """Features of a black image: a training batch without images puts them nowhere, for their gradient of 0.

        Ranks that saw images reduce gradients of tower, fusion and projector, or gather their weights, and would wait for ever
        for one that saw none. None where nothing of them learns, and outside of training unless
        :attr:`always_encodes_an_image` is set.
        """
        parts = (self.vision_tower, self.fusion, self.multi_modal_projector)
        learns = self.training and torch.is_grad_enabled() and any(_is_trainable(part) for part in parts if part)
        if not (learns or self.always_encodes_an_image):
            return None
        side, device, instruction_embeds = self.config.image_size, input_ids.device, None
        if self.reads_instruction:
            instruction_embeds = torch.zeros(1, self.config.fusion["text_dim"], device=device)
        return self.get_image_features(torch.zeros(1, 3, side, side, device=device), instruction_embeds)

    def _merge(self, input_ids: Tensor, inputs_embeds: Tensor, features: IgvaLlavaImageFeatures) -> Tensor:
        """Overwrite the embeddings at the placeholders, in reading order, after counting both."""
        is_image = input_ids == self.config.image_token_id  # (rows, length)
        tokens = features.pooler_output
        num_features = tokens.shape[0] * tokens.shape[1]
        num_placeholders = is_image.sum()
        # Of transformers: a compiled graph holds the check too, and is not cut by it.
        torch_compilable_check(
            num_placeholders == num_features,
            lambda: (
                f"image placeholders and image features do not match: input_ids holds {int(num_placeholders)} placeholders (id "
                f"{self.config.image_token_id}), pixel_values gave {num_features} features ({tokens.shape[0]} images x "
                f"{tokens.shape[1]} tokens); expand <image> with the processor, and never cut a text inside an image"
            ),
        )
        if tokens.shape[-1] != inputs_embeds.shape[-1]:
            raise ValueError(
                f"the image features have {tokens.shape[-1]} channels, but the language model's embeddings "
                f"{inputs_embeds.shape[-1]}: they were made by another model"
            )
        tokens = tokens.flatten(0, 1).to(inputs_embeds)
        return inputs_embeds.masked_scatter(is_image.unsqueeze(-1), tokens)

    def _check_no_image_is_missing(self, input_ids: Tensor, past_key_values: Cache | None) -> None:
        """Refuse placeholders without images where a text begins; later steps see the images through the cache.

        A compiled step is not asked: how full a static cache is, only the device knows.
        """
        if torch.compiler.is_compiling() or (past_key_values is not None and past_key_values.get_seq_length() != 0):
            return
        num_placeholders = int((input_ids == self.config.image_token_id).sum())
        if num_placeholders:
            raise ValueError(
                f"input_ids holds {num_placeholders} image placeholders (id {self.config.image_token_id}), but there are "
                "no pixel_values; pass the images, or remove <image> from the text"
            )


class IgvaLlavaForConditionalGeneration(IgvaLlavaPreTrainedModel, GenerationMixin):
    """The model with its language-modelling head: training and generate().

    Args:
        config: the configuration.
        vision_tower, language_model: loaded parts to use in place of new ones (without head).
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012 (transformers' form)

    def __init__(
        self,
        config: IgvaLlavaConfig,
        vision_tower: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        _check_plain_logits(config)
        self.model = IgvaLlavaModel(config, vision_tower, language_model)
        self.lm_head = LanguageModelHead(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the head; raises TypeError for one that is no plain linear layer."""
        self.lm_head = LanguageModelHead.from_linear(new_embeddings)

    @property
    def fusion_stage(self) -> int | None:
        """1 or 2; None for a fusion without stages."""
        return self.model.fusion_stage

    @property
    def reads_instruction(self) -> bool:
        """Whether the fusion, in its present stage, depends on ``instruction_embeds``."""
        return self.model.reads_instruction

    def set_fusion_stage(self, stage: int) -> None:
        """See :meth:`IgvaLlavaModel.set_fusion_stage`."""
        self.model.set_fusion_stage(stage)

    def get_image_features(
        self,
        pixel_values: Tensor,
        instruction_embeds: Tensor | None = None,
        image_to_sentence: Tensor | None = None,
        **kwargs: Any,
    ) -> IgvaLlavaImageFeatures:
        """See :meth:`IgvaLlavaModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, instruction_embeds, image_to_sentence, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        instruction_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        image_to_sample: Tensor | None = None,
        sample_ids: Tensor | None = None,
        return_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        image_to_sentence: Tensor | None = None,
        mm_encoder_outputs: dict[str, IgvaLlavaImageFeatures] | None = None,
        **kwargs: Any,
    ) -> IgvaLlavaOutput:
        """Logits, or the loss.

        With labels the head runs at the labelled positions only, and ``logits`` is None unless ``return_logits`` asks for them.

        Args:
            input_ids, pixel_values, instruction_embeds, attention_mask, position_ids, past_key_values, inputs_embeds,
                image_to_sentence, mm_encoder_outputs: see :meth:`IgvaLlavaModel.forward`.
            labels: (rows, length), not shifted; -100 where there is nothing to learn.
            num_items_in_batch: labels of the whole optimizer step, as the Trainer passes it; None for those of this batch.
            image_to_sample: (B,), the sample that each image belongs to: its row of ``input_ids``, or its number in
                ``sample_ids``. None counts the placeholders of each row. Only the balance term reads it.
            sample_ids: (rows, length), the sample of each position, for rows that hold several samples
                (:class:`model.data.collator.PackingCollator`). No token sees another sample. ``position_ids`` that restart and
                the boundaries (``cu_seq_lens_q``, ``cu_seq_lens_k``, ``max_length_q``, ``max_length_k``) must come with them.
            return_logits: whether to compute logits; None computes them when there are no labels.
            logits_to_keep: the last positions to compute logits for (0: all), or the positions themselves.
            kwargs: passed to the language model.

        Raises:
            ValueError: see :meth:`IgvaLlavaModel.forward` and :func:`model.loss.token_exact_loss`; or packed rows without all
                that tells their samples apart, or with padding or a cache.
        """
        if sample_ids is not None:
            _check_packed(attention_mask, position_ids, past_key_values, kwargs)
            # With a cache transformers would take the row for one text.
            kwargs["use_cache"] = False
        outputs: IgvaLlavaModelOutput = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            instruction_embeds=instruction_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            image_to_sentence=image_to_sentence,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        loss = cross_entropy = balance = logits = None
        if labels is not None:
            balance_loss_weight = self.config.balance_loss_weight
            needs_owners = balance_loss_weight and outputs.fusion_weights is not None and image_to_sample is None
            if needs_owners and outputs.image_hidden_states is None:
                image_to_sample = torch.empty(0, dtype=torch.long, device=labels.device)
            elif needs_owners and input_ids is not None and sample_ids is None:
                image_to_sample = self._rows_of_images(input_ids, *outputs.image_hidden_states.shape[:2])
            loss, cross_entropy, balance = token_exact_loss(
                outputs.last_hidden_state,
                labels,
                self.lm_head,
                num_items_in_batch=num_items_in_batch,
                fusion_weights=outputs.fusion_weights,
                image_to_sample=image_to_sample,
                sample_ids=sample_ids,
                balance_loss_weight=balance_loss_weight,
                legacy_double_softmax=self.config.legacy_double_softmax,
            )
        if return_logits if return_logits is not None else labels is None:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(outputs.last_hidden_state[:, keep])
        return IgvaLlavaOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            fusion_weights=outputs.fusion_weights,
            cross_entropy=cross_entropy,
            balance=balance,
        )

    def _rows_of_images(self, input_ids: Tensor, num_images: int, tokens_per_image: int) -> Tensor:
        """(B,), the row of each image: images fill the placeholders in reading order."""
        counts = (input_ids == self.config.image_token_id).sum(dim=1)  # (rows,)
        if bool((counts % tokens_per_image).any()):
            raise ValueError(
                f"the rows of input_ids hold {counts.tolist()} image placeholders, which are no multiples of the "
                f"{tokens_per_image} tokens of an image; pass image_to_sample"
            )
        rows = torch.arange(len(counts), device=counts.device)
        return torch.repeat_interleave(rows, counts // tokens_per_image, output_size=num_images)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """As in transformers, for beams and several answers, with all images of a text repeated together.

        Versions that know no ``mm_encoder_outputs`` repeat image by image, [A, A, B, B], which gives a text with two images the
        same image twice; those that do know them put the repeated features into the caller's own object.
        """
        names = ("pixel_values", "instruction_embeds", "image_to_sentence", "mm_encoder_outputs")
        images: dict[str, Any] = {name: model_kwargs.pop(name) for name in names if name in model_kwargs}
        if expand_size > 1 and input_ids is not None:
            images = self._repeat_images(images, input_ids, expand_size)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **images}

    def _repeat_images(self, images: dict[str, Any], input_ids: Tensor, times: int) -> dict[str, Any]:
        """The image inputs of texts that are each repeated: [A, B] of one text become [A, B, A, B]."""
        pixel_values, encoded = images.get("pixel_values"), images.get("mm_encoder_outputs") or {}
        features: IgvaLlavaImageFeatures | None = encoded.get("image")
        if pixel_values is not None:
            num_images, tokens_per_image = len(pixel_values), self.config.image_tokens.count(*pixel_values.shape[-2:])
        elif features is not None:
            num_images, tokens_per_image = features.pooler_output.shape[:2]
        else:
            return images
        owners = self._rows_of_images(input_ids, num_images, tokens_per_image)
        of_row = [(owners == row).nonzero().flatten() for row in range(len(input_ids))]
        order = torch.cat([own for own in of_row for _ in range(times)])
        repeated = dict(images)
        shared = images.get("image_to_sentence") is not None  # then the sentences stay as they are
        for name in ("pixel_values", "image_to_sentence", *(() if shared else ("instruction_embeds",))):
            if images.get(name) is not None:
                repeated[name] = images[name][order]
        if features is not None:
            weights = features.fusion_weights
            of_images = IgvaLlavaImageFeatures(
                pooler_output=features.pooler_output[order], fusion_weights=None if weights is None else weights[order]
            )
            repeated["mm_encoder_outputs"] = {**encoded, "image": of_images}
        return repeated

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        inputs_embeds: Tensor | None = None,  # by name: generate() looks for it here
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in transformers, with the image inputs in the first step only, or in every step where there is no cache.

        An assistant that guesses tokens for another model is never told that its first step is one; its cache is empty then.
        """
        images = {name: kwargs.pop(name) for name in _IMAGE_INPUTS if name in kwargs}
        cache = kwargs.get("past_key_values")
        inputs = super().prepare_inputs_for_generation(
            input_ids, *args, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if is_first_iteration or not kwargs.get("use_cache", True) or cache is None or cache.get_seq_length() == 0:
            return {**inputs, **images}
        return inputs


def _check_packed(
    attention_mask: Tensor | None, position_ids: Tensor | None, past_key_values: Cache | None, options: dict[str, Any]
) -> None:
    given = {"position_ids": position_ids, **{name: options.get(name) for name in _BOUNDARIES}}
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise ValueError(
            f"sample_ids is given, so the rows are packed, but {', '.join(missing)} is missing; use PackingCollator"
        )
    if attention_mask is not None or past_key_values is not None:
        name = "past_key_values" if attention_mask is None else "attention_mask"
        raise ValueError(f"sample_ids is given, so the rows are packed, which {name} does not go with; leave it out")


def _is_new(module: nn.Module) -> bool:
    """Whether no parameter came from a checkpoint; the mark is that of transformers' loading."""
    return not any(getattr(parameter, "_is_hf_initialized", False) for parameter in module.parameters())


def _is_trainable(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _check_plain_logits(config: IgvaLlavaConfig) -> None:
    """Refuse language models that alter their logits after the head: the loss here would silently differ from theirs."""
    for name, neutral in (("final_logit_softcapping", None), ("logits_scaling", 1.0), ("logit_scale", 1.0)):
        value = getattr(config.text_config, name, neutral)
        if value not in (None, neutral):
            raise ValueError(
                f"language models of type {config.text_config.model_type!r} with {name}={value!r} alter their logits after the "
                "head, which this model does not do; use a Llama-like language model"
            )
