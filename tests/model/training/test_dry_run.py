"""Every shipped recipe is dry-run; what would stop a run is found, and nothing is written."""

from __future__ import annotations

import json

import pytest

from model.cli.main import main
from model.cli.train import find_recipe, shipped_recipes
from model.training.dry_run import dry_run
from model.training.recipe import load_recipe
from model.training.run import train

RECIPES = {name: find_recipe(name) for name in shipped_recipes()}


@pytest.fixture
def offline(monkeypatch):
    """No hub: what a recipe names there is not here, as in CI."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def flags_for(name, new_model, stage1, data_file, tmp_path):
    """Data for every recipe, and parts for those that do not name published ones."""
    flags = [f"--data.path={data_file}", f"--output_dir={tmp_path / 'out'}", "--data.image_folder=null"]
    recipe = load_recipe(find_recipe(name))
    if "7b" in name or "13b" in name:
        return flags
    if recipe.model.checkpoint is not None:
        return [*flags, f"--model.checkpoint={stage1}"]
    parts = ["vision_tower", "language_model"] + (["sentence_encoder"] if recipe.model.sentence_encoder else [])
    size = ["--model.image_size=56"] if recipe.model.token_pooling or recipe.model.fusion.get("variant") == "sti" else []
    return [*flags, *(f"--model.{part}={new_model[part]}" for part in parts), *size]


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_passes(name, new_model, stage1, data_file, tmp_path, offline):
    recipe = load_recipe(find_recipe(name), flags_for(name, new_model, stage1, data_file, tmp_path))
    found = dry_run(recipe, num_processes=1, shipped=RECIPES)
    assert found.obstacles == []
    assert found.num_samples == 16 and found.steps >= 1
    assert sum(group["parameters"] for group in found.groups) == found.parameters.trainable > 0
    if found.steps > 3:
        assert max(rate for _, rate in found.learning_rates) == pytest.approx(found.groups[0]["lr"])
    published = "7b" in name or "13b" in name
    assert found.samples_checked == (0 if published else 16)
    assert not published or any("no processor" in note for note in found.notes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("size", "vicuna"), [("7b", 6_738_415_616), ("13b", 13_015_864_320)])
def test_the_large_models_have_their_published_size(size, vicuna, data_file, tmp_path, offline):
    stages = [load_recipe(find_recipe(f"igva-{size}-stage{stage}"), [f"--data.path={data_file}"]) for stage in (1, 2)]
    first, second = (dry_run(recipe, 8, RECIPES) for recipe in stages)
    width = {"7b": 4096, "13b": 5120}[size]
    projector = 2048 * width + width + width * width + width
    allocator = second.parameters["allocator"].trainable
    for found in (first, second):
        # CLIP-L/336's vision half; <image> and the rows that pad the vocabulary, in embeddings and head.
        total = vicuna + 303_507_456 + 2 * 64 * width + projector + allocator
        assert found.parameters.trainable + found.parameters.frozen == total
        assert found.tokens_per_image == 576 and len(found.slots) == 2
    assert first.parameters.trainable == projector
    assert second.parameters.frozen == 303_507_456 and allocator > 10**7


def test_steps_and_rates_are_those_of_the_run(make_recipe, tmp_path, offline):
    recipe = make_recipe(2, max_steps=None, epochs=2, scheduler="cosine", warmup=0.25, projector_learning_rate=1e-3)
    found = dry_run(recipe)
    result = train(recipe)
    assert found.obstacles == [] and found.steps == result["steps"] == 8
    assert found.parameters.to_dict() == result["parameters"]
    assert {group["lr"] for group in found.groups} == {1e-2, 1e-3}
    log = [json.loads(line) for line in (tmp_path / "stage2" / "training" / "log.jsonl").read_text().splitlines()]
    # The Trainer logs the rate of the first group at the end of a step, which is that of the next one or of this one.
    logged = {entry["learning_rate"] for entry in log if "learning_rate" in entry}
    peak = found.groups[0]["lr"]
    assert found.learning_rates[0] == (0, 0.0) and (2, peak) in found.learning_rates
    assert max(logged) == pytest.approx(peak)


def test_what_would_stop_a_run_is_found_all_at_once(make_recipe, picture_folder, make_record, tmp_path, offline):
    (picture_folder / "images" / "damaged.png").write_bytes(b"broken")
    records = [
        make_record("good", "images/red.png", "<image>\nWhich?", "red"),
        make_record("missing", "images/none.png", "<image>\nWhich?", "red"),
        make_record("damaged", "images/damaged.png", "<image>\nWhich?", "red"),
        make_record("long", None, "a" * 3000, "b"),
    ]
    file = picture_folder / "obstacles.json"
    file.write_text(json.dumps(records), encoding="utf-8")
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1" / "file").touch()
    recipe = make_recipe(1, data={"path": str(file)})
    found = dry_run(recipe, num_processes=3)
    text = "\n".join(found.obstacles)
    for part in ("multiple of 6", "1 x missing_image, first: sample missing", "sample damaged", "sample long", "is not empty"):
        assert part in text
    assert len(found.obstacles) == 5 and found.samples_checked == 1
    recipe.data.on_error = "skip"
    recipe.overwrite = True
    found = dry_run(recipe)
    assert found.obstacles == [] and len(found.notes) == 3


def test_the_command_says_it_and_exits(new_model, data_file, tmp_path, capsys, offline):
    flags = flags_for("igva-tiny-stage1", new_model, None, data_file, tmp_path)
    assert main(["train", "igva-tiny-stage1", "--dry_run", *flags]) == 0
    out = capsys.readouterr().out
    for part in ("Stage 1: what learns", "Optimizer groups", "optimizer steps", "nothing found that would stop this run"):
        assert part in out
    assert main(["train", "igva-tiny-stage1", "--dry_run"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "obstacle: model: " in out and "obstacle: data.path: nothing at data/tiny.json" in out
    assert main(["train", "igva-tiny-stage1", "--dry_run", "--num_processes=0"]) == 2
