"""How a checkpoint is to be loaded, on the command lines of all that use one."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from model.quantization import Quantization


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of :func:`model.cli.checkpoint.load_checkpoint`, which :func:`given_loading_arguments` reads."""
    group = parser.add_argument_group("how the checkpoint is loaded")
    group.add_argument("--base", metavar="CHECKPOINT", help="where CHECKPOINT is a folder of adapters: their base")
    group.add_argument(
        "--quantization",
        choices=get_args(Quantization),
        help="hold the language model in 8 bits (int8: torchao) or 4 (int4: torchao; nf4: bitsandbytes)",
    )
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: that of the checkpoint)"
    )


def given_loading_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a command line says of :func:`add_loading_arguments`, without what it leaves open."""
    names = ("base", "quantization", "dtype")
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
