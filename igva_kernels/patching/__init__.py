"""Make models that exist use the kernels: one call, undone by another.

    import igva_kernels

    report = igva_kernels.patch(model)  # an official IGVA, DenseConnector or MMFuser model, or Llava / VipLlava of transformers
    print(report)  # what was replaced, and what was left and why
    report.undo()

Models are known by what they have (methods, configuration), not by where their classes come from: nothing of them is imported.
Only methods of the objects that are given are replaced, never a class. What is computed stays the same up to rounding: sums run
in float32 and are rounded once, where those code bases round each step to the dtype of the model.
"""

from __future__ import annotations

from torch import nn

from igva_kernels.checks import check_impl
from igva_kernels.functional import Implementation
from igva_kernels.patching.deformable import deformable_attention
from igva_kernels.patching.dense_connector import dense_connector
from igva_kernels.patching.igva import igva
from igva_kernels.patching.layer_list import layer_list
from igva_kernels.patching.report import Left, PatchReport, Replaced, Rule

__all__ = ["Left", "PatchReport", "Replaced", "patch"]

RULES: tuple[Rule, ...] = (igva, dense_connector, layer_list, deformable_attention)


def patch(model: nn.Module, *, impl: Implementation = "auto") -> PatchReport:
    """Replace what the kernels can do in a model and its submodules.

    Args:
        model: any module; the code bases that are known are named in :mod:`igva_kernels.patching`.
        impl: as for :func:`igva_kernels.fuse`.

    Returns:
        What was replaced, and what was recognised but left as it is, with the reason. ``report.undo()`` restores the model;
        ``with patch(model): ...`` does so at the end of the block.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: ``impl`` is unknown, or nothing in the model is known.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}; patch() replaces methods of objects")
    check_impl(impl)
    report = PatchReport()
    for path, module in model.named_modules():
        for rule in RULES:
            found = rule(module, impl)
            if found is not None:
                report.apply(path, module, found)
    if not report.replaced and not report.left:
        raise ValueError(
            f"nothing in this {type(model).__name__} is known to patch(): it knows official IGVA, DenseConnector and MMFuser "
            "models, Llava and VipLlava of transformers with a list of layers, and modules of deformable attention. "
            "Call igva_kernels.fuse() in the code that mixes the layers instead"
        )
    return report
