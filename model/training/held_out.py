"""Exact match on held-out questions during a run: the model answers them, and training does not notice.

The Trainer calls :meth:`HeldOutQuestions.score` at its evaluation steps; the scores stand beside ``eval_loss`` in the log, in
the trackers and for ``metric_for_best_model``.

Legend: I images of the tower, E sentence width.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from model.answering import answer_end_tokens, render_prompt
from model.data.batches import HeldOutBatchSampler
from model.data.dataset import LlavaDataset, load_images
from model.data.llava_json import Sample
from model.data.problems import SampleError
from model.evaluation import NO_KIND, answer_batch, normalized, question_turns, reference_answer

if TYPE_CHECKING:
    from model.modeling import IgvaLlavaForConditionalGeneration

#: Names of the metrics, behind ``eval_``; by kind of question, ``exact_match_KIND`` and ``exact_match_KIND_stderr``.
EXACT_MATCH = "exact_match"
STANDARD_ERROR = "stderr"


class HeldOutQuestions:
    """The last question of each held-out sample, dealt to the ranks of a run.

    Every rank gets equally many batches, and ranks that share their weights under FSDP2 stay together: each encodes images in
    every batch (a black one, where it has none) and goes on generating until the last rank has its answers. ZeRO-3 is not
    supported: DeepSpeed loses track of weights that are gathered ahead when modules run outside of a forward pass.

    Args:
        data: the samples, and how their pictures and instructions are prepared.
        max_samples: as many at most, taken evenly from the file; None: all.
        max_new_tokens: longest answer.
        batch_size: samples at once on one rank.
        rank, num_ranks: this process among all.

    Raises:
        ValueError: no samples, or a question that is too long for the language model together with its answer; all ranks
            raise it.
    """

    def __init__(
        self,
        data: LlavaDataset,
        *,
        max_samples: int | None = None,
        max_new_tokens: int = 16,
        batch_size: int = 8,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        if not len(data):
            raise ValueError("there are no held-out questions to answer")
        self._data, self._processor = data, data.processor
        self._max_new_tokens = max_new_tokens
        samples = evenly(data.samples, max_samples)
        prompts = [render_prompt(self._processor, question_turns(sample)) for sample in samples]
        # By length, so that a batch wastes little, and neighbours, which ranks answer at the same time, take equally long.
        order = sorted(range(len(samples)), key=lambda index: len(prompts[index]))
        self._samples = [samples[index] for index in order]
        self._prompts = [prompts[index] for index in order]
        self._batches = HeldOutBatchSampler(len(samples), batch_size, rank, num_ranks)
        self.kinds = sorted({sample.kind or NO_KIND for sample in samples})

    def __len__(self) -> int:
        """Questions of all ranks together."""
        return len(self._samples)

    @property
    def metrics(self) -> list[str]:
        """Names of the shares that :meth:`score` returns, without their errors."""
        by_kind = [f"{EXACT_MATCH}_{kind}" for kind in self.kinds] if len(self.kinds) > 1 else []
        return [EXACT_MATCH, *by_kind]

    def check_length(self, longest: int | None) -> None:
        """Refuse questions that a language model of ``longest`` positions cannot read, before the first step.

        Raises:
            ValueError: the message names the first sample.
        """
        if longest is None:
            return
        for sample, prompt in zip(self._samples, self._prompts, strict=True):
            (expanded,) = self._processor.expand_image_tokens([prompt], self._view_counts(sample))
            tokens = len(self._processor.tokenizer(expanded, add_special_tokens=False)["input_ids"])
            if tokens + self._max_new_tokens > longest:
                raise ValueError(
                    f"held-out sample {sample.id}: its question has {tokens} tokens, images included, which with "
                    f"evaluation.max_new_tokens {self._max_new_tokens} is more than the {longest} that the language model can "
                    "read; leave it out, or lower evaluation.max_new_tokens"
                )

    @torch.no_grad()
    def score(
        self,
        model: IgvaLlavaForConditionalGeneration,
        sum_over_ranks: Callable[[Tensor], Tensor],
        *,
        sharded: bool = False,
    ) -> dict[str, float]:
        """Answer this rank's share, and count over all ranks; a collective, which all must call.

        Args:
            model: without the wrappers of data parallelism; it is left in the mode it was in.
            sum_over_ranks: sums a tensor over the ranks.
            sharded: whether no rank holds the whole model (FSDP2).

        Returns:
            ``exact_match``, the share of answers that equal the reference (:func:`model.evaluation.normalized`), and
            ``exact_match_stderr``, its binomial standard error; where there are several kinds, the same for each.

        Raises:
            ValueError, OSError: a picture that cannot be read, where such samples are not to be skipped.
        """
        counts = torch.zeros(len(self.kinds), 2, dtype=torch.float32)  # right answers and all; exact up to 16 million
        stop = answer_end_tokens(model, self._processor)
        with _evaluating(model), _together(model, sharded):
            for number, batch in enumerate(self._batches):
                samples = [self._samples[index] for index in batch]
                pictures = [self._pictures(sample) for sample in samples]
                if sharded and all(images is None for images, _ in pictures):
                    # Ranks must gather the weights of the tower equally often.
                    encode_black_image(model)
                texts, _ = answer_batch(
                    model,
                    self._processor,
                    [self._prompts[index] for index in batch],
                    [images for images, _ in pictures],
                    self._embeds(samples),
                    view_counts=[count for sample in samples for count in self._view_counts(sample)],
                    max_new_tokens=self._max_new_tokens,
                    stop=stop,
                )
                if number < self._batches.num_counted:
                    for sample, text, (_, readable) in zip(samples, texts, pictures, strict=True):
                        right = normalized(text) == normalized(reference_answer(sample))
                        counts[self.kinds.index(sample.kind or NO_KIND)] += torch.tensor([float(right), 1.0]) * readable
        return self._metrics(sum_over_ranks(counts.to(model.device)).tolist())

    def _metrics(self, counts: Sequence[Sequence[float]]) -> dict[str, float]:
        overall = [sum(column) for column in zip(*counts, strict=True)]
        metrics = {}
        # Of one kind there is the overall row alone.
        for name, (right, total) in zip(self.metrics, [overall, *counts], strict=False):
            share = right / total if total else 0.0
            metrics[name] = share
            metrics[f"{name}_{STANDARD_ERROR}"] = math.sqrt(share * (1 - share) / total) if total else 0.0
        return metrics

    def _view_counts(self, sample: Sample) -> list[int]:
        return self._data.view_counts(sample)

    def _pictures(self, sample: Sample) -> tuple[Tensor | None, bool]:
        """(I, 3, H, W), and whether they could be read; black ones stand for those of a sample that is skipped."""
        if not sample.images:
            return None, True
        data, largest = self._data, self._data.max_image_pixels
        try:
            return load_images(sample, self._processor, data.aspect_ratio, data.anyres_grids, max_pixels=largest), True
        except SampleError as error:
            data.problems.meet(error.of_sample(sample.id), file=sample.file, record=sample.record)
            return self._black(sum(self._view_counts(sample))), False

    def _embeds(self, samples: Sequence[Sample]) -> Tensor | None:
        """(samples, E); zeros where there is no picture, whose instruction nobody reads or has embedded."""
        if self._data.embed is None or not any(sample.images for sample in samples):
            return None
        rows = [self._data.embed([sample.human_turns]) if sample.images else None for sample in samples]
        width = next(row.shape[1] for row in rows if row is not None)
        return torch.cat([torch.zeros(1, width) if row is None else row for row in rows])

    def _black(self, count: int) -> Tensor:
        return torch.zeros(count, 3, *self._processor.output_size)


def encode_black_image(model: IgvaLlavaForConditionalGeneration) -> None:
    """Run tower, fusion and projector for nothing: ranks that share their weights must gather them equally often."""
    side, embeds = model.config.image_size, None
    if model.reads_instruction:
        embeds = torch.zeros(1, model.config.fusion["text_dim"], device=model.device)
    model.get_image_features(torch.zeros(1, 3, side, side, device=model.device, dtype=model.dtype), embeds)


def evenly(samples: Sequence[Sample], count: int | None) -> list[Sample]:
    """At most ``count`` samples from all over the file, always the same ones: files are often sorted by kind."""
    if count is None or count >= len(samples):
        return list(samples)
    return [samples[index * len(samples) // count] for index in range(count)]


@contextmanager
def unchanged_random_states(device: torch.device) -> Iterator[None]:
    """Put the generators of python, numpy and torch back to where they stood: a loader draws a seed even for data in order."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode within, and every module in its own mode after; layers run without torch.compile.

    Compiled layers would be compiled anew for the cache of keys and values, and count against the limit of their variants.
    """
    modes = [(module, module.training) for module in model.modules()]
    compiled = any(module._compiled_call_impl is not None for module, _ in modes)
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _together(model: Any, sharded: bool) -> Iterator[None]:
    """Let ranks that share the weights generate until the last has its answers, and gather what the tower needs.

    transformers asks for a mark of its own on FSDP2's models (``transformers.distributed.fsdp.is_fsdp_managed_module``), which
    accelerate does not set.
    """
    if not sharded:
        yield
        return
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    shards = model  # typed as any: FSDP2 makes the class of a model anew
    if isinstance(shards, FSDPModule):
        # Outside of forward() nothing gathers the weights.
        if "get_image_features" not in vars(model):
            register_fsdp_forward_method(model, "get_image_features")
        marked = getattr(model, "_is_fsdp_managed_module", False)
        model._is_fsdp_managed_module = True
        try:
            yield
        finally:
            model._is_fsdp_managed_module = marked
    else:
        yield
