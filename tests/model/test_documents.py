"""The pages about the model: their Python runs on a tiny checkpoint; commands of all pages are ones that the programs take.

``tests/documents`` has the rules for pages, and the tests that need no model.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
import yaml
from documents.commands import TARGETS, check, lines_of
from documents.pages import PAGES, Block, Page
from documents.running import run_page
from PIL import Image

from model import build_model, build_processor
from model.cli.main import _COMMANDS
from model.instruction import SentenceEncoder
from model.training.recipe import TrainRecipe

RUNNING = [page for page in PAGES if page.of("python") and page.uses_the_model]
COMMANDS = [
    pytest.param(line, id=f"{page.name}:{number}")
    for page in PAGES
    for block in page.of("bash", "indented")
    for number, line in lines_of(block)
]
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pytest.fixture(scope="module")
def checkpoint(part_folders: dict[str, Path], encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """IGVA with two groups, in stage 2, as a run saves it."""
    torch.manual_seed(0)
    fusion = {"type": "igva", "num_groups": 2, "text_dim": 16, "hidden_dim": 32, "num_blocks": 1}
    built = build_model(part_folders["clip"], part_folders["llama"], fusion=fusion)
    folder = tmp_path_factory.mktemp("checkpoint")
    built.save_pretrained(folder)
    encoder = SentenceEncoder(encoder_folder)
    build_processor(part_folders["clip"], part_folders["llama"], built.config, sentence_encoder=encoder).save_pretrained(folder)
    return folder


@pytest.fixture
def provide(checkpoint: Path, part_folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Any]:
    """What the comment of a page may name."""
    picture = Image.new("RGB", (40, 20), "red")

    def picture_file() -> Path:
        picture.save(tmp_path / "provided.png")
        return tmp_path / "provided.png"

    def data_file() -> Path:
        picture.save(tmp_path / "red.png")
        turns = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": "red"}]
        records = [{"id": str(n), "image": "red.png", "conversations": turns} for n in range(4)]
        (tmp_path / "provided.json").write_text(json.dumps(records), encoding="utf-8")
        return tmp_path / "provided.json"

    provided: dict[str, Callable[[], Any]] = {
        "checkpoint": lambda: checkpoint,
        "picture": lambda: picture,
        "picture_file": picture_file,
        "data_file": data_file,
        "vision_tower": lambda: part_folders["clip"],
        "language_model": lambda: part_folders["llama"],
    }
    return lambda name: provided[name]()


@pytest.mark.parametrize("page", RUNNING, ids=lambda page: page.name)
def test_python_runs(page: Page, tmp_path: Path, provide: Callable[[str], Any]) -> None:
    (tmp_path / "work").mkdir()
    names = run_page(page, tmp_path / "work", provide)
    if page.name == "docs/use.md":
        assert isinstance(names["made"], str)
        assert names["weights"].shape == (1, 2, 2)
        assert len(names["worth"]) == 2


def test_pages_with_python_that_needs_the_model() -> None:
    assert {"docs/use.md", "docs/scale.md"} <= {page.name for page in RUNNING}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_taken(command: str) -> None:
    check(command)


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 50


@pytest.mark.parametrize(
    "command",
    [
        "igva no-such-command",
        "igva ask CHECKPOINT",
        "igva train igva-7b-stage2 --no_such_field=1",
        "igva plan no-such-recipe",
        "python -m benchmarks --part=no-such-part",
        "make no-such-target",
        "pip install 'igva-kernels[no-such-extra]'",
        "torchrun --nproc_per_node=2 -m model train igva-7b-stage2 --distributed=no-such-way",
        "python -m pytest tests/no-such-folder",
        "rm -rf build",
    ],
)
def test_a_command_that_nothing_takes_is_found(command: str) -> None:
    with pytest.raises(AssertionError):
        check(command)


@EVERY_PAGE
def test_commands_in_the_text_exist(page: Page) -> None:
    named = [re.match(r"(?:\.venv/bin/)?(igva|make|python -m model) ([a-z][a-z-]*)", code) for code in page.inline_code]
    known = {"make": TARGETS, "igva": {name for name, *_ in _COMMANDS}}
    known["python -m model"] = known["igva"]
    assert not [found[0] for found in named if found and found[2] not in known[found[1]]]


@EVERY_PAGE
def test_settings_are_fields_of_a_recipe(page: Page) -> None:
    for block in page.of("yaml"):
        _check_fields(yaml.safe_load(block.text), TrainRecipe)


def _check_fields(settings: dict[str, Any], kind: type) -> None:
    types = get_type_hints(kind)
    assert set(settings) <= set(types), set(settings) - set(types)
    for name, value in settings.items():
        inner = [each for each in (types[name], *get_args(types[name])) if dataclasses.is_dataclass(each)]
        if inner and isinstance(value, dict):
            _check_fields(value, inner[0])


@pytest.mark.parametrize(("name", "module"), [("", "model.cli.main"), *((name, module) for name, module, _ in _COMMANDS)])
def test_the_help_of_a_command_has_examples_that_it_takes(name: str, module: str) -> None:
    text = importlib.import_module(module)._parser().epilog or ""
    shown = text.partition("examples:\n")[2].partition("\n\n")[0]
    # What explains an example stands behind it, two spaces away.
    examples = [re.sub(r"(?<=\S)  +\S.*$", "", line) for line in shown.splitlines()]
    assert any(f"igva {name}" in example for example in examples)
    for _, line in lines_of(Block("bash", "\n".join(examples), 1)):
        check(line)
