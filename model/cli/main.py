"""The ``igva`` command: finds the subcommand, and turns errors into one line and an exit status.

Subcommands are imported on use, so that each loads only what it needs.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from collections.abc import Sequence

from model.cli.errors import explain

# Name, module with run(argv) -> int | None, one line of help.
_COMMANDS = (
    ("train", "model.cli.train", "train a model from a recipe"),
    ("preview", "model.cli.preview", "show samples as a recipe sees them, trained tokens in colour"),
    ("recipe", "model.cli.recipe", "list recipes, or print one with the documentation of every field"),
    ("ask", "model.cli.ask", "ask a trained model about a picture"),
    ("chat", "model.cli.chat", "a conversation about pictures in the terminal"),
    ("web", "model.cli.web", "the same in the browser: a picture goes in, answer and weights come out"),
    ("explain", "model.cli.explain", "which layer groups each instruction uses: table, heat map, JSON"),
    ("evaluate", "model.cli.evaluate", "exact match of a trained model on a LLaVA JSON file"),
    ("plan", "model.cli.plan", "memory of a recipe's step, and the largest batch for a card, before anything is loaded"),
    ("embed", "model.cli.embed", "embed the instructions of a LLaVA JSON file ahead of a run"),
    ("merge", "model.cli.merge", "adapters and their base become one plain checkpoint"),
    ("export", "model.cli.export", "tower, fusion and projector as one file of torch.export"),
    ("convert", "model.cli.convert", "checkpoints of other code bases to ours and back"),
    ("doctor", "model.cli.doctor", "versions, devices, and which implementation will run and why"),
    ("compare", "model.quickstart.compare", "several fusions on the quickstart task, side by side"),
    ("quickstart", "model.quickstart.run", "train and evaluate a small model on real pictures on a CPU"),
)

_EXAMPLES = """examples:
  igva train recipe.yaml --learning_rate=1e-4
  igva ask runs/mine picture.jpg "What colour is the car?"
  igva evaluate runs/mine test.json --output scores.json

Each command has its own --help. Without an installation: python -m model COMMAND ...
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; ``sys.argv`` without the program's name when None.

    Returns:
        0 on success, 1 on an error, 2 on a command line that cannot be read, 130 on Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    if debug:
        argv.remove("--debug")
    parser = _parser()
    if not argv or argv[0] in ("-h", "--help"):
        parser.print_help(sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    modules = {name: module for name, module, _ in _COMMANDS}
    if argv[0] not in modules:
        parser.print_usage(sys.stderr)
        print(f"igva: no command {argv[0]!r}; there are {', '.join(modules)}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(modules[argv[0]]).main(argv[1:]) or 0
    except SystemExit as stop:  # argparse: 0 after --help, 2 after a usage error
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        print("igva: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        line = explain(error)
        if line is None:
            raise
        if debug:
            traceback.print_exc()
        else:
            print(f"igva {argv[0]}: {line}  (--debug shows where)", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    lines = "\n".join(f"  {name:12}{text}" for name, _, text in _COMMANDS)
    return argparse.ArgumentParser(
        prog="igva",
        usage="igva COMMAND ... [--debug]",
        description=f"Train and use a vision-language model with instruction-guided layer fusion.\n\ncommands:\n{lines}",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
