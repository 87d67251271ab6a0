"""A reply as it grows, for callers that want to draw it: the model runs in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Generator
from queue import SimpleQueue
from typing import Any

from model.answering import Conversation, Reply


def stream_reply(
    conversation: Conversation, question: str, *, stop: threading.Event | None = None, **options: Any
) -> Generator[Reply, None, None]:
    """Ask, and give the reply again with each new word.

    A caller that closes the generator early stops the model after the token in progress, and returns when it has stopped.

    Args:
        conversation: of which no other thread asks meanwhile.
        question: see :meth:`model.answering.Conversation.reply`.
        stop: ends the answer early, once set; it is set on return in any case.
        options: ``max_new_tokens``, ``sampling`` and ``policy`` of :meth:`model.answering.Conversation.reply`.

    Yields:
        The reply without text as soon as the weights are known, then with more and more text, and at last as a whole.

    Raises:
        ValueError: see :meth:`model.answering.Conversation.reply`; and whatever else the model raises.
    """
    stop = stop or threading.Event()
    events: SimpleQueue[Reply | Exception | None] = SimpleQueue()

    def run() -> None:
        try:
            events.put(conversation.reply(question, stop=stop, on_progress=events.put, **options))
        except Exception as error:
            events.put(error)
        finally:
            events.put(None)

    thread = threading.Thread(target=run, name="igva answer", daemon=True)
    thread.start()
    try:
        while (event := events.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event
    finally:
        stop.set()
        thread.join()
