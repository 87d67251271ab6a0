"""What the page does: answers are those of a conversation, logs say what is read, and no mistake ends it."""

from __future__ import annotations

import threading

import pytest
from PIL import Image

from model.answering import Conversation
from model.data.images import open_image
from model.web.talk import Settings

SHORT = Settings(max_new_tokens=4)


def last(views):
    *_, view = views
    return view


def test_an_answer_grows_into_that_of_a_conversation(talk, red):
    views = list(talk.ask([], "Which colour?", [red], SHORT, "me"))
    conversation = Conversation(talk.model, talk.processor)
    conversation.show(open_image(red))
    (exchange,) = views[-1]
    assert exchange.reply == conversation.reply("Which colour?", max_new_tokens=4)
    assert views[0][0].reply.text == "" and views[0][0].reply.weights == exchange.reply.weights
    assert exchange.begins


def test_a_question_goes_on_with_what_was_said(talk, red):
    log = last(talk.ask([], "Which colour?", [red], SHORT, "me"))
    log = last(talk.ask(log, "How many?", [], SHORT, "me"))
    conversation = Conversation(talk.model, talk.processor)
    conversation.show(open_image(red))
    conversation.ask("Which colour?", max_new_tokens=4)
    assert log[1].reply == conversation.reply("How many?", max_new_tokens=4)
    assert not log[1].begins


@pytest.mark.parametrize("begins", [True, False])
def test_a_new_picture_begins_anew_or_joins(talk, red, blue, begins):
    settings = Settings(max_new_tokens=4, picture_begins=begins)
    log = last(talk.ask([], "Which colour?", [red], settings, "me"))
    log = last(talk.ask(log, "And this?", [blue], settings, "me"))
    conversation = Conversation(talk.model, talk.processor)
    if not begins:
        conversation.show(open_image(red))
        conversation.recall("Which colour?", log[0].reply.text)
    conversation.show(open_image(blue))
    assert log[1].reply == conversation.reply("And this?", max_new_tokens=4)
    # What came before the new picture is shown on, and not read: the next question goes on with the new one.
    log = last(talk.ask(log, "Sure?", [], settings, "me"))
    assert log[2].reply == conversation.reply("Sure?", max_new_tokens=4)


def test_earlier_turns_can_be_left_out(talk, red):
    settings = Settings(max_new_tokens=4, remembers=False)
    log = last(talk.ask([], "Which colour?", [red], settings, "me"))
    log = last(talk.ask(log, "How many?", [], settings, "me"))
    assert log[1].reply == last(talk.ask([], "How many?", [red], settings, "me"))[0].reply


def test_again_answers_the_last_question_with_other_settings(talk, red):
    log = last(talk.ask([], "Which colour?", [red], SHORT, "me"))
    log = last(talk.ask(log, "How many?", [], SHORT, "me"))
    assert log[1].reply.instruction == ("How many?",)
    again = last(talk.ask_again(log, Settings(max_new_tokens=4, policy="first_turn"), "me"))
    assert again[0] == log[0] and len(again) == 2
    assert again[1].reply.instruction == ("Which colour?",)
    assert again[1].reply.weights != log[1].reply.weights
    with pytest.raises(ValueError, match="nothing has been asked yet"):
        talk.ask_again([], SHORT, "me")


def test_a_temperature_draws_by_its_seed(talk, red):
    texts = [
        last(talk.ask([], "Which colour?", [red], Settings(24, temperature, seed), "me"))[0].reply.text
        for temperature, seed in ((1.5, 1), (1.5, 1), (1.5, 2), (0.0, 1))
    ]
    assert texts[0] == texts[1] and len(set(texts)) == 3


def test_stop_ends_the_answer_of_this_visitor_alone(talk, red, answer_threads):
    views = talk.ask([], "Which colour?", [red], Settings(max_new_tokens=800), "me")
    next(views)
    talk.stop("somebody else")
    assert not talk._stops["me"].is_set()
    talk.stop("me")
    assert not last(views)[0].reply.is_whole
    assert talk._stops == {} and not talk._lock.locked() and not answer_threads()


def test_a_visitor_who_leaves_gives_the_model_back(talk, red, answer_threads):
    views = talk.ask([], "Which colour?", [red], Settings(max_new_tokens=800), "me")
    next(views)
    assert talk._lock.locked()
    views.close()
    assert not talk._lock.locked() and not answer_threads()


def test_the_model_answers_one_at_a_time(talk, red, monkeypatch):
    generate, running, most = type(talk.model).generate, [], []

    def counted(*args, **kwargs):
        running.append(1)
        most.append(len(running))
        try:
            return generate(*args, **kwargs)
        finally:
            running.pop()

    monkeypatch.setattr(type(talk.model), "generate", counted)
    visitors = [
        threading.Thread(target=lambda name=name: last(talk.ask([], "Which colour?", [red], SHORT, name))) for name in "abcd"
    ]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    assert most == [1, 1, 1, 1]


def test_mistakes_are_told_and_the_next_question_is_answered(talk, red, no_picture, monkeypatch):
    with pytest.raises(ValueError, match=r"cannot read the image text\.png") as caught:
        last(talk.ask([], "Which?", [no_picture], SHORT, "me"))
    assert no_picture not in str(caught.value)  # where uploads lie is nobody's business
    with pytest.raises(ValueError, match="the question is empty"):
        last(talk.ask([], "", [red], SHORT, "me"))
    with pytest.raises(ValueError, match="shorten the question"):
        last(talk.ask([], "word " * 300, [red], SHORT, "me"))
    with monkeypatch.context() as broken:
        broken.setattr(type(talk.model), "generate", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            last(talk.ask([], "Which?", [red], SHORT, "me"))
    assert last(talk.ask([], "Which?", [red], SHORT, "me"))[0].reply.is_whole


def test_questions_are_explained(talk, red):
    rows, warning = talk.explain(red, ["Which colour?", "How many?"])
    log = last(talk.ask([], "How many?", [red], SHORT, "me"))
    assert [row.name for row in rows] == ["Which colour?", "How many?"]
    assert rows[1].mean == pytest.approx(log[0].reply.weights, abs=1e-6)
    assert warning is None or "allocator" in warning or "not read" in warning
    with pytest.raises(ValueError, match="no picture; drop one"):
        talk.explain(None, ["Why?"])
    with pytest.raises(ValueError, match="write at least one"):
        talk.explain(red, [])


def test_a_fusion_without_weights_says_so(talk_without_weights, red):
    assert "mixes its layers in a fixed way" in talk_without_weights.fixed
    log = last(talk_without_weights.ask([], "Which colour?", [red], SHORT, "me"))
    assert log[0].reply.weights is None and talk_without_weights.warning(log) is None
    with pytest.raises(ValueError, match="nothing to explain"):
        talk_without_weights.explain(red, ["Why?"])


def test_the_examples_are_held_out_of_the_quickstart(tmp_path):
    import random

    from model.quickstart.pictures import TEST, emoji_compositions
    from model.web.examples import COMPOSITIONS, make_examples

    held_out = emoji_compositions(random.Random("0-_emoji"))[: TEST.emoji]
    assert set(COMPOSITIONS) <= set(held_out)
    examples = make_examples(tmp_path)
    assert len(examples) == 6 and len({example.question for example in examples}) == 3
    for example in examples:
        with Image.open(example.picture) as picture:
            assert picture.size == (112, 112)
