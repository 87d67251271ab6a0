"""What ``igva explain`` and the web page write of the weights: one JSON file and one heat map."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from model.explain import GroupSaliency


@dataclass(frozen=True)
class Row:
    """One line of the report: a question over all pictures, or a kind of question over its samples."""

    name: str
    count: int
    mean: tuple[float, ...]
    spread: tuple[float, ...]
    """Standard deviation over the count; zeros for one."""
    entropy: float
    """Mean entropy of the weights as a share of ln K."""


def row_of(name: str, weights: Tensor) -> Row:
    """The row of (n, K) weights."""
    from model.explain import entropy

    spread = weights.std(0) if len(weights) > 1 else weights[0] * 0
    return Row(name, len(weights), tuple(weights.mean(0).tolist()), tuple(spread.tolist()), float(entropy(weights).mean()))


def group_name(group: Sequence[int]) -> str:
    """``1-6``, or ``3`` for a single layer."""
    return f"{group[0]}-{group[-1]}" if len(group) > 1 else str(group[0])


def require_matplotlib() -> None:
    """Say before anything is loaded that no heat map can be drawn.

    Raises:
        ImportError: matplotlib is not installed; the message names the extra that brings it.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("the heat map needs matplotlib, which is not installed: pip install 'igva-kernels[quickstart]'")


def write(
    stem: Path,
    rows: Sequence[Row],
    groups: Sequence[Sequence[int]],
    warning: str | None = None,
    saliency: Sequence[GroupSaliency] = (),
) -> None:
    """STEM.json and STEM.png, each in one piece.

    Args:
        stem: path without the suffix; its folder is made.
        rows: what to show.
        groups: the layers of each group, as in ``FusionPlan.groups``.
        warning: of :func:`model.explain.collapse`.
        saliency: one a row, where there is some.
    """
    from model.instruction import write_text_atomically

    content: dict[str, Any] = {
        "groups": [list(group) for group in groups],
        "rows": [
            {"name": row.name, "count": row.count, "mean": row.mean, "spread": row.spread, "entropy": row.entropy}
            for row in rows
        ],
        "warning": warning,
    }
    if saliency:
        content["saliency"] = [
            {"answer": entry.answer, "log_probability": entry.log_probability, "lost": entry.lost} for entry in saliency
        ]
    stem.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(Path(f"{stem}.json"), json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    plot(Path(f"{stem}.png"), rows, groups)


def plot(path: Path, rows: Sequence[Row], groups: Sequence[Sequence[int]]) -> None:
    """The heat map: a row a question, a column a layer group, the spread below the weight where there is one."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.5 + 1.3 * len(groups), 1.2 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    values = [list(row.mean) for row in rows]
    drawn = axes.imshow(values, vmin=0, cmap="viridis", aspect="auto")
    for y, row in enumerate(rows):
        for x, (mean, spread) in enumerate(zip(row.mean, row.spread, strict=True)):
            text = f"{mean:.2f}" + (f"\n± {spread:.2f}" if row.count > 1 else "")
            red, green, blue, _ = drawn.to_rgba(np.asarray(mean))
            is_dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.5
            axes.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if is_dark else "black")
    axes.set_xticks(range(len(groups)), [f"layers {group_name(group)}" for group in groups])
    axes.set_yticks(range(len(rows)), [_shortened(row.name) for row in rows])
    figure.colorbar(drawn, label="weight")
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(path)


def _shortened(text: str, length: int = 40) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
