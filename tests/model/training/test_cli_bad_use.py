"""Bad use of a checkpoint is met with one line that says what is wrong and how to go on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from model.cli.main import main


@pytest.fixture
def told(stage1_checkpoint, picture_folder, tmp_path, capsys):
    """``told(change, question)``: the one line that `igva ask` says of a copy of the checkpoint that ``change`` has changed."""

    def ask(change=lambda folder: None, question: str = "Which colour?") -> str:
        folder = tmp_path / "checkpoint"
        shutil.copytree(stage1_checkpoint, folder)
        change(folder)
        capsys.readouterr()
        assert main(["ask", str(folder), str(picture_folder / "images/red.png"), question]) == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("igva ask: ") and line.endswith("(--debug shows where)")
        return line

    return ask


def cut_the_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_the_plan(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["fusion"] = {"type": "dense_connector"}
    (folder / "config.json").write_text(json.dumps(config))


def test_a_damaged_file_of_weights(told):
    assert "a file of weights is damaged or incomplete" in told(cut_the_weights)


def test_weights_of_another_plan(told):
    line = told(change_the_plan)
    assert "with the fusion 'dense_connector'" in line
    assert "model.multi_modal_projector.linear_1.weight is (64, 64), expected (64, 96)" in line
    assert "igva convert" in line


def test_an_empty_question(told):
    assert "the question is empty" in told(question=" \n")


def test_a_question_that_is_too_long(told):
    line = told(question="word " * 300)
    assert "more than the 1024 that the language model can read; shorten the question" in line
