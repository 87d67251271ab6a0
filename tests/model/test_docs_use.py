"""Every block of docs/use.md runs, one after the other, on a tiny checkpoint; every command that it names exists."""

import re
from pathlib import Path

import torch
from PIL import Image

from model import build_model, build_processor
from model.cli.main import _COMMANDS
from model.instruction import SentenceEncoder

PAGE = (Path(__file__).parents[2] / "docs" / "use.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def test_blocks_run(part_folders, encoder_folder, tmp_path):
    torch.manual_seed(0)
    fusion = {"type": "igva", "num_groups": 2, "text_dim": 16, "hidden_dim": 32, "num_blocks": 1}
    built = build_model(part_folders["clip"], part_folders["llama"], fusion=fusion)
    built.save_pretrained(tmp_path)
    encoder = SentenceEncoder(encoder_folder)
    build_processor(part_folders["clip"], part_folders["llama"], built.config, sentence_encoder=encoder).save_pretrained(
        tmp_path
    )
    names = {"checkpoint": tmp_path, "picture": Image.new("RGB", (40, 20), "red")}
    assert len(BLOCKS) == 5
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"docs/use.md, block {number + 1}", "exec"), names)
    assert isinstance(names["made"], str)
    assert names["weights"].shape == (1, 2, 2)
    assert len(names["worth"]) == 2


def test_commands_exist():
    named = set(re.findall(r"igva ([a-z]+) CHECKPOINT|    igva ([a-z]+)$", PAGE, flags=re.MULTILINE))
    named = {one or other for one, other in named}
    assert {"ask", "chat", "explain", "evaluate", "doctor"} <= named <= {name for name, *_ in _COMMANDS}
