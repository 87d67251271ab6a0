"""The chat: questions are answered as they stream, commands do what they say, and mistakes do not end it."""

from __future__ import annotations

import io
import signal

import pytest
from PIL import Image

from model.answering import Conversation
from model.cli import chat as command
from model.cli.main import main


@pytest.fixture
def picture(tmp_path) -> str:
    Image.new("RGB", (40, 20), "red").save(tmp_path / "red.png")
    return str(tmp_path / "red.png")


@pytest.fixture
def loaded(make_model, make_processor, tiny_encoder):
    model = make_model().eval()
    return model, make_processor(model.config, sentence_encoder=tiny_encoder)


@pytest.fixture
def talk(loaded):
    """``talk(*lines)``: all that is said, and the chat."""

    def run(*lines: str) -> tuple[str, command.Chat]:
        said = io.StringIO()
        chat = command.Chat(Conversation(*loaded), lambda line: print(line, file=said), said.write, max_new_tokens=4)
        assert all(chat.take(line) for line in lines)
        return said.getvalue(), chat

    return run


def test_an_answer_is_that_of_the_conversation_with_its_weights(talk, loaded, picture):
    said, _ = talk(f"/image {picture}", "Which colour?")
    conversation = Conversation(*loaded)
    conversation.show(Image.open(picture).convert("RGB"))
    answer, weights = conversation.ask("Which colour?", max_new_tokens=4)
    assert "red.png: 40 x 20 pixels" in said
    assert answer in said
    assert f"layers     1-2  {weights[0]:.2f}" in said


def test_a_new_picture_begins_anew_and_one_more_does_not(talk, picture):
    _, chat = talk(f"/image {picture}", "Which colour?", f"/add {picture}", "And this?")
    assert len(chat.conversation.turns) == 4
    chat.take(f"/image {picture}")
    assert chat.conversation.turns == ()


def test_weights_can_be_switched_off(talk, picture):
    said, _ = talk(f"/image {picture}", "/weights", "Which colour?")
    assert "not shown" in said
    assert "layers" not in said.split("not shown")[1]


def test_a_fixed_mix_says_so_once(make_model, make_processor, picture):
    model = make_model(fusion={"type": "llava"}).eval()
    said = io.StringIO()
    chat = command.Chat(Conversation(model, make_processor(model.config)), said.write, said.write, max_new_tokens=2)
    for line in (f"/image {picture}", "Which colour?", "And now?"):
        chat.take(line)
    assert said.getvalue().count("there are no weights to show") == 1


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(talk, loaded, picture):
    steps = []

    def interrupt(*_):
        steps.append(1)
        if len(steps) == 2:
            signal.raise_signal(signal.SIGINT)

    hook = loaded[0].register_forward_hook(interrupt)
    said, chat = talk(f"/image {picture}", "Which colour?")
    assert len(steps) == 2 and "(stopped)" in said
    hook.remove()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert chat.take("And now?") and len(chat.conversation.turns) == 4


def test_an_allocator_that_has_collapsed_is_told_once(talk, picture, monkeypatch):
    monkeypatch.setattr("model.explain.collapse", lambda weights: "it is uniform")
    said, _ = talk(f"/image {picture}", "Which colour?", "How many?")
    assert said.count("warning: it is uniform") == 1


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("/image nothere.png", "no image at nothere.png"),
        ("/image", "/image needs the path of a picture"),
        ("/picture x", "no command /picture; /help lists them"),
        ("word " * 300, "shorten the question"),
        ("/help", "/quit"),
        ("", ""),
    ],
)
def test_mistakes_do_not_end_the_chat(talk, line, text, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    said, chat = talk(line)
    assert text in said
    assert chat.take("/clear")
    assert not chat.take("/quit")


def test_lines_from_a_pipe(loaded, picture, monkeypatch, capsys):
    from model.cli import checkpoint

    monkeypatch.setattr(checkpoint, "load_checkpoint", lambda name: checkpoint.Checkpoint(*loaded))
    monkeypatch.setattr("sys.stdin", io.StringIO("Which colour?\n/quit\nnever read\n"))
    assert main(["chat", "mine", picture, "--max_new_tokens=2"]) == 0
    assert capsys.readouterr().out.count("layers") == 2
    monkeypatch.setattr("sys.stdin", io.StringIO("Which colour?"))
    assert main(["chat", "mine", picture, "--max_new_tokens=2"]) == 0


def test_a_picture_that_is_not_there_is_told_before_the_model_is_loaded(capsys):
    assert main(["chat", "nothing", "nothere.png"]) == 1
    assert "no image at nothere.png" in capsys.readouterr().err
