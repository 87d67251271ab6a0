"""Modules over the operators, with the parameter names of the published checkpoints."""

from igva_kernels.modules.allocator import WeightAllocator
from igva_kernels.modules.igva import IGVAFusion, IGVAFusionOutput

__all__ = ["IGVAFusion", "IGVAFusionOutput", "WeightAllocator"]
