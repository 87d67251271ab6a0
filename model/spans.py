"""From the chat template's marks to the tokens that are learned, checked instead of trusted.

LLaVA's own way, tokenizing the parts again and counting, fails when a tokenizer joins characters across parts, prints
"tokenization mismatch" and trains on nothing. Here the text is rendered and tokenized once, and every ``{% generation %}`` span
of the template is found in it by character offsets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template


def tokenize_with_spans(tokenizer: Any, messages: Sequence[dict[str, str]], chat_template: str) -> dict[str, list[int]]:
    """Token ids of a rendered conversation and a mask of those that lie in ``{% generation %}`` spans.

    Args:
        tokenizer: a fast one, which knows the characters of its tokens.
        messages: ``{"role": ..., "content": text}``.
        chat_template: Jinja template.

    Returns:
        ``input_ids``, ``attention_mask`` and ``assistant_masks``, lists of equal length.

    Raises:
        ValueError: the template marks nothing of what the assistant says; or another number of spans than the assistant has
            turns, or a span without its turn's words; or a token holds words of a span and words before or behind it.
    """
    rendered, spans = render_jinja_template(
        conversations=[list(messages)],
        chat_template=chat_template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    text = rendered[0]
    _check_spans(text, spans[0], [message["content"] for message in messages if message["role"] == "assistant"])
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = _mask(text, spans[0], encoded["offset_mapping"])
    return {
        "input_ids": list(encoded["input_ids"]),
        "attention_mask": list(encoded["attention_mask"]),
        "assistant_masks": mask,
    }


def _check_spans(text: str, spans: Sequence[tuple[int, int]], answers: Sequence[str]) -> None:
    if answers and not spans:
        raise ValueError("the chat template marks no {% generation %} span, so there would be nothing to learn")
    if len(spans) != len(answers):
        raise ValueError(
            f"the chat template marks {len(spans)} {{% generation %}} spans, but the assistant has {len(answers)} turns; mark "
            "each turn of the assistant once"
        )
    for (start, end), answer in zip(spans, answers, strict=True):
        # Templates may strip a text or put an end mark behind it; its words must be there.
        if answer.strip() not in text[start:end]:
            raise ValueError(
                f"the {{% generation %}} span {text[start:end][:80]!r} does not hold what the assistant says, {answer[:80]!r}; "
                "labels would be of other words"
            )


def _mask(text: str, spans: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """1 for the tokens of the spans; both come in the order of the text."""
    mask = [0] * len(offsets)
    remaining = iter(spans)
    span = next(remaining, None)
    for index, (start, end) in enumerate(offsets):
        while span is not None and start >= span[1]:
            span = next(remaining, None)
        if span is None:
            break
        if end <= span[0] or start == end:
            continue
        # A word takes the blank before it along ("ASSISTANT:" + " A"), which the template puts outside of the span.
        outside = text[start : min(span[0], end)] + text[max(span[1], start) : end]
        if outside.strip():
            raise ValueError(
                f"the token {text[start:end]!r} lies across the border of a {{% generation %}} span; put a "
                "blank, a line break or a special token between prompt and answer in the chat template"
            )
        if text[max(start, span[0]) : min(end, span[1])].strip() or not outside:
            mask[index] = 1
    return mask
