"""``python -m benchmarks``: all GPU work of the project, in parts of less than eight minutes."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import torch

from .context import Context
from .machine import describe
from .record import DeviceLost, Recorder

PARTS = ("tests", "kernels", "vision", "peers", "autotune", "tune", "family", "training", "training_step", "host")
RESULTS = Path(__file__).resolve().parent / "results"

BUDGET_S = 400.0
"""No case begins later than this, so that a part ends within eight minutes with what it has."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    measured = "\n\n".join(f"{part}:\n  " + _part(part).MEASURES.replace("\n", "\n  ") for part in PARTS)
    command = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Run one part of the GPU tests and benchmarks; writes a JSON file with machine, versions and every case.",
        epilog=f"What the parts measure on a GPU:\n\n{measured}\n\nIf a case fails, the others go on and the exit status is 1.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--part", required=True, choices=(*PARTS, "all"), help="what to run; all: one after the other")
    command.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one, else cpu")
    command.add_argument(
        "--out-dir",
        type=Path,
        default=RESULTS,
        help="folder of result files DEVICE-PART.json (default: benchmarks/results)",
    )
    command.add_argument("--out", type=Path, help="result file of one part, wherever --out-dir is")
    command.add_argument("--cases", type=_pattern, metavar="REGEX", help="only the cases in whose name REGEX is found")
    command.add_argument("--rounds", type=_positive, metavar="N", help="timed rounds of each variant, in place of --seconds")
    command.add_argument("--tiny", action="store_true", help="tiny sizes: runs the code of every case, measures nothing")
    command.add_argument("--seconds", type=float, default=0.5, help="time for the clock of each variant (default: %(default)s)")
    command.add_argument(
        "--budget-seconds", type=float, default=BUDGET_S, help="cases that would begin later are skipped (default: %(default)s)"
    )
    return command


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    options = parser().parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch finds no GPU here; use --device cpu, with --tiny for a dry run", file=sys.stderr)
        return 2
    if options.part == "all" and options.out:
        print("--out names one file, --part all writes one for each part: take --out-dir FOLDER", file=sys.stderr)
        return 2
    status = 0
    for name in PARTS if options.part == "all" else (options.part,):
        try:
            status = max(status, run(name, device, options))
        except DeviceLost as error:
            print(f"stopped: the device is lost to this process. {error}", file=sys.stderr)
            print("Run the other cases and parts in processes of their own: --part, --cases", file=sys.stderr)
            return 1
    return status


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of 1 or more, got {text!r}")
    return int(text)


def run(name: str, device: torch.device, options: argparse.Namespace) -> int:
    """Run one part; the exit status.

    Raises:
        DeviceLost: an error has left the device unusable to this process; the result file is written.
    """
    part = _part(name)
    kind = f"{device.type}-tiny" if options.tiny else device.type
    recorder = Recorder(
        path=options.out or options.out_dir / f"{kind}-{name}.json",
        part=name,
        machine=describe(device),
        arguments={
            "device": device.type,
            "tiny": options.tiny,
            "seconds": options.seconds,
            "rounds": options.rounds,
            "cases": options.cases and options.cases.pattern,
            "budget_s": options.budget_seconds,
        },
        budget_s=options.budget_seconds,
        only=options.cases,
    )
    if options.tiny:
        recorder.show(
            "tiny sizes: the code of every case runs, its figures mean nothing. On a GPU, without --tiny, this part measures:"
        )
        recorder.show(part.MEASURES)
    context = Context(device, options.tiny, 0.01 if options.tiny else options.seconds, recorder, options.rounds)
    try:
        recorder.guard(f"the part {name} outside of its cases", lambda: part.run_part(context))
    finally:
        status = recorder.finish()
    return status


def _part(name: str) -> ModuleType:
    return importlib.import_module(f".parts.{name}", __package__)


if __name__ == "__main__":
    sys.exit(main())
