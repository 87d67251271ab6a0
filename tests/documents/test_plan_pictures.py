"""The pictures of plans: what they show is what the plan holds, and those of docs/plans.md are those that it gives."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from documents.pages import ROOT

from igva_kernels import FusionPlan, Layer, Mean, Norm, Weighted
from igva_kernels.picture import Bar, bars_of, draw_plan, main, pictures_of_page, plan_of, save_picture

PAGE = ROOT / "docs" / "plans.md"
SHOWN = list(pictures_of_page(PAGE))


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib", reason="matplotlib is not installed: the pictures of plans are not drawn")


def structure(svg: Path) -> list[tuple[str, str, str, tuple[float, ...]]]:
    """Kind, words, colours and places of all that a picture shows, to a tenth of a point."""
    found = []
    for element in ElementTree.fromstring(svg.read_text(encoding="utf-8")).iter():
        tag = element.tag.rpartition("}")[2]
        if tag in ("path", "text", "use"):
            colours = re.findall(r"fill: (#\w+)", element.get("style", ""))
            numbers = " ".join(element.get(name, "") for name in ("d", "x", "y", "transform"))
            places = tuple(round(float(number), 1) for number in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", numbers))
            found.append((tag, element.text or "", "".join(colours), places))
    return found


def same(one: list, other: list) -> bool:
    """Equal, with places that differ by no more than another version's rounding."""
    return len(one) == len(other) and all(
        a[:3] == b[:3] and len(a[3]) == len(b[3]) and all(abs(x - y) <= 0.2 for x, y in zip(a[3], b[3], strict=True))
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize(("expression", "file", "weights"), SHOWN, ids=[file.stem for _, file, _ in SHOWN])
def test_the_pictures_of_the_page_are_those_of_its_plans(expression, file, weights, tmp_path, matplotlib):
    save_picture(plan_of(expression), tmp_path / "again.svg", weights=weights, title=expression)
    assert same(structure(file), structure(tmp_path / "again.svg")), "make pictures draws them again"


def test_the_pictures_of_the_page_are_small_and_all_there():
    files = {file for _, file, _ in SHOWN}
    assert files == set((ROOT / "docs" / "pictures" / "plans").iterdir())
    assert sum(file.stat().st_size for file in files) < 400_000


def test_a_picture_is_the_same_each_time(tmp_path, matplotlib):
    plan = FusionPlan.igva(24)
    for name in ("one.svg", "two.svg"):
        save_picture(plan, tmp_path / name, weights="image", title="IGVA")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert structure(tmp_path / "one.svg") != structure(next(file for _, file, _ in SHOWN))


def test_bars_of_igva():
    assert bars_of(FusionPlan.igva(24)) == (
        Bar(0, 0, 1, 6, "weighted", 0, "w₁ · mean", None),
        Bar(0, 0, 7, 12, "weighted", 1, "w₂ · mean", None),
        Bar(0, 0, 13, 18, "weighted", 2, "w₃ · mean", None),
        Bar(0, 0, 19, 24, "weighted", 3, "w₄ · mean", None),
        Bar(1, 0, 23, 23, "copy", None, "1", None),
    )


def test_what_enters_twice_stands_on_two_lines():
    plan = FusionPlan(6, (Weighted(((1, 2), (2, 3, 4, 5)), plus=2), Mean((0, 2, 3))))
    assert bars_of(plan) == (
        Bar(0, 0, 1, 2, "weighted", 0, "w₁/2", None),
        Bar(0, 1, 2, 5, "weighted", 1, "w₂ · mean", None),
        Bar(0, 2, 2, 2, "plus", None, "+1", None),
        Bar(1, 0, 0, 0, "mean", None, "1/3", None),
        Bar(1, 0, 2, 3, "mean", None, "1/3", None),
    )


def test_columns_go_on_over_slots_and_normalised_states_stand_apart():
    plan = FusionPlan(3, (Weighted(((1,), (2,))), Layer(0), Weighted(((2, 3),), norm=Norm("rms"))))
    assert [(bar.text, bar.first, bar.last, bar.norm) for bar in bars_of(plan) if bar.slot == 2] == [
        ("w₃/2", 2, 2, "rms"),
        ("w₃/2", 3, 3, "rms"),
    ]


def test_words_of_the_picture(tmp_path, matplotlib):
    save_picture(FusionPlan.tgif(4), tmp_path / "tgif.svg", weights="image", title="TGIF")
    words = {text for tag, text, _, _ in structure(tmp_path / "tgif.svg") if tag == "text"}
    assert {"TGIF", "weighted sum of 4 layers + h3", "weights per image", "w₁", "w₄", "+1", "out"} <= words


def test_the_command_draws_a_plan_and_a_page(tmp_path, capsys, matplotlib):
    assert main(["FusionPlan.llava(12)", str(tmp_path / "new" / "llava.png")]) == 0
    assert (tmp_path / "new" / "llava.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "page.md").write_text('![FusionPlan.tgif(4)](tgif.svg "weights per image")\n', encoding="utf-8")
    assert main(["--page", str(tmp_path / "page.md")]) == 0
    assert "1 pictures" in capsys.readouterr().out
    assert "weights per image" in (tmp_path / "tgif.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["FusionPlan.nonsense(3)", "plan.svg"], "gives no plan"),
        (["3", "plan.svg"], "expected a FusionPlan"),
        (["FusionPlan.llava(3)", "plan.jpg"], "must end in .svg or .png"),
        (["--page", "no-such-page.md"], "no-such-page.md"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_a_line(arguments, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    told = capsys.readouterr().err
    assert text in told and told.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_weights_that_are_unknown_are_refused():
    with pytest.raises(ValueError, match="weights must be one of 'all', 'image', 'token' or None, got 'head'"):
        draw_plan(FusionPlan.llava(2), weights="head")


def test_the_module_needs_no_matplotlib_before_it_draws():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from igva_kernels.picture import bars_of, plan_of\n"
        "print(len(bars_of(plan_of('FusionPlan.igva(24)'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "5\n", done.stderr


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        save_picture(FusionPlan.llava(2), tmp_path / "plan.svg")
    assert not list(tmp_path.iterdir())
