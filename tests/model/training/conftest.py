"""A small LLaVA JSON file with real pictures, tiny parts, and recipes for runs of seconds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from model import IgvaLlavaForConditionalGeneration, IgvaLlavaProcessor
from model.training.recipe import DataSource, EvaluationSettings, ModelSource, TrainRecipe
from model.training.run import train

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220), "white": (250, 250, 250)}


def record(sample_id: str, image: str | list[str] | None, *turns: str, **more: Any) -> dict[str, Any]:
    """One LLaVA record; the turns alternate between human and gpt."""
    conversations = [{"from": "gpt" if position % 2 else "human", "value": text} for position, text in enumerate(turns)]
    entry = {"id": sample_id, "conversations": conversations, **more}
    return entry if image is None else {**entry, "image": image}


@pytest.fixture(scope="session")
def make_record() -> Callable[..., dict[str, Any]]:
    return record


@pytest.fixture(scope="session")
def colours() -> dict[str, Any]:
    """The pictures that ``images`` begins with, by name; tests put others beside them."""
    return COLOURS


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One 40 x 20 picture of each colour."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 20), colour).save(folder / "images" / f"{name}.png")
    return folder


@pytest.fixture(scope="session")
def records() -> list[dict[str, Any]]:
    """Sixteen samples of every shape: one image, two images, several turns, none."""
    single = [
        record(f"colour-{i}", f"images/{name}.png", f"<image>\nWhich colour, {i}?", name, level="colour")
        for i, name in enumerate([*COLOURS] * 3)
    ]
    return [
        *single,
        record("two", ["images/red.png", "images/blue.png"], "<image>\n<image>\nWhich colours?", "red and blue"),
        record("turns", "images/green.png", "<image>\nWhich colour?", "green", "Is it dark?", "no", level="colour"),
        record("text-a", None, "What is two and two?", "four", level="text"),
        record("text-b", None, "Say hello.", "hello", level="text"),
    ]


@pytest.fixture(scope="session")
def data_file(picture_folder: Path, records: list[dict[str, Any]]) -> Path:
    file = picture_folder / "data.json"
    file.write_text(json.dumps(records), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def new_model(part_folders: dict[str, Path], encoder_folder: Path) -> dict[str, Any]:
    """Fields of ModelSource for a new model of the tiny parts."""
    return {
        "vision_tower": str(part_folders["clip"]),
        "language_model": str(part_folders["llama"]),
        "sentence_encoder": str(encoder_folder),
        "fusion": {"type": "igva", "num_groups": 2, "hidden_dim": 32, "num_blocks": 1},
    }


def tiny_recipe(stage: int, root: Path, model: dict[str, Any], data: dict[str, Any], **fields: Any) -> TrainRecipe:
    """Three steps of four samples."""
    defaults = {
        "name": f"tiny-{stage}",
        "output_dir": str(root / f"stage{stage}"),
        "batch_size": 4,
        "micro_batch_size": 2,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "warmup": 0,
        "scheduler": "constant",
        "precision": "fp32",
        "log_every": 1,
    }
    if isinstance(fields.get("evaluation"), dict):
        fields["evaluation"] = EvaluationSettings(**fields["evaluation"])
    return TrainRecipe(stage=stage, model=ModelSource(**model), data=DataSource(**data), **{**defaults, **fields})


@pytest.fixture
def make_recipe(new_model: dict[str, Any], data_file: Path, tmp_path: Path) -> Callable[..., TrainRecipe]:
    """``make_recipe(stage, checkpoint=None, data={}, **fields of TrainRecipe)``, into ``tmp_path/stageN``."""

    def make(stage: int = 1, checkpoint: str | None = None, data: dict[str, Any] | None = None, **fields: Any) -> TrainRecipe:
        model = new_model if checkpoint is None else {"checkpoint": checkpoint}
        return tiny_recipe(stage, tmp_path, model, {"path": str(data_file), **(data or {})}, **fields)

    return make


@pytest.fixture(scope="session")
def make_recipe_in(new_model: dict[str, Any], data_file: Path) -> Callable[[Path], Callable[..., TrainRecipe]]:
    """``make_recipe_in(folder)(stage, **fields)``: new models, for fixtures that outlive a test."""

    def make_in(folder: Path) -> Callable[..., TrainRecipe]:
        return lambda stage, **fields: tiny_recipe(stage, folder, new_model, {"path": str(data_file)}, **fields)

    return make_in


@pytest.fixture(scope="session")
def stage1_checkpoint(new_model: dict[str, Any], data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of stage 1 saved."""
    recipe = tiny_recipe(1, tmp_path_factory.mktemp("runs"), new_model, {"path": str(data_file)})
    return Path(train(recipe)["checkpoint"])


@pytest.fixture
def stage1(stage1_checkpoint: Path, tmp_path: Path) -> str:
    """A copy of it where ``make_recipe(1)`` would write."""
    shutil.copytree(stage1_checkpoint, tmp_path / "stage1")
    return str(tmp_path / "stage1")


@pytest.fixture
def model_and_processor(
    make_model: Callable[..., IgvaLlavaForConditionalGeneration],
    make_processor: Callable[..., IgvaLlavaProcessor],
    make_encoder: Callable[..., Any],
) -> tuple[IgvaLlavaForConditionalGeneration, IgvaLlavaProcessor]:
    """A tiny model in memory, its processor and a sentence encoder of hashes."""
    model = make_model()
    return model, make_processor(model.config, sentence_encoder=make_encoder())
