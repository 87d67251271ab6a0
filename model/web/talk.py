"""What the web page does, apart from how it looks: answers one after the other, from a log that each visitor keeps.

The page holds no conversation of the model between two questions, only the log of what was said. Each question rebuilds its
conversation from that, so that going back, asking again and beginning anew need nothing but another log.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL.Image import Image

from model.answer_stream import stream_reply
from model.answering import Conversation, Reply, Sampling
from model.data.images import open_image
from model.explain import check_weighs, collapse, collapse_of, group_weights
from model.explain_report import Row, row_of
from model.instruction import InstructionPolicy

if TYPE_CHECKING:
    from model.modeling import IgvaLlavaForConditionalGeneration
    from model.processing import IgvaLlavaProcessor


@dataclass(frozen=True)
class Exchange:
    """A question with its answer.

    Args:
        question: as typed.
        pictures: the files that came with it.
        begins: whether it begins a conversation: what was said before it is not read.
        reply: the answer, or what there is of it.
    """

    question: str
    pictures: tuple[str, ...]
    begins: bool
    reply: Reply


Answers = Generator[list[Exchange], None, None]
"""The log again with each new word; to be closed by whoever does not read to the end."""


@dataclass(frozen=True)
class Settings:
    """How the next question is answered.

    Args:
        max_new_tokens: longest answer.
        temperature: 0 takes the likeliest token each time.
        seed: of what is drawn, above temperature 0.
        policy: which questions the weights follow from; None: the processor's ``question_policy``.
        remembers: whether the model reads the earlier turns of the conversation, beside its pictures.
        picture_begins: whether a question that comes with a picture begins a conversation.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    policy: InstructionPolicy | None = None
    remembers: bool = True
    picture_begins: bool = True


class Talk:
    """One model that answers any number of visitors, one at a time.

    Args:
        model: ready to answer.
        processor: its processor.

    Attributes:
        groups: the layers of each group of the fusion.
        fixed: why no question moves the weights of this model, in a line; None where questions do.
    """

    def __init__(self, model: IgvaLlavaForConditionalGeneration, processor: IgvaLlavaProcessor) -> None:
        self.model, self.processor = model, processor
        self.groups: tuple[tuple[int, ...], ...] = model.config.fusion_plan(stage=2).groups
        self.fixed = _why_fixed(model, processor)
        # Beside the page's queue: a visitor who has left gives the model back only when its last token is done.
        self._lock = threading.Lock()
        self._stops: dict[str, threading.Event] = {}

    def ask(self, log: Sequence[Exchange], question: str, pictures: Sequence[str], settings: Settings, visitor: str) -> Answers:
        """Answer, and give the log again with each new word; closing the iterator stops the model.

        Args:
            log: what this visitor and the model have said.
            question: in words.
            pictures: files that come with it.
            settings: how to answer.
            visitor: for :meth:`stop`.

        Raises:
            ValueError: a file that is no picture; or see :meth:`model.answering.Conversation.reply`.
        """
        begins = not log or (bool(pictures) and settings.picture_begins)
        return self._answer(log, question, tuple(pictures), begins, settings, visitor)

    def ask_again(self, log: Sequence[Exchange], settings: Settings, visitor: str) -> Answers:
        """Answer the last question anew, as :meth:`ask`.

        Raises:
            ValueError: nothing has been asked.
        """
        if not log:
            raise ValueError("nothing has been asked yet; ask something about a picture")
        last = log[-1]
        return self._answer(log[:-1], last.question, last.pictures, last.begins, settings, visitor)

    def stop(self, visitor: str) -> None:
        """End the answer that this visitor waits for, if there is one."""
        event = self._stops.get(visitor)
        if event is not None:
            event.set()

    def warning(self, log: Sequence[Exchange]) -> str | None:
        """What the answers so far show to be wrong with the allocator."""
        return None if self.fixed else collapse_of(exchange.reply for exchange in log)

    def explain(self, picture: str | None, questions: Sequence[str]) -> tuple[list[Row], str | None]:
        """The weights that each question gives the layer groups, and what is wrong with the allocator, if something is.

        Raises:
            ValueError: no picture or no question, a file that is no picture, or see
                :func:`model.explain.check_weighs`.
        """
        if picture is None:
            raise ValueError("there is no picture; drop one")
        if not questions:
            raise ValueError("there is no question; write at least one, each on a line of its own")
        with self._lock:
            weights = group_weights(self.model, self.processor, [_open(picture)], questions)[0]
        return [row_of(question, weights[index : index + 1]) for index, question in enumerate(questions)], collapse(weights)

    def _answer(
        self,
        log: Sequence[Exchange],
        question: str,
        pictures: tuple[str, ...],
        begins: bool,
        settings: Settings,
        visitor: str,
    ) -> Answers:
        sampling = Sampling(settings.temperature, settings.seed) if settings.temperature else None
        stop = threading.Event()
        with self._lock:
            self._stops[visitor] = stop
            try:
                conversation = self._conversation([] if begins else _current(log), settings.remembers)
                for picture in pictures:
                    conversation.show(_open(picture))
                replies = stream_reply(
                    conversation,
                    question,
                    stop=stop,
                    max_new_tokens=settings.max_new_tokens,
                    sampling=sampling,
                    policy=settings.policy,
                )
                with closing(replies):
                    for reply in replies:
                        yield [*log, Exchange(question, pictures, begins, reply)]
            finally:
                del self._stops[visitor]

    def _conversation(self, exchanges: Sequence[Exchange], remembers: bool) -> Conversation:
        conversation = Conversation(self.model, self.processor)
        for exchange in exchanges:
            for picture in exchange.pictures:
                conversation.show(_open(picture))
            if remembers:
                conversation.recall(exchange.question, exchange.reply.text)
        return conversation


def _current(log: Sequence[Exchange]) -> Sequence[Exchange]:
    """The exchanges of the conversation that goes on."""
    begin = max((index for index, exchange in enumerate(log) if exchange.begins), default=0)
    return log[begin:]


def _open(picture: str) -> Image:
    """A picture; the error names the file, and not the folder of the server that it was uploaded to."""
    try:
        return open_image(picture)
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(str(error).replace(str(picture), Path(picture).name)) from error


def _why_fixed(model: IgvaLlavaForConditionalGeneration, processor: IgvaLlavaProcessor) -> str | None:
    try:
        check_weighs(model, processor)
    except ValueError as error:
        return str(error)
    return None
