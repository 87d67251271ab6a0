"""``python -m benchmarks.pages``: writes what was measured into the pages that show it, from ``benchmarks/results``.

A page has blocks between ``<!-- measured: NAME -->`` and ``<!-- end of measured -->``. What stands there is made here and
nowhere else, so that no page shows a figure that no result file holds.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from .record import read_json
from .report import table
from .targets import OURS, Outcome, fusions, is_on, measured_cases, outcomes, slower_than
from .variants import BASELINE

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "figures.md", ROOT / "docs" / "why-fast.md")

BLOCK = re.compile(r"(?P<begin><!-- measured: (?P<name>[a-z-]+) -->\n).*?(?P<end><!-- end of measured -->)", re.DOTALL)

SHOWN_FIRST = ("forward", "bfloat16")
"""Mode and dtype of the headline."""

COMPILE_SUM = "torch.compile of a plain sum"
NAMES = {OURS: "igva_kernels", BASELINE: "official eager", "torch.compile": "torch.compile of it", COMPILE_SUM: COMPILE_SUM}
"""Variants of the headline, in this order."""

DEVICES = {"cpu": "a CPU", "cuda": "a GPU"}
SHOWN_BATCHES = {"cpu": (4,), "cuda": (16, 1)}
"""The pages show one size of a CPU, and on a card the one that fills it and the one that a user waits for."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status: 1 where ``--check`` finds a page that is not up to date."""
    command = argparse.ArgumentParser(
        prog="python -m benchmarks.pages",
        description="Writes the measured figures into the pages that show them, from the result files.",
        epilog="examples: python -m benchmarks.pages          python -m benchmarks.pages --check",
    )
    command.add_argument("--results", type=Path, default=RESULTS, help="folder of result files (default: benchmarks/results)")
    command.add_argument(
        "--check", action="store_true", help="write nothing; end with 1 if a page is not what would be written"
    )
    command.add_argument("pages", nargs="*", type=Path, default=list(PAGES), help="pages (default: all that have blocks)")
    options = command.parse_args(arguments)
    try:
        documents = [read_json(file) for file in sorted(options.results.glob("*.json"))]
        written = {page: fill(page.read_text(), documents) for page in options.pages}
    except (OSError, ValueError) as error:
        print(f"python -m benchmarks.pages: {error}", file=sys.stderr)
        return 2
    stale = [page for page, text in written.items() if page.read_text() != text]
    for page in stale:
        if options.check:
            print(f"{page} does not show what the results hold: run python -m benchmarks.pages", file=sys.stderr)
        else:
            page.write_text(written[page])
            print(f"wrote {page}")
    return 1 if options.check and stale else 0


def fill(text: str, documents: list[dict]) -> str:
    """A page's text with its blocks as the results give them.

    Raises:
        ValueError: a block that nobody knows.
    """

    def block(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in BLOCKS:
            raise ValueError(f"no block is called {name!r}; there are {', '.join(BLOCKS)}")
        return f"{match['begin']}{BLOCKS[name](documents)}\n{match['end']}"

    return BLOCK.sub(block, text)


def headline(documents: list[dict]) -> str:
    """A line for each kind of device, the forward in bfloat16, and a line for the share of a training step."""
    return "\n".join(line for device in ("cuda", "cpu") for line in _headline_on(documents, device))


def _headline_on(documents: list[dict], device: str) -> list[str]:
    measured = [document for document in documents if is_on(document, device)]
    kernels = [document for document in measured if document["part"] == "kernels"]
    cases = [case for document in measured for case in measured_cases(document)]
    batch = SHOWN_BATCHES[device][0]
    rows = [row for row in _rows(cases, batch) if (row["parameters"]["mode"], row["parameters"]["dtype"]) == SHOWN_FIRST]
    if not rows or not kernels:
        return [f"* **On {DEVICES[device]}: nothing has been measured yet.**"]
    (row,) = rows
    cells = {name: row[name] for name in NAMES if name in row}
    times = ", ".join(f"{NAMES[name]} {metrics['median_s'] * 1e3:.3g} ms" for name, metrics in cells.items())
    maps = ", ".join(f"{metrics['peak_maps']:.0f}" for metrics in cells.values())
    machine, day = kernels[0]["machine"]["cpu" if device == "cpu" else "device"], kernels[0]["started"][:10]
    lines = [
        f"* **On {DEVICES[device]}** ({machine}, {day}; forward, CLIP-L/336, B = {batch}, bfloat16): {times}; maps alive at"
        f" once beyond the inputs {maps}."
    ]
    steps = [outcome for outcome in outcomes(documents, device) if outcome.target.part == "training_step" and outcome.values]
    if steps:
        lines.append(f"* **A training step** there gets {', '.join(map(_words, steps))}.")
    return lines


def performance(documents: list[dict]) -> str:
    """The section of why-fast.md: for each kind of device a table, where a peer is faster, and the share of a training step."""
    return "\n\n".join(_performance_on(documents, device) for device in ("cuda", "cpu"))


def _performance_on(documents: list[dict], device: str) -> str:
    measured = [document for document in documents if is_on(document, device)]
    kernels = [document for document in measured if document["part"] == "kernels"]
    if not kernels:
        return f"**On {DEVICES[device]}: nothing has been measured yet.**"
    machine, cases = kernels[0]["machine"], [case for document in measured for case in measured_cases(document)]
    name = machine["cpu"] if device == "cpu" else machine["device"]
    threads = f", {machine['torch_threads']} threads" if device == "cpu" else ""
    rows = [row for batch in SHOWN_BATCHES[device] for row in _rows(cases, batch)]
    versions = f"torch {machine['versions']['torch']}, {kernels[0]['started'][:10]}"
    lines = [
        f"**On {DEVICES[device]}** ({name}{threads}, {versions}; CLIP-L/336; milliseconds, medians, and maps alive at once"
        " beyond the inputs):",
        "",
        *table(rows, COLUMNS),
        "",
        _peers(measured),
        *(
            f"A training step gets {_words(outcome)}."
            for outcome in outcomes(documents, device)
            if outcome.target.part == "training_step" and outcome.values
        ),
        *(f"The fusion takes {outcome.measured} of a training step." for outcome in _shares(documents, device)),
    ]
    return "\n".join(lines)


def _words(outcome: Outcome) -> str:
    by = "the loop" if outcome.target.figure.endswith("loop") else "the kernels alone"
    return ", ".join(
        f"{outcome.target.unit.show(value)} times faster by {by} ({label})" for label, value in outcome.values.items()
    )


def _shares(documents: list[dict], device: str) -> list[Outcome]:
    return [outcome for outcome in outcomes(documents, device) if outcome.target.part == "training" and outcome.values]


PARTS = ("kernels", "peers", "autotune")
"""Where the times of ``fuse`` are."""

AUTOTUNE = "torch.compile max-autotune"
VARIANTS = ("torch.compile", COMPILE_SUM, AUTOTUNE, f"{AUTOTUNE} of a plain sum", BASELINE, OURS)


def _rows(cases: list[dict], batch: int) -> list[dict]:
    """One row a dtype and mode, with the variants' metrics beside each other, of the first of :data:`PARTS` that has them."""
    rows: dict[tuple[str, str], dict] = {}
    cases = sorted((case for case in cases if case["part"] in PARTS), key=lambda case: PARTS.index(case["part"]))
    for variant in VARIANTS:
        for case in fusions(cases, variant, ("forward", "frozen", "trainable")):
            parameters = case["parameters"]
            if parameters["batch"] == batch and parameters["tower"].startswith("CLIP-L"):
                row = rows.setdefault((parameters["mode"], parameters["dtype"]), {"parameters": parameters})
                row.setdefault(variant, case["metrics"])
    modes = ["forward", "frozen", "trainable"]
    return [rows[key] for key in sorted(rows, key=lambda key: (modes.index(key[0]), key[1] != "float32"))]


def _of(variant: str, name: str, form: str, scale: float = 1) -> Callable[[dict], str]:
    return lambda row: form.format(row[variant][name] * scale)


COLUMNS: dict[str, Callable[[dict], str]] = {
    "B": lambda row: str(row["parameters"]["batch"]),
    "mode": lambda row: row["parameters"]["mode"],
    "dtype": lambda row: row["parameters"]["dtype"],
    "igva_kernels": _of(OURS, "median_s", "**{:.3g}**", 1e3),
    "official eager": _of(BASELINE, "median_s", "{:.3g}", 1e3),
    "torch.compile": _of("torch.compile", "median_s", "{:.3g}", 1e3),
    "of a plain sum": _of(COMPILE_SUM, "median_s", "{:.3g}", 1e3),
    "max-autotune": _of(AUTOTUNE, "median_s", "{:.3g}", 1e3),
    "of a plain sum, max-autotune": _of(f"{AUTOTUNE} of a plain sum", "median_s", "{:.3g}", 1e3),
    "× eager": _of(OURS, "times_faster_than_official_eager", "{:.1f}"),
    "share of a copy": _of(OURS, "share_of_copy", "{:.0%}"),
    "maps: igva_kernels": _of(OURS, "peak_maps", "{:.1f}"),
    "eager": _of(BASELINE, "peak_maps", "{:.1f}"),
    "compile": _of("torch.compile", "peak_maps", "{:.1f}"),
    "plain sum": _of(COMPILE_SUM, "peak_maps", "{:.1f}"),
}


def _peers(documents: list[dict]) -> str:
    cases = [case for document in documents for case in measured_cases(document)]
    slower = slower_than(cases)
    if not slower:
        return "No peer was faster in any case of the results."
    return "A peer was faster in: " + "; ".join(slower) + "."


def figures(device: str) -> Callable[[list[dict]], str]:
    """The table of goals and outcomes of a kind of device."""

    def block(documents: list[dict]) -> str:
        runs = [document for document in documents if is_on(document, device)]
        origin = sorted({f"`{document['part']}` {document['started'][:16]}" for document in runs})
        heading = [f"Runs: {', '.join(origin)} (UTC).", ""] if origin else []
        return "\n".join([*heading, *_table(outcomes(documents, device))])

    return block


def _table(found: Iterable[Outcome]) -> list[str]:
    lines = ["| figure | goal | measured | met | `python -m benchmarks --part` |", "|---|---|---|---|---|"]
    for outcome in found:
        target = outcome.target
        cells = (target.figure, target.goal, outcome.measured, outcome.verdict, f"`{target.part}`")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


BLOCKS: dict[str, Callable[[list[dict]], str]] = {
    "headline": headline,
    "performance": performance,
    "figures-cpu": figures("cpu"),
    "figures-gpu": figures("cuda"),
}

if __name__ == "__main__":
    sys.exit(main())
