"""The vision side of a model (tower, fusion, projector) as one file that needs torch and igva_kernels, and nothing else.

``torch.export`` records the operators of this package as they are: wherever the file runs, each takes the implementation of
that device. Batches may have any size; the size of the pictures is the model's.

Shapes: B images · N' image tokens · H width of the language model · E width of a sentence embedding · K layer groups.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import igva_kernels
from model.modeling import IgvaLlavaForConditionalGeneration
from model.new_folder import new_file
from model.processing import IgvaLlavaProcessor

#: Name of the file's record of what it takes and gives, among the ``extra_files`` of :func:`torch.export.load`.
RECORD = "vision_side.json"

#: Batches that a file is checked with: one of those that torch treats specially, and others than that of the recording.
_CHECKED_BATCHES = (1, 2, 5)
_RECORDED_BATCH = 2

#: Largest difference from eager that is taken for rounding, in epsilons of the dtype times the largest token. The same
#: operators run in the same order; only matrix products may be split otherwise.
_ROUNDINGS = 64


class VisionSide(nn.Module):
    """Pictures, and the instruction where the fusion reads it, to what the language model reads.

    Args:
        model: whose tower, fusion and projector are used; they are shared, not copied.
    """

    def __init__(self, model: IgvaLlavaForConditionalGeneration) -> None:
        super().__init__()
        self.reads_instruction = model.reads_instruction
        # A second view of the same parts: the language model's weights must not get into the file.
        self.model = copy.copy(model.model)
        self.model._modules = {name: part for name, part in model.model._modules.items() if name != "language_model"}

    def forward(self, pixel_values: Tensor, instruction_embeds: Tensor | None = None) -> dict[str, Tensor]:
        """Image tokens, and the weights of the layer groups where the instruction gives them.

        Args:
            pixel_values: (B, 3, height, width), prepared by the processor.
            instruction_embeds: (B, E); for fusions that read it.

        Returns:
            ``image_tokens`` (B, N', H), and ``group_weights`` (B, K) in float32 where there are any.
        """
        features = self.model.get_image_features(pixel_values, instruction_embeds)
        outputs = {"image_tokens": features.pooler_output}
        if features.fusion_weights is not None:
            outputs["group_weights"] = features.fusion_weights
        return outputs


@dataclass(frozen=True)
class ExportReport:
    """What was exported, and how far it is from eager.

    Args:
        record: inputs, outputs and preparation, as written into the file.
        error: largest difference of an image token from eager, over batches of several sizes.
        largest: the largest magnitude among them.
        operators: names of this package's operators in the graph.
    """

    record: dict[str, Any]
    error: float
    largest: float
    operators: tuple[str, ...]


@torch.no_grad()
def export_vision_side(
    model: IgvaLlavaForConditionalGeneration, path: str | Path, processor: IgvaLlavaProcessor | None = None
) -> ExportReport:
    """Write the vision side of a model to a file, read it back, and compare it with the model.

    Args:
        model: on the device that the file is checked on, in the dtype that it is to have.
        path: a new file, ending in ``.pt2``.
        processor: whose normalisation of pictures is noted in the file; None notes none.

    Raises:
        FileExistsError: ``path`` is there already.
        RuntimeError: the file does not give what the model gives; it is not written then.
        ValueError: ``path`` has another ending.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise ValueError(f"{path} must end in .pt2, the format of torch.export; write to {path.with_suffix('.pt2')}")
    side = VisionSide(model).eval()
    batch = torch.export.Dim("batch", min=1)
    inputs = _random_inputs(model, _RECORDED_BATCH)
    record = _record(model, processor)
    with new_file(path) as file:
        exported = torch.export.export(side, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs), strict=False)
        torch.export.save(exported, file, extra_files={RECORD: json.dumps(record, indent=1)})
        error, largest = _difference(model, side, file)
    operators = {str(node.target) for node in exported.graph.nodes if str(node.target).startswith("igva.")}
    return ExportReport(record, error, largest, tuple(sorted(name.removesuffix(".default") for name in operators)))


def _difference(model: IgvaLlavaForConditionalGeneration, side: VisionSide, file: Path) -> tuple[float, float]:
    """The largest difference between file and model, and the largest token; raises RuntimeError above rounding."""
    loaded = torch.export.load(file).module()
    error = largest = 0.0
    for batch in _CHECKED_BATCHES:
        inputs = _random_inputs(model, batch)
        expected, found = side(*inputs)["image_tokens"], loaded(*inputs)["image_tokens"]
        error = max(error, (found - expected).abs().max().item())
        largest = max(largest, expected.abs().max().item())
    if not error <= _ROUNDINGS * torch.finfo(model.dtype).eps * largest:
        raise RuntimeError(
            f"the exported vision side differs from the model by {error:.2g}, with image tokens up to {largest:.2g}: this is a "
            "defect of the export, and nothing was written"
        )
    return error, largest


def _random_inputs(model: IgvaLlavaForConditionalGeneration, batch: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(batch)
    side = model.config.image_size
    inputs = [torch.randn(batch, 3, side, side, generator=generator).to(model.device, model.dtype)]
    if model.reads_instruction:
        inputs.append(torch.randn(batch, model.config.fusion["text_dim"], generator=generator).to(model.device))
    return tuple(inputs)


def _record(model: IgvaLlavaForConditionalGeneration, processor: IgvaLlavaProcessor | None) -> dict[str, Any]:
    config, side = model.config, model.config.image_size
    dtype = str(model.dtype).removeprefix("torch.")
    inputs = {"pixel_values": f"{dtype} (batch, 3, {side}, {side})"}
    if model.reads_instruction:
        inputs["instruction_embeds"] = f"float32 (batch, {config.fusion['text_dim']})"
    outputs = {"image_tokens": f"{dtype} (batch, {config.num_image_tokens}, {config.text_config.hidden_size})"}
    if model.reads_instruction:
        outputs["group_weights"] = f"float32 (batch, {config.fusion_plan().num_groups})"
    pictures = None
    if processor is not None:
        image_processor = processor.image_processor
        pictures = {
            "aspect_ratio": processor.aspect_ratio,
            "mean": list(image_processor.image_mean),
            "std": list(image_processor.image_std),
        }
    return {
        "inputs": inputs,
        "outputs": outputs,
        "pictures": pictures,
        "fusion": config.fusion,
        "sentence_encoder": None if processor is None else processor.sentence_encoder_fingerprint,
        "versions": {"torch": torch.__version__, "igva_kernels": igva_kernels.__version__},
    }
