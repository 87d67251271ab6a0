"""``igva merge``: adapters and their base checkpoint become one plain checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

_EXAMPLES = """examples:
  igva merge runs/mine/adapters runs/merged
  igva merge me/my-adapters runs/merged --base=runs/stage1
  igva merge runs/mine/adapters runs/merged --dtype=bfloat16
"""


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)

    # After the arguments are known to be right: these imports take seconds.
    import torch

    from model.adapters import adapter_folder, base_of, load_adapted
    from model.new_folder import new_folder
    from model.training.card import merged_card
    from model.training.lora import merge_lora

    adapters = adapter_folder(arguments.adapters)
    if adapters is None:
        raise ValueError(
            f"{arguments.adapters} is no folder of adapters (there is no adapter_config.json); give the adapters/ of a run "
            "with language_model_training=lora"
        )
    base = base_of(adapters, arguments.base)
    with new_folder(Path(arguments.out)) as folder:
        # In fp32: a weight in bf16 would round the adapters away while they are added.
        model, processor = load_adapted(adapters, base, dtype=torch.float32)
        merge_lora(model)
        model.to(getattr(torch, arguments.dtype))
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        card = merged_card(model.config, arguments.adapters, base)
        (folder / "README.md").write_text(card, encoding="utf-8")
    print(f"saved {arguments.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="igva merge",
        description="Add adapters into the weights of the checkpoint that they were trained from, with the projector and the "
        "fusion that were trained beside them, and save a plain checkpoint, which needs no peft.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("adapters", metavar="ADAPTERS", help="folder of adapters, or its hub name")
    parser.add_argument("out", metavar="OUT", help="new folder")
    parser.add_argument("--base", help="checkpoint that the adapters were trained from (default: the one that they name)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the saved weights; 16 bits take half the room and round each weight once (default: %(default)s)",
    )
    return parser
