"""A conversation gives the answers of the plain pieces, remembers what was said, and forgets what failed."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from model.answering import Conversation, embed_questions, generate_answers, pixels_of, render_prompt
from model.data.llava_json import Turn

RED, BLUE = (Image.new("RGB", (40, 20), colour) for colour in ("red", "blue"))


@pytest.fixture
def loaded(make_model, make_processor, tiny_encoder):
    model = make_model().eval()
    return model, make_processor(model.config, sentence_encoder=tiny_encoder)


def by_hand(loaded, turns, pictures):
    model, processor = loaded
    embeds = embed_questions(processor, [[turn.text for turn in turns if turn.role == "user"]])
    pixel_values = torch.cat([pixels_of(processor, picture) for picture in pictures])
    prompt = render_prompt(processor, turns)
    answers, weights = generate_answers(
        model, processor, [prompt], pixel_values, embeds.expand(len(pictures), -1), max_new_tokens=4
    )
    return answers[0], weights.mean(0).tolist()


def test_turns_pictures_and_instruction_are_those_of_the_whole_conversation(loaded):
    conversation = Conversation(*loaded)
    conversation.show(RED)
    first = conversation.ask("Which colour?", max_new_tokens=4)
    turns = [Turn("user", "<image>\nWhich colour?")]
    assert first == by_hand(loaded, turns, [RED])
    conversation.show(BLUE)
    second = conversation.ask("And this one?", max_new_tokens=4)
    turns += [Turn("assistant", first[0]), Turn("user", "<image>\nAnd this one?")]
    assert second == by_hand(loaded, turns, [RED, BLUE])
    assert second[1] != first[1]  # the last question weighs otherwise
    assert conversation.turns == (*turns, Turn("assistant", second[0]))


def test_a_question_without_a_picture(loaded):
    answer, weights = Conversation(*loaded).ask("Say hello.", max_new_tokens=4)
    assert isinstance(answer, str)
    assert weights is None


def test_what_fails_is_not_remembered(loaded):
    conversation = Conversation(*loaded)
    conversation.show(RED)
    with pytest.raises(ValueError, match="the question is empty"):
        conversation.ask("  ")
    with pytest.raises(ValueError, match="shorten the question"):
        conversation.ask("word " * 300)
    assert conversation.turns == ()
    conversation.ask("Which colour?", max_new_tokens=2)
    assert conversation.turns[0].text == "<image>\nWhich colour?"


def test_clear_forgets_pictures_and_turns(loaded):
    conversation = Conversation(*loaded)
    conversation.show(RED)
    conversation.ask("Which colour?", max_new_tokens=2)
    conversation.clear()
    assert conversation.turns == ()
    assert conversation.ask("Which colour?", max_new_tokens=2)[1] is None


def test_tokens_are_streamed_as_they_come(loaded):
    class Collector:
        def __init__(self):
            self.pieces, self.ended = [], False

        def put(self, value):
            self.pieces.append(value.flatten())

        def end(self):
            self.ended = True

    conversation, collector = Conversation(*loaded), Collector()
    conversation.show(RED)
    answer, _ = conversation.ask("Which colour?", max_new_tokens=4, streamer=collector)
    assert collector.ended
    streamed = torch.cat(collector.pieces[1:])  # the prompt comes first
    assert loaded[1].tokenizer.decode(streamed, skip_special_tokens=True).strip() == answer
