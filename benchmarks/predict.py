"""``python -m benchmarks.predict``: the time that each kernel should take on each card, from bytes and machine code.

No GPU is needed, and none was used: the figures are there to be confirmed or refuted. ``--compile`` makes the machine code anew
(minutes; it needs triton) and writes ``benchmarks/machine_code.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import torch

from .cards import CARDS, Card
from .machine_code import DTYPES, FILE, KERNELS, TARGETS, TOWERS, combinations, compile_kernel, key
from .record import write_json
from .report import table
from .roofline import START_S, KernelCode, Prediction, case_traffic, official_forward_traffic, predict
from .sizes import FuseCase, Tower

BATCHES = (1, 4, 16, 64)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    command = argparse.ArgumentParser(prog="python -m benchmarks.predict", description=__doc__.split("\n\n")[0])
    command.add_argument("--compile", action="store_true", help="compile the chosen kernels anew and write them to --file")
    command.add_argument(
        "--settings",
        action="store_true",
        help="instead: compile the launch settings of the part tune (minutes), print registers, spills and waves",
    )
    command.add_argument("--file", type=Path, default=FILE, help="machine code (default: benchmarks/machine_code.json)")
    for name, values in (("card", [card.name for card in CARDS]), ("tower", TOWERS), ("kernel", KERNELS), ("dtype", DTYPES)):
        command.add_argument(f"--{name}", choices=list(values), action="append", help="may be repeated; default: all")
    command.add_argument("--batch", type=int, action="append", help=f"may be repeated; default: {BATCHES}")
    options = command.parse_args(arguments)
    cards = [card for card in CARDS if options.card is None or card.name in options.card]
    towers = [TOWERS[name] for name in options.tower or TOWERS]
    kernels, dtypes = options.kernel or list(KERNELS), [DTYPES[name] for name in options.dtype or DTYPES]
    if options.settings:
        return show_settings(cards, kernels, towers, dtypes, options.batch or BATCHES)
    if options.compile:
        targets = TARGETS if options.card is None else dict.fromkeys(card.target for card in cards)
        compile_into(options.file, combinations(kernels, towers, dtypes), targets)
    codes = read_codes(options.file)
    rows = predictions(codes, cards, kernels, towers, dtypes, options.batch or BATCHES)
    print("\n".join(maps_of_calls(towers)), end="\n\n")
    print("\n".join(table(({"row": row} for row in rows), COLUMNS)))
    return 0


def maps_of_calls(towers: Iterable[Tower]) -> Iterator[str]:
    """A line for each tower: the maps of (B, N, D) that a call of stage 2 moves, whatever the card."""
    for tower in towers:
        cases = [FuseCase(tower, 1, torch.bfloat16, mode=mode) for mode in ("forward", "frozen", "trainable")]
        moved = ", ".join(f"{case.mode} {case_traffic(case).maps}" for case in cases)
        official = official_forward_traffic(cases[0]).maps
        yield f"{tower.name}, maps of (B, N, D) read and written: {moved}; by the official formulation, forward: {official}"


def show_settings(
    cards: Iterable[Card],
    kernels: Iterable[str],
    towers: Iterable[Tower],
    dtypes: Iterable[torch.dtype],
    batches: Iterable[int],
) -> int:
    """Print each launch setting of the chosen kernels on the chosen cards of NVIDIA; the exit status."""
    from .launch_settings import PASSES, Compiled, Wanted, can_compile_ahead, compile_all, settings_of

    chosen = [card for card in cards if can_compile_ahead(card.target)]
    combined = list(
        product([name for name in PASSES if name in kernels], towers, dtypes, dict.fromkeys(c.target for c in chosen))
    )
    if not combined:
        print(f"--settings: none of the chosen cards and kernels; it knows {PASSES} on cards of NVIDIA", file=sys.stderr)
        return 2
    wanted = [
        Wanted(name, tower, dtype, setting, target)
        for name, tower, dtype, target in combined
        for setting in settings_of(name, dtype)
    ]
    failed, cases = 0, []
    for each, found in compile_all(wanted).items():
        if not isinstance(found, Compiled):
            failed = 1
            print(f"{each.name}: {each.setting.name}: {found}", file=sys.stderr)
            continue
        for card, batch in product(chosen, batches):
            if card.target == each.target:
                num_bytes = kernel_bytes(each.name, each.tower, each.dtype, batch)
                launch = predict(found.code, card, batch, num_bytes)
                row = Row(each.name, each.tower, each.dtype, batch, card, num_bytes, launch)
                cases.append(
                    {"row": row, "setting": each.setting.name, "registers": found.code.registers, "spills": found.spills}
                )
    print("\n".join(table(cases, SETTING_COLUMNS)))
    return failed


def compile_into(file: Path, wanted: Iterable[tuple[str, Tower, torch.dtype]], targets: Iterable[str]) -> None:
    """Compile these combinations for every target and put them into the file, beside what else it holds."""
    import triton

    found = json.loads(file.read_text())["kernels"] if file.exists() else {}
    targets = list(targets)
    for kernel, tower, dtype in wanted:
        for target in targets:
            found[key(kernel, tower, dtype, target)] = compile_kernel(kernel, tower, dtype, target).as_dict()
        write_json(file, {"triton": triton.__version__, "kernels": dict(sorted(found.items()))})


def read_codes(file: Path = FILE) -> dict[str, KernelCode]:
    """The recorded codes, by :func:`benchmarks.machine_code.key`."""
    return {name: KernelCode(**values) for name, values in json.loads(file.read_text())["kernels"].items()}


@dataclass(frozen=True)
class Row:
    """One launch on one card."""

    kernel: str
    tower: Tower
    dtype: torch.dtype
    batch: int
    card: Card
    num_bytes: int
    prediction: Prediction


def predictions(
    codes: Mapping[str, KernelCode],
    cards: Iterable[Card],
    kernels: Iterable[str],
    towers: Iterable[Tower],
    dtypes: Iterable[torch.dtype],
    batches: Iterable[int],
) -> Iterator[Row]:
    """Every combination that is recorded, in the order of the arguments.

    Raises:
        KeyError: the file lacks the machine code of a combination: it was written for others.
    """
    wanted = list(combinations(kernels, towers, dtypes))
    for card, (kernel, tower, dtype), batch in product(cards, wanted, batches):
        num_bytes = kernel_bytes(kernel, tower, dtype, batch)
        found = predict(codes[key(kernel, tower, dtype, card.target)], card, batch, num_bytes)
        yield Row(kernel, tower, dtype, batch, card, num_bytes, found)


def kernel_bytes(kernel: str, tower: Tower, dtype: torch.dtype, batch: int) -> int:
    """The least bytes of a launch."""
    case = FuseCase(tower, batch, dtype)
    ratio = tower.num_tokens / tower.num_patches
    return KERNELS[kernel].traffic(KERNELS[kernel].plan(tower).program, case.map_bytes, ratio).bytes


CASE_KERNELS = {
    "forward": ("forward",),
    "frozen": ("forward, means saved", "dw"),
    "trainable": ("forward, means saved", "dw and dh"),
    "frozen backward": ("dw",),
    "trainable backward": ("dw and dh",),
}
"""The launches behind a mode of a stage 2 case."""


def predict_case(case: FuseCase, card: Card | None, copy_bytes_per_s: float) -> float | None:
    """Seconds of a case with this library, at the measured copy bandwidth of the card; None where nothing is recorded of it.

    Beside the kernels of :data:`CASE_KERNELS` a gradient of the weights takes one small launch of torch's, the sum of the
    partial sums, for which the model counts its start alone.
    """
    if card is None or case.stage != 2 or case.tower.name not in TOWERS:
        return None
    codes = _recorded_codes()
    seconds = START_S if case.mode != "forward" else 0.0
    for kernel in CASE_KERNELS[case.mode]:
        code = codes.get(key(kernel, case.tower, case.dtype, card.target))
        if code is None:
            return None
        num_bytes = kernel_bytes(kernel, case.tower, case.dtype, case.batch)
        seconds += predict(code, card, case.batch, num_bytes, copy_bytes_per_s=copy_bytes_per_s).seconds
    return seconds


@cache
def _recorded_codes() -> dict[str, KernelCode]:
    return read_codes()


COLUMNS = {
    "card": lambda case: case["row"].card.name,
    "kernel": lambda case: case["row"].kernel,
    "tower": lambda case: case["row"].tower.name,
    "dtype": lambda case: str(case["row"].dtype).removeprefix("torch."),
    "B": lambda case: str(case["row"].batch),
    "MB": lambda case: f"{case['row'].num_bytes * 1e-6:.1f}",
    "floor µs": lambda case: f"{case['row'].prediction.floor_s * 1e6:.1f}",
    "floor at nominal µs": lambda case: f"{case['row'].prediction.nominal_s * 1e6:.1f}",
    "issue µs": lambda case: f"{case['row'].prediction.issue_s * 1e6:.1f}",
    "programs/processor": lambda case: str(case["row"].prediction.resident_programs),
    "waves": lambda case: f"{case['row'].prediction.waves:.1f}",
    "KB under way, needed": lambda case: (
        f"{case['row'].prediction.bytes_in_flight * 1e-3:.0f}, {case['row'].prediction.bytes_needed * 1e-3:.0f}"
    ),
    "predicted µs": lambda case: f"{case['row'].prediction.seconds * 1e6:.1f}",
    "share of floor": lambda case: f"{case['row'].prediction.floor_s / case['row'].prediction.seconds:.0%}",
}

SETTING_COLUMNS = {
    **{name: COLUMNS[name] for name in ("card", "kernel", "dtype", "B")},
    "setting": lambda case: case["setting"],
    "registers": lambda case: str(case["registers"]),
    "spills": lambda case: str(case["spills"]),
    "programs/processor": COLUMNS["programs/processor"],
    "waves": lambda case: f"{case['row'].prediction.waves:.2f}",
    "predicted µs": COLUMNS["predicted µs"],
}

if __name__ == "__main__":
    sys.exit(main())
