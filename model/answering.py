"""From a question about pictures to the answer: prompts as in training, pictures, instruction, generation.

    conversation = Conversation(model, processor)
    conversation.show(Image.open("picture.jpg"))
    answer, weights = conversation.ask("What colour is the car?")

Legend: B prompts · I images of the tower · K layer groups · E sentence width.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation import StoppingCriteria, StoppingCriteriaList, TextStreamer

from model.data.llava_json import IMAGE_PLACEHOLDER, Turn
from model.instruction import InstructionPolicy, embed_instructions, instruction_texts

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers.generation.streamers import BaseStreamer

    from model.modeling import IgvaLlavaForConditionalGeneration, IgvaLlavaImageFeatures
    from model.processing import IgvaLlavaProcessor


@dataclass(frozen=True)
class Sampling:
    """Draw the tokens of an answer, where the likeliest ones are taken without it.

    Args:
        temperature: above 0; below 1 the likely tokens become likelier still.
        seed: the same seed gives the same answer on the same machine; None: torch's generator goes on from where it stands.

    Raises:
        ValueError: a temperature of 0 or less.
    """

    temperature: float
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"temperature must be above 0, got {self.temperature}; leave sampling out for the likeliest answer"
            )


@dataclass(frozen=True)
class Reply:
    """An answer, and what stood behind it.

    Args:
        text: the answer, or as much of it as there is.
        weights: the weight of each layer group, mean over the images; None where the model computes none.
        instruction: the user's texts whose mean embedding gave the weights; empty where none was read.
        is_whole: False while the answer grows, and where it was stopped.
    """

    text: str
    weights: tuple[float, ...] | None
    instruction: tuple[str, ...] = ()
    is_whole: bool = True


class Conversation:
    """Questions and answers about pictures, each prepared as in training.

    The weights of the layer groups follow from the user's turns under the processor's ``question_policy``, by default from the
    last one, so that a new question changes the tokens of all pictures: every question runs the tower and the whole prompt
    anew, and no cache of an earlier one is used.

    Args:
        model: in any dtype; it is put into eval mode.
        processor: its processor, with or without sentence encoder.
    """

    def __init__(self, model: IgvaLlavaForConditionalGeneration, processor: IgvaLlavaProcessor) -> None:
        self.model, self.processor = model.eval(), processor
        self.clear()

    def clear(self) -> None:
        """Forget pictures and turns."""
        self._turns: list[Turn] = []
        self._pixel_values: list[Tensor] = []
        self._num_new = 0

    @property
    def turns(self) -> tuple[Turn, ...]:
        """What was said so far."""
        return tuple(self._turns)

    def show(self, image: Image) -> None:
        """Add a picture, to which the next question refers first."""
        self._pixel_values.append(pixels_of(self.processor, image))
        self._num_new += 1

    def recall(self, question: str, answer: str) -> None:
        """Put in what was said before, about the pictures shown since the last question, without running the model.

        Raises:
            ValueError: as :meth:`reply` for its question.
        """
        self._turns += [self._question(question), Turn("assistant", answer)]
        self._num_new = 0

    def ask(
        self, question: str, *, max_new_tokens: int = 64, streamer: BaseStreamer | None = None
    ) -> tuple[str, list[float] | None]:
        """Answer greedily, and remember question and answer.

        Args:
            question: in words; pictures need no placeholder.
            max_new_tokens: longest answer.
            streamer: of transformers; gets the tokens as they come.

        Returns:
            The answer, and the mean over the images of the weight of each layer group (None where the model computes none).

        Raises:
            ValueError: see :meth:`reply`.
        """
        reply = self._reply(question, None, None, max_new_tokens=max_new_tokens, streamer=streamer)
        return reply.text, None if reply.weights is None else list(reply.weights)

    def reply(
        self,
        question: str,
        *,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        policy: InstructionPolicy | None = None,
        stop: threading.Event | None = None,
        on_progress: Callable[[Reply], None] | None = None,
    ) -> Reply:
        """Answer, and remember question and answer, also one that was stopped.

        Args:
            question: in words; pictures need no placeholder.
            max_new_tokens: longest answer.
            sampling: None: greedily.
            policy: which of the user's turns the weights follow from; None: the processor's ``question_policy``.
            stop: ends the answer after the token in progress, once set.
            on_progress: called when the weights are known, before the first token, and then with each new word.

        Raises:
            ValueError: an empty question or one that holds a placeholder, or a conversation that is too long for the language
                model. Nothing is remembered then.
        """
        return self._reply(question, policy, on_progress, max_new_tokens=max_new_tokens, sampling=sampling, stopped=stop)

    @torch.inference_mode()
    def _reply(
        self,
        question: str,
        policy: InstructionPolicy | None,
        on_progress: Callable[[Reply], None] | None,
        *,
        streamer: BaseStreamer | None = None,
        stopped: threading.Event | None = None,
        **options: Any,
    ) -> Reply:
        turns = [*self._turns, self._question(question)]
        user_turns = [turn.text for turn in turns if turn.role == "user"]
        embeds, pixel_values = None, torch.cat(self._pixel_values) if self._pixel_values else None
        instruction: tuple[str, ...] = ()
        if pixel_values is not None and self.model.reads_instruction and self.processor.sentence_encoder is not None:
            instruction = tuple(instruction_texts(user_turns, policy or self.processor.question_policy))
            embeds = embed_questions(self.processor, [user_turns], policy).expand(len(pixel_values), -1)
        features, image_weights = _image_features(self.model, pixel_values, embeds)
        weights = None if image_weights is None else tuple(image_weights.mean(0).tolist())
        begun = Reply("", weights, instruction, is_whole=False)
        if on_progress is not None:
            on_progress(begun)
            streamer = _Progress(self.processor.tokenizer, begun, on_progress)
        tokens, start = generate_tokens(
            self.model,
            self.processor,
            [render_prompt(self.processor, turns)],
            features,
            view_counts=[len(picture) for picture in self._pixel_values],
            streamer=streamer,
            stopped=stopped,
            **options,
        )
        answer = self.processor.tokenizer.decode(tokens[0, start:], skip_special_tokens=True).strip()
        self._turns, self._num_new = [*turns, Turn("assistant", answer)], 0
        return replace(begun, text=answer, is_whole=stopped is None or not stopped.is_set())

    def _question(self, question: str) -> Turn:
        if not question.strip():
            raise ValueError("the question is empty; ask something about the picture")
        if IMAGE_PLACEHOLDER in question:
            raise ValueError(f"the question holds {IMAGE_PLACEHOLDER}, which stands for a picture in the prompt; leave it out")
        return Turn("user", f"{IMAGE_PLACEHOLDER}\n" * self._num_new + question)


class _Progress(TextStreamer):
    """Tells the reply again whenever it has grown by a word."""

    def __init__(self, tokenizer: Any, begun: Reply, tell: Callable[[Reply], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._reply, self._tell = begun, tell

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._reply = replace(self._reply, text=(self._reply.text + text).lstrip())
            self._tell(self._reply)


class _Stopped(StoppingCriteria):
    """Ends all answers of a batch once the event is set."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full(input_ids.shape[:1], self._event.is_set(), device=input_ids.device)


def pixels_of(processor: IgvaLlavaProcessor, image: Image) -> Tensor:
    """(I, 3, H, W), the images of the tower that stand for a picture, prepared as in training."""
    pixel_values: Tensor = processor.image_processor(images=processor.views(image), return_tensors="pt")["pixel_values"]
    return pixel_values


def embed_questions(
    processor: IgvaLlavaProcessor, user_turns: Sequence[Sequence[str]], policy: InstructionPolicy | None = None
) -> Tensor:
    """(conversations, E), of the user's turns of each under ``policy``; None: the processor's ``question_policy``."""
    return embed_instructions(user_turns, processor.encode_instructions, policy or processor.question_policy)


def generate_answers(
    model: IgvaLlavaForConditionalGeneration,
    processor: IgvaLlavaProcessor,
    prompts: Sequence[str],
    pixel_values: Tensor | None,
    instruction_embeds: Tensor | None,
    *,
    max_new_tokens: int,
    stop: Sequence[int] | None = None,
    view_counts: Sequence[int] | None = None,
    streamer: BaseStreamer | None = None,
) -> tuple[list[str], Tensor | None]:
    """Greedy answers to rendered prompts.

    Args:
        prompts: B texts with ``<image>`` placeholders, from :func:`render_prompt`.
        pixel_values: (I, 3, H, W), the pictures in order of their placeholders, or None.
        instruction_embeds: (I, E), or None.
        max_new_tokens: longest answer.
        stop: tokens that end an answer; None: :func:`answer_end_tokens`.
        view_counts: images that each placeholder stands for, see :func:`model.data.images.num_views`; None: one each.
        streamer: of transformers; gets the tokens as they come, for one prompt.

    Returns:
        B texts, and the fusion weights (I, K) float32 or None.

    Raises:
        ValueError: a prompt and its answer together are longer than the language model can read.
    """
    features, weights = _image_features(model, pixel_values, instruction_embeds)
    tokens, start = generate_tokens(
        model,
        processor,
        prompts,
        features,
        max_new_tokens=max_new_tokens,
        stop=stop,
        view_counts=view_counts,
        streamer=streamer,
    )
    texts = processor.tokenizer.batch_decode(tokens[:, start:], skip_special_tokens=True)
    return [text.strip() for text in texts], weights


def _image_features(
    model: IgvaLlavaForConditionalGeneration, pixel_values: Tensor | None, instruction_embeds: Tensor | None
) -> tuple[IgvaLlavaImageFeatures | None, Tensor | None]:
    """Features of the pictures, and the weights (I, K) float32 on the CPU; None where there are none."""
    if pixel_values is None:
        return None, None
    # The tower runs here and not inside generate(), whose output does not carry the weights.
    features = model.get_image_features(
        pixel_values.to(model.device, model.dtype),
        None if instruction_embeds is None else instruction_embeds.to(model.device),
    )
    return features, None if features.fusion_weights is None else features.fusion_weights.float().cpu()


def generate_tokens(
    model: IgvaLlavaForConditionalGeneration,
    processor: IgvaLlavaProcessor,
    prompts: Sequence[str],
    features: IgvaLlavaImageFeatures | None,
    *,
    max_new_tokens: int,
    stop: Sequence[int] | None = None,
    view_counts: Sequence[int] | None = None,
    streamer: BaseStreamer | None = None,
    sampling: Sampling | None = None,
    stopped: threading.Event | None = None,
) -> tuple[Tensor, int]:
    """As :func:`generate_answers`, from image features to token ids.

    Args:
        sampling: None: greedily.
        stopped: ends the answers after the token in progress, once set.

    Returns:
        (B, prompt and answer), and where the answers begin.
    """
    expanded = processor.expand_image_tokens(prompts, view_counts)
    inputs = processor.tokenizer(expanded, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt").to(
        model.device
    )
    start = inputs["input_ids"].shape[1]
    _check_length(model, start, max_new_tokens)
    drawn = {"do_sample": False} if sampling is None else {"do_sample": True, "temperature": sampling.temperature}
    with _seeded(None if sampling is None else sampling.seed, model.device):
        tokens = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            **({} if features is None else {"mm_encoder_outputs": {"image": features}}),
            max_new_tokens=max_new_tokens,
            **drawn,
            eos_token_id=list(stop or answer_end_tokens(model, processor)),
            pad_token_id=processor.tokenizer.pad_token_id,
            streamer=streamer,
            stopping_criteria=None if stopped is None else StoppingCriteriaList([_Stopped(stopped)]),
        )
    return tokens, start


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """torch's generators at a seed within, and where they were after; None: left alone."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _check_length(model: IgvaLlavaForConditionalGeneration, prompt: int, answer: int) -> None:
    longest = getattr(model.config.text_config, "max_position_embeddings", None)
    if longest is not None and prompt + answer > longest:
        raise ValueError(
            f"the prompt has {prompt} tokens, images included, which with max_new_tokens {answer} is more than the {longest} "
            "that the language model can read; shorten the question, show fewer images, or lower max_new_tokens"
        )


def render_prompt(processor: IgvaLlavaProcessor, turns: Sequence[Turn]) -> str:
    """Turns that end with the user's, as the text after which the model is to answer."""
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    return processor.apply_chat_template(messages, add_generation_prompt=True)


def answer_end_tokens(model: IgvaLlavaForConditionalGeneration, processor: IgvaLlavaProcessor) -> list[int]:
    """Tokens that end an answer: the model's own, and the one with which the chat template closes an assistant's
    turn."""
    configured = model.generation_config.eos_token_id
    found = set(configured if isinstance(configured, list) else [configured]) | {processor.tokenizer.eos_token_id}
    encoded = processor.tokenize_conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    spoken = [token for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    if spoken[-1] in processor.tokenizer.all_special_ids:
        found.add(spoken[-1])
    return sorted(token for token in found if token is not None)
