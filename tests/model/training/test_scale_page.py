"""docs/scale.md: its commands are ones that the launchers take, and its table is that of the recipe."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from model.cli.train import shipped_recipes
from model.training.checkpoints import _FREE_FIELDS, MANIFEST
from model.training.distributed import CONFIGS
from model.training.recipe import Distributed

PAGE = (Path(__file__).parents[3] / "docs" / "scale.md").read_text(encoding="utf-8")


def commands():
    text = "\n".join(re.findall(r"^```bash\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


def test_the_table_is_that_of_the_recipe():
    rows = re.findall(r"^\| `(\w+)`[^|]*\|", PAGE, re.MULTILINE)
    assert tuple(rows[1:5]) == get_args(Distributed)
    for file in CONFIGS.glob("*.json"):
        assert file.name in PAGE
    assert MANIFEST in PAGE
    assert {"save_every", "log_every", "eval_every", "trackers"} <= _FREE_FIELDS


def test_commands_train_shipped_recipes():
    trained = [shlex.split(command) for command in commands() if " -m model " in command or "--module model" in command]
    assert len(trained) == 6
    for words in trained:
        recipe = words[words.index("train") + 1]
        assert recipe in shipped_recipes()
        way = next(word for word in words if word.startswith("--distributed="))
        assert way.partition("=")[2] in get_args(Distributed)


@pytest.mark.parametrize(
    ("program", "launcher"),
    [
        ("torchrun", "torch.distributed.run"),
        ("accelerate", "accelerate.commands.launch"),
        ("deepspeed", "deepspeed.launcher.runner"),
    ],
)
def test_the_launchers_know_the_flags(program, launcher):
    pytest.importorskip(launcher.partition(".")[0])
    done = subprocess.run([sys.executable, "-m", launcher, "--help"], capture_output=True, text=True, timeout=300)
    known = done.stdout.replace("-", "_")
    for command in commands():
        words = shlex.split(command)
        if words[0] == program:
            flags = [word.partition("=")[0] for word in words[: words.index("model")] if word.startswith("--")]
            assert all(flag.replace("-", "_") in known for flag in flags), command
