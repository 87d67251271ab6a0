"""A folder of adapters as something to use: the checkpoint that they belong to is found, and both become one model.

What such a folder holds is told in :mod:`model.training.lora`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoProcessor
from transformers.utils.peft_utils import find_adapter_config_file

from model.loading import load_model
from model.modeling import IgvaLlavaForConditionalGeneration
from model.processing import IgvaLlavaProcessor
from model.training.folders import is_checkpoint, require_checkpoint
from model.training.lora import CONFIG_FILE, load_adapters


def adapter_folder(name: str | Path) -> Path | None:
    """The folder of adapters that a folder's or a hub repository's name stands for (then it is downloaded); None for others."""
    folder = Path(name)
    if folder.is_dir():
        return folder if (folder / CONFIG_FILE).is_file() else None
    is_hub_name = str(name).count("/") == 1 and not str(name).startswith((".", "/", "~"))
    if not is_hub_name or find_adapter_config_file(str(name)) is None:
        return None
    return Path(snapshot_download(str(name)))


def base_of(adapters: Path, base: str | None = None) -> str:
    """The checkpoint that adapters belong to: a folder, or a hub name.

    Args:
        adapters: their folder. The name that it gives for its base is looked for beside it and beside the checkpoint that it
            is part of.
        base: what to take in place of that.

    Raises:
        FileNotFoundError: the folder that the adapters name is not there.
        ValueError: they name none.
    """
    if base is not None:
        return base
    named = json.loads((adapters / CONFIG_FILE).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not named:
        raise ValueError(
            f"the adapters in {adapters} name no checkpoint that they belong to (a run that begins with new parts has none); "
            "give it with --base"
        )
    adapters = adapters.resolve()
    for place in (adapters.parent / named, adapters.parent.parent / named, Path(named)):
        if is_checkpoint(place):
            return str(place)
    if named.count("/") == 1 and not named.startswith((".", "/", "~")):
        return named
    raise FileNotFoundError(
        f"the adapters in {adapters} belong to the checkpoint {Path(named).name!r}, which is not beside them; "
        "give it with --base"
    )


def load_adapted(
    adapters: Path, base: str | None = None, **options: Any
) -> tuple[IgvaLlavaForConditionalGeneration, IgvaLlavaProcessor]:
    """The base model with adapters, projector and fusion of a folder, in eval mode, and the processor of their training.

    Args:
        adapters, base: see :func:`base_of`.
        options: of ``from_pretrained``, for the base model.

    Returns:
        The model, and the processor of the folder, or where it has none that of the base.

    Raises:
        FileNotFoundError, ValueError: as :func:`base_of`, :func:`model.loading.load_model` and
            :func:`model.training.lora.load_adapters`; or a tokenizer of another vocabulary than the base's.
    """
    base = base_of(adapters, base)
    require_checkpoint(base)
    model = load_model(base, **options)
    own = (adapters / "processor_config.json").is_file()
    processor = AutoProcessor.from_pretrained(adapters if own else base)
    rows = model.config.text_config.vocab_size
    if processor.image_token_id != model.config.image_token_id or len(processor.tokenizer) > rows:
        raise ValueError(
            f"the adapters in {adapters} were trained with another vocabulary ({len(processor.tokenizer)} tokens, <image> is "
            f"{processor.image_token_id}) than that of {base} ({rows} rows, <image> is {model.config.image_token_id}); give "
            "the checkpoint that they were trained from with --base"
        )
    load_adapters(model, adapters)
    return model.eval(), processor
