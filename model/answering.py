"""From a question about pictures to the answer: prompts as in training, pictures, instruction, generation.

    conversation = Conversation(model, processor)
    conversation.show(Image.open("picture.jpg"))
    answer, weights = conversation.ask("What colour is the car?")

Legend: B prompts · I images of the tower · K layer groups · E sentence width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.data.llava_json import IMAGE_PLACEHOLDER, Turn
from model.instruction import embed_instructions

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers.generation.streamers import BaseStreamer

    from model.modeling import IgvaLlavaForConditionalGeneration, IgvaLlavaImageFeatures
    from model.processing import IgvaLlavaProcessor


class Conversation:
    """Questions and answers about pictures, each prepared as in training.

    The weights of the layer groups follow from the user's turns under the policy of training, so that a new question changes
    the tokens of all pictures: every question runs the tower and the whole prompt anew, and no cache of an earlier one is
    used.

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

    @torch.inference_mode()
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
            ValueError: an empty question, or a conversation that is too long for the language model. Nothing is remembered
                then.
        """
        if not question.strip():
            raise ValueError("the question is empty; ask something about the picture")
        turns = [*self._turns, Turn("user", f"{IMAGE_PLACEHOLDER}\n" * self._num_new + question)]
        embeds, pixel_values = None, torch.cat(self._pixel_values) if self._pixel_values else None
        if pixel_values is not None and self.model.reads_instruction and self.processor.sentence_encoder is not None:
            embeds = embed_questions(self.processor, [[turn.text for turn in turns if turn.role == "user"]])
            embeds = embeds.expand(len(pixel_values), -1)
        (answer,), weights = generate_answers(
            self.model,
            self.processor,
            [render_prompt(self.processor, turns)],
            pixel_values,
            embeds,
            max_new_tokens=max_new_tokens,
            view_counts=[len(picture) for picture in self._pixel_values],
            streamer=streamer,
        )
        self._turns, self._num_new = [*turns, Turn("assistant", answer)], 0
        return answer, None if weights is None else weights.mean(0).tolist()


def pixels_of(processor: IgvaLlavaProcessor, image: Image) -> Tensor:
    """(I, 3, H, W), the images of the tower that stand for a picture, prepared as in training."""
    pixel_values: Tensor = processor.image_processor(images=processor.views(image), return_tensors="pt")["pixel_values"]
    return pixel_values


def embed_questions(processor: IgvaLlavaProcessor, user_turns: Sequence[Sequence[str]]) -> Tensor:
    """(conversations, E), of the user's turns of each under the policy of training."""
    return embed_instructions(user_turns, processor.encode_instructions, processor.instruction_policy)


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
    features = weights = None
    if pixel_values is not None:
        # The tower runs here and not inside generate(), whose output does not carry the weights.
        features = model.get_image_features(
            pixel_values.to(model.device, model.dtype),
            None if instruction_embeds is None else instruction_embeds.to(model.device),
        )
        weights = None if features.fusion_weights is None else features.fusion_weights.float().cpu()
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
) -> tuple[Tensor, int]:
    """As :func:`generate_answers`, from image features to token ids.

    Returns:
        (B, prompt and answer), and where the answers begin.
    """
    expanded = processor.expand_image_tokens(prompts, view_counts)
    inputs = processor.tokenizer(expanded, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt").to(
        model.device
    )
    start = inputs["input_ids"].shape[1]
    _check_length(model, start, max_new_tokens)
    tokens = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        **({} if features is None else {"mm_encoder_outputs": {"image": features}}),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=list(stop or answer_end_tokens(model, processor)),
        pad_token_id=processor.tokenizer.pad_token_id,
        streamer=streamer,
    )
    return tokens, start


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
