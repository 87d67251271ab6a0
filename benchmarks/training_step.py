"""One training step as the official recipe takes it, and the same step with the parts of this package switched on one by one.

The recipe is written plainly on transformers' own modules: rows padded to the longest, drawn in random order; all hidden states
of the tower kept; the eager fusion of the released code (:mod:`benchmarks.peers`); full logits, upcast to fp32 and shifted, as
transformers' ``ForCausalLMLoss`` takes them. Model, parameters, samples, precision, attention, activation checkpointing and
optimizer are the same in all lines, and so are loss and gradients, which are compared before anything is timed.

    python -m benchmarks --part training_step
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import choose_attention
from model.configuration import IgvaLlavaConfig
from model.data.batches import StepBatchSampler
from model.data.collator import ImageTextCollator, PackingCollator
from model.loss import IGNORE_INDEX, negative_entropy
from model.modeling import IgvaLlavaForConditionalGeneration
from model.training.precision import hold_frozen_weights

from .peers import OfficialAllocator, official_fuse, official_summaries

SEED = 20261123
BALANCE_LOSS_WEIGHT = 0.02

Layout = Literal["random", "grouped", "packed"]
Vision = Literal["eager", "kernels", "streaming"]


@dataclass(frozen=True)
class Setup:
    """Sizes of one step.

    Args:
        name: printed in tables.
        stage: 1 (projector learns) or 2 (projector, allocator and language model).
        text, vision: configurations of language model and tower.
        text_dim, allocator_dim: widths of the sentence embedding and of the allocator.
        batch: samples of the step.
        micro_batch: samples of a forward pass.
        text_tokens: median of the text tokens of a sample with an image.
    """

    name: str
    stage: int
    text: dict
    vision: dict
    text_dim: int
    allocator_dim: int
    batch: int
    micro_batch: int
    text_tokens: int


@dataclass(frozen=True)
class Switches:
    """What of a step is ours.

    Args:
        layout: which samples share a forward pass, and whether they share a row.
        chunked_loss: the cross-entropy at labelled positions only, chunk by chunk; else full logits.
        vision: the fusion in plain torch, by the kernels from the tuple of hidden states, or by them while the tower runs.
    """

    layout: Layout = "random"
    chunked_loss: bool = False
    vision: Vision = "eager"


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Args:
        name: what is switched on.
        part: what it belongs to: the recipe, the loop or the kernels.
        switches: of the step.
    """

    name: str
    part: Literal["recipe", "loop", "kernels"]
    switches: Switches


RECIPE = Line("the official recipe's way", "recipe", Switches())

#: Each line is the one before with one part more.
LINES = (
    RECIPE,
    Line("+ loss at the labels, in chunks", "loop", Switches(chunked_loss=True)),
    Line("+ neighbours in length share a pass", "loop", Switches("grouped", chunked_loss=True)),
    Line("+ packed rows", "loop", Switches("packed", chunked_loss=True)),
    Line("+ fused kernels", "kernels", Switches("packed", chunked_loss=True, vision="kernels")),
    Line("+ tower layer by layer", "kernels", Switches("packed", chunked_loss=True, vision="streaming")),
)

#: The kernels without the loop.
KERNELS_ONLY = Line("the recipe with the kernels alone", "kernels", Switches(vision="streaming"))


@dataclass
class Trained:
    """A model in training and what the plain step needs beside it.

    Args:
        network: the model of the package.
        allocator: the released allocator, with the parameters of the network's own.
        groups, base: the layers of the groups, and the one that is concatenated.
        setup: its sizes.
        device, precision: where and in what it runs, ``fp32`` or ``bf16``.
    """

    network: IgvaLlavaForConditionalGeneration
    allocator: nn.Module
    groups: tuple[tuple[int, ...], ...]
    base: int
    setup: Setup
    device: torch.device
    precision: str

    def learning(self) -> list[nn.Parameter]:
        """Parameters that learn."""
        return [parameter for parameter in self.network.parameters() if parameter.requires_grad]


def build(setup: Setup, device: torch.device) -> Trained:
    """The model with random weights as a run of the package prepares it: what learns in fp32, the rest in bf16 on a GPU."""
    from model.training.freeze import apply_stage

    torch.manual_seed(SEED)
    config = IgvaLlavaConfig(
        vision_config=setup.vision,
        text_config=setup.text,
        fusion={
            "type": "igva",
            "stage": setup.stage,
            "text_dim": setup.text_dim,
            "hidden_dim": setup.allocator_dim,
            "order": "base_first",  # that of the released code
        },
        image_token_id=setup.text["vocab_size"] - 1,
        balance_loss_weight=BALANCE_LOSS_WEIGHT if setup.stage == 2 else 0.0,
    )
    precision = "bf16" if device.type == "cuda" else "fp32"
    with torch.device(device):
        network = IgvaLlavaForConditionalGeneration(config)
    apply_stage(network, setup.stage, "full" if setup.stage == 2 else "frozen")
    hold_frozen_weights(network, "auto", device, precision)
    network.train()
    network.model.language_model.set_attn_implementation(attention(device, "random"))
    sizes = {"vision_dim": config.vision_config.hidden_size, "text_dim": setup.text_dim, "hidden_dim": setup.allocator_dim}
    allocator = OfficialAllocator(num_groups=config.fusion["num_groups"], **sizes)
    share_parameters(network.model.fusion.allocator, allocator)
    network.set_fusion_stage(
        2
    )  # in stage 1 the groups are one mean of all layers, which the released code takes of the groups'
    groups = network.model.tower_plan.groups
    network.set_fusion_stage(setup.stage)
    base = config.vision_config.num_hidden_layers - 1  # the penultimate layer
    return Trained(network, allocator, groups, base, setup, device, precision)


def share_parameters(source: nn.Module, target: nn.Module) -> None:
    """Give ``target`` the very parameters of ``source``, by name."""
    parameters = dict(source.named_parameters())
    for name, _ in list(target.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        setattr(target.get_submodule(owner), leaf, parameters[name])


def attention(device: torch.device, layout: Layout) -> str:
    """The attention that a run of the package takes for a layout."""
    return choose_attention("auto", device, packing=layout == "packed", half_precision=device.type == "cuda").name


# ---- data ---------------------------------------------------------------------------------------------------------------


def make_samples(trained: Trained) -> list[dict[str, Tensor]]:
    """Samples of random tokens in the shape of LLaVA's mix: 1 in 8 without an image, text lengths spread log-normally.

    The spread (sigma 0.8) is an assumption, not taken from the data: the share of padding is printed with every line. A third
    of the text is the question, the rest is learned.
    """
    setup, config = trained.setup, trained.network.config
    generator = torch.Generator().manual_seed(SEED)
    samples = []
    for index in range(setup.batch):
        has_image = index % 8 != 7
        spread = torch.randn((), generator=generator).mul(0.8).exp().item()
        median = setup.text_tokens if has_image else 4 * setup.text_tokens
        length = min(max(round(median * spread), 4), 8 * setup.text_tokens)
        text = torch.randint(1, config.image_token_id, (length,), generator=generator)
        image = torch.full((config.num_image_tokens if has_image else 0,), config.image_token_id)
        labels = torch.cat((image, text))
        labels[: len(image) + length // 3] = IGNORE_INDEX
        sample = {"input_ids": torch.cat((image, text)), "labels": labels}
        if has_image:
            side = config.image_size
            sample["pixel_values"] = torch.randn(1, 3, side, side, generator=generator)
            sample["instruction_embeds"] = torch.randn(1, setup.text_dim, generator=generator)
        samples.append(sample)
    return samples


def make_batches(trained: Trained, samples: list[dict[str, Tensor]], layout: Layout) -> list[dict[str, Any]]:
    """The forward passes of the step, dealt by the package's own sampler, on the device."""
    sampler = StepBatchSampler(
        [len(sample["input_ids"]) for sample in samples],
        ["pixel_values" in sample for sample in samples],
        batch_size=trained.setup.batch,
        micro_batch_size=trained.setup.micro_batch,
        packing=layout == "packed",
        grouping="random" if layout == "random" else "modality_length",
        seed=SEED,
    )
    collate = PackingCollator() if layout == "packed" else ImageTextCollator(0)
    batches = [collate([samples[index] for index in indices]) for indices in sampler]
    for batch in batches:
        for name, value in batch.items():
            batch[name] = value.to(trained.device) if isinstance(value, Tensor) else value
    return batches


def count(batches: list[dict[str, Any]]) -> dict[str, int]:
    """Tokens, positions with padding, labels and samples of the step."""
    samples = positions = tokens = labels = 0
    for batch in batches:
        mask, boundaries = batch.get("attention_mask"), batch.get("cu_seq_lens_q")
        positions += batch["input_ids"].numel()
        tokens += batch["input_ids"].numel() if mask is None else int(mask.sum())
        samples += len(batch["input_ids"]) if boundaries is None else len(boundaries) - 1
        labels += int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    return {"tokens": tokens, "positions": positions, "labels": labels, "samples": samples}


# ---- the step -----------------------------------------------------------------------------------------------------------


def make_step(trained: Trained, samples: list[dict[str, Tensor]], switches: Switches) -> Callable[[], Tensor]:
    """All forward and backward passes of the step; the call returns its loss, gradients are summed into the parameters."""
    batches = make_batches(trained, samples, switches.layout)
    num_items = count(batches)["labels"]

    def step() -> Tensor:
        language_model = trained.network.model.language_model
        language_model.set_attn_implementation(attention(trained.device, switches.layout))
        total = torch.zeros((), device=trained.device)
        for batch in batches:
            with torch.autocast(trained.device.type, torch.bfloat16, enabled=trained.precision == "bf16"):
                loss = step_loss(trained, batch, num_items, switches)
            loss.backward()
            total += loss.detach()
        return total

    return step


def step_loss(trained: Trained, batch: dict[str, Any], num_items: int, switches: Switches) -> Tensor:
    """The share of one forward pass in the loss of the step."""
    network = trained.network
    if switches.chunked_loss and switches.vision != "eager":
        network.config.fusion["streaming"] = switches.vision == "streaming"
        return network(**batch, num_items_in_batch=num_items, use_cache=False).loss
    return mixed_loss(trained, dict(batch), num_items, switches)


def mixed_loss(trained: Trained, batch: dict[str, Any], num_items: int, switches: Switches) -> Tensor:
    """The same loss with parts in the recipe's way."""
    network = trained.network
    inner, config = network.model, network.config
    labels, input_ids = batch.pop("labels"), batch.pop("input_ids")
    pixels, sentences = batch.pop("pixel_values", None), batch.pop("instruction_embeds", None)
    owners, batch["use_cache"] = batch.pop("image_to_sample", None), False
    sample_ids = batch.pop("sample_ids", None)
    embeds, weights = inner.get_input_embeddings()(input_ids), None
    if pixels is not None:
        if switches.vision == "eager":
            tokens, weights = eager_vision(trained, pixels, sentences)
        else:
            config.fusion["streaming"] = switches.vision == "streaming"
            features = inner.get_image_features(pixels, sentences)
            tokens, weights = features.pooler_output, features.fusion_weights
        places = (input_ids == config.image_token_id).unsqueeze(-1)
        embeds = embeds.masked_scatter(places, tokens.flatten(0, 1).to(embeds))
    states = inner.language_model(inputs_embeds=embeds, **batch).last_hidden_state
    targets = labels[:, 1:]
    if switches.chunked_loss:
        learned = targets != IGNORE_INDEX
        loss = network.lm_head(states[:, :-1][learned], targets[learned]) / num_items
    else:
        logits = network.lm_head(states).float()
        shifted = F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:].flatten()
        loss = F.cross_entropy(logits.flatten(0, 1), shifted, ignore_index=IGNORE_INDEX, reduction="sum") / num_items
    if weights is None or not config.balance_loss_weight:
        return loss
    learned = targets != IGNORE_INDEX
    num_labels = learned.sum(1) if sample_ids is None else torch.bincount(sample_ids[:, 1:][learned], minlength=len(owners))
    balances = negative_entropy(weights) * num_labels[owners]  # one image a sample
    return loss + config.balance_loss_weight * balances.sum() / num_items


def eager_vision(trained: Trained, pixels: Tensor, sentences: Tensor) -> tuple[Tensor, Tensor | None]:
    """Tower with all hidden states kept, released fusion, projector: (B, N, H) and the weights (B, K), None in stage 1."""
    inner = trained.network.model
    with torch.no_grad():
        states = inner.vision_tower(pixels.to(inner.vision_tower.dtype), output_hidden_states=True).hidden_states
    weights = None
    if trained.setup.stage == 2:
        weights = trained.allocator(official_summaries(states, trained.groups).float(), sentences)
    fused = official_fuse(states, trained.groups, trained.base, weights, trained.network.config.num_prefix_tokens)
    return inner.multi_modal_projector(fused), weights


def require_same(trained: Trained, samples: list[dict[str, Tensor]], lines: tuple[Line, ...]) -> dict[str, float]:
    """The loss of each line, after loss and gradients were compared with those of the first.

    Raises:
        RuntimeError: a line computes another step.
    """
    losses: dict[str, float] = {}
    expected: list[Tensor] = []
    # Roundings of bf16 in another order, or of fp32; a part that is missing is off by percents.
    tolerance = 3e-2 if trained.precision == "bf16" else 1e-3
    parameters = [*trained.network.model.multi_modal_projector.parameters()]
    parameters += [p for p in trained.network.model.fusion.parameters() if p.requires_grad]
    for line in lines:
        trained.network.zero_grad(set_to_none=True)
        losses[line.name] = make_step(trained, samples, line.switches)().item()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        expected = expected or gradients
        norm = sum(float(g.double().square().sum()) for g in expected) ** 0.5
        off = sum(float((a - b).double().square().sum()) for a, b in zip(gradients, expected, strict=True)) ** 0.5
        first = losses[lines[0].name]
        if abs(losses[line.name] - first) > tolerance * abs(first) or not off <= 3 * tolerance * norm:
            raise RuntimeError(
                f"{line.name!r} computes another step: loss {losses[line.name]:.6g} for {first:.6g}, gradients of projector "
                f"and allocator off by {off / norm:.2%}"
            )
    trained.network.zero_grad(set_to_none=True)
    return losses
