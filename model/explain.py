"""What a fusion does with an instruction: the weights of the layer groups, how sure they are, and what each group is worth.

Legend: I images · Q questions · K layer groups · E sentence width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL.Image import Image
from torch import Tensor

from model.answering import Reply, embed_questions, generate_tokens, pixels_of, render_prompt
from model.data.llava_json import IMAGE_PLACEHOLDER, Turn

if TYPE_CHECKING:
    from model.modeling import IgvaLlavaForConditionalGeneration
    from model.processing import IgvaLlavaProcessor

UNIFORM_ENTROPY = 0.995
"""Share of ln K from which weights count as uniform: for K = 4 all within about 0.03 of 1/4."""

ONE_GROUP = 0.95
"""Weight from which one group counts as the only one."""

SAME_FOR_ALL = 0.005
"""Standard deviation over questions below which the instruction counts as unread: a hundredth of what a trained quickstart
model shows between kinds of question."""


@dataclass(frozen=True)
class GroupSaliency:
    """What an answer loses when a layer group is left out and the others share its weight."""

    answer: str
    log_probability: float
    """Sum over the tokens of the answer, in nats."""
    without_group: tuple[float, ...]
    """The same for each group left out."""

    @property
    def lost(self) -> tuple[float, ...]:
        """Nats that each group is worth to this answer; negative where the answer is likelier without it."""
        return tuple(self.log_probability - value for value in self.without_group)


def check_weighs(model: IgvaLlavaForConditionalGeneration, processor: IgvaLlavaProcessor) -> None:
    """Refuse a model whose weights do not depend on an instruction.

    Raises:
        ValueError: a fusion that reads no instruction, stage 1, or a processor without sentence encoder.
    """
    if not model.reads_instruction:
        stage = f" in stage {model.fusion_stage}" if model.fusion_stage else ""
        raise ValueError(
            f"the fusion {model.config.fusion['type']!r}{stage} mixes its layers in a fixed way: no instruction moves its "
            "weights, so there is nothing to explain; use a checkpoint of IGVA's stage 2, TGIF or mixture_of_layers"
        )
    if processor.sentence_encoder is None:
        raise ValueError(
            "the checkpoint has no sentence encoder, so its groups always weigh the same; train with model.sentence_encoder"
        )


@torch.inference_mode()
def group_weights(
    model: IgvaLlavaForConditionalGeneration, processor: IgvaLlavaProcessor, images: Sequence[Image], questions: Sequence[str]
) -> Tensor:
    """The weight of each layer group for each picture and question.

    The tower runs once a picture. Several tiles of one picture (anyres) are averaged.

    Args:
        images: I pictures, prepared as in training.
        questions: Q instructions, each embedded by itself under the policy of training.

    Returns:
        (I, Q, K), float32 on the CPU.

    Raises:
        ValueError: no pictures or questions, or see :func:`check_weighs`.
    """
    check_weighs(model, processor)
    if not images or not questions:
        raise ValueError(f"got {len(images)} pictures and {len(questions)} questions, expected at least one of each")
    embeds = embed_questions(processor, [[question] for question in questions]).to(model.device)
    rows = []
    for image in images:
        pixel_values = pixels_of(processor, image).to(model.device, model.dtype)
        rows.append(model.model.fusion_weights(pixel_values, embeds).float().mean(dim=1).cpu())
    return torch.stack(rows)


@torch.inference_mode()
def group_saliency(
    model: IgvaLlavaForConditionalGeneration,
    processor: IgvaLlavaProcessor,
    image: Image,
    question: str,
    *,
    max_new_tokens: int = 32,
) -> GroupSaliency:
    """How much likelier each layer group makes the model's own answer.

    The model answers greedily; then the log-probability of that answer is taken with each group's weight set to zero and the
    others scaled to sum to one again.

    Raises:
        ValueError: see :func:`check_weighs`; or a fusion other than IGVA, whose weights are no allocator's.
    """
    check_weighs(model, processor)
    allocator = getattr(model.model.fusion, "allocator", None)
    if allocator is None:
        raise ValueError(f"saliency needs IGVA's allocator, and the fusion is {model.config.fusion['type']!r}")
    pixel_values = pixels_of(processor, image).to(model.device, model.dtype)
    embeds = embed_questions(processor, [[question]]).to(model.device).expand(len(pixel_values), -1)
    prompt = render_prompt(processor, [Turn("user", f"{IMAGE_PLACEHOLDER}\n{question}")])
    whole = model.get_image_features(pixel_values, embeds)
    tokens, start = generate_tokens(
        model, processor, [prompt], whole, max_new_tokens=max_new_tokens, view_counts=[len(pixel_values)]
    )

    def log_probability(features: object) -> float:
        logits = model(input_ids=tokens, mm_encoder_outputs={"image": features}, use_cache=False).logits[0, start - 1 : -1]
        return float(logits.float().log_softmax(-1).gather(-1, tokens[0, start:, None]).sum())

    without = []
    for group in range(allocator.num_groups):
        with _leave_out(allocator, group):
            without.append(log_probability(model.get_image_features(pixel_values, embeds)))
    answer = processor.tokenizer.decode(tokens[0, start:], skip_special_tokens=True).strip()
    return GroupSaliency(answer, log_probability(whole), tuple(without))


def entropy(weights: Tensor) -> Tensor:
    """(..., K) weights to their entropy as a share of ln K: 1 where all groups weigh the same, 0 where one has all."""
    if weights.shape[-1] == 1:
        return torch.zeros(weights.shape[:-1])
    return torch.special.entr(weights).sum(-1) / math.log(weights.shape[-1])


def collapse(weights: Tensor) -> str | None:
    """What is wrong with an allocator that gives these (questions, K) weights; None where nothing is.

    One question tells nothing: its weights may be as it needs them. Nor do the weights of a single group.
    """
    if len(weights) < 2 or weights.shape[-1] == 1:
        return None
    mean = weights.mean(0)
    top = int(mean.argmax())
    if mean[top] > ONE_GROUP:
        return (
            f"the allocator has collapsed to group {top + 1} ({mean[top]:.2f} of the weight): the others do not reach the "
            "answer; raise balance_loss_weight"
        )
    if entropy(weights).mean() > UNIFORM_ENTROPY:
        return (
            "the allocator has collapsed to uniform weights: it does what the plain average of stage 1 does; train it longer "
            "or with a higher allocator_learning_rate, or lower balance_loss_weight"
        )
    if weights.std(0).max() < SAME_FOR_ALL:
        return "the weights are the same for all these questions: the instruction is not read"
    return None


def collapse_of(replies: Iterable[Reply]) -> str | None:
    """:func:`collapse` over the different instructions of some answers; None where none was read."""
    rows = {reply.instruction: reply.weights for reply in replies if reply.instruction and reply.weights}
    return collapse(torch.tensor(list(rows.values()))) if rows else None


@contextmanager
def _leave_out(allocator: torch.nn.Module, group: int) -> Iterator[None]:
    """Take a group's weight from it and give it to the others in proportion."""

    def without(module: torch.nn.Module, arguments: object, weights: Tensor) -> Tensor:
        kept = weights.clone()
        kept[:, group] = 0
        return kept / kept.sum(-1, keepdim=True)

    handle = allocator.register_forward_hook(without)
    try:
        yield
    finally:
        handle.remove()
