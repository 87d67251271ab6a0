"""Packed runs take the steps of padded ones, on one rank and with accumulation, and go on where they were killed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback

from model.training.precision import hold_frozen_weights
from model.training.run import deal_batches, load_data, train

#: The parts of an entry of the log that the layout of the batches must not change.
SAME = ("loss", "objective", "balance", "grad_norm", "fusion_weight_1")


def log_of(result):
    lines = Path(result["checkpoint"], "training", "log.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if "loss" in entry]


@pytest.fixture
def make_run(make_recipe, stage1, tmp_path):
    """``make_run(name, **fields)``: a stage 2 run of three steps into a folder of its own."""

    def make(name, packing=False, grouping="modality_length", callbacks=(), **fields):
        defaults = {"language_model_training": "full", "balance_loss_weight": 0.5, "batch_size": 8, "learning_rate": 1e-3}
        recipe = make_recipe(2, stage1, data={"packing": packing, "grouping": grouping}, **{**defaults, **fields})
        recipe.output_dir = str(tmp_path / name)
        return train(recipe, callbacks=callbacks)

    return make


@pytest.mark.parametrize("grouping", ["random", "modality_length"])
def test_a_packed_run_takes_the_steps_of_a_padded_one(grouping, make_run):
    padded = log_of(make_run("padded", grouping=grouping, micro_batch_size=8))
    packed = log_of(make_run("packed", packing=True, grouping=grouping, micro_batch_size=2))
    assert len(padded) == len(packed) == 3
    for expected, actual in zip(padded, packed, strict=True):
        for name in SAME:
            # fp32 sums in another order; rows that saw one another would differ by tens of percent.
            assert actual[name] == pytest.approx(expected[name], rel=2e-4), name
        assert actual["padding_share"] == 0 < expected["padding_share"]


def test_the_progress_line_shows_the_padding(make_run, capfd):
    make_run("padded", micro_batch_size=4, max_steps=1)
    assert "padding " in capfd.readouterr().err


def test_a_packed_run_that_was_killed_ends_where_a_straight_one_does(make_run):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    # Sixteen samples in steps of eight: the third step is the first of the second epoch, whose order is another one.
    fields = {"packing": True, "max_steps": 4, "save_every": 2}
    straight = make_run("straight", **fields)
    with pytest.raises(KeyboardInterrupt):
        make_run("killed", callbacks=[Stop()], **fields)
    resumed = make_run("killed", resume=True, **fields)
    for name, expected in AutoModelForImageTextToText.from_pretrained(straight["checkpoint"]).state_dict().items():
        actual = AutoModelForImageTextToText.from_pretrained(resumed["checkpoint"]).state_dict()[name]
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0, msg=name)


def test_held_out_samples_may_be_packed(make_recipe, data_file):
    losses = []
    for packing in (False, True):
        data = {"eval_path": str(data_file), "packing": packing}
        recipe = make_recipe(1, data=data, max_steps=1, eval_batch_size=3 if packing else 5, overwrite=True)
        losses.append(train(recipe)["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_lengths_are_estimated_without_tokenizing(make_recipe, stage1, tmp_path, monkeypatch):
    recipe = make_recipe(2, stage1, micro_batch_size=4)
    processor = AutoProcessor.from_pretrained(stage1)
    data, _ = load_data(recipe, processor, tmp_path / "cache")
    monkeypatch.setattr(type(processor), "tokenize_conversation", lambda *args, **kwargs: pytest.fail("tokenized"))
    lengths = data.estimated_lengths()
    images = [len(sample.images) for sample in data.samples]
    assert len(lengths) == 16
    # "<image>\n<image>\nWhich colours?" and "red and blue" have 43 bytes; a picture has four tokens.
    assert lengths[images.index(2)] == 1 + 43 // 4 + 2 * 4
    data.max_length = 12
    assert max(data.estimated_lengths()) == 12
    assert sorted(index for batch in deal_batches(recipe, data) for index in batch) == list(range(16))


# ---- frozen weights -----------------------------------------------------------------------------------------------------


def dtypes(model, trainable):
    return {parameter.dtype for parameter in model.parameters() if parameter.requires_grad == trainable}


@pytest.mark.parametrize(("stage", "language_model"), [(1, "frozen"), (2, "lora"), (2, "full")])
def test_what_does_not_learn_may_be_held_in_bf16(stage, language_model, make_recipe, stage1, tmp_path):
    held = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            held["trainable"], held["frozen"] = dtypes(model, True), dtypes(model.model.vision_tower, False)
            held["norms"] = {p.dtype for name, p in model.model.language_model.named_parameters() if "norm" in name}

    recipe = make_recipe(stage, stage1, language_model_training=language_model, precision="bf16", frozen_weights="bf16")
    recipe.output_dir = str(tmp_path / "held")
    result = train(recipe, callbacks=[Look()])
    assert held["trainable"] == {torch.float32} and held["frozen"] == {torch.bfloat16}
    assert held["norms"] == {torch.float32 if language_model == "full" else torch.bfloat16}
    assert all(entry["loss"] < 20 for entry in log_of(result))
    before = AutoModelForImageTextToText.from_pretrained(stage1, dtype=torch.float32)
    after = AutoModelForImageTextToText.from_pretrained(result["checkpoint"], dtype=torch.float32)
    tower = before.model.vision_tower.embeddings.patch_embedding.weight
    assert torch.equal(after.model.vision_tower.embeddings.patch_embedding.weight, tower.bfloat16().float())
    # What learned is saved as it learned, in fp32.
    learned = after.model.multi_modal_projector.linear_1.weight
    assert not torch.equal(learned, learned.bfloat16().float())


def test_frozen_weights_stay_in_fp32_where_nothing_is_won(make_model):
    model = make_model().requires_grad_(False)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert hold_frozen_weights(model, "auto", cpu, "bf16") == 0
    assert hold_frozen_weights(model, "auto", gpu, "fp32") == 0
    assert hold_frozen_weights(model, "fp32", gpu, "bf16") == 0
    assert dtypes(model, False) == {torch.float32}
    with pytest.raises(ValueError, match="frozen_weights is bf16, but the run computes in fp32"):
        hold_frozen_weights(model, "bf16", gpu, "fp32")
    assert hold_frozen_weights(model, "auto", gpu, "bf16") > 0
    assert dtypes(model.model.vision_tower, False) == {torch.bfloat16}
    assert dtypes(model.model.fusion, False) == dtypes(model.model.multi_modal_projector, False) == {torch.float32}
    assert model.lm_head.weight is model.get_input_embeddings().weight
