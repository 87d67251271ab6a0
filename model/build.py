"""A model and its processor from parts: vision tower, language model and sentence encoder, each a folder or a hub name."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from model._hf_compat import load_image_processor, pil_image_processor
from model.chat_templates import CHAT_TEMPLATES
from model.configuration import IgvaLlavaConfig
from model.gguf import load_language_model, load_tokenizer, place
from model.instruction import Encoder, SentenceEncoder
from model.modeling import IgvaLlavaForConditionalGeneration
from model.processing import IgvaLlavaProcessor

logger = logging.get_logger(__name__)

IMAGE_TOKEN = "<image>"

#: Tensor cores want the vocabulary in multiples of 8 (fp16/bf16) to 64 (A100, per NVIDIA's matmul guide); one new token would
#: leave 32,001 rows.
_VOCABULARY_MULTIPLE = 64

_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
#: Image processor of a tower whose folder has none, by model type: class and normalisation that it was trained with.
_IMAGE_PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "clip_vision_model": ("CLIPImageProcessor", {}),
    "dinov2": ("BitImageProcessor", _IMAGENET),
    "dinov2_with_registers": ("BitImageProcessor", _IMAGENET),
}


def build_model(
    vision_tower: str | Path,
    language_model: str | Path,
    *,
    fusion: dict[str, Any] | None = None,
    token_pooling: int | None = None,
    projector_hidden_act: str = "gelu",
    projector_input_norm: bool = False,
    projector_output_norm: bool = False,
    image_size: int | None = None,
    num_prefix_tokens: int | None = None,
    balance_loss_weight: float = 0.0,
    legacy_double_softmax: bool = False,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str | None = None,
) -> IgvaLlavaForConditionalGeneration:
    """A model with pretrained tower and language model; projector and allocator are new.

    Args:
        vision_tower: folder or hub name; of a CLIP or SigLIP checkpoint with both halves the vision half is loaded.
        language_model: folder, hub name or GGUF file of a Llama-like causal language model with its tokenizer. If the tokenizer
            does not know ``<image>``, the token is added and the embeddings grow to hold it.
        fusion, token_pooling, projector_hidden_act, projector_input_norm, projector_output_norm, image_size, num_prefix_tokens,
            balance_loss_weight, legacy_double_softmax: see :class:`model.configuration.IgvaLlavaConfig`.
        dtype: of all parameters.
        attn_implementation: of tower and language model; None lets transformers choose.

    Raises:
        FileNotFoundError, ImportError: a GGUF file that is not there, or cannot be read without gguf.
        ValueError: settings that contradict each other or the parts, or a language model whose head is not a plain matrix.
    """
    options: dict[str, Any] = {"dtype": dtype}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    tokenizer = tokenizer_with_image_token(language_model)
    # The settings are checked before gigabytes are read.
    settings: dict[str, Any] = {
        "fusion": fusion,
        "token_pooling": token_pooling,
        "projector_hidden_act": projector_hidden_act,
        "projector_input_norm": projector_input_norm,
        "projector_output_norm": projector_output_norm,
        "image_size": image_size,
        "num_prefix_tokens": num_prefix_tokens,
        "balance_loss_weight": balance_loss_weight,
        "legacy_double_softmax": legacy_double_softmax,
        "image_token_id": tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
    }
    text_config = part_config(language_model)
    IgvaLlavaConfig(vision_config=_vision_config(vision_tower), text_config=text_config, **settings)

    tower = AutoModel.from_pretrained(vision_tower, config=_vision_config(vision_tower), **options)
    causal_lm = load_language_model(language_model, **options)
    for part, source in ((tower, vision_tower), (causal_lm, language_model)):
        if Path(source).exists():
            # A checkpoint names the hub repositories that it came from, but no folder or file of this machine.
            part.config.name_or_path = ""
    return assemble_model(tower, causal_lm, len(tokenizer), settings, dtype=dtype)


def assemble_model(
    tower: PreTrainedModel,
    causal_lm: PreTrainedModel,
    num_tokens: int,
    settings: dict[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
) -> IgvaLlavaForConditionalGeneration:
    """A model around loaded parts; projector and fusion are new.

    Args:
        tower: the vision tower.
        causal_lm: the language model with its head; its embeddings grow where ``<image>`` does not fit.
        num_tokens: of the tokenizer that knows ``<image>``.
        settings: fields of :class:`model.configuration.IgvaLlavaConfig`, ``image_token_id`` among them.
        dtype: of all parameters.

    Raises:
        ValueError: as :func:`build_model`.
    """
    head = _plain_head(causal_lm)
    config = IgvaLlavaConfig(vision_config=tower.config, text_config=causal_lm.config, dtype=dtype, **settings)
    for part in (tower, causal_lm):
        _mark_initialized(part)
    model = IgvaLlavaForConditionalGeneration(config, vision_tower=tower, language_model=causal_lm.base_model)
    model.set_output_embeddings(head)
    model.tie_weights()
    _scale_output_norm(model, config)
    model.to(dtype)
    model.generation_config = causal_lm.generation_config
    vocab_size = config.text_config.vocab_size
    if config.image_token_id >= vocab_size:
        model.resize_token_embeddings(num_tokens, pad_to_multiple_of=_VOCABULARY_MULTIPLE)
    # Rows that no text ever trained: a picture's place and the padding of the vocabulary are no answers.
    no_answer = {config.image_token_id, *range(vocab_size, config.text_config.vocab_size)}
    model.generation_config.suppress_tokens = sorted(no_answer)
    return model.eval()


def build_processor(
    vision_tower: str | Path,
    language_model: str | Path,
    config: IgvaLlavaConfig,
    *,
    sentence_encoder: str | Path | Encoder | None = None,
    image_size: int | None = None,
    chat_template: str | None = None,
) -> IgvaLlavaProcessor:
    """The processor that belongs to a model of :func:`build_model`.

    Args:
        vision_tower: folder or hub name; its image processor's normalisation is kept, its size is set.
        language_model: folder, hub name or GGUF file; its tokenizer gets ``<image>``.
        config: the model's configuration.
        sentence_encoder: folder, hub name or encoder; None for none (instruction embeddings then come from elsewhere).
        image_size: side of the pictures; by default ``config.image_size``.
        chat_template: ``"vicuna_v1"``, ``"chatml"``, ``"plain"``, or a Jinja template with ``{% generation %}`` spans. None
            keeps the tokenizer's own if it has such spans, and else takes ``"chatml"`` for tokenizers with ``<|im_end|>`` and
            ``"vicuna_v1"`` for others. The processor has ``"plain"`` (stage 1) by name in any case.

    Raises:
        ValueError: the tokenizer's ``<image>`` is not the config's, the encoder's width is not the fusion's ``text_dim``, or
            there is no image processor for the tower.
    """
    tokenizer = tokenizer_with_image_token(language_model)
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if image_token_id != config.image_token_id:
        raise ValueError(
            f"{IMAGE_TOKEN} has the id {image_token_id} in the tokenizer of {language_model}, but the config says "
            f"{config.image_token_id}; build model and processor from the same language model"
        )
    templates = {"default": _default_template(tokenizer, chat_template), "plain": CHAT_TEMPLATES["plain"]}
    # On both: the processor renders prompts, the tokenizer labels; saved side by side, they must agree.
    tokenizer.chat_template = templates
    processor = IgvaLlavaProcessor(
        _image_processor(vision_tower, config, image_size or config.image_size),
        tokenizer,
        chat_template=templates,
        image_token=IMAGE_TOKEN,
        **asdict(config.image_tokens),
    )
    if sentence_encoder is not None:
        encoder = SentenceEncoder(sentence_encoder) if isinstance(sentence_encoder, (str, Path)) else sentence_encoder
        expected = config.fusion.get("text_dim")
        if expected not in (None, encoder.dimension):
            raise ValueError(
                f"the sentence encoder gives {encoder.dimension} numbers a sentence, but the fusion's text_dim is {expected}; "
                f"build the model with fusion={{'text_dim': {encoder.dimension}, ...}}"
            )
        processor.sentence_encoder = encoder
    return processor


def _vision_config(vision_tower: str | Path) -> PreTrainedConfig:
    config = AutoConfig.from_pretrained(vision_tower)
    return getattr(config, "vision_config", config)


def part_config(part: str | Path) -> PreTrainedConfig:
    """The configuration of a part in a folder, at the hub or, for language models, in a GGUF file."""
    folder, which = place(part)
    return AutoConfig.from_pretrained(folder, **which)


def tokenizer_with_image_token(language_model: str | Path) -> Any:
    """The tokenizer of a folder, hub name or GGUF file, with ``<image>`` added where it lacks it."""
    tokenizer = load_tokenizer(language_model)
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    return tokenizer


def padded_vocabulary(num_tokens: int) -> int:
    """Rows of the embeddings that grow to hold ``num_tokens``."""
    return -(-num_tokens // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE


def _default_template(tokenizer: Any, chat_template: str | None) -> str:
    if chat_template is not None:
        return CHAT_TEMPLATES.get(chat_template, chat_template)
    own = tokenizer.chat_template
    own = own.get("default") if isinstance(own, dict) else own
    if own is not None and "generation %}" in own:
        return own
    name = "chatml" if "<|im_end|>" in tokenizer.get_vocab() else "vicuna_v1"
    logger.info("the tokenizer's chat template marks no answers; taking the template %r", name)
    return CHAT_TEMPLATES[name]


def _image_processor(vision_tower: str | Path, config: IgvaLlavaConfig, image_size: int) -> Any:
    config.image_tokens.count(image_size, image_size)
    square = {"height": image_size, "width": image_size}
    # Shortest edge to the side asked for, then the centre.
    size = {"size": {"shortest_edge": image_size}, "crop_size": square, "do_resize": True, "do_center_crop": True}
    try:
        values, _ = BaseImageProcessor.get_image_processor_dict(vision_tower)
    except OSError as error:
        model_type = config.vision_config.model_type
        if model_type not in _IMAGE_PROCESSORS:
            raise ValueError(
                f"{vision_tower} has no preprocessor_config.json, and no image processor is known for {model_type!r} towers "
                f"(known: {sorted(_IMAGE_PROCESSORS)}); save one beside the tower"
            ) from error
        name, values = _IMAGE_PROCESSORS[model_type]
        return pil_image_processor(name)(**{**values, **size})
    if "height" in (values.get("size") or {}):
        # SigLIP's and ViT's processors know no shortest edge: they resize to a square.
        size = {"size": square, "do_resize": True}
    return load_image_processor({**values, **size})


def _plain_head(causal_lm: PreTrainedModel) -> nn.Linear:
    head = causal_lm.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError(
            f"the head of {type(causal_lm).__name__} is {head}, expected a Linear without bias; use a Llama-like language model"
        )
    return head


def _scale_output_norm(model: IgvaLlavaForConditionalGeneration, config: IgvaLlavaConfig) -> None:
    """Let the projector's output norm begin at the spread of the word embeddings: 1 would be 7 times SmolLM2's 0.136."""
    if config.projector_output_norm:
        words = model.get_input_embeddings().get_parameter("weight")
        scale = model.model.multi_modal_projector.output_norm.get_parameter("weight")
        nn.init.constant_(scale, words.detach().float().std().item())


def _mark_initialized(model: nn.Module) -> None:
    """Keep the composite model's initialisation away from loaded parts."""
    for module in model.modules():
        module._is_hf_initialized = True  # type: ignore[assignment]
