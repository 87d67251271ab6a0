"""``python -m benchmarks.report RESULTS.json...``: result files as markdown tables, and as a plot."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from .record import read_json

Cell = Callable[[dict], str]


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    command = argparse.ArgumentParser(prog="python -m benchmarks.report", description="Result files as markdown tables.")
    command.add_argument("files", nargs="+", type=Path, help="result files of python -m benchmarks")
    command.add_argument("--out", type=Path, help="write the tables here (default: standard output)")
    command.add_argument("--plot", type=Path, help="write a PNG of the fusion's speed here; needs matplotlib")
    options = command.parse_args(arguments)
    try:
        documents = [read_json(file) for file in options.files]
    except (OSError, ValueError) as error:
        print(f"cannot read the results: {error}", file=sys.stderr)
        return 2
    text = "\n\n".join(render(document) for document in documents) + "\n"
    if options.out:
        options.out.write_text(text)
    else:
        print(text, end="", flush=True)
    if options.plot:
        try:
            plot(documents, options.plot)
        except ImportError:
            print("--plot: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
            return 2
        except ValueError as error:
            print(f"--plot: {error}", file=sys.stderr)
            return 2
    return 0


def render(document: dict) -> str:
    """One result file as markdown."""
    machine = document["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    processor = (
        f"{machine['cpu']}, {machine['cpu_count']} cores, {machine['cpu_capability']}, {machine['torch_threads']} threads"
    )
    lines = [f"## {document['part']} on {machine['device']}", "", f"{document['started']} · {processor} · {versions}"]
    load = machine.get("load_average")
    if load and load > BUSY_LOAD and machine["device"] == "cpu":
        lines += ["", f"**The machine was busy: load average {load:.1f} at the start. Ratios are more reliable than times.**"]
    if document["arguments"].get("tiny"):
        lines += ["", "**Tiny sizes: these figures show that the code runs, and nothing else.**"]
    copy = document["ceilings"].get("copy")
    if copy:
        lines += ["", f"Copy bandwidth in this run: {copy['bytes_per_s'] / 1e9:.1f} GB/s (bytes read plus bytes written)."]
    if document["ceilings"].get("matmul_flops_per_s"):
        lines += [f"Matrix product in this run: {document['ceilings']['matmul_flops_per_s'] / 1e12:.2f} TFLOP/s."]
    measured = [case for case in document["cases"] if case["status"] == "ok"]
    for title, chosen, columns in TABLES:
        rows = [case for case in measured if chosen(case)]
        if rows:
            lines += ["", f"### {title}", "", *table(rows, columns)]
    for status, heading in (("error", "Failed"), ("skipped", "Not run")):
        left = [case for case in document["cases"] if case["status"] == status]
        if left:
            reasons = [(case["name"], (case.get("error") or case.get("reason") or "").splitlines() or [""]) for case in left]
            lines += ["", f"### {heading}", "", *(f"- {name}: {reason[0]}" for name, reason in reasons)]
    return "\n".join(lines)


BUSY_LOAD = 0.3
"""Load average over the minute before the run above which something else ran beside it."""


def table(rows: Iterable[dict], columns: dict[str, Cell]) -> list[str]:
    """Markdown lines of a table; a cell without a figure is a dash, a column without one is left out."""
    cells = [[_cell(cell, row) for cell in columns.values()] for row in rows]
    kept = [index for index in range(len(columns)) if any(row[index] != NOTHING for row in cells)]
    body = [[row[index] for index in kept] for row in cells]
    heads = [list(columns)[index] for index in kept]
    return [f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(kept), *body)]


NOTHING = "–"
"""A cell without a figure."""


def _cell(cell: Cell, row: dict) -> str:
    try:
        return cell(row)
    except KeyError:
        return NOTHING


def _parameter(name: str) -> Cell:
    return lambda case: str(case["parameters"][name])


def _spread(case: dict) -> str:
    metrics = case["metrics"]
    return f"{_microseconds(metrics['median_s'])} ({_microseconds(metrics['low_s'])} – {_microseconds(metrics['high_s'])})"


def _microseconds(seconds: float) -> str:
    value = seconds * 1e6
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _metric(name: str, form: str, scale: float = 1) -> Cell:
    return lambda case: form.format(case["metrics"][name] * scale)


def _inner(name: str) -> Cell:
    return lambda case: _microseconds(case["metrics"][name]["median_s"])


TIMES: dict[str, Cell] = {
    "variant": _parameter("variant"),
    "µs, median (20 % – 80 %)": _spread,
    "× eager": _metric("times_faster_than_official_eager", "{:.2f}"),
    "predicted µs": lambda case: _microseconds(case["metrics"]["predicted_s"]),
    "measured / predicted": _metric("measured_over_predicted", "{:.2f}"),
}
MEMORY: dict[str, Cell] = {
    "peak MB": _metric("peak_bytes", "{:.1f}", 1e-6),
    "peak maps": _metric("peak_maps", "{:.1f}"),
}
LAUNCH: dict[str, Cell] = {
    "host µs": lambda case: _microseconds(case["metrics"]["host_s"]),
    "latency µs": _inner("latency"),
}
CASE: dict[str, Cell] = {
    "tower": _parameter("tower"),
    "B": _parameter("batch"),
    "dtype": _parameter("dtype"),
}
FLOOR: dict[str, Cell] = {
    "GB/s of the floor": _metric("gb_per_s", "{:.1f}"),
    "share of copy": _metric("share_of_copy", "{:.0%}"),
    "of a copy of the same size": _metric("share_of_copy_of_same_size", "{:.0%}"),
}
STEP: dict[str, Cell] = {
    "model": _parameter("setup"),
    "fusion": _parameter("fusion"),
    "s per step (20 % – 80 %)": lambda case: "{median_s:.3f} ({low_s:.3f} – {high_s:.3f})".format(**case["metrics"]),
    "tokens/s": _metric("tokens_per_s", "{:,.0f}"),
    "peak GB": _metric("peak_bytes", "{:.2f}", 1e-9),
    "fusion ms": _metric("fusion_s", "{:.2f}", 1e3),
    "fusion's share": _metric("fusion_share", "{:.3%}"),
}


RUN: dict[str, Cell] = {"model": _parameter("model"), "stage": _parameter("stage")}
FASTER = _metric("times_faster_than_before", "{:.3f}")
FASTER_IN_ALL = _metric("times_faster_than_recipe", "{:.2f}")
LOOP: dict[str, Cell] = {
    "s per step (20 % – 80 %)": lambda case: "{median_s:.3f} ({low_s:.3f} – {high_s:.3f})".format(**case["metrics"]),
    "tokens/s": _metric("tokens_per_s", "{:,.0f}"),
    "TFLOP/s": _metric("tflops_per_s", "{:.3g}"),
    "of the card": _metric("share_of_peak", "{:.1%}"),
    "padding": _metric("padding_share", "{:.1%}"),
    "peak GB": _metric("peak_bytes", "{:.3f}", 1e-9),
}


def _milliseconds(case: dict) -> str:
    median, low, high = (1e3 * case["metrics"][name] for name in ("median_s", "low_s", "high_s"))
    return f"{median:,.1f} ({low:,.1f} – {high:,.1f})"


def _operation(name: str) -> Callable[[dict], bool]:
    return lambda case: case["parameters"].get("operation", "").startswith(name)


def _fuse(mode: str) -> Callable[[dict], bool]:
    return lambda case: case["parameters"].get("mode") == mode and "operation" not in case["parameters"]


STAGE: dict[str, Cell] = {"stage": _parameter("stage")}

TABLES: list[tuple[str, Callable[[dict], bool], dict[str, Cell]]] = [
    ("fuse, forward", _fuse("forward"), CASE | STAGE | TIMES | FLOOR | MEMORY | LAUNCH),
    ("fuse, forward and backward, frozen tower", _fuse("frozen"), CASE | TIMES | FLOOR | MEMORY | LAUNCH),
    ("fuse, forward and backward, trainable tower", _fuse("trainable"), CASE | STAGE | TIMES | FLOOR | MEMORY | LAUNCH),
    ("fuse, backward alone, frozen tower", _fuse("frozen backward"), CASE | TIMES | FLOOR | MEMORY | LAUNCH),
    ("fuse, backward alone, trainable tower", _fuse("trainable backward"), CASE | STAGE | TIMES | FLOOR | MEMORY | LAUNCH),
    (
        "other mixes, against the code of their authors",
        _operation("mix"),
        {"mix": _parameter("mix"), "mode": _parameter("mode")} | CASE | TIMES | FLOOR | MEMORY | {"": _metric("not_run", "{}")},
    ),
    (
        "launch settings",
        _operation("launch settings"),
        {"pass": _parameter("pass")}
        | CASE
        | TIMES
        | {"× shipped": _metric("times_faster_than_shipped", "{:.3f}")}
        | FLOOR
        | {
            "registers": _metric("registers", "{}"),
            "spills": _metric("spills", "{}"),
            "programs/processor": _metric("programs_per_processor", "{}"),
            "waves": _metric("waves", "{:.2f}"),
            "": _metric("not_run", "{}"),
        },
    ),
    (
        "host",
        _operation("host"),
        {
            "piece": _parameter("piece"),
            "µs, median (20 % – 80 %)": _spread,
            "of the processor, µs": lambda case: _microseconds(case["metrics"]["cpu_s"]),
            "at least, µs": lambda case: _microseconds(case["metrics"]["least_s"]),
            "limit µs": lambda case: _microseconds(case["metrics"]["limit_s"]),
            "within": lambda case: "yes" if case["metrics"]["within_limit"] else "no",
            "": _metric("not_run", "{}"),
        },
    ),
    ("group summaries", _operation("summaries"), CASE | TIMES | MEMORY | LAUNCH),
    ("weight allocator", _operation("allocator"), CASE | TIMES | MEMORY | LAUNCH),
    (
        "vision side: tower, fusion, projector",
        lambda case: "llm_dim" in case["parameters"] and "operation" not in case["parameters"],
        CASE | TIMES | MEMORY | LAUNCH,
    ),
    ("replay of a CUDA graph", _operation("CUDA graph"), {"of": lambda case: case["name"].split()[0]} | CASE | TIMES),
    ("training step", lambda case: "setup" in case["parameters"], STEP),
    (
        "training step, part by part",
        lambda case: "line" in case["parameters"],
        RUN
        | {"": _parameter("line"), "gain of": _parameter("part"), "× line before": FASTER, "× recipe": FASTER_IN_ALL}
        | LOOP,
    ),
    (
        "what the loop gives and what the kernels give",
        lambda case: "apart" in case["parameters"],
        RUN | {"": _parameter("apart"), "times faster": _metric("times_faster", "{:.3f}")},
    ),
    (
        "the language model's layers, on top of all parts",
        lambda case: "switch" in case["parameters"],
        RUN | {"": _parameter("switch"), "× without": FASTER} | LOOP | {"not run": _metric("not_run", "{}")},
    ),
    (
        "head and loss alone",
        lambda case: "loss" in case["parameters"],
        {"": _parameter("loss")}
        | {name: _parameter(name) for name in ("positions", "labelled", "width", "vocabulary")}
        | {"ms (20 % – 80 %)": _milliseconds, "peak MB": _metric("peak_bytes", "{:,.0f}", 1e-6)},
    ),
    (
        "tests",
        lambda case: "passed" in case["metrics"],
        {"what": lambda case: case["name"], "passed": _metric("passed", "{}"), "skipped": _metric("skipped", "{}")},
    ),
]


def plot(documents: Iterable[dict], path: Path) -> None:
    """Bars of the share of the copy bandwidth, one group a case.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no case of the files has a share of the copy bandwidth.
    """
    from matplotlib.figure import Figure

    groups: dict[str, dict[str, float]] = {}
    for document in documents:
        for case in document["cases"]:
            if case["status"] == "ok" and "share_of_copy" in case["metrics"] and "operation" not in case["parameters"]:
                label = case["name"].removesuffix(f": {case['parameters']['variant']}").removeprefix("fuse ")
                label = f"{label} ({document['machine']['device']})"
                groups.setdefault(label, {})[case["parameters"]["variant"]] = case["metrics"]["share_of_copy"]
    if not groups:
        raise ValueError("no case of these files has a share of the copy bandwidth: give a file of the part kernels")
    variants = list(dict.fromkeys(variant for shares in groups.values() for variant in shares))
    figure = Figure(figsize=(9, 1.2 + 0.22 * len(groups) * (len(variants) + 1)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(variants)
    for index, variant in enumerate(variants):
        places = [row + index * height for row, shares in enumerate(groups.values()) if variant in shares]
        axes.barh(places, [shares[variant] for shares in groups.values() if variant in shares], height, label=variant)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(groups))], list(groups))
    axes.invert_yaxis()
    axes.axvline(1.0, color="0.5", linewidth=1)
    axes.set_xlabel("least bytes of the case over its time, as a share of the measured copy bandwidth")
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
