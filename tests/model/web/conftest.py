"""A tiny model, files of pictures, and the page of it on this machine, for tests that have gradio."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from model.web.talk import Talk


@pytest.fixture
def red(tmp_path: Path) -> str:
    Image.new("RGB", (40, 20), "red").save(tmp_path / "red.png")
    return str(tmp_path / "red.png")


@pytest.fixture
def blue(tmp_path: Path) -> str:
    Image.new("RGB", (40, 20), "blue").save(tmp_path / "blue.png")
    return str(tmp_path / "blue.png")


@pytest.fixture
def no_picture(tmp_path: Path) -> str:
    (tmp_path / "text.png").write_text("this is no picture", encoding="utf-8")
    return str(tmp_path / "text.png")


@pytest.fixture
def talk(make_model, make_processor, tiny_encoder) -> Talk:
    model = make_model().eval()
    return Talk(model, make_processor(model.config, sentence_encoder=tiny_encoder))


@pytest.fixture
def talk_without_weights(make_model, make_processor) -> Talk:
    model = make_model(fusion={"type": "llava"}).eval()
    return Talk(model, make_processor(model.config))


@dataclass(frozen=True)
class Served:
    """A page that is up."""

    url: str
    talk: Talk


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """``serve(talk, name, max_new_tokens)``: the page of it on a free port of this machine, as ``igva web`` launches it."""
    from model.web.examples import make_examples
    from model.web.page import build_page, launch_options

    pages = []

    def up(talk: Talk, name: str = "tiny", max_new_tokens: int = 8) -> Served:
        folder = tmp_path / f"served-{len(pages)}"
        folder.mkdir()
        page = build_page(talk, name, make_examples(folder), folder, max_new_tokens)
        page.queue(max_size=20)
        _, url, _ = page.launch(server_name="127.0.0.1", share=False, prevent_thread_lock=True, **launch_options())
        pages.append(page)
        return Served(url, talk)

    yield up
    for page in pages:
        page.close(verbose=False)


@pytest.fixture
def answer_threads() -> Callable[[], list[threading.Thread]]:
    """The threads in which a model answers at this moment."""
    return lambda: [thread for thread in threading.enumerate() if thread.name == "igva answer"]


@pytest.fixture
def nothing_leaves(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names beyond this machine that somebody in this process asks for; none is reached."""
    asked: list[str] = []
    resolve = socket.getaddrinfo

    def local_only(host, *rest, **options):
        if host in (None, "", "127.0.0.1", "localhost", "::1", "0.0.0.0", b"127.0.0.1"):
            return resolve(host, *rest, **options)
        asked.append(host)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", local_only)
    return asked
