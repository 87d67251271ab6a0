"""The command line: help with examples, one-line errors, and each command on a tiny checkpoint."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from model.cli import main as main_module
from model.cli.ask import weight_bars
from model.cli.main import main
from model.training.run import train

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def checkpoint(stage1_checkpoint, tmp_path_factory):
    """A checkpoint of stage 2."""
    folder = tmp_path_factory.mktemp("cli") / "stage2"
    shutil.copytree(stage1_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["fusion"]["stage"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture
def recipe_file(make_recipe, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(make_recipe(1).to_dict()), encoding="utf-8")
    return file


@pytest.mark.parametrize("command", [name for name, *_ in main_module._COMMANDS])
def test_every_command_has_help_with_an_example(command, capsys):
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"igva {command} " in out.partition("examples:")[2]


def test_the_help_of_train_explains_every_field(capsys):
    main(["train", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "--data.aspect_ratio {pad,crop,stretch,anyres} ``pad`` puts an image on a square of the mean colour" in out
    assert "igva-tiny-stage2" in out


def test_help_lists_the_commands(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for command in ("train", "ask", "evaluate", "embed", "quickstart"):
        assert f"\n  {command} " in out


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        ([], 2, "usage"),
        (["fly"], 2, "no command 'fly'"),
        (["train"], 2, "no recipe given"),
        (["train", "none.yaml"], 1, "no recipe file none.yaml"),
        (["train", "igva-tiny-stage1", "--lerning_rate=1"], 1, "lerning_rate"),
        (["train", "igva-tiny-stage1", "--batch_size=-1"], 1, "batch_size must be above 0"),
        (["ask", "nowhere", "nothing.png", "What?"], 1, "no image at nothing.png"),
        (["ask", "nowhere"], 2, "required: QUESTION"),
        (["evaluate", "nowhere", "nothing.json"], 1, "no data file at nothing.json"),
        (["evaluate", "nowhere", "nothing.json", "--limit=0"], 2, "--limit must be at least 1"),
        (["embed", "nothing.json"], 2, "required: --out"),
        (["embed", "nothing.json", "--encoder=e", "--out=o"], 1, "no data file at nothing.json"),
    ],
)
def test_errors_take_one_line_and_a_status(argv, status, message, capsys):
    assert main(argv) == status
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    if status == 1:
        assert err.count("\n") == 1


def test_debug_shows_where_it_happened(capsys):
    assert main(["train", "none.yaml", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_train_takes_a_recipe_and_flags(recipe_file, tmp_path):
    assert main(["train", str(recipe_file), f"--output_dir={tmp_path / 'run'}", "--max_steps=2"]) == 0
    assert json.loads((tmp_path / "run" / "training" / "result.json").read_text())["steps"] == 2


def test_train_smoke_leaves_the_real_folder_alone(recipe_file, tmp_path):
    assert main(["train", str(recipe_file), "--smoke", "--max_steps=2"]) == 0
    assert (tmp_path / "stage1-smoke" / "model.safetensors").is_file()
    assert not (tmp_path / "stage1").exists()


def test_ask_answers_and_shows_the_weights(checkpoint, picture_folder, capsys):
    assert main(["ask", checkpoint, str(picture_folder / "images" / "red.png"), "Which colour?", "--max_new_tokens=4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    bars = [line for line in lines if line.startswith("layers ")]
    assert [line.split()[1] for line in bars] == ["1-2", "3-4"]
    assert sum(float(line.split()[2]) for line in bars) == pytest.approx(1, abs=0.011)


def test_ask_says_so_where_there_are_no_weights(stage1, picture_folder, capsys):
    assert main(["ask", stage1, str(picture_folder / "images" / "red.png"), "Which?", "--max_new_tokens=2"]) == 0
    assert "no weights to show" in capsys.readouterr().out


def test_bars_are_as_long_as_the_weights():
    text = weight_bars([0.1, 0.9], [(1, 2, 3), (4,)])
    short, long = text.splitlines()
    assert short == "layers     1-3  0.10  " + "█" * 3
    assert long == "layers       4  0.90  " + "█" * 27


def test_evaluate_writes_scores_and_answers(checkpoint, data_file, tmp_path, capsys):
    file = tmp_path / "out" / "scores.json"
    data = ["--train_data", str(data_file), "--output", str(file), "--max_new_tokens=2", "--limit=12", "--baselines"]
    assert main(["evaluate", checkpoint, str(data_file), *data]) == 0
    scores = json.loads(file.read_text())
    assert set(scores) == {"model", "another picture", "most frequent answer"}
    assert scores["model"]["scores"]["overall"]["count"] == 12
    assert len(scores["model"]["answers"]) == 12
    assert scores["most frequent answer"]["scores"]["colour"]["accuracy"] > 0
    assert "Exact match: model" in capsys.readouterr().out


def test_embed_makes_one_file_that_training_reads(encoder_folder, data_file, make_recipe, tmp_path, capsys):
    file = tmp_path / "instructions.safetensors"
    command = ["embed", str(data_file), f"--encoder={encoder_folder}", f"--out={file}"]
    assert main(command) == 0
    # Twelve single questions, one about two pictures, one dialogue; text-only samples need none.
    assert "14 different instructions of 14 samples with images, 14 of them new; 14 in" in capsys.readouterr().out
    made = file.stat().st_mtime_ns
    assert main(command) == 0
    assert "14 samples with images, 0 of them new; 14 in" in capsys.readouterr().out
    train(make_recipe(2, data={"instruction_cache": str(file)}))
    assert file.stat().st_mtime_ns == made
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [file.name]


def test_embed_takes_the_encoder_of_a_checkpoint(stage1, data_file, tmp_path, capsys):
    assert main(["embed", str(data_file), f"--checkpoint={stage1}", f"--out={tmp_path / 'a.safetensors'}"]) == 0
    assert "14 of them new" in capsys.readouterr().out
    shutil.rmtree(Path(stage1) / "sentence_encoder")
    assert main(["embed", str(data_file), f"--checkpoint={stage1}", f"--out={tmp_path / 'b.safetensors'}"]) == 1
    assert "has no sentence encoder" in capsys.readouterr().err


def test_a_folder_that_is_no_checkpoint_is_named(picture_folder, capsys):
    assert main(["ask", str(picture_folder), str(picture_folder / "images" / "red.png"), "What?"]) == 1
    assert "holds no igva_llava checkpoint" in capsys.readouterr().err


def test_python_m_model_runs_from_the_tree():
    done = subprocess.run([sys.executable, "-m", "model", "train", "none.yaml"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("igva train: no recipe file none.yaml")
