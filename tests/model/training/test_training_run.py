"""Whole runs on tiny parts: what learns, what is saved, what is refused."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText, AutoProcessor

from model.adapters import load_adapted
from model.data.collator import ImageTextCollator
from model.training import run
from model.training.lora import load_adapters
from model.training.recipe import ModelSource, load_recipe
from model.training.run import load_data, load_parts, train

PARTS = {"projector": "model.multi_modal_projector.", "allocator": "model.fusion.", "language_model": "model.language_model."}


def changed_parts(before, after):
    """Names of the parts that differ in any bit between two state dicts."""
    names = [name for name in before if not torch.equal(before[name], after[name])]
    return {
        part for name in names for part, prefix in {**PARTS, "tower": "model.vision_tower."}.items() if name.startswith(prefix)
    }


@torch.no_grad()
def logits(model, processor, recipe, tmp_path):
    """Logits of a batch with one image, two, and none."""
    data, _ = load_data(recipe, processor, tmp_path / "cache")
    batch = ImageTextCollator(processor.tokenizer.pad_token_id)([data[index] for index in (0, 12, 14)])
    batch.pop("labels")
    return model.eval()(**batch).logits


def test_stage_1_trains_the_projector_and_no_other_bit(make_recipe):
    recipe = make_recipe(1)
    torch.manual_seed(recipe.seed)  # as the run does, so that new weights are the same
    before, _ = load_parts(recipe.model)
    result = train(recipe)
    after = AutoModelForImageTextToText.from_pretrained(result["checkpoint"])
    assert changed_parts(before.state_dict(), after.state_dict()) == {"projector"}
    assert after.fusion_stage == 1
    assert result["steps"] == 3
    assert result["parameters"]["projector"]["trainable"] > 0 == result["parameters"]["vision_tower"]["trainable"]


@pytest.mark.parametrize(
    ("language_model", "expected"),
    [("frozen", {"projector", "allocator"}), ("lora", {*PARTS}), ("full", {*PARTS})],
)
def test_stage_2_trains_projector_allocator_and_language_model(language_model, expected, make_recipe, stage1):
    result = train(make_recipe(2, stage1, language_model_training=language_model, balance_loss_weight=0.02))
    before, after = (AutoModelForImageTextToText.from_pretrained(folder) for folder in (stage1, result["checkpoint"]))
    assert before.state_dict().keys() == after.state_dict().keys()  # merged: a plain model
    assert changed_parts(before.state_dict(), after.state_dict()) == expected
    assert after.fusion_stage == 2


def test_a_run_with_adapters_saves_them_beside_the_merged_model(make_recipe, stage1, tmp_path):
    recipe = make_recipe(2, stage1, language_model_training="lora")
    checkpoint = train(recipe)["checkpoint"]
    merged = AutoModelForImageTextToText.from_pretrained(checkpoint)
    processor = AutoProcessor.from_pretrained(checkpoint)
    adapted = AutoModelForImageTextToText.from_pretrained(stage1)
    untrained = logits(copy.deepcopy(adapted), processor, recipe, tmp_path)
    adapted.set_fusion_stage(2)
    load_adapters(adapted, f"{checkpoint}/adapters")
    expected = logits(adapted, processor, recipe, tmp_path)
    # W + B A in fp32 against W x + B (A x): rounding, at logits of about 5.
    torch.testing.assert_close(logits(merged, processor, recipe, tmp_path), expected, atol=1e-4, rtol=0)
    assert (expected - untrained).abs().max() > 0.1
    # By its name alone the base is found: both lie side by side.
    again, its_processor = load_adapted(Path(checkpoint) / "adapters")
    assert torch.equal(logits(again, its_processor, recipe, tmp_path), expected)
    card = (Path(checkpoint) / "adapters" / "README.md").read_text()
    assert "base.set_fusion_stage(2)" in card and str(tmp_path) not in card


def test_the_checkpoint_is_the_trained_model_with_its_processor_and_encoder(make_recipe, stage1, tmp_path, monkeypatch):
    trained = {}
    save = run.save_checkpoint

    def keep(recipe, trainer, *rest):
        trained["model"] = trainer.model
        return save(recipe, trainer, *rest)

    monkeypatch.setattr(run, "save_checkpoint", keep)
    recipe = make_recipe(2, stage1, language_model_training="full")
    checkpoint = train(recipe)["checkpoint"]
    loaded, processor = AutoModelForImageTextToText.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    assert processor.sentence_encoder.dimension == 16
    # Loaded weights lie at other addresses, and the CPU's matrix products round by alignment.
    torch.testing.assert_close(
        logits(loaded, processor, recipe, tmp_path), logits(trained["model"], processor, recipe, tmp_path), atol=1e-5, rtol=0
    )


def test_the_checkpoint_tells_how_it_was_made(make_recipe):
    recipe = make_recipe(1, data={"aspect_ratio": "stretch"})
    folder = Path(train(recipe)["checkpoint"]) / "training"
    assert load_recipe(folder / "recipe.yaml") == recipe
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert entries[0]["event"] == "start"
    assert entries[0]["parts"]["projector"]["frozen"] == 0
    assert [entry["step"] for entry in entries[1:4]] == [1, 2, 3]
    assert all(entry["loss"] > 0 and entry["tokens_per_second"] > 0 for entry in entries[1:4])
    assert json.loads((folder / "result.json").read_text())["steps"] == 3
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 3


def test_a_run_learns_its_data(make_recipe):
    result = train(make_recipe(2, language_model_training="full", max_steps=25, batch_size=16, micro_batch_size=16))
    log = Path(result["checkpoint"], "training", "log.jsonl").read_text().splitlines()
    losses = [entry["loss"] for entry in map(json.loads, log) if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]


def test_held_out_samples_give_a_loss(make_recipe, data_file):
    result = train(make_recipe(1, data={"eval_path": str(data_file)}, eval_every=2))
    log = Path(result["checkpoint"], "training", "log.jsonl").read_text().splitlines()
    steps = [entry["step"] for entry in map(json.loads, log) if "eval_loss" in entry]
    assert steps == [2, 3]
    assert 0 < result["eval_loss"] < 20


@pytest.mark.parametrize(
    "fields",
    [
        {"precision": "bf16"},
        {"data": {"num_workers": 1}},
        {"activation_checkpointing": True},
        {"scheduler": "cosine", "warmup": 0.5},
    ],
)
def test_other_settings_run_to_the_end(fields, make_recipe):
    result = train(make_recipe(2, language_model_training="lora", **fields))
    assert result["steps"] == 3
    assert result["precision"] == fields.get("precision", "fp32")


def test_activation_checkpointing_gives_the_same_checkpoint(make_recipe, tmp_path):
    states = []
    for name, checkpointing in (("plain", False), ("checkpointed", True)):
        recipe = make_recipe(2, language_model_training="full", activation_checkpointing=checkpointing)
        recipe.output_dir = str(tmp_path / name)
        states.append(AutoModelForImageTextToText.from_pretrained(train(recipe)["checkpoint"]).state_dict())
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, atol=1e-5, rtol=0, msg=name)


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_a_finished_checkpoint_is_replaced_only_on_demand(make_recipe, stage1):
    with pytest.raises(FileExistsError, match="overwrite=true"):
        train(make_recipe(1))
    marker = Path(stage1) / "marker"
    marker.touch()
    train(make_recipe(1, overwrite=True))
    assert not marker.exists()
    assert not list(Path(stage1).parent.glob("stage1.*"))


def test_a_folder_that_is_no_checkpoint_is_never_replaced(make_recipe, tmp_path):
    (tmp_path / "stage1").mkdir()
    (tmp_path / "stage1" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="no igva_llava checkpoint"):
        train(make_recipe(1, overwrite=True))
    assert (tmp_path / "stage1" / "thesis.tex").exists()


def test_a_failed_save_leaves_the_earlier_checkpoint(make_recipe, stage1, monkeypatch):
    before = {path: path.read_bytes() for path in Path(stage1).rglob("*") if path.is_file()}

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("model.processing.IgvaLlavaProcessor.save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        train(make_recipe(1, overwrite=True, seed=7))
    assert {path: path.read_bytes() for path in Path(stage1).rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("failing", ["finished", "stage1"])
def test_a_failed_rename_leaves_the_earlier_checkpoint(failing, make_recipe, stage1, monkeypatch):
    before = (Path(stage1) / "model.safetensors").read_bytes()
    replace = os.replace

    def fail(source, target):
        if Path(source).name == failing:
            raise OSError("no such device")
        replace(source, target)

    monkeypatch.setattr("model.training.folders.os.replace", fail)
    with pytest.raises(OSError, match="no such device"):
        train(make_recipe(1, overwrite=True, seed=7))
    assert (Path(stage1) / "model.safetensors").read_bytes() == before


def test_a_checkpoint_left_aside_by_a_killed_run_is_put_back(make_recipe, stage1):
    Path(stage1).rename(f"{stage1}.replaced")  # as if killed between the two renames
    with pytest.raises(FileExistsError, match="overwrite=true"):
        train(make_recipe(1))
    assert (Path(stage1) / "model.safetensors").is_file()


def test_an_unfinished_run_is_not_thrown_away_by_accident(make_recipe, tmp_path):
    (tmp_path / "stage1.partial").mkdir()
    (tmp_path / "stage1.partial" / "log.jsonl").touch()
    with pytest.raises(FileExistsError, match="resume=true"):
        train(make_recipe(1))


@pytest.mark.parametrize(("stage", "language_model"), [(1, None), (2, "lora"), (2, "full")])
def test_a_resumed_run_ends_where_a_straight_one_does(stage, language_model, make_recipe, tmp_path, monkeypatch):
    fields = {"language_model_training": language_model, "max_steps": 4, "save_every": 2}
    straight = make_recipe(stage, **fields)
    straight.output_dir = str(tmp_path / "straight")
    expected = AutoModelForImageTextToText.from_pretrained(train(straight)["checkpoint"]).state_dict()

    class Stop(run.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(make_recipe(stage, **fields), callbacks=[Stop()])
    resumed = AutoModelForImageTextToText.from_pretrained(train(make_recipe(stage, resume=True, **fields))["checkpoint"])
    for name, tensor in expected.items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, atol=1e-6, rtol=0, msg=name)


def test_there_must_be_something_to_resume(make_recipe):
    with pytest.raises(FileNotFoundError, match="no intermediate checkpoint"):
        train(make_recipe(1, resume=True))


def test_a_smoke_run_takes_ten_steps_at_most_and_its_own_folder(make_recipe, tmp_path):
    for _ in range(2):  # a second one replaces the first
        result = train(make_recipe(1, max_steps=100, log_every=50, smoke=True))
    assert result["steps"] == 10
    assert result["checkpoint"] == str(tmp_path / "stage1-smoke")
    assert not (tmp_path / "stage1").exists()


# ---- parts and data --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"checkpoint": "./nowhere"}, "no checkpoint at nowhere"),
        ({"checkpoint": "a/b/c"}, "no checkpoint at a/b/c"),
        ({}, "needs model.vision_tower and model.language_model"),
        ({"vision_tower": "tower"}, "needs model.vision_tower and model.language_model"),
    ],
)
def test_a_source_without_a_model_is_refused(source, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_parts(ModelSource(**source))


def test_the_allocator_takes_the_width_of_the_sentence_encoder(new_model):
    model, processor = load_parts(ModelSource(**new_model))
    assert model.config.fusion["text_dim"] == processor.sentence_encoder.dimension == 16


def test_an_encoder_of_another_width_is_refused(make_model, make_processor, new_model, tmp_path):
    model = make_model(fusion={"text_dim": 24})
    model.save_pretrained(tmp_path / "wide")
    make_processor(model.config).save_pretrained(tmp_path / "wide")
    source = ModelSource(checkpoint=str(tmp_path / "wide"), sentence_encoder=new_model["sentence_encoder"])
    with pytest.raises(ValueError, match="gives 16 numbers a sentence, but the checkpoint's allocator takes 24"):
        load_parts(source)


def test_a_model_without_sentence_encoder_trains_with_uniform_weights(make_recipe):
    recipe = make_recipe(2, language_model_training="frozen")
    recipe.model.sentence_encoder = None
    recipe.model.fusion = {**recipe.model.fusion, "text_dim": 16}
    result = train(recipe)
    log = Path(result["checkpoint"], "training", "log.jsonl").read_text().splitlines()
    weights = [entry["fusion_weight_1"] for entry in map(json.loads, log) if "loss" in entry]
    assert weights == pytest.approx([0.5] * 3)


def test_a_tokenizer_without_padding_gets_one(new_model, part_folders, tmp_path):
    shutil.copytree(part_folders["llama"], tmp_path / "llama")
    config = json.loads((tmp_path / "llama" / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (tmp_path / "llama" / "tokenizer_config.json").write_text(json.dumps(config))
    _, processor = load_parts(ModelSource(**{**new_model, "language_model": str(tmp_path / "llama")}))
    assert processor.tokenizer.pad_token_id == processor.tokenizer.eos_token_id


def test_every_instruction_is_embedded_before_the_first_step(make_recipe, stage1, tmp_path, monkeypatch):
    recipe = make_recipe(2, stage1, data={"instruction_cache": str(tmp_path / "cache")})
    processor = AutoProcessor.from_pretrained(stage1)
    data, _ = load_data(recipe, processor, tmp_path / "unused")
    monkeypatch.setattr(type(processor.sentence_encoder), "encode", lambda *args: pytest.fail("encoded during training"))
    for index in range(len(data)):
        data[index]
    assert not (tmp_path / "unused").exists()


def test_stage_1_embeds_nothing(make_recipe, new_model, tmp_path):
    _, processor = load_parts(ModelSource(**new_model))
    data, _ = load_data(make_recipe(1), processor, tmp_path / "cache")
    assert "instruction_embeds" not in data[0]
    assert not (tmp_path / "cache").exists()


def test_a_chat_template_may_be_named_or_come_from_a_file(make_recipe, new_model, tmp_path):
    _, processor = load_parts(ModelSource(**new_model))
    file = tmp_path / "template.jinja"
    answer = "{% generation %}{{ m.content }}{% endgeneration %}"
    file.write_text(
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}" + answer + "{% endif %}{% endfor %}"
    )
    lengths = []
    for template in ("plain", str(file), None):
        data, _ = load_data(make_recipe(1, data={"chat_template": template}), processor, tmp_path)
        lengths.append(len(data[14]["input_ids"]))
    # Bytes of sample "text-a": answer, line break and <s>; question and answer; the full dialogue.
    assert lengths[:2] == [len("four\n") + 1, len("What is two and two?four")]
    assert lengths[2] > lengths[1]


def test_the_saved_recipe_is_plain_yaml(make_recipe):
    recipe = make_recipe(1)
    assert yaml.safe_load(yaml.safe_dump(recipe.to_dict()))["data"]["aspect_ratio"] == "pad"
