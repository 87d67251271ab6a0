"""Bad use is met with one line that says what is wrong and how to go on, and a status other than zero; no traceback.

Each case goes through the command line on a copy of a tiny checkpoint.
"""

from __future__ import annotations

import io
import json
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from model.cli import checkpoint as checkpoint_module
from model.cli.errors import explain
from model.cli.main import main
from model.instruction import SentenceEncoder
from model.processing import IgvaLlavaProcessor

ROOT = Path(__file__).resolve().parents[3]
QUESTION = "Which colour?"


@pytest.fixture
def checkpoint(stage1_checkpoint, tmp_path) -> Path:
    """A checkpoint of stage 2, to be damaged."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(stage1_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["fusion"]["stage"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def red(picture_folder) -> str:
    return str(picture_folder / "images/red.png")


@pytest.fixture
def told(capsys, monkeypatch) -> Callable[..., str]:
    """``told(command, *arguments)``: the one line that the command says, and ends with status 1."""
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n"))

    def run(command: str, *arguments: str) -> str:
        capsys.readouterr()
        assert main([command, *map(str, arguments)]) == 1
        err = capsys.readouterr().err
        assert "Traceback" not in err
        # Progress bars and what training is at come before.
        line = err.splitlines()[-1]
        assert line.startswith(f"igva {command}: ") and line.endswith("(--debug shows where)")
        return line

    return run


@pytest.fixture
def command_line(checkpoint, red, data_file, make_recipe, tmp_path) -> Callable[[str], list[str]]:
    """``command_line(command)``: arguments with which a command reads the checkpoint."""

    def make(command: str) -> list[str]:
        if command == "train":
            recipe = make_recipe(2, checkpoint=str(checkpoint)).to_dict()
            (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
            return [command, str(tmp_path / "recipe.yaml")]
        rest = {"ask": [red, QUESTION], "chat": [red], "explain": [red, QUESTION], "evaluate": [str(data_file)]}
        return [command, str(checkpoint), *rest[command]]

    return make


# ---- checkpoints --------------------------------------------------------------------------------------------------------


def cut(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return change


def remove(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    return change


def change_the_plan(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["fusion"] = {"type": "dense_connector"}
    (folder / "config.json").write_text(json.dumps(config))


def lose_a_shard(folder: Path) -> None:
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    (folder / "model.safetensors").rename(folder / first)
    weight_map = {"lm_head.weight": first, "model.multi_modal_projector.linear_1.weight": second}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def take_another_encoder(folder: Path) -> None:
    (folder / "sentence_encoder" / "igva_fingerprint.json").write_text(json.dumps({"fingerprint": "0" * 64}))


DAMAGE = {
    "half a file of weights": (cut("model.safetensors"), ("model.safetensors is damaged or incomplete", "download it again")),
    "an empty file of weights": (
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        ("model.safetensors is damaged or incomplete", "download it again"),
    ),
    "no weights": (remove("model.safetensors"), ("holds no weights", "download the whole checkpoint")),
    "a missing shard": (lose_a_shard, ("lacks model-00002-of-00002.safetensors", "download the whole checkpoint")),
    "half a config": (cut("config.json"), ("config.json is damaged", "download it again")),
    "half a tokenizer": (cut("tokenizer.json"), ("tokenizer.json is damaged", "download it again")),
    "no config": (remove("config.json"), ("holds no igva_llava checkpoint", "give the output_dir of a finished training run")),
    "another plan": (
        change_the_plan,
        (
            "with the fusion 'dense_connector'",
            "model.multi_modal_projector.linear_1.weight is (64, 64), expected (64, 96)",
            "Take config.json and weights from one checkpoint",
        ),
    ),
    "no sentence encoder": (remove("sentence_encoder"), ("sentence_encoder is missing", "copy the whole checkpoint")),
    "another sentence encoder": (take_another_encoder, ("holds another one", "copy the whole checkpoint")),
    "half a sentence encoder": (
        cut("sentence_encoder/model.safetensors"),
        ("sentence_encoder/model.safetensors is damaged or incomplete", "download it again"),
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_checkpoint_that_is_not_as_it_was_saved(damage, checkpoint, command_line, told):
    change, texts = DAMAGE[damage]
    change(checkpoint)
    line = told(*command_line("ask"))
    for text in texts:
        assert text in line


@pytest.mark.parametrize("command", ["chat", "explain", "evaluate", "train"])
@pytest.mark.parametrize("damage", ["half a file of weights", "another plan", "no sentence encoder", "no config"])
def test_every_command_that_reads_a_checkpoint_says_it(command, damage, checkpoint, command_line, told):
    change, texts = DAMAGE[damage]
    change(checkpoint)
    assert texts[0] in told(*command_line(command))


@pytest.mark.parametrize("command", ["chat", "explain", "evaluate", "train", "ask"])
def test_a_folder_that_is_not_there(command, checkpoint, command_line, told):
    arguments = command_line(command)
    shutil.rmtree(checkpoint)
    assert f"no checkpoint at {checkpoint}" in told(*arguments)


@pytest.fixture(scope="module")
def wide_encoder(encoder_folder, tmp_path_factory) -> Path:
    """A sentence encoder of width 32 in place of 16."""
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(str(encoder_folder), device="cpu")
    try:
        from sentence_transformers.sentence_transformer.modules import Dense
    except ImportError:  # where it was before sentence-transformers 6
        from sentence_transformers.models import Dense

    wide = SentenceTransformer(modules=[*encoder, Dense(16, 32)], device="cpu")
    folder = tmp_path_factory.mktemp("wide") / "encoder"
    wide.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("command", ["ask", "explain", "evaluate"])
def test_a_sentence_encoder_of_another_width(command, checkpoint, command_line, wide_encoder, told):
    processor = IgvaLlavaProcessor.from_pretrained(checkpoint)
    processor.sentence_encoder = SentenceEncoder(wide_encoder)
    shutil.rmtree(checkpoint / "sentence_encoder")
    processor.save_pretrained(checkpoint)
    line = told(*command_line(command))
    assert "32), expected 16 numbers a sentence" in line and "another sentence encoder" in line


def test_training_with_a_sentence_encoder_of_another_width(checkpoint, command_line, wide_encoder, told):
    line = told(*command_line("train"), f"--model.sentence_encoder={wide_encoder}")
    assert "gives 32 numbers a sentence, but the checkpoint's allocator takes 16; use the encoder" in line


# ---- pictures and questions ---------------------------------------------------------------------------------------------


def half_a_picture(path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:1000])


def too_many_pixels(path: Path) -> None:
    """By its header, which is all that is read of it."""
    Image.new("1", (8, 8)).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 12000, 9000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


PICTURES = {
    "none": (lambda path: None, "no image at"),
    "a folder": (lambda path: path.mkdir(), "no image at"),
    "a text": (lambda path: path.write_text("a red car"), "cannot read the image"),
    "an empty file": (lambda path: path.touch(), "cannot read the image"),
    "half a picture": (half_a_picture, "cannot read the image"),
    "too many pixels": (too_many_pixels, "more than max_image_pixels"),
}


@pytest.mark.parametrize("kind", PICTURES)
@pytest.mark.parametrize("command", ["ask", "chat"])
def test_a_picture_that_cannot_be_read(command, kind, checkpoint, told, tmp_path):
    make, text = PICTURES[kind]
    path = tmp_path / "picture.png"
    make(path)
    line = told(command, checkpoint, path, *([QUESTION] if command == "ask" else []))
    assert text in line and str(path) in line


@pytest.mark.parametrize(
    ("kind", "text"),
    [("none", "no picture, folder or data file at"), ("a text", "cannot read the image"), ("a folder", "holds no pictures")],
)
def test_a_picture_that_cannot_be_explained(kind, text, checkpoint, told, tmp_path):
    PICTURES[kind][0](tmp_path / "picture.png")
    assert text in told("explain", checkpoint, tmp_path / "picture.png", QUESTION)


@pytest.mark.parametrize("kind", ["none", "a text", "half a picture"])
@pytest.mark.parametrize("command", ["evaluate", "train"])
def test_a_data_file_whose_picture_cannot_be_read(command, kind, command_line, told, make_record, tmp_path):
    make, text = PICTURES[kind]
    make(tmp_path / "picture.png")
    data = tmp_path / "broken.json"
    data.write_text(json.dumps([make_record("first", "picture.png", "<image>\nWhich?", "red")] * 4))
    arguments = command_line(command)
    line = told(*arguments, f"--data.path={data}") if command == "train" else told(*arguments[:-1], data)
    assert text in line and str(tmp_path / "picture.png") in line


def test_the_question_is_not_there(checkpoint, red, capsys):
    assert main(["ask", str(checkpoint), red]) == 2
    assert f"{red} is a file, and no question came after it" in capsys.readouterr().err
    assert main(["ask", str(checkpoint)]) == 2
    assert "required: QUESTION" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("question", "text"),
    [
        (" \n", "the question is empty; ask something"),
        ("word " * 300, "more than the 1024 that the language model can read; shorten the question"),
        ("What is <image>?", "the question holds <image>"),
    ],
)
def test_a_question_that_cannot_be_asked(question, text, checkpoint, red, told):
    assert text in told("ask", checkpoint, red, question)


def test_an_answer_that_would_be_too_long(checkpoint, red, told):
    assert "or lower max_new_tokens" in told("ask", checkpoint, red, QUESTION, "--max_new_tokens=2000")


def test_a_question_that_is_too_long_to_be_evaluated(checkpoint, told, make_record, picture_folder, tmp_path):
    data = tmp_path / "long.json"
    image = str(picture_folder / "images/red.png")
    data.write_text(json.dumps([make_record("first", image, f"<image>\n{'word ' * 300}", "red")]))
    line = told("evaluate", checkpoint, data, f"--image_folder={picture_folder}")
    assert "more than the 1024 that the language model can read" in line


def test_a_question_without_a_picture_is_answered(checkpoint, capsys):
    assert main(["ask", str(checkpoint), "Say hello.", "--max_new_tokens=2"]) == 0
    out = capsys.readouterr().out
    assert "no picture was shown" in out and "layers   " not in out


def test_several_pictures_are_shown_in_their_order(checkpoint, picture_folder, capsys):
    from model.answering import Conversation
    from model.data.images import open_image

    paths = [str(picture_folder / "images" / f"{name}.png") for name in ("red", "blue")]
    # An option before the pictures leaves them theirs.
    assert main(["ask", str(checkpoint), "--max_new_tokens", "4", *paths, QUESTION]) == 0
    out = capsys.readouterr().out
    loaded = checkpoint_module.load_checkpoint(str(checkpoint))
    conversation = Conversation(loaded.model, loaded.processor)
    for path in paths:
        conversation.show(open_image(path))
    answer, weights = conversation.ask(QUESTION, max_new_tokens=4)
    assert out.startswith(answer)
    assert "mean over 2 pictures" in out and f"layers     1-2  {weights[0]:.2f}" in out


# ---- recipes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "plan", "preview", "recipe"])
@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "no recipe file"),
        ("name: [unclosed", "recipe.yaml"),
        ("- a list", "recipe.yaml"),
        ("name: mine\nlerning_rate: 1\n", "lerning_rate"),
    ],
)
def test_a_recipe_that_cannot_be_read(command, content, text, told, tmp_path):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content)
    assert text in told(command, path)


# ---- memory, and the user's patience ------------------------------------------------------------------------------------


def test_memory_that_torch_cannot_have():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**48)
    assert explain(caught.value).startswith("out of memory (")


#: Lets a command have 100 MB more than its imports took.
LITTLE_MEMORY = """
import resource, sys
import model.answering, model.cli.checkpoint, model.data.images
from model.cli.main import main

used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 100_000_000, resource.RLIM_INFINITY))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space, and where they are read, are Linux's")
def test_memory_that_the_system_refuses(checkpoint, tmp_path):
    Image.new("L", (8000, 8000)).save(tmp_path / "large.png", compress_level=1)  # 192 MB and more in RGB
    command = [sys.executable, "-c", LITTLE_MEMORY, "ask", str(checkpoint), str(tmp_path / "large.png"), QUESTION]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("igva ask: out of memory (") and "fewer pictures at once" in line


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("command", ["ask", "chat", "explain", "evaluate", "train"])
def test_interrupted(command, command_line, monkeypatch, capsys):
    """A real signal, as Ctrl-C sends it."""
    monkeypatch.setattr(checkpoint_module, "load_checkpoint", lambda name, **options: signal.raise_signal(signal.SIGINT))
    monkeypatch.setattr("model.training.run.train", lambda recipe: signal.raise_signal(signal.SIGINT))
    assert main(command_line(command)) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "igva: interrupted"
