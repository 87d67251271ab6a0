"""The only place that knows versions of transformers: 5.10 to 5.x.

Everything here is a name that moved or a default that changed; the rest of the package imports what it needs from here.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedModel

_OLDEST = (5, 10)


def check_version(version: str = transformers.__version__) -> None:
    """Raises ImportError for a transformers that the package was not written for."""
    major, minor = (int(part) for part in version.split(".")[:2])
    if (major, minor) < _OLDEST or major > _OLDEST[0]:
        raise ImportError(
            f"model needs transformers>={_OLDEST[0]}.{_OLDEST[1]},<{_OLDEST[0] + 1}, found {version}; "
            "install a version of that range"
        )


def pil_image_processor(name: str) -> Any:
    """The image processor class ``name`` (``"CLIPImageProcessor"``) in the variant that needs no torchvision.

    The PIL variants carry a suffix in the versions that have it; before, the plain name was the PIL one.

    Raises:
        ValueError: transformers has no such class.
    """
    for candidate in (f"{name}Pil", name):
        processor = getattr(transformers, candidate, None)
        if processor is not None:
            return processor
    raise ValueError(f"transformers {transformers.__version__} has no image processor {name!r}")


def load_image_processor(values: dict[str, Any]) -> Any:
    """An image processor from the values of its JSON file, PIL variant.

    ``AutoImageProcessor`` of some versions insists on torchvision even for a file that names a PIL class.

    Raises:
        ValueError: the values name no class, or one that transformers does not have.
    """
    values = dict(values)
    name = values.pop("image_processor_type", None)
    if name is None:
        raise ValueError("the image processor's file names no image_processor_type")
    return pil_image_processor(name.removesuffix("Pil").removesuffix("Fast")).from_dict(values)


def gguf_options() -> dict[str, Any]:
    """What ``from_pretrained`` takes beside ``gguf_file`` for dense weights.

    Newer versions leave the model quantised, which can be neither saved nor trained, unless they are told to dequantise; older
    ones always did, and take no ``quantization_config`` with a GGUF file.
    """
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def enable_activation_checkpointing(module: PreTrainedModel) -> None:
    """Compute activations again in the backward pass; renamed from gradient_checkpointing_enable, which warns by now."""
    enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
    enable({"use_reentrant": False})


# On import, and before anything else of the package: a name that is missing would tell nobody why.
check_version()
