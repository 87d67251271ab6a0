"""``igva web``: ask a model in the browser, and see which layers each question used."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from model.cli.loading_arguments import add_loading_arguments, given_loading_arguments
from model.explain_report import require_matplotlib

_EXAMPLES = """examples:
  igva web runs/mine
  igva web runs/mine --port=8000 --queue=5

The page listens to this machine alone unless --host or --share say otherwise, asks nothing of the network, and sends nothing
anywhere. Whoever reaches it can use it: there is no password. From another machine: ssh -L 7860:localhost:7860 MACHINE, and
open http://localhost:7860 there.
"""


def main(argv: Sequence[str]) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.queue < 1:
        parser.error(f"--queue must be at least 1, got {arguments.queue}")
    if arguments.max_new_tokens < 1:
        parser.error(f"--max_new_tokens must be at least 1, got {arguments.max_new_tokens}")
    require_gradio()
    require_matplotlib()

    # After the arguments are known to be right: these imports take seconds. gradio reads the variable where it would call home.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from model.cli.checkpoint import load_checkpoint
    from model.web.examples import make_examples
    from model.web.page import build_page, launch_options
    from model.web.talk import Talk

    checkpoint = load_checkpoint(arguments.checkpoint, **given_loading_arguments(arguments))
    name = "/".join(Path(arguments.checkpoint).resolve().parts[-2:])
    with tempfile.TemporaryDirectory(prefix="igva-web-") as folder:
        examples = make_examples(Path(folder))
        page = build_page(Talk(checkpoint.model, checkpoint.processor), name, examples, Path(folder), arguments.max_new_tokens)
        page.queue(max_size=arguments.queue)
        _, local, shared = page.launch(
            server_name=arguments.host,
            server_port=arguments.port,
            share=arguments.share,
            prevent_thread_lock=True,
            **launch_options(),
        )
        print(f"{name} answers at {local}  (Ctrl-C ends it)", flush=True)
        if shared:
            print(f"and for everybody at {shared}", flush=True)
        elif arguments.host not in ("127.0.0.1", "localhost", "::1"):
            print(f"whoever reaches {arguments.host} can use it: there is no password", file=sys.stderr)
        page.block_thread()
    return 0


def require_gradio() -> None:
    """Say before anything is loaded that there can be no page.

    Raises:
        ImportError: gradio is not installed; the message names the extra that brings it.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ImportError("the web page needs gradio, which is not installed: pip install 'igva-kernels[web]'")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="igva web",
        description="A web page where one drops a picture, asks, and sees answer and weights of the layer groups.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of a finished training run, or a hub name")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: all (default: %(default)s)")
    parser.add_argument("--port", type=int, help="port to listen at (default: the first free one from 7860)")
    parser.add_argument("--share", action="store_true", help="a public link through gradio's servers, for a week")
    parser.add_argument("--queue", type=int, default=20, help="questions that may wait (default: %(default)s)")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer in tokens (default: %(default)s)")
    add_loading_arguments(parser)
    return parser
