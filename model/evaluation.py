"""Exact match on held-out samples, beside two baselines that show what the pictures are worth.

    result = evaluate(model, processor, samples)
    blind = evaluate(model, processor, samples, picture_of=other_pictures(samples))  # another sample's picture
    guess = most_frequent_answers(train_samples, samples)                            # the commonest answer of each kind

Legend: B samples of a batch, I their images, K groups, E sentence width.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from model.answering import answer_end_tokens, generate_answers, render_prompt
from model.data.dataset import load_images, view_counts
from model.data.llava_json import Sample, Turn
from model.instruction import InstructionPolicy, embed_instructions

if TYPE_CHECKING:
    from rich.table import Table

    from model.modeling import IgvaLlavaForConditionalGeneration
    from model.processing import IgvaLlavaProcessor

OVERALL = "overall"
NO_KIND = "unnamed"


@dataclass(frozen=True)
class Answer:
    """What the model said to one sample."""

    id: str
    kind: str
    question: str
    reference: str
    answer: str
    correct: bool
    fusion_weights: tuple[float, ...] | None
    """Mean over the sample's images of the weight of each layer group; None where the model computes none."""


@dataclass(frozen=True)
class KindScore:
    """Exact match of one kind of question."""

    count: int
    accuracy: float
    standard_error: float
    """sqrt(p (1 - p) / n), the binomial standard error of the accuracy."""
    fusion_weights: tuple[float, ...] | None
    """Mean weight of each layer group."""


@dataclass(frozen=True)
class EvaluationResult:
    """Scores by kind of question, ``overall`` last, and every answer."""

    scores: dict[str, KindScore]
    answers: tuple[Answer, ...]

    @property
    def overall(self) -> KindScore:
        """All samples together."""
        return self.scores[OVERALL]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "scores": {kind: asdict(score) for kind, score in self.scores.items()},
            "answers": [asdict(answer) for answer in self.answers],
        }

    def table(self, title: str = "Exact match") -> Table:
        """The scores for a terminal."""
        from rich.table import Table

        table = Table(title=title)
        for column in ("kind", "samples", "exact match", "layer groups"):
            table.add_column(column, justify="left" if column == "kind" else "right")
        for kind, score in self.scores.items():
            if kind == OVERALL:
                table.add_section()
            weights = "" if score.fusion_weights is None else " ".join(f"{weight:.2f}" for weight in score.fusion_weights)
            accuracy = f"{100 * score.accuracy:.1f} ± {100 * score.standard_error:.1f} %"
            table.add_row(kind, str(score.count), accuracy, weights)
        return table


@torch.inference_mode()
def evaluate(
    model: IgvaLlavaForConditionalGeneration,
    processor: IgvaLlavaProcessor,
    samples: Sequence[Sample],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 16,
    aspect_ratio: str = "pad",
    instruction_policy: InstructionPolicy = "mean_of_turns",
    picture_of: Sequence[int] | None = None,
    show_progress: bool = False,
) -> EvaluationResult:
    """Let the model answer the last question of each sample, greedily, and compare with the last answer of the sample.

    Compared are :func:`normalized` texts. Prompts are padded on the left and sorted by length, so that a batch wastes
    little.

    Args:
        model: the model, in any dtype; it is put into eval mode.
        processor: its processor; where it has a sentence encoder, the instructions are embedded with it.
        samples: checked samples, such as those of :func:`model.data.llava_json.read_llava_json`.
        batch_size: samples at once.
        max_new_tokens: longest answer; generation stops earlier at the end of the last answer of a batch.
        aspect_ratio, instruction_policy: as in training.
        picture_of: for sample i, the index of the sample whose pictures it is shown; None: its own.
        show_progress: a bar on stderr.

    Raises:
        ValueError: no samples, or a ``picture_of`` that gives a sample another number of pictures than it has
            placeholders.
    """
    if not samples:
        raise ValueError("samples is empty: there is nothing to evaluate")
    _check_pictures(samples, picture_of)
    model.eval()
    questions = [question_turns(sample) for sample in samples]
    prompts = [render_prompt(processor, turns) for turns in questions]
    embeds = _embeds(model, processor, questions, instruction_policy)
    stop, grids = answer_end_tokens(model, processor), processor.anyres_grids
    answers: list[Answer | None] = [None] * len(samples)
    order = sorted(range(len(samples)), key=lambda index: len(prompts[index]))
    with tqdm(total=len(samples), disable=not show_progress, unit="sample") as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            shown = [samples[index if picture_of is None else picture_of[index]] for index in batch]
            texts, weights = answer_batch(
                model,
                processor,
                [prompts[index] for index in batch],
                [load_images(sample, processor, aspect_ratio, grids) if sample.images else None for sample in shown],
                embeds[batch] if embeds is not None else None,
                view_counts=[count for sample in shown for count in view_counts(sample, processor, aspect_ratio, grids)],
                max_new_tokens=max_new_tokens,
                stop=stop,
            )
            for index, text, rows in zip(batch, texts, weights, strict=True):
                answers[index] = _answer(samples[index], text, rows)
            bar.update(len(batch))
    return _result([answer for answer in answers if answer is not None])


def answer_batch(
    model: IgvaLlavaForConditionalGeneration,
    processor: IgvaLlavaProcessor,
    prompts: Sequence[str],
    pixel_values: Sequence[Tensor | None],
    embeds: Tensor | None,
    *,
    view_counts: Sequence[int],
    max_new_tokens: int,
    stop: Sequence[int] | None = None,
) -> tuple[list[str], list[Tensor | None]]:
    """Greedy answers to the prompts of B samples, each with its own number of images.

    Args:
        prompts: with ``<image>`` placeholders, from :func:`model.answering.render_prompt`.
        pixel_values: for each sample (I, 3, H, W), or None without pictures.
        embeds: (B, E), the instruction of each sample, or None.
        view_counts: images of the tower of each picture, over all samples.
        max_new_tokens, stop: as for :func:`model.answering.generate_answers`.

    Returns:
        B texts, and for each sample its fusion weights (I, K), or None where the model computes none.
    """
    pictures = [images for images in pixel_values if images is not None]
    counts = torch.tensor([0 if images is None else len(images) for images in pixel_values])
    texts, weights = generate_answers(
        model,
        processor,
        prompts,
        torch.cat(pictures) if pictures else None,
        embeds.repeat_interleave(counts, dim=0) if embeds is not None and pictures else None,
        max_new_tokens=max_new_tokens,
        stop=stop,
        view_counts=view_counts,
    )
    return texts, [None] * len(prompts) if weights is None else list(weights.split(counts.tolist()))


def other_pictures(samples: Sequence[Sample]) -> list[int]:
    """For each sample another one, of the same kind and number of images, whose pictures are not its own.

    Within a kind the samples are rolled by half their number, and on from there while the pictures are the same.
    Samples without images keep themselves.

    Raises:
        ValueError: all samples of a kind show the same picture.
    """
    alike: dict[tuple[str, int], list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        alike[sample.kind or NO_KIND, len(sample.images)].append(index)
    chosen = list(range(len(samples)))
    for (kind, num_images), members in alike.items():
        if num_images:
            for position, index in enumerate(members):
                chosen[index] = _next_other(samples, members, position, kind)
    return chosen


def most_frequent_answers(train_samples: Sequence[Sample], samples: Sequence[Sample]) -> EvaluationResult:
    """The score of always giving the commonest answer that the training data have for the kind of question.

    A kind without training samples gets the commonest answer of all.

    Raises:
        ValueError: no training samples.
    """
    if not train_samples:
        raise ValueError("train_samples is empty: there is no most frequent answer")
    by_kind: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in train_samples:
        for kind in (sample.kind or NO_KIND, OVERALL):
            by_kind[kind][normalized(reference_answer(sample))] += 1
    common = {kind: counts.most_common(1)[0][0] for kind, counts in by_kind.items()}
    return _result([_answer(sample, common.get(sample.kind or NO_KIND, common[OVERALL]), None) for sample in samples])


def normalized(text: str) -> str:
    """Lower case, one space between words, no full stop at the end: what two equal answers share."""
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def _last_answer(sample: Sample) -> int:
    return max(position for position, turn in enumerate(sample.turns) if turn.role == "assistant")


def question_turns(sample: Sample) -> tuple[Turn, ...]:
    """The turns of a sample before its last answer."""
    return sample.turns[: _last_answer(sample)]


def reference_answer(sample: Sample) -> str:
    """The last answer of a sample."""
    return sample.turns[_last_answer(sample)].text.strip()


def _embeds(
    model: IgvaLlavaForConditionalGeneration,
    processor: IgvaLlavaProcessor,
    questions: Sequence[Sequence[Turn]],
    policy: InstructionPolicy,
) -> Tensor | None:
    """(n, E) for all questions; None where the model does not read them or the processor cannot make them."""
    if not model.reads_instruction or processor.sentence_encoder is None:
        return None
    texts = [[turn.text for turn in turns if turn.role == "user"] for turns in questions]
    return embed_instructions(texts, processor.encode_instructions, policy)


def _check_pictures(samples: Sequence[Sample], picture_of: Sequence[int] | None) -> None:
    if picture_of is None:
        return
    if len(picture_of) != len(samples):
        raise ValueError(f"picture_of has {len(picture_of)} entries for {len(samples)} samples")
    for sample, other in zip(samples, picture_of, strict=True):
        if len(samples[other].images) != len(sample.images):
            raise ValueError(
                f"picture_of shows sample {sample.id}, which has {len(sample.images)} images, the "
                f"{len(samples[other].images)} of sample {samples[other].id}"
            )


def _next_other(samples: Sequence[Sample], members: Sequence[int], position: int, kind: str) -> int:
    for step in _rolled(len(members)):
        candidate = members[(position + step) % len(members)]
        if samples[candidate].images != samples[members[position]].images:
            return candidate
    raise ValueError(f"all samples of kind {kind!r} show the same picture: there is no other one to give them")


def _rolled(count: int) -> Iterator[int]:
    half = count // 2
    yield from range(half, count)
    yield from range(half)


def _answer(sample: Sample, text: str, weights: Tensor | None) -> Answer:
    reference = reference_answer(sample)
    mean = tuple(weights.mean(0).tolist()) if weights is not None and len(weights) else None
    question = question_turns(sample)[-1].text.replace("<image>", "").strip()
    correct = normalized(text) == normalized(reference)
    return Answer(sample.id, sample.kind or NO_KIND, question, reference, text, correct, mean)


def _result(answers: Sequence[Answer]) -> EvaluationResult:
    kinds: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        kinds[answer.kind].append(answer)
    scores = {kind: _score(kinds[kind]) for kind in sorted(kinds)}
    return EvaluationResult({**scores, OVERALL: _score(answers)}, tuple(answers))


def _score(answers: Sequence[Answer]) -> KindScore:
    accuracy = sum(answer.correct for answer in answers) / len(answers)
    weights = [answer.fusion_weights for answer in answers if answer.fusion_weights is not None]
    mean = tuple(torch.tensor(weights).mean(0).tolist()) if weights else None
    return KindScore(len(answers), accuracy, math.sqrt(accuracy * (1 - accuracy) / len(answers)), mean)
