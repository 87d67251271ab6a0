"""What the papers report of LLaVA-1.5, DenseConnector, MMFuser and IGVA, beside results of lmms-eval.

The numbers and the source of each stand in ``published_results.json``. They were read, not run: no weights of IGVA are public.

    own = read_lmms_eval(["logs/mine/20260101_results.json"])
    table = published_table(own)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

_FILE = Path(__file__).with_name("published_results.json")

#: Heads every table of these numbers.
NOT_RUN = "Published, 7B; not run here"


@dataclass(frozen=True)
class PublishedNumber:
    """One number and the key of its source in :attr:`PublishedResults.sources`."""

    value: float
    source: str


@dataclass(frozen=True)
class Benchmark:
    """One row of the table."""

    name: str
    metric: str
    """What is counted, with its unit."""
    published: Mapping[str, tuple[PublishedNumber, ...]]
    """By system; where there are several, the first is that of the IGVA tables."""
    task: str | None = None
    """The task of lmms-eval; None where the model cannot run it, or it gives no single number."""
    task_metric: str | None = None
    scale: float = 1.0
    """Factor from lmms-eval's number to the published unit."""
    note: str | None = None
    """Why numbers may not compare."""


@dataclass(frozen=True)
class PublishedResults:
    """The systems, the benchmarks in the order of the paper, and the sources by key."""

    systems: tuple[str, ...]
    benchmarks: tuple[Benchmark, ...]
    sources: Mapping[str, str]


def published_results() -> PublishedResults:
    """The numbers that the package carries."""
    content = json.loads(_FILE.read_text(encoding="utf-8"))
    return PublishedResults(
        tuple(content["systems"]), tuple(_benchmark(entry) for entry in content["benchmarks"]), content["sources"]
    )


def _benchmark(entry: Mapping[str, Any]) -> Benchmark:
    task = entry.get("lmms_eval", {})
    published = {system: tuple(PublishedNumber(**one) for one in numbers) for system, numbers in entry["published"].items()}
    return Benchmark(
        entry["name"],
        entry["metric"],
        published,
        task.get("task"),
        task.get("metric"),
        task.get("scale", 1.0),
        entry.get("note"),
    )


def read_lmms_eval(files: Sequence[str | Path]) -> dict[str, float]:
    """Results of lmms-eval by the name of the benchmark, in the published units.

    Args:
        files: ``..._results.json`` that ``lmms-eval --output_path`` wrote. Of a benchmark that several hold, the last counts.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file that is no result of lmms-eval, or no benchmark of the table in any of them.
    """
    by_task: dict[str, dict[str, Any]] = {}
    for file in map(Path, files):
        if not file.is_file():
            raise FileNotFoundError(f"no results at {file}; `lmms-eval --output_path` writes them as ..._results.json")
        try:
            tasks = json.loads(file.read_text(encoding="utf-8"))["results"]
            by_task |= {name: dict(metrics) for name, metrics in tasks.items()}
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{file} is no results file of lmms-eval, expected JSON with the scores of each task under 'results' "
                f"({type(error).__name__}: {error})"
            ) from error
    own = {}
    for benchmark in published_results().benchmarks:
        value = _score(by_task.get(benchmark.task or "", {}), benchmark.task_metric)
        if value is not None:
            own[benchmark.name] = benchmark.scale * value
    if not own:
        known = ", ".join(benchmark.task for benchmark in published_results().benchmarks if benchmark.task)
        raise ValueError(f"the results hold {', '.join(by_task) or 'no task'}, and none of the published ones: {known}")
    return own


def _score(metrics: Mapping[str, Any], metric: str | None) -> float | None:
    """The number under ``METRIC,FILTER``; lmms-eval writes "N/A" where it has none."""
    for key, value in metrics.items():
        if key.partition(",")[0] == metric and isinstance(value, int | float):
            return float(value)
    return None


def published_table(own: Mapping[str, float] | None = None, own_name: str = "this model") -> Table:
    """The published numbers for a terminal, with a column of one's own where there is one.

    Args:
        own: by the name of the benchmark, as :func:`read_lmms_eval` gives them.
        own_name: heads that column.
    """
    from rich.table import Table

    results = published_results()
    table = Table(title=NOT_RUN, caption=_caption(results), caption_justify="left")
    table.add_column("benchmark")
    table.add_column("metric")
    for system in results.systems:
        table.add_column(system, justify="right")
    if own is not None:
        table.add_column(f"{own_name}, run with lmms-eval", justify="right")
    notes = _numbered_notes(results)
    for benchmark in results.benchmarks:
        number = notes.get(benchmark.note or "")
        cells = [_cell(benchmark.published.get(system, ())) for system in results.systems]
        if own is not None:
            cells.append(f"{own[benchmark.name]:.1f}" if benchmark.name in own else "–")
        table.add_row(benchmark.name + (f" ({number})" if number else ""), benchmark.metric, *cells)
    return table


def markdown_table() -> str:
    """The same numbers as the table of docs/evaluate.md, notes and sources below it."""
    results = published_results()
    notes = _numbered_notes(results)
    lines = [f"| {NOT_RUN} | metric | {' | '.join(results.systems)} | lmms-eval |", "|---|---" + "|---" * 5 + "|"]
    for benchmark in results.benchmarks:
        number = notes.get(benchmark.note or "")
        cells = " | ".join(_cell(benchmark.published.get(system, ())) for system in results.systems)
        task = f"`{benchmark.task}`: {benchmark.task_metric}" if benchmark.task else ""
        lines.append(f"| {benchmark.name}{f' ({number})' if number else ''} | {benchmark.metric} | {cells} | {task} |")
    return "\n".join([*lines, "", *_legend(results), ""])


def _cell(numbers: Sequence[PublishedNumber]) -> str:
    if not numbers:
        return "–"
    first, *more = (f"{number.value:.1f}" for number in numbers)
    return first + "".join(f" (own {value})" for value in more)


def _numbered_notes(results: PublishedResults) -> dict[str, int]:
    notes = dict.fromkeys(benchmark.note for benchmark in results.benchmarks if benchmark.note)
    return {note: number for number, note in enumerate(notes, start=1)}


def _legend(results: PublishedResults) -> list[str]:
    lines = [f"({number}) {note}." for note, number in _numbered_notes(results).items()]
    lines.append(f"Numbers: {results.sources['igva_tables']}; in brackets: {results.sources['llava_model_zoo']}.")
    return ["  \n".join(lines)]


def _caption(results: PublishedResults) -> str:
    return "\n".join(_legend(results)).replace("  \n", "\n")
