"""``igva convert``: checkpoints of other code bases to ours and back."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

_KINDS = ("llava-hf", "llava", "igva", "dense_connector", "mmfuser")

_EXAMPLES = """examples:
  igva convert llava-hf/llava-1.5-7b-hf runs/llava --from=llava-hf
  igva convert mm_projector.bin runs/mine --from=llava --vision_tower=openai/clip-vit-large-patch14-336 \\
      --language_model=lmsys/vicuna-7b-v1.5
  igva convert DIR runs/igva --from=igva --order=fused_first --vision_tower=openai/clip-vit-large-patch14-336
  igva convert runs/igva DIR --to=igva --vocab_size=32000
"""


def main(argv: Sequence[str]) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    out = Path(arguments.out)
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; choose another folder")
    if arguments.source_kind not in (None, "llava-hf") and arguments.vision_tower is None:
        parser.error(f"--from={arguments.source_kind} needs --vision_tower: the tower that the checkpoint was trained with")
    if arguments.source_kind is not None:
        _convert_from(arguments, out)
    else:
        _convert_to(arguments, out)
    print(f"saved {out}")
    return 0


def _convert_from(arguments: argparse.Namespace, out: Path) -> None:
    # After the arguments are known to be right: these imports take seconds.
    from model.build import build_processor
    from model.instruction import write_text_atomically

    if arguments.source_kind == "llava-hf":
        from transformers import LlavaForConditionalGeneration

        from model.converters.llava_hf import from_llava

        model = from_llava(LlavaForConditionalGeneration.from_pretrained(arguments.source, use_safetensors=True))
        record, tower, words = {"from": "llava-hf"}, arguments.source, arguments.source
    else:
        from model.converters.official import from_official

        conversion = from_official(
            arguments.source_kind,
            arguments.source,
            vision_tower=arguments.vision_tower,
            language_model=arguments.language_model,
            source_order=arguments.source_order,
            order=arguments.order,
        )
        model, record, tower = conversion.model, conversion.record, arguments.vision_tower
        words = arguments.language_model or arguments.source
    processor = build_processor(tower, words, model.config, sentence_encoder=arguments.sentence_encoder)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    write_text_atomically(out / "conversion.json", json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


def _convert_to(arguments: argparse.Namespace, out: Path) -> None:
    from model.cli.checkpoint import load_checkpoint
    from model.converters.llava_hf import to_llava
    from model.converters.official import write_official

    checkpoint = load_checkpoint(arguments.source)
    if arguments.target_kind == "llava-hf":
        to_llava(checkpoint.model).save_pretrained(out)
        checkpoint.processor.image_processor.save_pretrained(out)
    else:
        write_official(arguments.target_kind, checkpoint.model, out, vocab_size=arguments.vocab_size)
    checkpoint.processor.tokenizer.save_pretrained(out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="igva convert",
        description="Convert a checkpoint of another code base to ours, or ours to another's. What was done, the order of the "
        "projector's slots above all, is written to conversion.json.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="checkpoint folder, hub name, or file of projector weights")
    parser.add_argument("out", metavar="OUT", help="new folder")
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--from", dest="source_kind", choices=_KINDS, help="code base that SOURCE comes from")
    direction.add_argument("--to", dest="target_kind", choices=_KINDS, help="code base that OUT is for; SOURCE is ours")
    parser.add_argument("--vision_tower", help="folder or hub name of the tower that SOURCE was trained with")
    parser.add_argument("--language_model", help="folder or hub name, where SOURCE holds the projector alone")
    parser.add_argument("--sentence_encoder", help="folder or hub name of the sentence encoder, saved with the result")
    parser.add_argument("--source_order", help="slots of SOURCE's projector (default: base_first, as the released code)")
    parser.add_argument("--order", help="slots of the result's projector: base_first, fused_first (igva), base_last")
    parser.add_argument("--vocab_size", type=int, help="with --to: rows of the embeddings to keep (default: all)")
    return parser
