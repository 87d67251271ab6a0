"""``igva evaluate``: exact match on a LLaVA JSON file, and the published results of the four systems."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from model.cli.loading_arguments import add_loading_arguments, given_loading_arguments

_EXAMPLES = """examples:
  igva evaluate runs/mine test.json
  igva evaluate runs/mine test.json --image_folder=images --output=scores.json
  igva evaluate runs/mine test.json --baselines --train_data=train.json
  igva evaluate --published
  igva evaluate --published --results logs/runs__mine/20260101_results.json

Benchmarks run through lmms-eval, `lmms-eval --model igva ...`: docs/evaluate.md.
"""

_NOT_COMPARABLE = (
    "Exact match on data of your own has no published counterpart: benchmarks run through lmms-eval (docs/evaluate.md)."
)


def main(argv: Sequence[str]) -> int:
    parser = _parser()
    arguments = parser.parse_intermixed_args(argv)  # options may stand between positionals
    _check(parser, arguments)

    # After the arguments are known to be right: these imports take seconds.
    from rich.console import Console

    if arguments.checkpoint is not None:
        _evaluate(arguments)
    if arguments.published:
        from model.published import published_table, read_lmms_eval

        own = read_lmms_eval(arguments.results) if arguments.results else None
        Console().print(published_table(own))
        if arguments.checkpoint is not None:
            Console().print(_NOT_COMPARABLE)
    return 0


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse a command line that asks for nothing, or for half of something."""
    if arguments.limit is not None and arguments.limit < 1:
        parser.error(f"--limit must be at least 1, got {arguments.limit}")
    if arguments.results and not arguments.published:
        parser.error("--results is a column of the published table; add --published")
    if arguments.checkpoint is None and not arguments.published:
        parser.error("give CHECKPOINT and DATA, or --published for the published results")
    if arguments.checkpoint is not None and arguments.data is None:
        parser.error(f"give DATA, a LLaVA JSON file to evaluate {arguments.checkpoint} on")


def _evaluate(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from model.cli.checkpoint import load_checkpoint
    from model.data.llava_json import read_llava_json
    from model.evaluation import evaluate, most_frequent_answers, other_pictures

    samples = read_llava_json(arguments.data, arguments.image_folder)[: arguments.limit]
    train_samples = read_llava_json(arguments.train_data, arguments.image_folder) if arguments.train_data else None
    checkpoint = load_checkpoint(arguments.checkpoint, **given_loading_arguments(arguments))

    def run(picture_of: Sequence[int] | None = None):
        return evaluate(
            checkpoint.model,
            checkpoint.processor,
            samples,
            batch_size=arguments.batch_size,
            max_new_tokens=arguments.max_new_tokens,
            aspect_ratio=checkpoint.aspect_ratio,
            instruction_policy=checkpoint.instruction_policy,
            picture_of=picture_of,
            show_progress=True,
        )

    results = {"model": run()}
    if arguments.baselines:
        results["another picture"] = run(other_pictures(samples))
    if train_samples is not None:
        results["most frequent answer"] = most_frequent_answers(train_samples, samples)
    for name, result in results.items():
        Console().print(result.table(f"Exact match: {name}"))
    if arguments.output:
        from model.instruction import write_text_atomically

        content = json.dumps({name: result.to_dict() for name, result in results.items()}, indent=2, ensure_ascii=False)
        Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(Path(arguments.output), content + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="igva evaluate",
        description='Exact match on the last answer of each sample, by kind of question (the field "level" of a record), with '
        "its standard error and the mean weight of each layer group; and what was published of LLaVA-1.5, DenseConnector, "
        "MMFuser and IGVA.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", help="folder of a finished training run, or a hub name")
    parser.add_argument("data", metavar="DATA", nargs="?", help="LLaVA JSON file")
    parser.add_argument("--image_folder", help="what the image paths are relative to (default: the folder of DATA)")
    parser.add_argument("--batch_size", type=int, default=32, help="samples at once (default: %(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=16, help="longest answer in tokens (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="only the first samples of DATA")
    parser.add_argument("--baselines", action="store_true", help="also score the model when shown other samples' pictures")
    parser.add_argument("--train_data", help="LLaVA JSON file; also score its most frequent answer of each kind")
    parser.add_argument("--output", help="JSON file for scores and answers")
    parser.add_argument(
        "--published", action="store_true", help="the published results of the four systems, which were not run here"
    )
    parser.add_argument(
        "--results", nargs="+", metavar="FILE", help="with --published: results of lmms-eval as a column beside them"
    )
    add_loading_arguments(parser)
    return parser
