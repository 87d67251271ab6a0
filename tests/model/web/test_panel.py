"""The bars: as long as the weights, marked where they were, and safe against what people type."""

from __future__ import annotations

import re

from model.answering import Reply
from model.web.panel import message_line, weights_panel
from model.web.talk import Exchange

GROUPS = ((1, 2), (3,))


def exchange(question: str, *weights: float) -> Exchange:
    return Exchange(question, (), False, Reply("yes", weights or None, (question,) if weights else ()))


def test_bars_have_one_scale_over_all_answers():
    panel = weights_panel([exchange("Old?", 0.8, 0.2), exchange("New?", 0.4, 0.6)], GROUPS)
    newest, earlier = panel.split('<div class="igva-answer earlier">')
    assert re.findall(r"width: ([\d.]+)%", newest) == ["50.0", "75.0"]
    assert re.findall(r"width: ([\d.]+)%", earlier) == ["100.0", "25.0"]
    assert re.findall(r'aria-label="(.*?)"', newest) == ["layers 1-2: 0.40", "layer 3: 0.60"]


def test_the_newest_bars_are_marked_where_the_answer_before_had_them():
    panel = weights_panel([exchange("Old?", 0.8, 0.2), exchange("No picture"), exchange("New?", 0.4, 0.6)], GROUPS)
    assert re.findall(r"left: ([\d.]+)%", panel) == ["100.0", "25.0"]
    assert "igva-before" not in weights_panel([exchange("First?", 0.4, 0.6)], GROUPS)


def test_what_the_allocator_read_is_shown():
    assert "The allocator read: “New?”" in weights_panel([exchange("New?", 0.4, 0.6)], GROUPS)


def test_an_honest_line_where_there_are_no_weights():
    assert "no layers were weighed" in weights_panel([exchange("Hello?")], GROUPS)
    fixed = weights_panel([exchange("Hello?")], GROUPS, fixed="mixes its layers in a fixed way")
    assert fixed.count("in a fixed way") == 1 and "no layers were weighed" not in fixed
    assert "igva-bar" not in weights_panel([], GROUPS)


def test_a_warning_stands_above_the_bars():
    panel = weights_panel([exchange("New?", 0.5, 0.5)], GROUPS, warning="collapsed")
    assert panel.index("warning: collapsed") < panel.index("igva-bar")


def test_what_is_typed_stays_text():
    attack = '<img src=x onerror="alert(1)">'
    assert "<img" not in weights_panel([exchange(attack, 0.4, 0.6)], GROUPS, warning=attack)
    assert "<img" not in message_line(attack)
    assert message_line("") == ""
