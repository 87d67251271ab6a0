"""What the quickstart shows at its end: tables for the terminal, one JSON, one plot."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from model.evaluation import OVERALL, Answer, EvaluationResult, KindScore
from model.instruction import write_text_atomically
from model.quickstart.fusion_cost import FusionCost
from model.quickstart.pictures import KINDS

NUM_SAMPLE_ANSWERS = 8

PACKAGES = ("torch", "transformers", "accelerate", "peft", "sentence-transformers", "numpy")


@dataclass(frozen=True)
class Evaluations:
    """The model on its own pictures and the two baselines, all on the same questions."""

    model: EvaluationResult
    another_picture: EvaluationResult
    most_frequent: EvaluationResult

    @property
    def margins(self) -> tuple[float, float]:
        """Overall accuracy above each baseline."""
        own = self.model.overall.accuracy
        return own - self.another_picture.overall.accuracy, own - self.most_frequent.overall.accuracy


def print_report(
    console: Console,
    evaluations: Evaluations,
    groups: Sequence[Sequence[int]],
    cost: FusionCost,
    seconds: dict[str, float],
    peak_memory_gb: float,
) -> None:
    """All of it but the command for one's own picture.

    Args:
        groups: the layers of each group, for the headings.
        seconds: wall time by phase.
        peak_memory_gb: of the training.
    """
    console.print(accuracy_table(evaluations))
    over_picture, over_guess = evaluations.margins
    console.print(
        f"overall {100 * over_picture:+.1f} points over the same model with another picture, "
        f"{100 * over_guess:+.1f} over the most frequent answer\n"
    )
    console.print(weights_table(evaluations.model, groups))
    console.print(answers_table(sample_answers(evaluations.model.answers)))
    console.print(cost_table(cost))
    console.print(time_table(seconds))
    console.print(f"peak memory of the training: {peak_memory_gb:.1f} GB\n")


def accuracy_table(evaluations: Evaluations) -> Table:
    """Exact match and its standard error by kind of question, beside the baselines."""
    table = Table(title="Exact match on held-out pictures")
    table.add_column("kind")
    for heading in ("questions", "IGVA", "another picture", "most frequent answer"):
        table.add_column(heading, justify="right")
    for kind in _kinds(evaluations.model):
        if kind == OVERALL:
            table.add_section()
        table.add_row(
            kind,
            str(evaluations.model.scores[kind].count),
            *(
                _percent(result.scores[kind])
                for result in (evaluations.model, evaluations.another_picture, evaluations.most_frequent)
            ),
        )
    return table


def weights_table(result: EvaluationResult, groups: Sequence[Sequence[int]]) -> Table:
    """Mean weight of each layer group by kind of question."""
    table = Table(title="Mean weight of the layer groups")
    table.add_column("kind")
    for group in groups:
        table.add_column(f"layers {_layers(group)}", justify="right")
    for kind in _kinds(result):
        if kind == OVERALL:
            table.add_section()
        table.add_row(kind, *(f"{weight:.3f}" for weight in result.scores[kind].fusion_weights or ()))
    return table


def sample_answers(answers: Sequence[Answer]) -> list[Answer]:
    """Eight answers, kind by kind in turn, right and wrong as they come."""
    by_kind = [[answer for answer in answers if answer.kind == kind] for kind in KINDS]
    turns = [of_kind[turn] for turn in range(NUM_SAMPLE_ANSWERS) for of_kind in by_kind if turn < len(of_kind)]
    return turns[:NUM_SAMPLE_ANSWERS]


def answers_table(answers: Sequence[Answer]) -> Table:
    """Questions with the right answer and the model's."""
    table = Table(title="Sample answers")
    for heading in ("sample", "question", "right answer", "model"):
        table.add_column(heading)
    for answer in answers:
        mark = "" if answer.correct else "  (wrong)"
        table.add_row(answer.id, answer.question, answer.reference, answer.answer + mark)
    return table


def cost_table(cost: FusionCost) -> Table:
    """Time and peak memory of the fusion."""
    table = Table(title=f"The fusion of {cost.images} pictures, {cost.tokens} patches of width {cost.width}, {cost.dtype}")
    for heading in ("", "time", "peak memory"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, row in (("igva_kernels.fuse", cost.fused), ("official eager formulation", cost.official)):
        table.add_row(name, f"{1e3 * row.seconds:.2f} ms", f"{row.peak_bytes / 2**20:.1f} MiB")
    table.add_row(
        "ratio",
        f"{cost.official.seconds / cost.fused.seconds:.1f}x",
        f"{cost.official.peak_bytes / cost.fused.peak_bytes:.1f}x",
    )
    return table


def time_table(seconds: dict[str, float]) -> Table:
    """Wall time by phase."""
    table = Table(title="Wall time")
    table.add_column("phase")
    table.add_column("time", justify="right")
    for name, value in seconds.items():
        table.add_row(name, _minutes(value))
    table.add_section()
    table.add_row("total", _minutes(sum(seconds.values())))
    return table


def write_json(path: Path, evaluations: Evaluations, cost: FusionCost, **more: Any) -> None:
    """Everything as one JSON file; ``more`` are further entries, such as timings and settings."""
    content = {
        "machine": machine(),
        **more,
        "model": evaluations.model.to_dict(),
        "another_picture": evaluations.another_picture.to_dict(),
        "most_frequent_answer": evaluations.most_frequent.to_dict(),
        "fusion_cost": cost.to_dict(),
    }
    write_text_atomically(path, json.dumps(content, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """What the figures come from: processor, threads, versions."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def plot(path: Path, evaluations: Evaluations, groups: Sequence[Sequence[int]]) -> None:
    """Accuracy by kind with one standard error, beside the baselines; below it the weights of the layer groups."""
    from matplotlib.figure import Figure

    kinds = _kinds(evaluations.model)
    figure = Figure(figsize=(9, 7), layout="constrained")
    top, bottom = figure.subplots(2, 1)
    bars = (
        ("IGVA", evaluations.model, "tab:blue"),
        ("same model, another picture", evaluations.another_picture, "tab:orange"),
        ("most frequent answer", evaluations.most_frequent, "tab:gray"),
    )
    for offset, (label, result, colour) in zip((-0.27, 0, 0.27), bars, strict=True):
        scores = [result.scores[kind] for kind in kinds]
        top.bar(
            [position + offset for position in range(len(kinds))],
            [100 * score.accuracy for score in scores],
            0.27,
            yerr=[100 * score.standard_error for score in scores],
            label=label,
            color=colour,
            capsize=2,
        )
    top.set_xticks(range(len(kinds)), kinds)
    top.set_ylabel("exact match, %")
    top.set_ylim(0, 105)
    top.legend(loc="upper center", bbox_to_anchor=(0.5, 1.15), ncols=3, frameon=False)

    heights = [0.0] * len(kinds)
    for column, group in enumerate(groups):
        values = [(evaluations.model.scores[kind].fusion_weights or [0.0] * len(groups))[column] for kind in kinds]
        bottom.bar(kinds, values, 0.6, bottom=heights, label=f"layers {_layers(group)}")
        heights = [height + value for height, value in zip(heights, values, strict=True)]
    bottom.set_ylabel("mean weight of the layer groups")
    bottom.set_ylim(0, 1)
    bottom.legend(loc="upper center", bbox_to_anchor=(0.5, 1.15), ncols=len(groups), frameon=False)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(path)


def _kinds(result: EvaluationResult) -> list[str]:
    return [kind for kind in (*KINDS, OVERALL) if kind in result.scores]


def _percent(score: KindScore) -> str:
    return f"{100 * score.accuracy:.1f} ± {100 * score.standard_error:.1f} %"


def _layers(group: Sequence[int]) -> str:
    return str(group[0]) if len(group) == 1 else f"{group[0]}-{group[-1]}"


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"
