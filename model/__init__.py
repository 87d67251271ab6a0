"""A LLaVA-style model whose image features are IGVA's instruction-guided mix of the tower's layers.

Importing the package registers it with transformers: ``AutoModelForImageTextToText.from_pretrained(folder)`` and
``AutoProcessor.from_pretrained(folder)`` work after ``import model``.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from model._hf_compat import check_version as _check_version  # noqa: F401 (first: it refuses versions that the rest fails on)
from model.build import build_model, build_processor
from model.configuration import IgvaLlavaConfig
from model.modeling import IgvaLlavaForConditionalGeneration, IgvaLlavaModel, IgvaLlavaOutput
from model.processing import IgvaLlavaProcessor

AutoConfig.register(IgvaLlavaConfig.model_type, IgvaLlavaConfig, exist_ok=True)
AutoModel.register(IgvaLlavaConfig, IgvaLlavaModel, exist_ok=True)
AutoModelForImageTextToText.register(IgvaLlavaConfig, IgvaLlavaForConditionalGeneration, exist_ok=True)
AutoProcessor.register(IgvaLlavaConfig, IgvaLlavaProcessor, exist_ok=True)

__all__ = [
    "IgvaLlavaConfig",
    "IgvaLlavaForConditionalGeneration",
    "IgvaLlavaModel",
    "IgvaLlavaOutput",
    "IgvaLlavaProcessor",
    "build_model",
    "build_processor",
]
