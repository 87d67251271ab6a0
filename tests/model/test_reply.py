"""A reply: what it says while it grows, how it is drawn, stopped, streamed, and what of it is remembered."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from PIL import Image

from model.answer_stream import stream_reply
from model.answering import Conversation, Sampling, embed_questions
from model.data.llava_json import Turn
from model.explain import collapse_of

RED = Image.new("RGB", (40, 20), "red")


@pytest.fixture
def loaded(make_model, make_processor, tiny_encoder):
    model = make_model().eval()
    return model, make_processor(model.config, sentence_encoder=tiny_encoder)


@pytest.fixture
def conversation(loaded):
    begun = Conversation(*loaded)
    begun.show(RED)
    return begun


def test_it_is_the_answer_of_ask(conversation, loaded):
    other = Conversation(*loaded)
    other.show(RED)
    reply = conversation.reply("Which colour?", max_new_tokens=4)
    answer, weights = other.ask("Which colour?", max_new_tokens=4)
    assert (reply.text, list(reply.weights)) == (answer, weights)
    assert reply.instruction == ("Which colour?",) and reply.is_whole
    assert conversation.turns == other.turns


def test_weights_come_before_words_and_words_only_grow(conversation):
    told = []
    reply = conversation.reply("Which colour?", max_new_tokens=12, on_progress=told.append)
    assert told[0].text == "" and told[0].weights == reply.weights
    assert not any(part.is_whole for part in told)
    for earlier, later in itertools.pairwise(told):
        assert later.text.startswith(earlier.text)
    assert told[-1].text.strip() == reply.text


@pytest.mark.parametrize("policy", ["first_turn", "last_turn", "mean_of_turns"])
def test_the_policy_chooses_what_the_allocator_reads(loaded, policy):
    model, processor = loaded
    conversation = Conversation(model, processor)
    conversation.show(RED)
    conversation.reply("Which colour?", max_new_tokens=2)
    reply = conversation.reply("How many?", max_new_tokens=2, policy=policy)
    texts = {"first_turn": ("Which colour?",), "last_turn": ("How many?",), "mean_of_turns": ("Which colour?", "How many?")}
    assert reply.instruction == texts[policy]
    embeds = embed_questions(processor, [["Which colour?", "How many?"]], policy)
    features = model.get_image_features(conversation._pixel_values[0], embeds)
    torch.testing.assert_close(torch.tensor(reply.weights), features.fusion_weights[0])
    assert processor.question_policy == "last_turn"  # of others who share the processor


def test_what_is_drawn_follows_from_the_seed(loaded):
    def draw(seed: int | None) -> str:
        conversation = Conversation(*loaded)
        conversation.show(RED)
        return conversation.reply("Which colour?", max_new_tokens=24, sampling=Sampling(1.5, seed)).text

    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    assert draw(1) == draw(1) != draw(2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert draw(None) != draw(None)


def test_a_temperature_of_nothing_is_refused():
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        Sampling(0)


def test_a_stopped_answer_ends_with_its_token_and_is_remembered(conversation):
    steps = []
    conversation.model.register_forward_hook(lambda *_: steps.append(1))
    stop = threading.Event()
    stop.set()
    reply = conversation.reply("Which colour?", max_new_tokens=50, stop=stop)
    assert len(steps) == 1 and not reply.is_whole
    assert conversation.turns[-1] == Turn("assistant", reply.text)


def test_recall_is_as_if_it_had_been_asked(conversation, loaded):
    first = conversation.reply("Which colour?", max_new_tokens=4)
    other = Conversation(*loaded)
    other.show(RED)
    other.recall("Which colour?", first.text)
    assert other.turns == conversation.turns
    assert other.reply("And now?", max_new_tokens=4) == conversation.reply("And now?", max_new_tokens=4)


def test_a_placeholder_in_the_question_is_refused(conversation):
    with pytest.raises(ValueError, match="holds <image>, which stands for a picture"):
        conversation.ask("What is <image>?")
    assert conversation.turns == ()


def test_without_a_picture_nothing_is_read(loaded):
    reply = Conversation(*loaded).reply("Say hello.", max_new_tokens=2)
    assert reply.weights is None and reply.instruction == ()


def test_a_stream_ends_with_the_whole_reply(conversation, loaded):
    *growing, whole = stream_reply(conversation, "Which colour?", max_new_tokens=12)
    other = Conversation(*loaded)
    other.show(RED)
    assert whole == other.reply("Which colour?", max_new_tokens=12)
    assert growing and not any(part.is_whole for part in growing)


def test_a_stream_that_is_closed_stops_the_model(conversation):
    steps = []
    conversation.model.register_forward_hook(lambda *_: steps.append(1))
    stream = stream_reply(conversation, "Which colour?", max_new_tokens=900)
    assert next(stream).weights is not None
    stream.close()
    assert len(steps) < 900
    assert not [thread for thread in threading.enumerate() if thread.name == "igva answer"]


def test_a_stream_raises_what_the_model_raises(conversation):
    with pytest.raises(ValueError, match="the question is empty"):
        list(stream_reply(conversation, " "))
    conversation.model.generate = None
    with pytest.raises(TypeError):
        list(stream_reply(conversation, "Which colour?"))


def test_a_collapse_is_told_of_different_instructions_alone(conversation):
    first = conversation.reply("Which colour?", max_new_tokens=1)
    uniform = [type(first)("", (0.5, 0.5), (question,)) for question in ("Which colour?", "How many?")]
    assert "uniform" in collapse_of(uniform)
    assert collapse_of(uniform[:1]) is None  # it may be what this question needs
    moved = type(first)("", (0.6, 0.4), ("a",))
    assert collapse_of([moved, moved]) is None  # the same question twice shows nothing
    assert "not read" in collapse_of([moved, type(first)("", (0.6, 0.4), ("b",))])
    assert collapse_of([]) is None
    one_group = [type(first)("", (1.0,), (question,)) for question in "ab"]
    assert collapse_of(one_group) is None  # it has all the weight there is
