"""How many operations a step needs, and how many the card could do: what TFLOP/s and its share of the card are made of.

Counted is what the step needs by its formulas, on real tokens: a product with a weight of n entries costs 2n operations a
token in the forward pass, 2n for the gradient of its input, and 2n for that of the weight where it learns. Causal attention
over S tokens costs 2·S²·width forward (half of the square) and twice that backward. Not counted: padding, what activation
checkpointing computes again, norms, activations, and the fusion of the layers (below a thousandth of the step for IGVA). So the
share of the card is the model FLOPs utilisation of PaLM (arXiv 2204.02311, appendix B), with causal attention at its half.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from model.modeling import IgvaLlavaForConditionalGeneration

#: Dense bfloat16 operations a second, by a part of the name that torch gives the card; the first that fits counts. From the
#: vendors' data sheets, whose figures "with sparsity" are halved: A100, A30, A40, A10, L4, L40S, H100, H200 and Blackwell
#: (nvidia.com/data-center), RTX 3090 and 4090 (white papers GA102 and Ada, with fp32 accumulation), MI250X (one of its two
#: dies, as torch sees them), MI300X and MI325X (amd.com/instinct).
PEAKS: tuple[tuple[str, float], ...] = (
    ("B200", 2250e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("A30", 165e12),
    ("A40", 149.7e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),
    ("MI325X", 1307e12),
    ("MI300X", 1307e12),
    ("MI250X", 191.5e12),
)


def peak_of(device_name: str) -> float | None:
    """Dense bfloat16 operations a second of a card; None for one that is not in :data:`PEAKS`."""
    words = f" {device_name} ".replace("-", " ")
    return next((peak for name, peak in PEAKS if f" {name} " in words), None)


def peak_of_run(device: torch.device, precision: str) -> float | None:
    """What a run in ``precision`` (``fp32`` or ``bf16``) can be held against; None on a CPU, in fp32 and on unknown cards."""
    if device.type != "cuda" or precision != "bf16":
        return None
    return peak_of(torch.cuda.get_device_name(device))


@dataclass(frozen=True)
class StepFlops:
    """Operations of forward and backward pass, by what they grow with.

    Args:
        per_token: for each token of the language model, image tokens included.
        per_squared_length: for the square of each sample's length, in attention.
        per_label: for each labelled position, in the head.
        per_image: for each image or tile, in tower and projector.
    """

    per_token: float
    per_squared_length: float
    per_label: float
    per_image: float

    @classmethod
    def of(cls, model: IgvaLlavaForConditionalGeneration) -> StepFlops:
        """Counts of a model in which ``requires_grad`` is as in training, and images have the size of its config."""
        inner, config = model.model, model.config
        text = config.text_config
        heads = text.num_attention_heads
        width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
        side, vision = config.image_size, config.vision_config
        rows, columns = config.image_tokens.patches(side, side)
        num_tokens = rows * columns + config.num_prefix_tokens
        # Blocks above the deepest layer that the fusion reads are not run.
        depth = max(inner.tower_plan.sources) / vision.num_hidden_layers
        blocks = sum(linear.in_features * linear.out_features for linear in _linears(inner.vision_tower))
        patches = sum(
            conv.out_channels * conv.in_channels // conv.groups * math.prod(conv.kernel_size)
            for conv in inner.vision_tower.modules()
            if isinstance(conv, nn.Conv2d)
        )
        tower_forward = depth * (2 * blocks * num_tokens + 4 * num_tokens**2 * vision.hidden_size * vision.num_hidden_layers)
        tower_forward += 2 * patches * rows * columns
        tower_learns = any(parameter.requires_grad for parameter in inner.vision_tower.parameters())
        return cls(
            per_token=sum(map(_forward_and_backward, _linears(inner.language_model))),
            per_squared_length=3 * 2 * width * text.num_hidden_layers,
            per_label=_forward_and_backward(model.lm_head),
            per_image=tower_forward * (3 if tower_learns else 1)
            + config.num_image_tokens * sum(map(_forward_and_backward, _linears(inner.multi_modal_projector))),
        )

    def total(self, tokens: float, squared_lengths: float, labels: float, images: float) -> float:
        """Operations for so much of each."""
        return (
            self.per_token * tokens
            + self.per_squared_length * squared_lengths
            + self.per_label * labels
            + self.per_image * images
        )


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


def _forward_and_backward(linear: nn.Linear) -> float:
    """Operations a row; the shape of the layer, since ZeRO-3 leaves weights empty."""
    products = 3 if linear.weight.requires_grad else 2
    return 2.0 * products * linear.in_features * linear.out_features
