"""Language models in 8 or 4 bits: the linear layers of the language model alone, by torchao or bitsandbytes.

Tower, fusion, projector and head stay as they are: they are a small part of the weights, the allocator's kernels read plain
matrices, and the loss takes the head's weight itself. Both libraries are imported when they are asked for.

========  ==============  ============================================================================================
name      library         a weight is
========  ==============  ============================================================================================
int8      torchao         8 bits, one scale a row (symmetric); products in the dtype of the activations
int4      torchao         4 bits, one scale and zero point for 128 of a row; on a CUDA GPU and in bfloat16 only
nf4       bitsandbytes    4 bits of NormalFloat (QLoRA, arXiv 2305.14314), one scale for 64, itself in 8 bits
========  ==============  ============================================================================================
"""

from __future__ import annotations

import copy
import importlib.util
from typing import Any, Literal, get_args

import torch
from torch import nn

Quantization = Literal["int8", "int4", "nf4"]

#: What is left as it is, under the model with its head and without.
_PARTS = ("vision_tower", "fusion", "multi_modal_projector")
KEPT = (*(f"model.{part}" for part in _PARTS), *_PARTS, "lm_head")

_LIBRARIES = {"int8": "torchao", "int4": "torchao", "nf4": "bitsandbytes"}

#: The form that torch's own kernel for CUDA reads; torchao 0.18 has none for CPUs.
_INT4 = {"group_size": 128, "int4_packing_format": "tile_packed_to_4d"}


def quantization_config(name: Quantization) -> Any:
    """What ``from_pretrained(..., quantization_config=...)`` takes to quantise the language model.

    Args:
        name: ``"int8"``, ``"int4"`` or ``"nf4"``, see above.

    Raises:
        ImportError: the library is not installed.
        ValueError: another name, or ``"int4"`` where there is no CUDA GPU.
    """
    if name not in get_args(Quantization):
        raise ValueError(f"quantization must be one of {', '.join(get_args(Quantization))}, got {name!r}")
    library = _LIBRARIES[name]
    if importlib.util.find_spec(library) is None:
        raise ImportError(f"{name} needs {library}, which is not installed: pip install 'igva-kernels[{library}]'")
    if name == "int4" and not torch.cuda.is_available():
        raise ValueError("int4 of torchao has kernels for CUDA GPUs alone, and there is none; use nf4 or int8")
    if name == "nf4":
        from transformers import BitsAndBytesConfig

        on_gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if on_gpu else torch.float32,
            llm_int8_skip_modules=list(KEPT),
        )
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    scheme = Int8WeightOnlyConfig() if name == "int8" else Int4WeightOnlyConfig(**_INT4)
    return TorchAoConfig(scheme, modules_to_not_convert=list(KEPT))


def loading_options(quantization: Quantization | None, dtype: torch.dtype | Literal["auto"] = "auto") -> dict[str, Any]:
    """Options of ``from_pretrained`` for a name of :func:`quantization_config`.

    Args:
        quantization: None quantises nothing.
        dtype: of everything else; ``"auto"``: that of the checkpoint, and bfloat16 for ``"int4"``.

    Returns:
        ``dtype``, and where something is quantised the config, and the device that does it: the GPU if there is one.

    Raises:
        ImportError, ValueError: as :func:`quantization_config`; a dtype that ``"int4"`` does not have.
    """
    if quantization is None:
        return {"dtype": dtype}
    if quantization == "int4" and dtype not in ("auto", torch.bfloat16):
        raise ValueError(f"int4 of torchao runs in bfloat16, got the dtype {dtype}; leave it out, or use nf4 or int8")
    device: int | str = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {
        "dtype": torch.bfloat16 if quantization == "int4" else dtype,
        "quantization_config": quantization_config(quantization),
        "device_map": {"": device},
    }


def only_language_model(config: Any) -> Any:
    """A quantisation config of transformers that leaves :data:`KEPT` alone, whatever it left alone before; a copy.

    Raises:
        ValueError: a kind of quantisation that cannot leave modules out.
    """
    names = [name for name in ("llm_int8_skip_modules", "modules_to_not_convert") if hasattr(config, name)]
    if not names:
        raise ValueError(
            f"quantization_config is a {type(config).__name__}, which cannot leave vision tower, fusion and projector as they "
            "are; use model.quantization.quantization_config('int8'), or a BitsAndBytesConfig or TorchAoConfig"
        )
    config = copy.copy(config)
    for name in names:
        setattr(config, name, sorted({*(getattr(config, name) or ()), *KEPT}))
    return config


def is_quantized(model: nn.Module) -> bool:
    """Whether ``from_pretrained`` quantised the model."""
    return getattr(model, "hf_quantizer", None) is not None
