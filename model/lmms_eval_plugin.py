"""Tells lmms-eval of the model: ``pip install 'igva-kernels[lmms-eval]'`` makes ``lmms-eval --model igva`` work.

The entry point of the group ``lmms_eval.models`` (EvolvingLMMs-Lab/lmms-eval: lmms_eval/models/registry_v2.py, from version 0.7
on) names :func:`manifest`. The classes themselves are imported when a run asks for the model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

#: What ``lmms-eval --model`` takes.
MODEL_NAME = "igva"


def manifest() -> ModelManifest:
    """What lmms-eval's registry keeps: a class for chat tasks, and one for the simple tasks of ``--force_simple``.

    lmms-eval gives multiple-choice tasks, which compare likelihoods, to simple models only.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id=MODEL_NAME,
        chat_class_path="model.lmms_eval_model.IgvaChat",
        simple_class_path="model.lmms_eval_model.IgvaSimple",
        aliases=("igva_llava",),
    )
