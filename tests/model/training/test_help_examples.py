"""The examples of every command's --help: the real parsers take them all, and those that a tiny model can run do run."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from documents.commands import check_igva
from PIL import Image

from model.cli import main as main_module
from model.cli.main import main

COMMANDS = [name for name, *_ in main_module._COMMANDS]

#: Commands whose examples run here, and those whose examples name models of 7B and hubs, or take many minutes.
RUN = ("ask", "chat", "explain", "evaluate", "embed", "preview", "recipe", "doctor", "train", "plan")

HUB_ENCODER = "sentence-transformers/all-mpnet-base-v2"


def examples(text: str) -> list[tuple[str, str | None, str | None]]:
    """Of a help text: each command line, what is piped into it, and the file that takes its output."""
    block = text.partition("examples:\n")[2].partition("\n\n")[0]
    found = []
    for line in re.sub(r"\\\n\s*", "", block).splitlines():
        line = re.split(r"\s{2,}", line.strip())[0]  # two spaces and more begin a remark
        piped, _, line = line.rpartition(" | ")
        line, _, target = line.partition(" > ")
        found.append((line, shlex.split(piped)[-1] if piped else None, target or None))
    return found


def help_of(command: str, capsys) -> str:
    assert main([command, "--help"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_the_parsers_take_every_example(command, capsys):
    found = examples(help_of(command, capsys))
    assert any(line.startswith(f"igva {command}") for line, _, _ in found)
    for line, _, _ in found:
        program, *words = shlex.split(line)
        assert program == "igva"
        check_igva(words)


def test_the_parsers_take_the_examples_of_the_whole(capsys):
    assert main(["--help"]) == 0
    found = examples(capsys.readouterr().out)
    assert len(found) > 2
    for line, _, _ in found:
        check_igva(shlex.split(line)[1:])


@pytest.fixture
def place(stage1_checkpoint, picture_folder, colours, records, make_record, make_recipe, monkeypatch, tmp_path) -> Path:
    """A folder with all files that the examples name."""
    checkpoint = tmp_path / "runs" / "mine"
    shutil.copytree(stage1_checkpoint, tmp_path / "runs" / "igva-7b-stage1")
    shutil.copytree(stage1_checkpoint, checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    config["fusion"]["stage"] = 2
    (checkpoint / "config.json").write_text(json.dumps(config))
    for name in ("picture", "before", "after"):
        Image.new("RGB", (40, 20), "red").save(tmp_path / f"{name}.jpg")
    # What --image_folder=images and the recipes of the paper (data) find, too: paths in the data begin with images/.
    for folder in ("images", "images/images", "data/images", "pictures"):
        (tmp_path / folder).mkdir(parents=True)
        for name in colours:
            shutil.copy(picture_folder / "images" / f"{name}.png", tmp_path / folder)
    samples = [*records, make_record("000000033471", "images/red.png", "<image>\nWhich colour?", "red", level="colour")]
    (tmp_path / "data.json").write_text(json.dumps(samples))
    for name in ("test", "train"):  # of every kind two samples and more, whose pictures a baseline can exchange
        (tmp_path / f"{name}.json").write_text(json.dumps([sample for sample in samples if sample.get("level") == "colour"]))
    recipe = make_recipe(1, data={"path": str(tmp_path / "data.json")}).to_dict()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def without_7b(monkeypatch):
    """What a recipe of the paper would do with its 7B model is left out; the recipe is read."""

    def stop(*arguments, **options):
        raise SystemExit(0)

    monkeypatch.setattr("model.training.run.train", stop)
    monkeypatch.setattr("model.cli.train._dry_run", stop)
    monkeypatch.setattr("model.training.memory_plan.plan_memory", stop)


@pytest.mark.parametrize("command", RUN)
def test_the_examples_run(command, place, encoder_folder, without_7b, monkeypatch, capsys):
    for line, piped, target in examples(help_of(command, capsys)):
        words = shlex.split(line.replace(HUB_ENCODER, str(encoder_folder)).replace("--device=cuda", "--device=cpu"))[1:]
        if "--results" in words:  # files of lmms-eval
            continue
        if command in ("ask", "chat"):
            words.append("--max_new_tokens=4")  # a model that was not trained finds no end
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{piped or 'What colour?'}\n"))
        assert main(words) == 0, line
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        if target:
            (place / target).write_text(out)
