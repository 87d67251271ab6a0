"""transformers' Llava to our model with the fusion ``llava`` (or ``layers``), and back: the same maths, the same weights."""

from __future__ import annotations

from transformers import LlavaConfig, LlavaForConditionalGeneration

from model.configuration import IgvaLlavaConfig
from model.modeling import IgvaLlavaForConditionalGeneration

_LINEARS = ("linear_1", "linear_2")


def from_llava(llava: LlavaForConditionalGeneration) -> IgvaLlavaForConditionalGeneration:
    """Our model with the parts of a transformers' Llava: tower, language model and head are the same objects.

    ``vision_feature_layer`` becomes the fusion ``{"type": "llava", "layer": ...}``, or ``layers`` for a list.

    Raises:
        ValueError: a setting that our model does not have: a projector without bias, or prefix tokens that
            ``vision_feature_select_strategy`` keeps ("full" with a CLS token) or drops where there are none ("default"
            without).
    """
    source = llava.config
    if not source.multimodal_projector_bias:
        raise ValueError("multimodal_projector_bias is False, but our projector has biases; add zero biases first")
    layer = source.vision_feature_layer
    fusion = {"type": "llava", "layer": layer} if isinstance(layer, int) else {"type": "layers", "layers": list(layer)}
    tower, language_model = llava.model.vision_tower, llava.model.language_model
    config = IgvaLlavaConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        fusion=fusion,
        image_token_id=source.image_token_id,
        projector_hidden_act=source.projector_hidden_act,
        tie_word_embeddings=source.tie_word_embeddings,
        dtype=llava.dtype,
    )
    dropped = 1 if source.vision_feature_select_strategy == "default" else 0
    if dropped != config.num_prefix_tokens:
        raise ValueError(
            f"vision_feature_select_strategy={source.vision_feature_select_strategy!r} drops {dropped} tokens, but a "
            f"{tower.config.model_type!r} tower has {config.num_prefix_tokens} before its patches"
        )
    model = IgvaLlavaForConditionalGeneration(config, vision_tower=tower, language_model=language_model).to(llava.dtype)
    model.set_output_embeddings(llava.lm_head)
    model.tie_weights()
    for name in _LINEARS:
        ours, theirs = (getattr(each.model.multi_modal_projector, name) for each in (model, llava))
        ours.load_state_dict(theirs.state_dict())
    model.generation_config = llava.generation_config
    return model.eval()


def to_llava(model: IgvaLlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """transformers' Llava with the weights of our model, copied.

    Raises:
        ValueError: the fusion is none of ``llava`` and ``layers``, or a setting that Llava does not have is on.
    """
    config, fusion = model.config, model.config.fusion
    if fusion["type"] not in ("llava", "layers"):
        raise ValueError(f"transformers' Llava knows no fusion of type {fusion['type']!r}, only 'llava' and 'layers'")
    on = [name for name in ("token_pooling", "projector_input_norm", "projector_output_norm") if getattr(config, name)]
    if on or config.num_prefix_tokens > 1 or config.image_size != config.vision_config.image_size:
        raise ValueError(
            f"transformers' Llava has no {on[0] if on else 'other image_size than its tower and at most one prefix token'}; "
            "such a model cannot be converted"
        )
    target = LlavaConfig(
        vision_config=config.vision_config.to_dict(),
        text_config=config.text_config.to_dict(),
        image_token_id=config.image_token_id,
        projector_hidden_act=config.projector_hidden_act,
        vision_feature_select_strategy="default" if config.num_prefix_tokens else "full",
        vision_feature_layer=fusion["layer"] if fusion["type"] == "llava" else fusion["layers"],
        image_seq_length=config.num_image_tokens,
        multimodal_projector_bias=True,
        tie_word_embeddings=config.tie_word_embeddings,
    )
    llava = LlavaForConditionalGeneration(target).to(model.dtype)
    llava.model.vision_tower.load_state_dict(model.model.vision_tower.state_dict())
    llava.model.language_model.load_state_dict(model.model.language_model.state_dict())
    llava.lm_head.load_state_dict(model.lm_head.state_dict())
    for name in _LINEARS:
        ours, theirs = (getattr(each.model.multi_modal_projector, name) for each in (model, llava))
        theirs.load_state_dict(ours.state_dict())
    llava.generation_config = model.generation_config
    return llava.eval()
