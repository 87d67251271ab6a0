"""Reading a checkpoint: all of its weights, or one line that says which file is not as it should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoModelForImageTextToText
from transformers.utils import logging

from model.modeling import IgvaLlavaForConditionalGeneration

_AGAIN = "copy or download it again"
_WHOLE = "copy or download the whole checkpoint"


def load_model(name: str | Path, **options: Any) -> IgvaLlavaForConditionalGeneration:
    """The model of a checkpoint with every weight from its files, which transformers alone does not ask for: it warns, and
    leaves what is missing random.

    Args:
        name: folder, or name of a repository of the hub.
        options: of ``from_pretrained`` (``dtype``, ``device_map``, ``quantization_config`` ...).

    Raises:
        FileNotFoundError: the folder holds no weights, or lacks a file of them.
        ValueError: a damaged file, or weights of another model than ``config.json`` describes.
    """
    if Path(name).is_dir():
        check_files(Path(name))
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of what does not fit, a line a tensor; ours is one line
    try:
        model, loading = AutoModelForImageTextToText.from_pretrained(
            name, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    finally:
        logging.set_verbosity(verbosity)
    _check_complete(name, model, loading)
    return model


def check_files(folder: Path) -> None:
    """Refuse a checkpoint folder with a file that is damaged or not there, by the name of the file.

    Read are the JSON files, and of the weights the headers, which tell how long each file must be.

    Raises:
        FileNotFoundError, ValueError: as :func:`load_model`.
    """
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); {_AGAIN}") from error
        for shard in sorted(set(content["weight_map"].values())) if path.name.endswith(".index.json") else ():
            if not (folder / shard).is_file():
                raise FileNotFoundError(f"{folder} lacks {shard}, which {path.name} names; {_WHOLE}")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights and not any(folder.glob("pytorch_model*.bin")):
        raise FileNotFoundError(f"{folder} holds no weights (*.safetensors); {_WHOLE}")
    for path in [*weights, *sorted(folder.glob("*/*.safetensors"))]:
        try:
            with safe_open(str(path), framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or incomplete ({error}); {_AGAIN}") from error


def _check_complete(name: str | Path, model: IgvaLlavaForConditionalGeneration, loading: dict[str, Any]) -> None:
    """Refuse what transformers only warns of: weights that are not there, or of another shape, would be random."""
    wrong = [f"{key} is missing" for key in sorted(loading["missing_keys"])]
    wrong += [f"{key} is {tuple(found)}, expected {tuple(wanted)}" for key, found, wanted in sorted(loading["mismatched_keys"])]
    wrong += [f"{key} has no place in it" for key in sorted(loading["unexpected_keys"])]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"the weights in {name} are not those of the model that its config.json describes, with the fusion "
            f"{model.config.fusion['type']!r}: {'; '.join(wrong[:3])}{more}. Take config.json and weights from one checkpoint; "
            "`igva convert` changes the fusion's order"
        )
