"""Auto classes, pipeline, batches and streaming work as for transformers' own models, and prepare inputs as in training."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TextIteratorStreamer, pipeline

import model as _registration  # noqa: F401 (the Auto classes learn of the model type)
from model.answering import Conversation, pixels_of
from model.instruction import SentenceEncoder, embed_instructions
from model.processing import IgvaLlavaProcessor

QUESTION = "Which colour?"


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def message(*content: Image.Image | str, role: str = "user") -> dict:
    parts = [{"type": "text", "text": c} if isinstance(c, str) else {"type": "image", "image": c} for c in content]
    return {"role": role, "content": parts}


def inputs_of(processor: IgvaLlavaProcessor, *conversations: list[dict], **options):
    arguments = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt", **options}
    return processor.apply_chat_template(conversations[0] if len(conversations) == 1 else list(conversations), **arguments)


@pytest.mark.parametrize("aspect_ratio", ["pad", "crop", "stretch", "anyres"])
def test_pictures_are_prepared_as_in_training(make_processor, aspect_ratio):
    processor = make_processor()
    processor.aspect_ratio = aspect_ratio
    inputs = inputs_of(processor, [message(picture(), picture(60, 30, 1), QUESTION)])
    expected = torch.cat([pixels_of(processor, picture()), pixels_of(processor, picture(60, 30, 1))])
    assert torch.equal(inputs["pixel_values"], expected)
    assert (len(expected) > 2) == (aspect_ratio == "anyres")
    num_tokens = int((inputs["input_ids"] == processor.image_token_id).sum())
    assert num_tokens == len(expected) * processor.num_image_tokens()


@pytest.mark.parametrize("policy", ["first_turn", "last_turn", "mean_of_turns"])
def test_the_instruction_defaults_to_the_turns_under_the_policy_of_training(make_processor, tiny_encoder, policy):
    processor = make_processor(sentence_encoder=tiny_encoder)
    processor.instruction_policy, processor.aspect_ratio = policy, "anyres"
    turns = [message(picture(60, 30), QUESTION), message("Red.", role="assistant"), message("How many?")]
    other = [message(picture(), "Is it dark?")]
    inputs = inputs_of(processor, turns, other, processor_kwargs={"padding": True, "padding_side": "left"})
    expected = embed_instructions([[QUESTION, "How many?"], ["Is it dark?"]], tiny_encoder.encode, policy)
    counts = torch.tensor([len(processor.views(picture(60, 30))), len(processor.views(picture()))])
    assert torch.equal(inputs["instruction_embeds"], expected.repeat_interleave(counts, dim=0))


def test_a_chosen_instruction_is_taken_and_text_alone_needs_none(make_processor, tiny_encoder):
    processor = make_processor(sentence_encoder=tiny_encoder)
    inputs = inputs_of(processor, [message(picture(), QUESTION)], processor_kwargs={"instruction": "Another."})
    assert torch.equal(inputs["instruction_embeds"], tiny_encoder.encode(["Another."]))
    assert "instruction_embeds" not in inputs_of(processor, [message("Hello.")])
    assert "instruction_embeds" not in inputs_of(make_processor(), [message(picture(), QUESTION)])


@pytest.fixture(scope="module")
def saved(tmp_path_factory, part_folders, encoder_folder):
    """A checkpoint that was saved and then moved, as to another machine."""
    from model import build_model, build_processor

    torch.manual_seed(0)
    fusion = {"type": "igva", "num_groups": 2, "text_dim": 16, "hidden_dim": 32, "num_blocks": 1}
    built = build_model(part_folders["clip"], part_folders["llama"], fusion=fusion)
    processor = build_processor(
        part_folders["clip"], part_folders["llama"], built.config, sentence_encoder=SentenceEncoder(encoder_folder)
    )
    folder = tmp_path_factory.mktemp("saved")
    built.save_pretrained(folder / "first")
    processor.save_pretrained(folder / "first")
    shutil.move(folder / "first", folder / "second")
    return folder / "second"


@pytest.fixture(scope="module")
def loaded(saved):
    return AutoModelForImageTextToText.from_pretrained(saved).eval(), AutoProcessor.from_pretrained(saved)


def answers(loaded, inputs, **options) -> list[str]:
    model, processor = loaded
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False, **options)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.tokenizer.batch_decode(new, skip_special_tokens=True)]


def test_auto_classes_answer_as_a_conversation_does(loaded):
    conversation = Conversation(*loaded)
    conversation.show(picture())
    expected, _ = conversation.ask(QUESTION, max_new_tokens=5)
    assert answers(loaded, inputs_of(loaded[1], [message(picture(), QUESTION)])) == [expected]


def test_the_pipeline_answers_the_same(loaded):
    model, processor = loaded
    answer = pipeline("image-text-to-text", model=model, processor=processor)
    made = answer(
        text=[message(picture(), QUESTION)], max_new_tokens=5, return_full_text=False, generate_kwargs={"do_sample": False}
    )
    assert [made[0]["generated_text"].strip()] == answers(loaded, inputs_of(processor, [message(picture(), QUESTION)]))


def test_a_left_padded_batch_gives_the_answers_of_single_runs(loaded):
    conversations = [
        [message(picture(), QUESTION)],
        [message(picture(50, 20, 1), picture(20, 20, 2), "What is the difference between these two pictures?")],
        [message("Hello.")],
    ]
    batch = inputs_of(loaded[1], *conversations, processor_kwargs={"padding": True, "padding_side": "left"})
    single = [answers(loaded, inputs_of(loaded[1], conversation))[0] for conversation in conversations]
    assert answers(loaded, batch) == single


def test_an_answer_can_be_streamed(loaded):
    model, processor = loaded
    inputs = inputs_of(processor, [message(picture(), QUESTION)])
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, max_new_tokens=5, do_sample=False, streamer=streamer)
    assert ["".join(streamer).strip()] == answers(loaded, inputs)
