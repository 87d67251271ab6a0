"""``igva chat``: a conversation about pictures in the terminal, with the weights behind each answer."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.cli.ask import weight_bars
from model.cli.errors import explain
from model.cli.loading_arguments import add_loading_arguments, given_loading_arguments

if TYPE_CHECKING:
    from model.answering import Conversation, Reply

_EXAMPLES = """examples:
  igva chat runs/mine picture.jpg
  igva chat runs/mine                              then /image picture.jpg
  echo "What colour is it?" | igva chat runs/mine picture.jpg

In the chat, a line is a question. A line that begins with a slash is a command:
"""

COMMANDS = """  /image PATH   show a picture, and begin anew
  /add PATH     show one more beside those that are there
  /clear        forget pictures and turns
  /weights      switch the bars of the layer groups on or off
  /help         this list
  /quit         leave; so do Ctrl-D and Ctrl-C

Ctrl-C while an answer comes stops the answer, and the chat goes on."""


class Chat:
    """The state of a chat, apart from where its lines come from and go to.

    Args:
        conversation: with the model.
        say: writes a line.
        stream: writes a piece of an answer as it comes, without ending the line.
        max_new_tokens: longest answer.
    """

    def __init__(
        self,
        conversation: Conversation,
        say: Callable[[str], None],
        stream: Callable[[str], None],
        max_new_tokens: int = 256,
    ) -> None:
        self.conversation, self.say, self.stream, self.max_new_tokens = conversation, say, stream, max_new_tokens
        self.shows_weights = True
        self._replies: list[Reply] = []
        self._warned: str | None = None

    def take(self, line: str) -> bool:
        """Answer a line; False where it ends the chat.

        What the user can mend (no such picture, a conversation that has grown too long) is said, and the chat goes on.
        """
        line = line.strip()
        command, _, argument = line.partition(" ")
        if command == "/quit":
            return False
        try:
            if command.startswith("/"):
                self._command(command, argument.strip())
            elif line:
                self._answer(line)
        except Exception as error:
            text = explain(error)
            if text is None:
                raise
            self.say(text)
        return True

    def _command(self, command: str, argument: str) -> None:
        if command in ("/image", "/add"):
            from model.data.images import open_image

            if not argument:
                raise ValueError(f"{command} needs the path of a picture")
            image = open_image(Path(argument).expanduser())
            if command == "/image":
                self.conversation.clear()
            self.conversation.show(image)
            self.say(f"{argument}: {image.width} x {image.height} pixels")
        elif command == "/clear":
            self.conversation.clear()
            self.say("pictures and turns are forgotten")
        elif command == "/weights":
            self.shows_weights = not self.shows_weights
            self.say(f"the weights of the layer groups are {'shown' if self.shows_weights else 'not shown'}")
        elif command == "/help":
            self.say(COMMANDS)
        else:
            raise ValueError(f"no command {command}; /help lists them")

    def _answer(self, question: str) -> None:
        from model.explain import collapse_of

        stop, shown = threading.Event(), 0

        def show(reply: Reply) -> None:
            nonlocal shown
            self.stream(reply.text[shown:])
            shown = len(reply.text)

        with _on_interrupt(stop):
            reply = self.conversation.reply(question, max_new_tokens=self.max_new_tokens, stop=stop, on_progress=show)
        self.say("" if reply.is_whole else " (stopped)")
        if reply.weights is not None and self.shows_weights:
            groups = self.conversation.model.config.fusion_plan(stage=2).groups
            self.say(weight_bars(reply.weights, groups))
        elif self.shows_weights and not self._replies and not self.conversation.model.reads_instruction:
            self.say("(this checkpoint mixes its layers in a fixed way: there are no weights to show)")
        self._replies.append(reply)
        self._warn(collapse_of(self._replies))

    def _warn(self, warning: str | None) -> None:
        """Say what is wrong with the allocator, once."""
        if warning is not None and warning != self._warned:
            self.say(f"warning: {warning}")
        self._warned = warning or self._warned


@contextmanager
def _on_interrupt(stop: threading.Event) -> Iterator[None]:
    """Ctrl-C sets the event; a second one interrupts, as it does outside."""
    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        yield
        return

    def interrupted(signum: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_intermixed_args(argv)  # options may stand between pictures
    if arguments.max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens must be at least 1, got {arguments.max_new_tokens}")

    # After the arguments are known to be right: these imports take seconds.
    from model.answering import Conversation
    from model.cli.checkpoint import load_checkpoint
    from model.data.images import open_image

    images = [open_image(path) for path in arguments.images]
    checkpoint = load_checkpoint(arguments.checkpoint, **given_loading_arguments(arguments))
    conversation = Conversation(checkpoint.model, checkpoint.processor)
    for image in images:
        conversation.show(image)

    def stream(text: str) -> None:
        print(text, end="", flush=True)

    chat = Chat(conversation, print, stream, arguments.max_new_tokens)
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401 (gives input() history and editing)

        print(
            "Ask about the picture; /help lists commands." if images else "/image PATH shows a picture; /help lists commands."
        )
    while True:
        try:
            line = input("> " if interactive else "")
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        if not chat.take(line):
            return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="igva chat",
        description="Talk with a model about pictures; each answer shows how much each group of the tower's layers weighed.",
        epilog=_EXAMPLES + COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a finished training run, or a hub name")
    parser.add_argument("images", metavar="IMAGE", nargs="*", help="pictures to begin with")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer in tokens (default: %(default)s)")
    add_loading_arguments(parser)
    return parser
