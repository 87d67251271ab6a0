"""How much memory a training step takes, without a weight and without the memory: the step runs on tensors that hold nothing.

torch's fake tensors have shapes and types, and every operator says what it would give. The parts of a step run on them as they
run in training (tower, fusion, projector, language model, chunked loss, backward), and what would be alive is added up. AdamW's
states are two numbers in fp32 for each that learns; its step needs no more than the backward had.

Where a step depends on values (how many placeholders a text has, how many labels), the plan takes numbers instead. Counted
are tensors; not what a driver, a library or the gaps of the allocator take beside them, for which :data:`RESERVE` stands, nor
temporaries inside of a single kernel.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.configuration import IgvaLlavaConfig
from model.modeling import IgvaLlavaForConditionalGeneration
from model.training.freeze import FreezeReport, apply_stage, report
from model.training.layers import checkpoint_layers
from model.training.lora import add_lora
from model.training.recipe import TrainRecipe

RESERVE = 0.08
"""Share of a card that is left free: context and libraries take 1 to 2 GB of an 80 GB card, gaps of the allocator as much."""

CARDS_GB: dict[str, float] = {
    "RTX 3090": 24,
    "RTX 4090": 24,
    "L40S": 48,
    "A100 40GB": 40,
    "A100 80GB": 80,
    "H100": 80,
    "H200": 141,
    "B200": 180,
    "MI300X": 192,
}
"""Memory by the vendors' data sheets, in 10^9 bytes."""

ANSWER_SHARE = 0.25
"""Labels among the text tokens of a sample that is not described: LLaVA's mix has answers of about that share."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one step on one device.

    Args:
        weights: of all parameters and buffers, by part.
        gradients: of what learns.
        optimizer: AdamW's two moments, in fp32.
        activations: the most that is alive beside these at any time of the step, temporaries included.
        batch: samples of the forward pass.
        length: tokens of a sample, image tokens included.
    """

    weights: dict[str, int]
    gradients: int
    optimizer: int
    activations: int
    batch: int
    length: int

    @property
    def fixed(self) -> int:
        """What does not grow with the batch."""
        return sum(self.weights.values()) + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """The peak of the step."""
        return self.fixed + self.activations


@dataclass(frozen=True)
class MemoryPlan:
    """A recipe's step, and what it would be with another batch.

    Args:
        step: at the recipe's ``micro_batch_size``.
        report: which parameters learn.
        per_sample: bytes of activations that one more sample adds.
        without_samples: bytes of activations that no sample adds.
    """

    step: StepMemory
    report: FreezeReport
    per_sample: int
    without_samples: int

    def largest_batch(self, card_gb: float) -> int:
        """Samples in one forward pass that a card of so many 10^9 bytes holds; 0 where not even one fits."""
        room = card_gb * 1e9 * (1 - RESERVE) - self.step.fixed - self.without_samples
        return max(0, math.floor(room / max(self.per_sample, 1)))


def plan_memory(
    recipe: TrainRecipe, config: IgvaLlavaConfig, *, length: int | None = None, labels: int | None = None, bf16: bool = True
) -> MemoryPlan:
    """Memory of a step of a recipe on one device that holds the whole model (``distributed: ddp``).

    Args:
        recipe: the run.
        config: the model's architecture.
        length: tokens of each sample, image tokens included; None for the tokens of one image and 128 of text, and at most
            ``data.max_length``.
        labels: tokens of each sample that are learned; None for :data:`ANSWER_SHARE` of its text.
        bf16: whether the step computes in bf16, with frozen weights held in it where the recipe does not say otherwise.

    Raises:
        ValueError: a length that does not hold an image, or more than ``data.max_length``.
    """
    image_tokens = config.num_image_tokens
    length = min(image_tokens + 128, recipe.data.max_length) if length is None else length
    if not image_tokens < length <= recipe.data.max_length:
        raise ValueError(
            f"length is {length}, expected more than the {image_tokens} tokens of an image and at most data.max_length "
            f"{recipe.data.max_length}"
        )
    labels = max(1, round(ANSWER_SHARE * (length - image_tokens))) if labels is None else labels
    steps = [
        _step(recipe, config, batch, length, labels, bf16)
        for batch in dict.fromkeys((recipe.micro_batch_size, max(1, 2 * recipe.micro_batch_size)))
    ]
    (at_recipe, parameters), (doubled, _) = steps
    per_sample = (doubled.activations - at_recipe.activations) / (doubled.batch - at_recipe.batch)
    without = at_recipe.activations - per_sample * at_recipe.batch
    return MemoryPlan(at_recipe, parameters, round(per_sample), max(0, round(without)))


def _step(
    recipe: TrainRecipe, config: IgvaLlavaConfig, batch: int, length: int, labels: int, bf16: bool
) -> tuple[StepMemory, FreezeReport]:
    model = _model(recipe, config)
    with FakeTensorMode(), LiveMemory() as memory:
        _allocate(model, bf16 and recipe.frozen_weights != "fp32")
        weights = {
            name: sum(tensor.nbytes for tensor in {id(t): t for t in (*part.parameters(), *part.buffers())}.values())
            for name, part in _parts(model)
        }
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = sum(parameter.nbytes for parameter in learning)
        held = memory.peak = memory.live
        if recipe.accumulation_steps() > 1:
            # Those of the passes before, to which this one adds.
            for parameter in learning:
                parameter.grad = torch.zeros_like(parameter)
        _run(model, batch, length, labels, bf16)
        activations = max(0, memory.peak - held - gradients)
        parameters = report(model, recipe.stage)
    moments = sum(2 * 4 * parameter.numel() for parameter in learning)
    return StepMemory(weights, gradients, moments, activations, batch, length), parameters


def _model(recipe: TrainRecipe, config: IgvaLlavaConfig) -> IgvaLlavaForConditionalGeneration:
    """On the meta device, as the recipe trains it."""
    with torch.device("meta"):
        model = IgvaLlavaForConditionalGeneration(config)
        if recipe.resolved_language_model_training == "lora":
            add_lora(model, recipe.lora)
    apply_stage(model, recipe.stage, recipe.resolved_language_model_training)
    if recipe.activation_checkpointing:
        checkpoint_layers(model.model.language_model, recipe.checkpoint_every_n_layers)
    return model.train()


def _allocate(model: IgvaLlavaForConditionalGeneration, frozen_in_bf16: bool) -> None:
    """Give parameters and buffers memory, which under a fake mode is none; tied ones stay tied."""
    halves = {
        id(p) for part in (model.model.vision_tower, model.model.language_model, model.lm_head) for p in part.parameters()
    }
    new: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in new:
                in_bf16 = frozen_in_bf16 and not parameter.requires_grad and id(parameter) in halves
                memory = torch.empty(parameter.shape, dtype=torch.bfloat16 if in_bf16 else parameter.dtype)
                new[id(parameter)] = torch.nn.Parameter(memory, requires_grad=parameter.requires_grad)
            setattr(module, name, new[id(parameter)])
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, torch.zeros(buffer.shape, dtype=buffer.dtype), persistent=False)


def _run(model: IgvaLlavaForConditionalGeneration, batch: int, length: int, labels: int, bf16: bool) -> None:
    """Forward and backward pass of one batch with one image a sample."""
    config = model.config
    side, text_dim = config.image_size, config.fusion.get("text_dim")
    input_ids = torch.zeros(batch, length, dtype=torch.int64)
    targets = torch.zeros(batch * labels, dtype=torch.int64)
    pixel_values = torch.zeros(batch, 3, side, side)
    embeds = torch.zeros(batch, text_dim) if model.reads_instruction and text_dim else None
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        tokens = model.get_image_features(pixel_values, embeds).pooler_output
        words = model.get_input_embeddings()(input_ids)
        # Where the placeholders stand depends on the texts; in front, the same bytes are written.
        mixed = torch.cat([tokens.to(words.dtype), words[:, tokens.shape[1] :]], dim=1)
        hidden = model.model.language_model(inputs_embeds=mixed, use_cache=False).last_hidden_state
        loss = model.lm_head(hidden.flatten(0, 1)[: batch * labels], targets)
    loss.backward()


class LiveMemory(TorchDispatchMode):
    """Adds up the storages of the tensors that operators give, while they are alive.

    Attributes:
        live: bytes now.
        peak: the most so far; may be set to begin anew.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return outputs

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if self._known[key]:
            return
        self._known[key] += 1
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        del self._known[key]
        self.live -= size


def _parts(model: IgvaLlavaForConditionalGeneration) -> list[tuple[str, torch.nn.Module]]:
    inner = model.model
    parts = {
        "vision tower": inner.vision_tower,
        "fusion": inner.fusion,
        "projector": inner.multi_modal_projector,
        "language model": inner.language_model,
    }
    if not model.config.tie_word_embeddings:
        parts["head"] = model.lm_head
    return [(name, part) for name, part in parts.items() if part is not None]
