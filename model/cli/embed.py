"""``igva embed``: embeds the instructions of a data file ahead of a run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import get_args

from model.training.recipe import InstructionPolicy

_EXAMPLES = """examples:
  igva embed data.json --encoder=sentence-transformers/all-mpnet-base-v2 --out=instructions.safetensors
  igva embed data.json --checkpoint=runs/igva-7b-stage1 --out=instructions.safetensors --device=cuda
  igva train recipe.yaml --data.instruction_cache=instructions.safetensors
"""


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)

    # After the arguments are known to be right: these imports take seconds.
    from tqdm import tqdm

    from model.data.llava_json import read_llava_json
    from model.data.problems import Problems
    from model.instruction import SentenceEncoder
    from model.instruction_store import fill
    from model.processing import sentence_encoder_of

    problems = Problems(arguments.on_error)
    samples = read_llava_json(arguments.data, arguments.image_folder, problems)
    if arguments.encoder is not None:
        encoder = SentenceEncoder(arguments.encoder, device=arguments.device)
    else:
        encoder = sentence_encoder_of(arguments.checkpoint, device=arguments.device)
    turns = [sample.human_turns for sample in samples if sample.images]
    with tqdm(unit="instruction", desc="embedding") as bar:

        def show(done: int, todo: int) -> None:
            bar.total = todo
            bar.update(done - bar.n)

        report = fill(arguments.out, turns, encoder, arguments.instruction_policy, dtype=arguments.dtype, progress=show)
    _report_problems(problems)
    print(
        f"{report.asked:,} different instructions of {len(turns):,} samples with images, {report.encoded:,} of them new; "
        f"{report.rows:,} in {arguments.out}"
    )
    return 0


def _report_problems(problems) -> None:
    if problems.counts():
        from rich.console import Console

        Console(stderr=True).print(problems.table())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="igva embed",
        description="Embed the instructions of a LLaVA JSON file into one file that training reads through its memory map. "
        "A stopped command is given again and goes on where it stopped; a file that is there gets what it lacks. "
        "It belongs to one encoder and one policy, and a run with others refuses it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", metavar="DATA", help="LLaVA JSON or JSONL file")
    encoder = parser.add_mutually_exclusive_group(required=True)
    encoder.add_argument("--encoder", help="folder or hub name of a sentence-transformers model")
    encoder.add_argument("--checkpoint", help="folder of a checkpoint, whose sentence encoder is taken")
    parser.add_argument("--out", required=True, help="file to make or complete, for data.instruction_cache of recipes")
    parser.add_argument("--image_folder", help="what the image paths are relative to (default: the folder of DATA)")
    parser.add_argument(
        "--instruction_policy",
        choices=get_args(InstructionPolicy),
        default="mean_of_turns",
        help="which human turns are embedded (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16"),
        default="float32",
        help="of the vectors in a new file; float16 takes half the space (default: %(default)s)",
    )
    parser.add_argument(
        "--on_error", choices=("raise", "skip"), default="raise", help="what to do about broken samples (default: %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="where the encoder runs (default: %(default)s)")
    return parser
