"""The weights of the layer groups as bars in HTML, one chart an answer, and the instruction that they follow from."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from model.explain_report import group_name
from model.web.talk import Exchange

CSS = """
.igva-answer { margin-bottom: 1rem; }
.igva-answer.earlier { opacity: 0.75; font-size: 0.85em; }
.igva-question { font-weight: 600; margin-bottom: 0.25rem; overflow-wrap: anywhere; }
.igva-bar { display: grid; grid-template-columns: 7.5em 1fr 3em; align-items: center; gap: 0.5em; margin: 0.2rem 0; }
.igva-track { position: relative; height: 1.25em; background: var(--background-fill-secondary); border-radius: 3px; }
.earlier .igva-track { height: 0.7em; }
.igva-fill { position: absolute; inset: 0 auto 0 0; border-radius: 3px; }
.igva-before { position: absolute; top: -3px; bottom: -3px; width: 2px; background: var(--body-text-color); }
.igva-weight { text-align: right; font-variant-numeric: tabular-nums; }
.igva-note { opacity: 0.75; font-size: 0.85em; overflow-wrap: anywhere; }
button[aria-label="Share"], .icon-button-wrapper:not(:has(button:not([aria-label="Share"]))) { display: none; }
#igva-message:not(:has(.igva-message)) { display: none; }
.igva-message { color: var(--error-text-color, #b91c1c); font-weight: 600; overflow-wrap: anywhere; }
"""


def weights_panel(
    log: Sequence[Exchange], groups: Sequence[Sequence[int]], fixed: str | None = None, warning: str | None = None
) -> str:
    """The charts of all answers, the newest first; its bars carry a mark where the answer before it had them.

    All charts have one scale, so that bars can be compared between questions.

    Args:
        log: questions and answers, oldest first.
        groups: the layers of each group.
        fixed: why no question moves the weights, or None.
        warning: what is wrong with the weights, or None.
    """
    parts = [_note(fixed)] if fixed is not None else []
    parts += [message_line(f"warning: {warning}")] if warning is not None else []
    if not log:
        return "".join(parts) if parts else _note("Ask about a picture: here stands how much each group of layers weighed.")
    longest = max((max(exchange.reply.weights or (0,)) for exchange in log), default=0) or 1
    before: Sequence[float] | None = None
    charts = []
    for exchange in log:
        charts.append(_chart(exchange, groups, longest, before, is_newest=exchange is log[-1], is_fixed=fixed is not None))
        before = exchange.reply.weights or before
    return "".join([*parts, *reversed(charts)])


def message_line(text: str) -> str:
    """A line that says what went wrong; nothing for nothing."""
    return f'<div class="igva-message" role="alert">{escape(text)}</div>' if text else ""


def _chart(
    exchange: Exchange,
    groups: Sequence[Sequence[int]],
    longest: float,
    before: Sequence[float] | None,
    *,
    is_newest: bool,
    is_fixed: bool,
) -> str:
    question = f'<div class="igva-question">{escape(exchange.question)}</div>'
    weights = exchange.reply.weights
    if weights is None:
        # Where the fusion is fixed, the panel says so once, above the charts.
        body = "" if is_fixed else _note("No picture was shown, so no layers were weighed.")
    else:
        marks = before if is_newest and before is not None else [None] * len(weights)
        rows = zip(groups, weights, marks, range(len(weights)), strict=True)
        body = "".join(_bar(group, weight, mark, longest, 205 + 95 * k / len(weights)) for group, weight, mark, k in rows)
    if is_newest and weights is not None:
        if before is not None:
            body += _note("The marks show the answer before.")
        if exchange.reply.instruction:
            read = " · ".join(f"“{text}”" for text in exchange.reply.instruction)
            body += _note(f"The allocator read: {read}")
    return f'<div class="igva-answer{"" if is_newest else " earlier"}">{question}{body}</div>'


def _bar(group: Sequence[int], weight: float, before: float | None, longest: float, hue: float) -> str:
    name = f"layer {group_name(group)}" if len(group) == 1 else f"layers {group_name(group)}"
    mark = "" if before is None else f'<span class="igva-before" style="left: {100 * before / longest:.1f}%"></span>'
    return (
        f'<div class="igva-bar" role="img" aria-label="{name}: {weight:.2f}"><span>{name}</span><span class="igva-track">'
        f'<span class="igva-fill" style="width: {100 * weight / longest:.1f}%; background: hsl({hue:.0f} 60% 55%)"></span>'
        f'{mark}</span><span class="igva-weight">{weight:.2f}</span></div>'
    )


def _note(text: str) -> str:
    return f'<div class="igva-note">{escape(text)}</div>'
