"""Language models from GGUF files, as llama.cpp has them: dequantised when they are read, plain models from then on.

A name that ends in ``.gguf`` may stand wherever a language model's folder may: in :func:`model.build.build_model` and in
``model.language_model`` of a recipe. transformers reads such files with the package gguf. Vision towers have no GGUF form that
transformers reads.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from model._hf_compat import gguf_options


def is_gguf(source: str | Path) -> bool:
    """Whether a language model's name means a GGUF file."""
    return str(source).endswith(".gguf")


def place(source: str | Path) -> tuple[str, dict[str, Any]]:
    """Folder or hub name, and the further options, that ``from_pretrained`` of transformers takes for a language model.

    Raises:
        FileNotFoundError: there is no such GGUF file.
        ImportError: it needs gguf, which is not installed.
    """
    if not is_gguf(source):
        return str(source), {}
    file = Path(source)
    if not file.is_file():
        raise FileNotFoundError(f"no GGUF file at {file}; of a hub repository, download the file first")
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"{file.name} is read with gguf, which is not installed: pip install 'igva-kernels[gguf]'")
    return str(file.parent), {"gguf_file": file.name}


def load_language_model(source: str | Path, **options: Any) -> Any:
    """A causal language model of transformers from a folder, a hub name or a GGUF file.

    Args:
        source: where it is.
        options: of ``from_pretrained``.

    Raises:
        FileNotFoundError, ImportError: as :func:`place`.
    """
    folder, which = place(source)
    if not which:
        return AutoModelForCausalLM.from_pretrained(folder, **options)
    # Without it the model counts as quantised, and can be neither saved nor trained.
    language_model = AutoModelForCausalLM.from_pretrained(folder, **which, **options, **gguf_options())
    if hasattr(language_model.config, "quantization_config"):
        del language_model.config.quantization_config
    return language_model


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a folder, a hub name or a GGUF file.

    Raises:
        FileNotFoundError, ImportError: as :func:`place`.
    """
    folder, which = place(source)
    tokenizer = AutoTokenizer.from_pretrained(folder, **which)
    if which:
        _take_special_tokens(tokenizer, Path(source))
    return tokenizer


def _take_special_tokens(tokenizer: Any, file: Path) -> None:
    """Set the special tokens by the numbers in the file: some versions of transformers recover others, or none."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("unk_token", "unknown")):
        field = fields.get(f"tokenizer.ggml.{key}_token_id")
        if field is not None:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(int(field.parts[field.data[0]][0])))
