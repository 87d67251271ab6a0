"""The parts that a recipe names: the model with its processor, the processor alone, or the architecture alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoProcessor, CLIPVisionConfig, LlamaConfig, PreTrainedConfig

import model as _registration  # noqa: F401 (the Auto classes learn of the model type)
from model.build import (
    IMAGE_TOKEN,
    build_model,
    build_processor,
    padded_vocabulary,
    part_config,
    tokenizer_with_image_token,
)
from model.configuration import IgvaLlavaConfig
from model.fusions import takes_text
from model.gguf import is_gguf
from model.instruction import SentenceEncoder
from model.loading import load_model
from model.modeling import IgvaLlavaForConditionalGeneration
from model.processing import IgvaLlavaProcessor
from model.quantization import Quantization, loading_options
from model.training.folders import require_checkpoint
from model.training.recipe import ModelSource, load_recipe


def _vicuna(hidden_size: int, intermediate_size: int, num_layers: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 128,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )


#: Architectures of the published parts that shipped recipes name (their config.json), so that a dry run needs no hub.
_PUBLISHED: dict[str, PreTrainedConfig] = {
    "openai/clip-vit-large-patch14-336": CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    ),
    "lmsys/vicuna-7b-v1.5": _vicuna(4096, 11008, 32),
    "lmsys/vicuna-13b-v1.5": _vicuna(5120, 13824, 40),
}
_PUBLISHED_ENCODERS = {"sentence-transformers/all-mpnet-base-v2": 768}


def load_parts(
    source: ModelSource, quantization: Quantization | None = None
) -> tuple[IgvaLlavaForConditionalGeneration, IgvaLlavaProcessor]:
    """The model in fp32 and its processor, from a checkpoint or from parts.

    Args:
        source: where they are.
        quantization: how the language model of a checkpoint is held; see :mod:`model.quantization`.
    """
    encoder = SentenceEncoder(source.sentence_encoder) if source.sentence_encoder else None
    if source.checkpoint is not None:
        require_checkpoint(source.checkpoint)
        model = load_model(source.checkpoint, **loading_options(quantization, torch.float32))
        processor = AutoProcessor.from_pretrained(source.checkpoint)
        if encoder is not None:
            processor.sentence_encoder = encoder
    else:
        if source.vision_tower is None or source.language_model is None:
            raise ValueError("a new model needs model.vision_tower and model.language_model; or give model.checkpoint")
        fusion = dict(source.fusion or {"type": "igva"})
        if encoder is not None and takes_text(fusion):
            fusion.setdefault("text_dim", encoder.dimension)
        model = build_model(
            source.vision_tower,
            source.language_model,
            fusion=fusion,
            token_pooling=source.token_pooling,
            projector_input_norm=source.projector_input_norm,
            projector_output_norm=source.projector_output_norm,
            image_size=source.image_size,
        )
        processor = build_processor(source.vision_tower, source.language_model, model.config, sentence_encoder=encoder)
    _check_encoder(model, processor)
    _ensure_padding(processor)
    return model, processor


def load_processor(source: ModelSource) -> IgvaLlavaProcessor:
    """The processor alone: no weights are read.

    Raises:
        FileNotFoundError, ValueError, OSError: a checkpoint, or a part of a new model, that cannot be read.
    """
    if source.checkpoint is not None:
        require_checkpoint(source.checkpoint)
        processor = AutoProcessor.from_pretrained(source.checkpoint)
    else:
        vision_tower, language_model = _named_parts(source)
        processor = build_processor(vision_tower, language_model, architecture(source))
    _ensure_padding(processor)
    return processor


def architecture(source: ModelSource) -> IgvaLlavaConfig:
    """The configuration of the model that a recipe trains: no weights are read.

    Raises:
        FileNotFoundError, ValueError, OSError: as :func:`load_processor`.
    """
    if source.checkpoint is not None:
        require_checkpoint(source.checkpoint)
        return AutoConfig.from_pretrained(source.checkpoint)
    vision_tower, language_model = _named_parts(source)
    fusion = dict(source.fusion or {"type": "igva"})
    if source.sentence_encoder is not None and takes_text(fusion):
        width = _PUBLISHED_ENCODERS.get(source.sentence_encoder) or SentenceEncoder(source.sentence_encoder).dimension
        fusion.setdefault("text_dim", width)
    text_config = _part_config(language_model)
    if language_model in _PUBLISHED:
        image_token_id, num_tokens = text_config.vocab_size, text_config.vocab_size + 1
    else:
        tokenizer = tokenizer_with_image_token(language_model)
        image_token_id, num_tokens = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), len(tokenizer)
    if image_token_id >= text_config.vocab_size:
        text_config.vocab_size = padded_vocabulary(num_tokens)
    return IgvaLlavaConfig(
        vision_config=_part_config(vision_tower),
        text_config=text_config,
        fusion=fusion,
        image_token_id=image_token_id,
        image_size=source.image_size,
        token_pooling=source.token_pooling,
        projector_input_norm=source.projector_input_norm,
        projector_output_norm=source.projector_output_norm,
    )


def architecture_of_run(source: ModelSource, shipped: Mapping[str, Path]) -> tuple[IgvaLlavaConfig, str | None]:
    """As :func:`architecture`; for a checkpoint that is not there yet, that of the shipped recipe that makes it.

    Args:
        source: of the recipe.
        shipped: recipes by name.

    Returns:
        The configuration, and the name of that recipe, or None.
    """
    if source.checkpoint is not None and not Path(source.checkpoint).exists():
        for name, path in shipped.items():
            maker = load_recipe(path)
            if maker.output_dir == source.checkpoint:
                return architecture_of_run(maker.model, shipped)[0], name
    return architecture(source), None


def _named_parts(source: ModelSource) -> tuple[str, str]:
    if source.vision_tower is None or source.language_model is None:
        raise ValueError("a new model needs model.vision_tower and model.language_model; or give model.checkpoint")
    return source.vision_tower, source.language_model


def _part_config(name: str) -> Any:
    if name in _PUBLISHED:
        return _PUBLISHED[name].__class__.from_dict(_PUBLISHED[name].to_dict())
    # A path that is not there would be asked for at the hub, which says at length that it knows no such name.
    if not is_gguf(name) and not Path(name).is_dir() and (name.count("/") != 1 or Path(name).parent.is_dir()):
        raise FileNotFoundError(f"no folder {name}")
    return part_config(name)


def _ensure_padding(processor: IgvaLlavaProcessor) -> None:
    tokenizer = processor.tokenizer
    if tokenizer.pad_token is None:
        # Llama's has none. Padding is masked in attention and loss, so any token serves.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token


def _check_encoder(model: IgvaLlavaForConditionalGeneration, processor: IgvaLlavaProcessor) -> None:
    expected, encoder = model.config.fusion.get("text_dim"), processor.sentence_encoder
    if encoder is not None and expected not in (None, encoder.dimension):
        raise ValueError(
            f"model.sentence_encoder gives {encoder.dimension} numbers a sentence, but the checkpoint's allocator takes "
            f"{expected}; use the encoder that it was built with"
        )
