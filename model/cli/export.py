"""``igva export``: tower, fusion and projector of a checkpoint as one file of torch.export."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

_EXAMPLES = """examples:
  igva export runs/mine vision.pt2
  igva export runs/mine vision-bf16.pt2 --dtype=bfloat16

To use it, with torch and igva_kernels alone:
  import torch, igva_kernels.modules
  vision = torch.export.load("vision.pt2").module()
  outputs = vision(pixel_values, instruction_embeds)
"""


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)

    # After the arguments are known to be right: these imports take seconds.
    from model.cli.checkpoint import load_checkpoint
    from model.export import export_vision_side

    checkpoint = load_checkpoint(arguments.checkpoint, base=arguments.base, dtype=arguments.dtype)
    report = export_vision_side(checkpoint.model, arguments.out, checkpoint.processor)
    for kind in ("inputs", "outputs"):
        for name, form in report.record[kind].items():
            print(f"{kind[:-1]:6}  {name}: {form}")
    print(f"operators of this package: {', '.join(report.operators) or 'none'}")
    print(f"largest difference from eager: {report.error:.1e}, with image tokens up to {report.largest:.1e}")
    print(f"saved {arguments.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="igva export",
        description="Write vision tower, fusion and projector of a checkpoint to one file of torch.export, with the operators "
        "of igva_kernels in it, for batches of any size. The file is read back and compared with the model before it takes "
        "its name.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a finished training run, or a hub name")
    parser.add_argument("out", metavar="OUT.pt2", help="new file")
    parser.add_argument("--base", help="where CHECKPOINT is a folder of adapters: what they were trained from")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the weights (default: that of the checkpoint)",
    )
    return parser
