"""Modules over the operators, with the parameter names of the published checkpoints."""

from igva_kernels.modules.allocator import WeightAllocator
from igva_kernels.modules.deformable_attention import DeformableAttention
from igva_kernels.modules.igva import IGVAFusion, IGVAFusionOutput
from igva_kernels.modules.mixture_of_layers import MixtureOfLayersRouter, MixtureOfLayersRouting
from igva_kernels.modules.mllama import columns_to_blocks, columns_to_interleaved
from igva_kernels.modules.mmfuser import MMFuserFusion, mmfuser_from_official, mmfuser_to_official
from igva_kernels.modules.multi_layer_sum import MultiLayerSum
from igva_kernels.modules.norms import output_norm_of
from igva_kernels.modules.scalar_mix import ScalarMix, convert_allennlp_scalar_mix
from igva_kernels.modules.tgif import TGIFFusion, TGIFFusionOutput
from igva_kernels.modules.token_integration import SparseTokenIntegration, reduce_tokens
from igva_kernels.modules.vip_llava import VipLlavaFusion

__all__ = [
    "DeformableAttention",
    "IGVAFusion",
    "IGVAFusionOutput",
    "MMFuserFusion",
    "MixtureOfLayersRouter",
    "MixtureOfLayersRouting",
    "MultiLayerSum",
    "ScalarMix",
    "SparseTokenIntegration",
    "TGIFFusion",
    "TGIFFusionOutput",
    "VipLlavaFusion",
    "WeightAllocator",
    "columns_to_blocks",
    "columns_to_interleaved",
    "convert_allennlp_scalar_mix",
    "mmfuser_from_official",
    "mmfuser_to_official",
    "output_norm_of",
    "reduce_tokens",
]
