"""The page behind its buttons, through gradio's own client on this machine: every answer, mistake and file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="needs gradio: make test-web")

from gradio_client import Client, handle_file

from model.web.page import messages, told

SETTINGS = [6, 0, 0, "last_turn", True, True]


@pytest.fixture
def connect():
    """``connect(served)``: gradio's client, which would report to its makers that it was used."""
    return lambda served: Client(served.url, verbose=False, analytics_enabled=False)


@pytest.fixture
def client(serve, talk, connect):
    return connect(serve(talk))


def ask(client, question, *files, settings=None):
    typed = {"text": question, "files": [handle_file(file) for file in files]}
    return client.predict(typed, *(settings or SETTINGS), api_name="/ask")


def texts(chat):
    return [(entry["role"], part["text"]) for entry in chat for part in entry["content"] if part.get("type") == "text"]


def test_questions_are_answered_and_remembered(client, red):
    _, first, message, _ = ask(client, "Which colour?", red)
    assert message == ""
    chat, second, *_ = ask(client, "How many?")
    assert [entry for entry in texts(chat) if entry[0] == "user"] == [("user", "Which colour?"), ("user", "How many?")]
    assert any(part.get("type") == "file" for part in chat[0]["content"])
    assert first.count("igva-bar") == 2 and second.count("igva-bar") == 4
    assert "The allocator read: “How many?”" in second


def test_words_and_weights_stream(client, red):
    job = client.submit({"text": "Which colour?", "files": [handle_file(red)]}, *SETTINGS, api_name="/ask")
    job.result()
    views = job.outputs()
    assert len(views) >= 3
    chat, panel, _, typed = views[0]
    assert typed["text"] == "" and typed["files"] == []  # the input is free for the next question
    assert texts(chat)[-1] == ("assistant", "…") and "igva-bar" in panel


def test_again_undo_and_clear(client, red):
    ask(client, "Which colour?", red)
    before = ask(client, "How many?")
    again = client.predict(6, 0, 0, "first_turn", True, True, api_name="/again")
    assert "The allocator read: “Which colour?”" in again[1] and again[1] != before[1]
    chat, _, _, typed = client.predict(api_name="/undo")
    assert len(chat) == 2 and typed["text"] == "How many?"
    chat, _, _, typed = client.predict(api_name="/undo")
    assert chat == [] and typed["text"] == "Which colour?" and len(typed["files"]) == 1
    ask(client, "Which colour?", red)
    chat, panel, *_ = client.predict(api_name="/clear")
    assert chat == [] and "igva-bar" not in panel
    assert "nothing has been asked yet" in client.predict(*SETTINGS, api_name="/again")[2]


@pytest.mark.parametrize(
    ("question", "line"),
    [("", "the question is empty"), ("word " * 300, "shorten the question"), ("a <image>?", "&lt;image&gt;")],
)
def test_mistakes_are_one_line_and_the_page_goes_on(client, red, question, line):
    ask(client, "Which colour?", red)
    chat, _, message, _ = ask(client, question)
    assert line in message and "Traceback" not in message
    assert len(chat) == 2
    assert ask(client, "How many?")[2] == ""


def test_a_file_that_is_no_picture_is_named(client, no_picture):
    _, _, message, _ = ask(client, "Which colour?", no_picture)
    assert "cannot read the image text.png" in message and "/" not in message.split("image text.png")[0].split(">")[-1]
    assert ask(client, "Say hello.")[2] == ""


def test_a_defect_is_one_line_here_and_a_traceback_in_the_terminal(client, talk, red, monkeypatch, capsys):
    with monkeypatch.context() as broken:
        broken.setattr(type(talk.model), "generate", lambda *_, **__: 1 / 0)
        chat, _, message, typed = ask(client, "Which colour?", red)
    assert "ZeroDivisionError" in message and "Traceback" not in message
    assert chat == [] and typed["text"] == "Which colour?" and len(typed["files"]) == 1
    assert "Traceback" in capsys.readouterr().err
    assert ask(client, "Which colour?", red)[2] == ""


def test_explain_gives_a_heat_map_and_the_figures(client, talk, red):
    picture, files, message = client.predict(handle_file(red), "Which colour?\n\nHow many?\n", api_name="/explain")
    assert Path(picture).read_bytes().startswith(b"\x89PNG")
    (figures,) = [file for file in files if file.endswith(".json")]
    written = json.loads(Path(figures).read_text(encoding="utf-8"))
    rows, warning = talk.explain(red, ["Which colour?", "How many?"])
    assert [row["name"] for row in written["rows"]] == ["Which colour?", "How many?"]
    assert [tuple(row["mean"]) for row in written["rows"]] == [row.mean for row in rows]
    assert ("warning" in message) == (warning is not None)


@pytest.mark.parametrize(("lines", "text"), [("", "write at least one"), ("Why?", "there is no picture")])
def test_explain_says_what_is_missing(client, red, lines, text):
    picture = handle_file(red) if not lines else None
    heat_map, files, message = client.predict(picture, lines, api_name="/explain")
    assert heat_map is None and not files and text in message


def test_a_fusion_without_weights_has_an_honest_line(serve, connect, talk_without_weights, red):
    client = connect(serve(talk_without_weights))
    _, panel, message, _ = ask(client, "Which colour?", red)
    assert message == "" and "mixes its layers in a fixed way" in panel and "igva-bar" not in panel


def test_visitors_do_not_see_each_other(serve, connect, talk, red):
    served = serve(talk)
    mine, yours = connect(served), connect(served)
    ask(mine, "Which colour?", red)
    chat, *_ = ask(yours, "How many?", red)
    assert len(chat) == 2


def test_an_answer_is_shown_as_it_stands(talk, red):
    growing, *_, whole = talk.ask([], "Which colour?", [red], talk_settings(), "me")
    assert messages(growing, running=True)[-1]["content"] == "…"
    assert messages(growing)[-1]["content"] == "(stopped)"
    assert messages(whole)[0]["content"] == [{"path": red}, "Which colour?"]


def talk_settings():
    from model.web.talk import Settings

    return Settings(max_new_tokens=4)


def test_what_a_visitor_can_mend_leaves_no_traceback(capsys):
    assert told(ValueError("too long")) == "too long"
    assert capsys.readouterr().err == "igva web: too long\n"
