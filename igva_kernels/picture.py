"""A fusion plan as a picture: hidden states from left to right, slots from top to bottom, a bar for what is mixed.

    python -m igva_kernels.picture "FusionPlan.igva(24)" igva.svg
    python -m igva_kernels.picture --page docs/plans.md        # every plan that a markdown page shows, again

Only this module needs matplotlib (``pip install matplotlib``), and only once it draws.
"""

from __future__ import annotations

import argparse
import io
import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import igva_kernels
from igva_kernels.plan import FusionPlan, Layer, Mean, Slot
from igva_kernels.program import NormKind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Bar", "Sharing", "bars_of", "draw_plan", "pictures_of_page", "plan_of", "save_picture"]

Kind = Literal["copy", "mean", "weighted", "plus"]

Sharing = Literal["all", "image", "token"]
"""For what the weights are the same: (K,), (B, K) and (B, N, K)."""

SHARING_TEXT: dict[Sharing, str] = {
    "all": "one set of weights for all",
    "image": "weights per image",
    "token": "weights per token",
}
NORM_TEXT: dict[NormKind, str] = {"layer": "round: after a LayerNorm", "rms": "round: after an RMSNorm"}

FORMATS = (".svg", ".png")


@dataclass(frozen=True)
class Bar:
    """Neighbouring hidden states that enter one slot alike.

    Args:
        slot: position of the slot in the plan.
        lane: line within the slot, from the top; states that enter a slot twice need two.
        first, last: indices of the hidden states, both included.
        kind: ``"plus"`` is the layer that stands beside a weighted sum.
        column: of the weights; None where there is none.
        text: what the states are multiplied with.
        norm: of each state, before it is multiplied; None for none.
    """

    slot: int
    lane: int
    first: int
    last: int
    kind: Kind
    column: int | None
    text: str
    norm: NormKind | None


def bars_of(plan: FusionPlan) -> tuple[Bar, ...]:
    """What :func:`draw_plan` draws, slot by slot, without matplotlib."""
    bars: list[Bar] = []
    column = 0
    for position, slot in enumerate(plan.slots):
        lanes: list[set[int]] = []
        for kind, layers, number, norm in _parts(slot, column):
            lane = next((lane for lane, taken in enumerate(lanes) if not taken & set(layers)), len(lanes))
            if lane == len(lanes):
                lanes.append(set())
            lanes[lane].update(layers)
            # One cell a normalised state, whose round shape says so.
            for run in _runs(layers) if norm is None else [[layer] for layer in layers]:
                text = _factor(kind, number, len(layers), len(run))
                bars.append(Bar(position, lane, run[0], run[-1], kind, number, text, norm))
        column += len(getattr(slot, "groups", ()))
    return tuple(bars)


def draw_plan(plan: FusionPlan, *, weights: Sharing | None = None, title: str | None = None) -> Figure:
    """The picture of a plan.

    Args:
        plan: any plan.
        weights: said beside the weighted sums; a plan does not tell, as its weights come at run time. None says nothing.
        title: above the picture; None for none.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: ``weights`` is none of ``"all"``, ``"image"``, ``"token"``.
    """
    if weights is not None and weights not in get_args(Sharing):
        raise ValueError(f"weights must be one of {', '.join(map(repr, get_args(Sharing)))} or None, got {weights!r}")
    figure_class = _matplotlib_figure()

    bars = bars_of(plan)
    tops, bottom = _rows(plan, bars, _TITLE if title else 0.0)
    width, height = _LEFT + plan.num_layers + 1 + _RIGHT, bottom + _MARGIN
    figure = figure_class(figsize=(width * _INCH, height * _INCH), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(-_LEFT, width - _LEFT)
    axes.set_ylim(height, 0)
    if title:
        axes.text(-_LEFT + _MARGIN, 0.8, title, family="monospace", size=8, color=_INK, va="center")
    _draw_header(axes, plan, tops[0] - 0.75)
    for position, slot in enumerate(plan.slots):
        _draw_slot(axes, plan, position, slot, tops[position], weights)
    axes.hlines(
        [top + 0.5 for top in tops], 0.2, plan.num_layers + 0.8, colors=_LINE, linewidths=0.8, zorder=0.5, clip_on=False
    )
    for bar in bars:
        _draw_bar(axes, bar, tops[bar.slot] + bar.lane, plan.num_groups)
    return figure


def save_picture(plan: FusionPlan, path: str | Path, *, weights: Sharing | None = None, title: str | None = None) -> None:
    """Write the picture of a plan in one piece: the same plan gives the same SVG, byte for byte, with one matplotlib.

    Args:
        plan, weights, title: as for :func:`draw_plan`.
        path: ends in ``.svg`` or ``.png``; its folder is made.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: another ending; ``weights`` as for :func:`draw_plan`.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"the picture of a plan must end in {' or '.join(FORMATS)}, got {path.name!r}")
    _matplotlib_figure()
    import matplotlib

    # Text stays text, so that a picture takes a few kilobytes and its words can be found.
    written = io.BytesIO()
    with matplotlib.rc_context(
        {
            "svg.hashsalt": "igva_kernels",
            "svg.fonttype": "none",
            "font.sans-serif": ["DejaVu Sans"],
            "font.monospace": ["DejaVu Sans Mono"],
        }
    ):
        figure = draw_plan(plan, weights=weights, title=title)
        if path.suffix.lower() == ".svg":
            figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
        else:
            figure.savefig(written, format="png", dpi=150)
    content = written.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(_shorter(content) if path.suffix.lower() == ".svg" else content)
    temporary.replace(path)


def plan_of(expression: str) -> FusionPlan:
    """The plan that an expression gives, in the names of :mod:`igva_kernels`: ``"FusionPlan.igva(24)"``. It is evaluated.

    Raises:
        ValueError: it cannot be evaluated, or gives no plan.
    """
    names = {**vars(igva_kernels), "__builtins__": {"range": range}}
    try:
        plan = eval(expression, names)
    except Exception as error:
        raise ValueError(f"{expression!r} gives no plan: {error}; write for instance FusionPlan.igva(24)") from error
    if not isinstance(plan, FusionPlan):
        raise ValueError(f"{expression!r} gives {type(plan).__name__}, expected a FusionPlan, such as FusionPlan.igva(24)")
    return plan


def pictures_of_page(page: Path) -> Iterator[tuple[str, Path, Sharing | None]]:
    """The plans that a markdown page shows: expression, file, and what its weights are for.

    That is every image whose alternative text is the expression: ``![FusionPlan.igva(24)](igva.svg "weights per image")``.

    Raises:
        ValueError: a title that is none of :data:`SHARING_TEXT`.
    """
    sharing = {text: key for key, text in SHARING_TEXT.items()}
    for expression, file, title in _IMAGE.findall(page.read_text(encoding="utf-8")):
        if title and title not in sharing:
            raise ValueError(f"{page}: the title {title!r} of {file} is none of {', '.join(map(repr, sharing))}")
        yield expression, page.parent / file, sharing.get(title)


_IMAGE = re.compile(r"!\[(FusionPlan[^\n]*?)\]\(([^\s)]+)(?: \"([^\"\n]*)\")?\)")


def _shorter(svg: bytes) -> bytes:
    """Without what changes nothing: rotations by 0, metadata, and thousandths of a point."""
    text = re.sub(r' transform="rotate\(-?0 [^"]*"|\s*<metadata>.*?</metadata>', "", svg.decode(), flags=re.DOTALL)
    return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", text).encode()


# ---- the drawing, in units of a column ------------------------------------------------------------------------------

_INCH, _LEFT, _RIGHT, _MARGIN, _TITLE, _BETWEEN = 0.27, 4.2, 8.0, 0.4, 1.1, 0.55
_INK, _PALE, _LINE, _COPY, _MEAN = "#24292f", "#b8bec6", "#dde1e6", "#3d4451", "#56b4e9"
# Okabe and Ito's colours, which stay apart in every common kind of colour blindness.
_GROUPS = ("#e69f00", "#009e73", "#cc79a7", "#0072b2", "#f0e442", "#d55e00")


def _parts(slot: Slot, column: int) -> Iterator[tuple[Kind, tuple[int, ...], int | None, NormKind | None]]:
    """Kind, layers, column of the weights and norm of all that a slot adds up."""
    if isinstance(slot, Layer):
        yield "copy", (slot.index,), None, None
    elif isinstance(slot, Mean):
        yield "mean", slot.layers, None, slot.norm.kind if slot.norm else None
    else:
        for number, group in enumerate(slot.groups, start=column):
            yield "weighted", group, number, slot.norm.kind if slot.norm else None
        if slot.plus is not None:
            yield "plus", (slot.plus,), None, None


def _runs(layers: Sequence[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return runs


def _factor(kind: Kind, column: int | None, size: int, length: int) -> str:
    """What stands in a bar of ``length`` states, of a group of ``size``."""
    if kind == "copy":
        return "1"
    if kind == "plus":
        return "+1"
    weight = "" if column is None else "w" + str(column + 1).translate(_SUBSCRIPTS)
    if length == size >= 4:
        return f"{weight} · mean" if weight else f"mean of {size}"
    return f"{weight or 1}/{size}" if size > 1 else weight or "1"


_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def _rows(plan: FusionPlan, bars: Sequence[Bar], title: float) -> tuple[list[float], float]:
    """Where each slot begins, and where the last one ends."""
    tops, top = [], title + 1.5
    for position in range(plan.num_slots):
        tops.append(top)
        top += 1 + max(bar.lane for bar in bars if bar.slot == position) + _BETWEEN
    return tops, top - _BETWEEN


def _draw_header(axes: Axes, plan: FusionPlan, y: float) -> None:
    axes.text(-0.2, y, "h", size=7, color=_INK, ha="right", va="center", style="italic")
    for layer in range(plan.num_layers + 1):
        read = layer in plan.sources
        axes.text(layer + 0.5, y, str(layer), size=6.5, color=_INK if read else _PALE, ha="center", va="center")


def _draw_slot(axes: Axes, plan: FusionPlan, position: int, slot: Slot, top: float, weights: Sharing | None) -> None:
    bounds = "" if plan.num_slots == 1 else f"[{_multiple(position)} : {_multiple(position + 1)}]"
    axes.text(-0.4, top + 0.5, f"out{bounds}", family="monospace", size=7, color=_INK, ha="right", va="center")
    lines = _described(slot, weights)
    x = plan.num_layers + 1.5
    for number, line in enumerate(lines):
        y = top + 0.5 + (number - (len(lines) - 1) / 2) * 0.62
        axes.text(x, y, line, size=7 if number == 0 else 6, color=_INK, ha="left", va="center")


def _multiple(count: int) -> str:
    return {0: "0", 1: "D"}.get(count, f"{count}D")


def _described(slot: Slot, weights: Sharing | None) -> list[str]:
    """What a slot holds, in words."""
    if isinstance(slot, Layer):
        return [f"h{slot.index}, copied"]
    norm = [NORM_TEXT[slot.norm.kind]] if slot.norm else []
    if isinstance(slot, Mean):
        return [f"mean of {len(slot.layers)} layers", *norm]
    single = all(len(group) == 1 for group in slot.groups)
    what = f"weighted sum of {len(slot.groups)} {'layers' if single else 'means'}"
    plus = "" if slot.plus is None else f" + h{slot.plus}"
    return [what + plus, *norm, *([SHARING_TEXT[weights]] if weights else [])]


def _draw_bar(axes: Axes, bar: Bar, top: float, num_groups: int) -> None:
    from matplotlib.patches import FancyBboxPatch

    colour = _colour(bar, num_groups)
    ink = "white" if _luminance(colour) < 0.22 else _INK
    length = bar.last - bar.first + 1
    style = f"round,pad=0,rounding_size={0.1 if bar.norm is None else 0.42}"
    corner, size = (bar.first + 0.07, top + 0.07), (length - 0.14, 0.86)
    axes.add_patch(FancyBboxPatch(corner, *size, boxstyle=style, facecolor=colour, linewidth=0, clip_on=False))
    background = None
    if length > 1:
        # One line with gaps, which takes less of a file than one line a column.
        columns = [x for layer in range(bar.first + 1, bar.last + 1) for x in (layer, layer, math.nan)]
        heights = [top + 0.07, top + 0.93, math.nan] * (length - 1)
        axes.plot(columns, heights, color="white", linewidth=0.6, clip_on=False)
        background = {"facecolor": colour, "edgecolor": "none", "pad": 0.6}
    points = min(7.0, 24.0 * length / len(bar.text))
    x, y = (bar.first + bar.last + 1) / 2, top + 0.5
    axes.text(x, y, bar.text, size=points, color=ink, ha="center", va="center", bbox=background)


def _colour(bar: Bar, num_groups: int) -> str:
    if bar.kind in ("copy", "plus"):
        return _COPY
    if bar.column is None:
        return _MEAN
    if num_groups <= len(_GROUPS):
        return _GROUPS[bar.column]
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return to_hex(colormaps["cividis"](0.15 + 0.85 * bar.column / (num_groups - 1)))


def _luminance(colour: str) -> float:
    """Relative luminance (WCAG 2) of ``#rrggbb``."""
    channels = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _matplotlib_figure() -> type[Figure]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the picture of a plan needs matplotlib: pip install matplotlib") from error
    return Figure


# ---- the command ----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if (options.page is None) == (options.plan is None) or (options.plan is None) != (options.out is None):
        parser.error("give a plan and a file, or --page alone")
    try:
        if options.page is None:
            save_picture(plan_of(options.plan), options.out, weights=options.weights, title=options.plan)
            return 0
        drawn = list(pictures_of_page(options.page))
        for expression, file, weights in drawn:
            save_picture(plan_of(expression), file, weights=weights, title=expression)
    except (ImportError, OSError, ValueError) as error:
        print(f"igva_kernels.picture: {error}", file=sys.stderr)
        return 1
    print(f"{len(drawn)} pictures of {options.page}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m igva_kernels.picture",
        description="Draw a fusion plan: hidden states from left to right, slots from top to bottom.",
        epilog='example:\n  python -m igva_kernels.picture "FusionPlan.igva(24)" igva.svg --weights=image',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("plan", nargs="?", metavar="PLAN", help="Python expression in the names of igva_kernels")
    parser.add_argument("out", nargs="?", type=Path, metavar="OUT", help="file that ends in .svg or .png")
    parser.add_argument("--weights", choices=get_args(Sharing), help="what the weights are the same for, to be said in it")
    parser.add_argument("--page", type=Path, help="markdown page: draw all plans again that it shows")
    return parser


if __name__ == "__main__":
    sys.exit(main())
