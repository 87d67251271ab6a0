"""Checkpoints of haotian-liu/LLaVA and of the code bases that grew from it, to ours and back.

============================  ==============================================================================================
official name                 ours
============================  ==============================================================================================
``model.mm_projector.0``      ``model.multi_modal_projector.linear_1`` (MMFuser: the block, and ``.1``, ``.3`` the Linears)
``model.mm_projector.2``      ``model.multi_modal_projector.linear_2``
``model.vision_aggregator``   ``model.fusion.allocator`` (IGVA)
``model.vision_tower...``     ``model.vision_tower``, where the checkpoint holds it; else the tower's own checkpoint
``model.*``, ``lm_head``      ``model.language_model.*``, ``lm_head``
============================  ==============================================================================================

The order of a projector's slots: the released code of IGVA and DenseConnector concatenates the base first. ``order`` says what
our model is to use. Where it differs from ``source_order``, the columns of the projector's first weight are permuted, which
changes no result; both are recorded.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from igva_kernels.modules import mmfuser_from_official, mmfuser_to_official
from model.build import IMAGE_TOKEN, assemble_model, tokenizer_with_image_token
from model.converters.tensors import read_tensors
from model.modeling import IgvaLlavaForConditionalGeneration

Kind = Literal["llava", "igva", "dense_connector", "mmfuser"]
KINDS: tuple[Kind, ...] = ("llava", "igva", "dense_connector", "mmfuser")

_OTHER_ORDER = {"igva": ("base_first", "fused_first"), "dense_connector": ("base_first", "base_last")}
_PROJECTOR, _AGGREGATOR, _TOWER = "model.mm_projector.", "model.vision_aggregator.", "model.vision_tower.vision_tower."
_LINEARS = {"linear_1": "0", "linear_2": "2"}
_LINEARS_OF_MMFUSER = {"linear_1": "1", "linear_2": "3"}


@dataclass(frozen=True)
class Conversion:
    """A converted model, and what was done, for ``conversion.json``."""

    model: IgvaLlavaForConditionalGeneration
    record: dict[str, Any]


def from_official(
    kind: Kind,
    source: str | Path,
    *,
    vision_tower: str | Path,
    language_model: str | Path | None = None,
    fusion: Mapping[str, Any] | None = None,
    source_order: str | None = None,
    order: str | None = None,
) -> Conversion:
    """Our model with the weights of an official checkpoint.

    Args:
        kind: the code base.
        source: a checkpoint folder, or a file of projector weights (``mm_projector.bin``; for IGVA's stage 2 it must hold the
            aggregator too).
        vision_tower: folder or hub name of the tower that it was trained with.
        language_model: folder or hub name; needed where ``source`` holds no language model, and else only for its tokenizer,
            None for the one in ``source``.
        fusion: our fusion options; None reads them from ``config.json`` in or beside ``source``.
        source_order: how the checkpoint's projector expects its slots; None for that of the released code, ``"base_first"``.
        order: how ours is to; None leaves it as ``source_order``.

    Raises:
        FileNotFoundError: no such weights, or no ``config.json`` where it is needed.
        ValueError: an unknown kind or order, a projector that is not ``mlp2x_gelu``, tensors that are missing, unknown or of
            other shapes.
    """
    _check_kind(kind)
    source = Path(source)
    folder = source if source.is_dir() else source.parent
    config_file = folder / "config.json"
    values = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else None
    tensors = {name: tensor for name, tensor in read_tensors(source).items() if "rotary_emb.inv_freq" not in name}
    tower_config = AutoConfig.from_pretrained(vision_tower)
    tower_config = getattr(tower_config, "vision_config", tower_config)
    if fusion is None:
        if values is None:
            raise FileNotFoundError(f"there is no {config_file} to read the fusion from; give the fusion's options yourself")
        fusion = fusion_of(kind, values, tower_config)
    source_order, order = _orders(kind, fusion, source_order, order)
    if order is not None:
        fusion = {**fusion, "order": order}

    mm = {name: tensor for name, tensor in tensors.items() if name.startswith((_PROJECTOR, _AGGREGATOR, _TOWER))}
    words = {name: tensor for name, tensor in tensors.items() if name not in mm}
    holds_language_model = "model.embed_tokens.weight" in words
    if not holds_language_model and language_model is None:
        raise ValueError(f"{source} holds no language model; name the one that it was trained with as language_model")
    tokenizer = tokenizer_with_image_token(folder if language_model is None else language_model)
    tower = AutoModel.from_pretrained(vision_tower, config=tower_config, dtype=torch.float32)
    if holds_language_model:
        causal_lm = AutoModelForCausalLM.from_config(_text_config(values, config_file))
        _load(causal_lm, words, optional=("lm_head.weight",) if causal_lm.config.tie_word_embeddings else ())
    else:
        if words:
            raise ValueError(f"{source} holds tensors that are neither projector nor aggregator: {sorted(words)[:5]}")
        causal_lm = AutoModelForCausalLM.from_pretrained(language_model, dtype=torch.float32)
    for part in (tower, causal_lm):
        part.config.name_or_path = ""
    settings = {"fusion": fusion, "image_token_id": tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)}
    model = assemble_model(tower, causal_lm, len(tokenizer), settings)
    permuted = source_order != order
    _load_multimodal(model, kind, mm, permuted)
    record = {
        "from": kind,
        "source_order": source_order,
        "order": order,
        "projector_columns": "permuted" if permuted else "as they were",
        "language_model": "in the checkpoint" if holds_language_model else "given",
        "vision_tower": "in the checkpoint" if any(name.startswith(_TOWER) for name in mm) else "given",
    }
    return Conversion(model, record)


def to_official(
    kind: Kind, model: IgvaLlavaForConditionalGeneration, *, vocab_size: int | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of our model under official names, the projector in the order of the released code.

    Args:
        kind: the code base; the model's fusion must be the one that it computes.
        model: ours.
        vocab_size: rows of the embeddings to keep: those of the original vocabulary, before ``<image>`` was added. None keeps
            all.

    Returns:
        Tensors by official name, without the tower; and the values for the official ``config.json``.

    Raises:
        ValueError: an unknown kind, another fusion, or settings that the code base does not have.
    """
    _check_kind(kind)
    fusion, config = model.config.fusion, model.config
    expected = "llava" if kind == "llava" else kind
    if fusion["type"] != expected or fusion.get("token_reduction"):
        raise ValueError(f"{kind} computes the fusion {expected!r} without token_reduction, but the model has {fusion}")
    on = [name for name in ("token_pooling", "projector_input_norm", "projector_output_norm") if getattr(config, name)]
    if on:
        raise ValueError(f"the official code has no {on[0]}; such a model cannot be converted")
    state = model.state_dict()
    tensors: dict[str, Tensor] = {}
    for name, place in _linears_of(kind).items():
        for kind_of in ("weight", "bias"):
            tensor = state[f"model.multi_modal_projector.{name}.{kind_of}"]
            if (name, kind_of) == ("linear_1", "weight") and fusion.get("order", "base_first") != "base_first":
                tensor = _move_base(tensor, config.vision_config.hidden_size, to_front=True)
            tensors[f"{_PROJECTOR}{place}.{kind_of}"] = tensor.clone()
    if kind == "igva":
        prefix = "model.fusion.allocator."
        tensors |= {_AGGREGATOR + name.removeprefix(prefix): t.clone() for name, t in state.items() if name.startswith(prefix)}
    if kind == "mmfuser":
        prefix = "model.fusion."
        block = {name.removeprefix(prefix): t.clone() for name, t in state.items() if name.startswith(prefix)}
        tensors |= mmfuser_to_official(block, f"{_PROJECTOR}0.")
    prefix = "model.language_model."
    for name, tensor in state.items():
        if name.startswith(prefix) or name.startswith("lm_head."):
            kept = tensor[:vocab_size] if name.endswith(("embed_tokens.weight", "lm_head.weight")) else tensor
            tensors["model." + name.removeprefix(prefix) if name.startswith(prefix) else name] = kept.clone()
    return tensors, _official_config(kind, model, vocab_size)


def write_official(
    kind: Kind, model: IgvaLlavaForConditionalGeneration, folder: str | Path, *, vocab_size: int | None = None
) -> None:
    """Write ``model.safetensors``, ``config.json`` and ``mm_projector.bin`` as the official code reads them.

    Arguments and Raises as for :func:`to_official`; ``FileExistsError`` for a folder that is not empty.
    """
    tensors, values = to_official(kind, model, vocab_size=vocab_size)
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    projector = {name: tensor for name, tensor in tensors.items() if name.startswith((_PROJECTOR, _AGGREGATOR))}
    torch.save(projector, folder / "mm_projector.bin")
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def fusion_of(kind: Kind, values: Mapping[str, Any], tower_config: PreTrainedConfig) -> dict[str, Any]:
    """Our fusion options from an official ``config.json``.

    Raises:
        ValueError: a projector that is not ``mlp2x_gelu``, or an entry that is missing; the text names it.
    """
    if values.get("mm_projector_type") != "mlp2x_gelu":
        raise ValueError(f"mm_projector_type is {values.get('mm_projector_type')!r}, only 'mlp2x_gelu' can be converted")

    def entry(name: str) -> Any:
        if name not in values:
            raise ValueError(f"config.json has no {name!r}, which a checkpoint of kind {kind!r} has")
        return values[name]

    if kind == "llava":
        return {"type": "llava", "layer": int(entry("mm_vision_select_layer"))}
    if kind == "mmfuser":
        layers = entry("mm_vision_select_layer")
        if isinstance(layers, str):
            layers = [int(layer) for layer in layers.removeprefix("list").split("/")]
        return {"type": "mmfuser", "layers": list(layers)}
    if kind == "dense_connector":
        # The released code deletes SigLIP's last block and takes the last hidden state.
        base = -1 if tower_config.model_type == "siglip_vision_model" else int(values.get("mm_vision_select_layer", -2))
        return {"type": "dense_connector", "variant": entry("mm_dense_connector_type"), "base": base}
    groups = entry("vit_aggregate_groups")
    groups = ast.literal_eval(groups) if isinstance(groups, str) else groups
    fusion = {"type": "igva", "groups": groups, "base": int(entry("vit_base_layer"))}
    if entry("aggregate_by_average"):
        return {**fusion, "stage": 1}
    sizes = {"text_dim": "sentence_embed_dim", "hidden_dim": "aggregator_hidden_dim"}
    sizes |= {"num_blocks": "aggregator_num_transformers", "num_heads": "aggregator_num_heads"}
    return {**fusion, "stage": 2, **{ours: int(entry(theirs)) for ours, theirs in sizes.items()}}


def _official_config(kind: Kind, model: IgvaLlavaForConditionalGeneration, vocab_size: int | None) -> dict[str, Any]:
    config, fusion = model.config, model.config.fusion
    text = config.text_config.to_dict()
    width = config.vision_config.hidden_size
    values = {
        **text,
        "model_type": f"llava_{text['model_type']}" if text["model_type"] != "llama" else "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "vocab_size": vocab_size or text["vocab_size"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "mm_hidden_size": config.make_fusion().width if kind == "dense_connector" else width,
        "use_mm_proj": True,
    }
    if kind == "llava":
        return {**values, "mm_vision_select_layer": fusion["layer"]}
    if kind == "mmfuser":
        return {**values, "mm_vision_select_layer": fusion["layers"]}
    if kind == "dense_connector":
        return {**values, "mm_vision_select_layer": fusion["base"], "mm_dense_connector_type": fusion["variant"]}
    return {
        **values,
        "vit_base_layer": fusion["base"],
        "vit_aggregate_groups": json.dumps([list(group) for group in config.fusion_plan(stage=2).groups]),
        "aggregate_by_average": fusion["stage"] == 1,
        "sentence_embed_dim": fusion["text_dim"],
        "aggregator_hidden_dim": fusion["hidden_dim"],
        "aggregator_num_transformers": fusion["num_blocks"],
        "aggregator_num_heads": fusion["num_heads"],
    }


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")


def _orders(
    kind: Kind, fusion: Mapping[str, Any], source_order: str | None, order: str | None
) -> tuple[str | None, str | None]:
    choices = None if fusion.get("variant") == "sti" else _OTHER_ORDER.get(kind)
    for name, value in (("source_order", source_order), ("order", order)):
        if value is not None and value not in (choices or ()):
            has = f"one of {choices}" if choices else f"None: {kind} concatenates no channels here"
            raise ValueError(f"{name} must be {has}, got {value!r}")
    if choices is None:
        return None, None
    source_order = source_order or "base_first"
    return source_order, order or source_order


def _linears_of(kind: Kind) -> dict[str, str]:
    return _LINEARS_OF_MMFUSER if kind == "mmfuser" else _LINEARS


def _move_base(weight: Tensor, width: int, *, to_front: bool) -> Tensor:
    """(H, S·D) with the columns of the base, the first or the last D, moved to the other end."""
    return torch.roll(weight, width if to_front else -width, dims=1)


def _load_multimodal(model: IgvaLlavaForConditionalGeneration, kind: Kind, mm: Mapping[str, Tensor], permuted: bool) -> None:
    width = model.config.vision_config.hidden_size
    ours: dict[str, Tensor] = {}
    block: dict[str, Tensor] = {}
    places = {place: name for name, place in _linears_of(kind).items()}
    for name, tensor in mm.items():
        if name.startswith(_TOWER):
            ours["vision_tower." + _tower_name(model, name.removeprefix(_TOWER))] = tensor
        elif name.startswith(_AGGREGATOR):
            ours["fusion.allocator." + name.removeprefix(_AGGREGATOR)] = tensor
        else:
            place, _, rest = name.removeprefix(_PROJECTOR).partition(".")
            if place in places:
                ours[f"multi_modal_projector.{places[place]}.{rest}"] = tensor
            else:
                block[name] = tensor
    if kind == "mmfuser" and block:
        ours |= {f"fusion.{name}": tensor for name, tensor in mmfuser_from_official(block, f"{_PROJECTOR}0.").items()}
    elif block:
        raise ValueError(f"the checkpoint holds tensors that a {kind} projector does not have: {sorted(block)[:5]}")
    weight = "multi_modal_projector.linear_1.weight"
    if permuted and weight in ours:
        # Of two orders one has the base first: it goes to the end, or comes from there.
        to_front = model.config.fusion["order"] == "base_first"
        ours[weight] = _move_base(ours[weight], width, to_front=to_front)
    inner = model.model
    needed = {name for name in inner.state_dict() if name.startswith(("multi_modal_projector.", "fusion."))}
    if model.fusion_stage == 1:
        needed = {name for name in needed if not name.startswith("fusion.")}  # stage 1 has no aggregator yet
    _load(inner, ours, optional=set(inner.state_dict()) - needed)


def _tower_name(model: IgvaLlavaForConditionalGeneration, name: str) -> str:
    """CLIP's names in old versions of transformers begin with ``vision_model.``; those of this version may not."""
    own = model.model.vision_tower.state_dict()
    return name if name in own else name.removeprefix("vision_model.")


def _load(module: torch.nn.Module, tensors: Mapping[str, Tensor], *, optional: Any = ()) -> None:
    own = module.state_dict()
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("position_ids")}
    missing, unknown = sorted(set(own) - set(tensors) - set(optional)), sorted(set(tensors) - set(own))
    if missing or unknown:
        raise ValueError(
            f"the checkpoint does not fit: {len(missing)} tensors are missing ({', '.join(missing[:3])}), {len(unknown)} are "
            f"unknown ({', '.join(unknown[:3])})"
        )
    for name, tensor in tensors.items():
        if own[name].shape != tensor.shape:
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, the model expects {tuple(own[name].shape)}")
    module.load_state_dict(tensors, strict=False)


def _text_config(values: Mapping[str, Any] | None, file: Path) -> PreTrainedConfig:
    if values is None:
        raise FileNotFoundError(f"there is no {file}, which tells the sizes of the language model in the checkpoint")
    model_type = values["model_type"].removeprefix("llava_")
    model_type = "llama" if model_type == "llava" else model_type
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"the language model of type {values['model_type']!r} is not known")
    known = set(CONFIG_MAPPING[model_type]().to_dict()) | {"rope_theta", "rope_scaling"}
    own = {"model_type", "architectures", "transformers_version", "_name_or_path", "auto_map", "torch_dtype", "dtype"}
    return CONFIG_MAPPING[model_type](**{name: value for name, value in values.items() if name in known - own})
