"""``igva embed``: embeds the instructions of a data file ahead of a run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import get_args

from model.training.recipe import InstructionPolicy

_EXAMPLES = """examples:
  igva embed data.json --encoder=sentence-transformers/all-mpnet-base-v2 --out=instructions
  igva train recipe.yaml --data.instruction_cache=instructions
"""


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)

    # After the arguments are known to be right: these imports take seconds.
    from model.data.llava_json import read_llava_json
    from model.instruction import InstructionCache, SentenceEncoder
    from model.training.run import fill_cache

    samples = read_llava_json(arguments.data, arguments.image_folder)
    cache = InstructionCache(arguments.out, SentenceEncoder(arguments.encoder, device=arguments.device))
    before = len(cache)
    texts = fill_cache(cache, samples, arguments.instruction_policy)
    print(f"{texts:,} different instructions, {len(cache) - before:,} of them new, in {cache.folder}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="igva embed",
        description="Embed the instructions of a LLaVA JSON file into a cache that training reads. What is there already "
        "is kept, so that a stopped run can be repeated.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", metavar="DATA", help="LLaVA JSON file")
    parser.add_argument("--encoder", required=True, help="folder or hub name of a sentence-transformers model")
    parser.add_argument("--out", required=True, help="folder of the cache, for data.instruction_cache of recipes")
    parser.add_argument("--image_folder", help="what the image paths are relative to (default: the folder of DATA)")
    parser.add_argument(
        "--instruction_policy",
        choices=get_args(InstructionPolicy),
        default="mean_of_turns",
        help="which human turns are embedded (default: %(default)s)",
    )
    parser.add_argument("--device", default="cpu", help="where the encoder runs (default: %(default)s)")
    return parser
