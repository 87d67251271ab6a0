"""``igva evaluate``: exact match on a LLaVA JSON file."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

_EXAMPLES = """examples:
  igva evaluate runs/mine test.json
  igva evaluate runs/mine test.json --image_folder=images --output=scores.json
  igva evaluate runs/mine test.json --baselines --train_data=train.json
"""


def main(argv: Sequence[str]) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.limit is not None and arguments.limit < 1:
        parser.error(f"--limit must be at least 1, got {arguments.limit}")

    # After the arguments are known to be right: these imports take seconds.
    from rich.console import Console

    from model.cli.checkpoint import load_checkpoint
    from model.data.llava_json import read_llava_json
    from model.evaluation import evaluate, most_frequent_answers, other_pictures

    samples = read_llava_json(arguments.data, arguments.image_folder)[: arguments.limit]
    train_samples = read_llava_json(arguments.train_data, arguments.image_folder) if arguments.train_data else None
    checkpoint = load_checkpoint(arguments.checkpoint)

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
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="igva evaluate",
        description='Exact match on the last answer of each sample, by kind of question (the field "level" of a record), with '
        "its standard error and the mean weight of each layer group.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a finished training run, or a hub name")
    parser.add_argument("data", metavar="DATA", help="LLaVA JSON file")
    parser.add_argument("--image_folder", help="what the image paths are relative to (default: the folder of DATA)")
    parser.add_argument("--batch_size", type=int, default=32, help="samples at once (default: %(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=16, help="longest answer in tokens (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="only the first samples of DATA")
    parser.add_argument("--baselines", action="store_true", help="also score the model when shown other samples' pictures")
    parser.add_argument("--train_data", help="LLaVA JSON file; also score its most frequent answer of each kind")
    parser.add_argument("--output", help="JSON file for scores and answers")
    return parser
