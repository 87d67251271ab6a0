"""The page itself, in gradio: where things stand, and which of :mod:`model.web.talk` each button calls."""

from __future__ import annotations

import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from model.cli.errors import explain
from model.explain_report import write
from model.web.examples import QUESTIONS, Example
from model.web.panel import CSS, message_line, weights_panel
from model.web.talk import Answers, Exchange, Settings, Talk

POLICIES = [("the last question", "last_turn"), ("the mean of all questions", "mean_of_turns"), ("the first", "first_turn")]

#: Uploads are kept this long, in seconds, so that "again" finds its pictures.
_KEPT = 24 * 3600

_NOTHING_TYPED: dict[str, Any] = {"text": "", "files": []}


def build_page(talk: Talk, name: str, examples: Sequence[Example], folder: Path, max_new_tokens: int = 256) -> gr.Blocks:
    """The page of one model.

    Args:
        talk: answers.
        name: of the checkpoint, for the heading.
        examples: offered below the input.
        folder: an existing folder for the files of the second tab.
        max_new_tokens: where the setting stands at first.
    """
    page = gr.Blocks(title=f"igva · {name}", analytics_enabled=False, fill_width=True, delete_cache=(3600, _KEPT))
    with page:
        gr.Markdown(f"## igva · {name}\n{_describe(talk)}")
        with gr.Tab("Ask"):
            _ask_tab(talk, examples, max_new_tokens)
        with gr.Tab("Explain"):
            _explain_tab(talk, folder)

        def stop_for_good(request: gr.Request) -> None:
            talk.stop(_visitor(request))

        # gradio closes the handler of a visitor who has left between two words; until then the model would go on.
        page.unload(stop_for_good)
    return page


def launch_options() -> dict[str, Any]:
    """What ``launch`` must be told so that the page asks nothing of the network and shows no traceback."""
    return {
        "css": CSS,
        "theme": gr.themes.Default(),
        "footer_links": [],
        "quiet": True,
        "show_error": True,
        "ssr_mode": False,
        "enable_monitoring": False,
        "run_history": False,
        "pwa": False,
        "mcp_server": False,
        "max_file_size": "64mb",
    }


def _describe(talk: Talk) -> str:
    config = talk.model.config
    language_model = getattr(config.text_config, "model_type", "?")
    return (
        f"Fusion `{config.fusion['type']}` over the {config.vision_config.num_hidden_layers} layers of a "
        f"`{config.vision_config.model_type}` tower, language model `{language_model}`."
    )


# ---- ask ----------------------------------------------------------------------------------------------------------------


def _ask_tab(talk: Talk, examples: Sequence[Example], max_new_tokens: int) -> None:
    with gr.Row():
        with gr.Column(scale=3, min_width=420):
            chat = gr.Chatbot(
                label="Conversation",
                height=560,
                # What a model says is text: as Markdown it could name pictures for the browser to fetch.
                render_markdown=False,
                latex_delimiters=[],
                allow_tags=False,
                buttons=["copy_all"],
                allow_file_downloads=False,
                placeholder="Drop a picture into the line below, and ask about it.",
                elem_id="igva-chat",
            )
            message = gr.HTML(elem_id="igva-message")
            box = gr.MultimodalTextbox(
                placeholder="A question, with or without a picture",
                file_types=["image"],
                file_count="multiple",
                show_label=False,
                elem_id="igva-box",
            )
            with gr.Row():
                stop = gr.Button("Stop", size="sm", min_width=80, elem_id="igva-stop")
                again = gr.Button("Again", size="sm", min_width=80, elem_id="igva-again")
                undo = gr.Button("Undo", size="sm", min_width=80, elem_id="igva-undo")
                clear = gr.Button("Clear", size="sm", min_width=80, elem_id="igva-clear")
            gr.Examples(
                [[{"text": example.question, "files": [str(example.picture)]}] for example in examples],
                [box],
                label="Examples",
                examples_per_page=len(examples) or 1,
            )
        with gr.Column(scale=2, min_width=320):
            gr.Markdown("### Which layers the question used")
            panel = gr.HTML(weights_panel([], talk.groups, talk.fixed), elem_id="igva-weights")
            with gr.Accordion("Settings", open=False):
                settings = _settings(talk, max_new_tokens)
    log = gr.State([])
    shown = [chat, panel, message, box, log]
    one_at_a_time = {"concurrency_limit": 1, "concurrency_id": "model"}

    def ask(typed: dict[str, Any], log: list[Exchange], request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        question, pictures = typed["text"].strip(), list(typed["files"])
        yield from _answers(talk, log, lambda: talk.ask(log, question, pictures, _read(values), _visitor(request)), typed)

    def ask_again(log: list[Exchange], request: gr.Request, *values: Any) -> Iterator[list[Any]]:
        yield from _answers(talk, log, lambda: talk.ask_again(log, _read(values), _visitor(request)))

    def take_back(log: list[Exchange], request: gr.Request) -> list[Any]:
        talk.stop(_visitor(request))
        if not log:
            return _view(talk, [])
        return _view(talk, log[:-1], {"text": log[-1].question, "files": list(log[-1].pictures)})

    def forget(request: gr.Request) -> list[Any]:
        talk.stop(_visitor(request))
        return _view(talk, [], _NOTHING_TYPED)

    def stop_answer(request: gr.Request) -> None:
        talk.stop(_visitor(request))

    asked = box.submit(ask, [box, log, *settings], shown, api_name="ask", **one_at_a_time)
    repeated = again.click(ask_again, [log, *settings], shown, api_name="again", **one_at_a_time)
    stop.click(stop_answer, None, None, queue=False, api_name="stop")
    undo.click(take_back, log, shown, queue=False, cancels=[asked, repeated], api_name="undo")
    # The conversation has a bin of its own in its corner, which else would empty what is shown and not what is remembered.
    gr.on([clear.click, chat.clear], forget, None, shown, queue=False, cancels=[asked, repeated], api_name="clear")


def _settings(talk: Talk, max_new_tokens: int) -> list[gr.components.Component]:
    """In the order of the fields of :class:`model.web.talk.Settings`."""
    readable = getattr(talk.model.config.text_config, "max_position_embeddings", None) or 4096
    longest = min(readable, max(2048, max_new_tokens))
    return [
        gr.Slider(1, longest, value=min(max_new_tokens, longest), step=1, label="Longest answer, in tokens"),
        gr.Slider(0, 2, value=0, step=0.05, label="Temperature", info="0: the likeliest word each time"),
        gr.Number(0, precision=0, minimum=0, label="Seed", info="of what is drawn, above temperature 0"),
        gr.Radio(
            POLICIES,
            value=talk.processor.question_policy,
            label="The allocator reads",
            info="Of a single question all three are the same",
            interactive=talk.fixed is None,
        ),
        gr.Checkbox(True, label="Remember earlier turns", info="off: each question is put by itself, about the same pictures"),
        gr.Checkbox(True, label="A new picture begins a new conversation", info="off: it joins those that are there"),
    ]


def _read(values: Sequence[Any]) -> Settings:
    max_new_tokens, temperature, seed, policy, remembers, picture_begins = values
    return Settings(int(max_new_tokens), float(temperature), int(seed or 0), policy, remembers, picture_begins)


def _visitor(request: gr.Request) -> str:
    return str(request.session_hash)


def _answers(
    talk: Talk, log: list[Exchange], start: Callable[[], Answers], typed: dict[str, Any] | None = None
) -> Iterator[list[Any]]:
    """The views of an answer as it grows; where it fails, one of the log as it was, with a line that says why.

    Args:
        start: asks.
        typed: what the input holds; it is emptied once the model has begun, and filled again where the answer fails later.
    """
    newest, has_begun = log, False
    try:
        with closing(start()) as answers:
            for newest in answers:
                yield _view(talk, newest, None if has_begun or typed is None else _NOTHING_TYPED, running=True)
                has_begun = True
    except Exception as error:
        yield _view(talk, log, typed if has_begun else None, message=told(error))
    else:
        yield _view(talk, newest)


def _view(
    talk: Talk, log: list[Exchange], typed: dict[str, Any] | None = None, *, running: bool = False, message: str = ""
) -> list[Any]:
    """Conversation, panel, message line, input (None: as it is) and log."""
    panel = weights_panel(log, talk.groups, talk.fixed, talk.warning(log))
    return [messages(log, running=running), panel, message_line(message), gr.skip() if typed is None else typed, log]


def messages(log: Sequence[Exchange], *, running: bool = False) -> list[dict[str, Any]]:
    """The log as gradio's chat shows it.

    Args:
        log: questions and answers.
        running: the last answer is still growing; else one that is not whole was stopped.
    """
    shown: list[dict[str, Any]] = []
    for exchange in log:
        pictures = [{"path": picture} for picture in exchange.pictures]
        shown.append({"role": "user", "content": [*pictures, _as_text(exchange.question)]})
        text = exchange.reply.text
        if running and exchange is log[-1]:
            text = text or "…"
        elif not exchange.reply.is_whole:
            text = f"{text} (stopped)".lstrip()
        shown.append({"role": "assistant", "content": _as_text(text or "(an empty answer)")})
    return shown


def _as_text(text: str) -> str:
    """Text that stays text: gradio's chat takes HTML, also where it renders no Markdown."""
    return escape(text, quote=False)


def told(error: Exception) -> str:
    """One line for the page; what is a defect of ours goes to the terminal of the server as well, with its traceback."""
    line = explain(error)
    if line is None:
        traceback.print_exception(error)
        line = f"this went wrong ({type(error).__name__}); the terminal of the server shows where"
    print(f"igva web: {line}", file=sys.stderr)
    return line


# ---- explain ------------------------------------------------------------------------------------------------------------


def _explain_tab(talk: Talk, folder: Path) -> None:
    if talk.fixed is not None:
        gr.HTML(message_line(talk.fixed))
        return
    with gr.Row():
        with gr.Column(scale=2, min_width=320):
            picture = gr.Image(
                type="filepath",
                image_mode=None,
                sources=["upload"],
                label="Picture",
                height=280,
                buttons=["fullscreen"],
                elem_id="igva-picture",
            )
            questions = gr.Textbox("\n".join(QUESTIONS), lines=6, label="Questions, one a line", elem_id="igva-questions")
            show = gr.Button("Show the layers", variant="primary", elem_id="igva-explain")
            message = gr.HTML(elem_id="igva-explain-message")
        with gr.Column(scale=3, min_width=420):
            heat_map = gr.Image(
                label="Weight of the layer groups",
                interactive=False,
                format="png",
                buttons=["download", "fullscreen"],
                elem_id="igva-heat-map",
            )
            files = gr.File(label="Files", file_count="multiple", interactive=False, elem_id="igva-files")

    def explain_questions(picture: str | None, lines: str) -> list[Any]:
        asked = [line.strip() for line in lines.splitlines() if line.strip()]
        try:
            rows, warning = talk.explain(picture, asked)
            # A folder of its own each time: the browser may fetch the files of the last one only now.
            stem = Path(tempfile.mkdtemp(dir=folder)) / "explain"
            write(stem, rows, talk.groups, warning)
        except Exception as error:
            return [None, None, message_line(told(error))]
        note = message_line(f"warning: {warning}") if warning else ""
        return [f"{stem}.png", [f"{stem}.json", f"{stem}.png"], note]

    show.click(
        explain_questions,
        [picture, questions],
        [heat_map, files, message],
        api_name="explain",
        concurrency_limit=1,
        concurrency_id="model",
    )
