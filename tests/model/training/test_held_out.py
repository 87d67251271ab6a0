"""Answers to held-out questions during a run: they are those of `igva evaluate`, and training does not notice."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from model.data.dataset import LlavaDataset
from model.data.llava_json import samples_from_records
from model.data.problems import Problems, SampleError
from model.evaluation import evaluate
from model.instruction import embed_instructions
from model.training import held_out
from model.training.held_out import HeldOutQuestions, evenly, unchanged_random_states
from model.training.recipe import LoraSettings
from model.training.run import train

LORA = {"language_model_training": "lora", "lora": LoraSettings(r=4, alpha=8, dropout=0.5)}


@pytest.fixture
def make_data(model_and_processor, records, picture_folder):
    processor = model_and_processor[1]

    def embed(conversations):
        return embed_instructions(conversations, processor.encode_instructions)

    def make(records=records, **options):
        return LlavaDataset(samples_from_records(records, picture_folder), processor, embed=embed, **options)

    return make


def log_of(result):
    lines = Path(result["checkpoint"], "training", "log.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["event"] == "log"]


def the_same(counts):
    return counts


def test_the_scores_are_those_of_the_command(model_and_processor, make_data, monkeypatch):
    model, processor = model_and_processor
    data = make_data()
    said = {answer.id: answer.answer for answer in evaluate(model, processor, data.samples, max_new_tokens=6).answers}
    # What the model says to every other sample is made its reference.
    half = {sample.id: index % 2 == 0 for index, sample in enumerate(data.samples)}
    monkeypatch.setattr(held_out, "reference_answer", lambda sample: said[sample.id] if half[sample.id] else "something else")
    scores = HeldOutQuestions(data, max_new_tokens=6, batch_size=5).score(model, the_same)
    for kind in ("colour", "text", "unnamed", None):
        of_kind = [half[sample.id] for sample in data.samples if kind in (sample.kind or "unnamed", None)]
        share = sum(of_kind) / len(of_kind)
        name = "exact_match" if kind is None else f"exact_match_{kind}"
        assert scores[name] == pytest.approx(share)
        assert scores[f"{name}_stderr"] == pytest.approx((share * (1 - share) / len(of_kind)) ** 0.5)
    assert len(scores) == 8


def test_ranks_answer_each_question_once(model_and_processor, make_data, monkeypatch):
    model, _ = model_and_processor
    asked = []
    answer = held_out.answer_batch

    def count(model, processor, prompts, *rest, **options):
        asked.append(list(prompts))
        return answer(model, processor, prompts, *rest, **options)

    monkeypatch.setattr(held_out, "answer_batch", count)
    monkeypatch.setattr(held_out, "normalized", lambda text: "right")
    totals, passes = [], []
    for rank in range(3):
        asked.clear()
        questions = HeldOutQuestions(make_data(), max_new_tokens=2, batch_size=2, rank=rank, num_ranks=3)
        questions.score(model, lambda counts: totals.append(counts.clone()) or counts)
        passes.append(len(asked))
    assert passes == [3, 3, 3]  # 16 samples are 8 batches of 2: one rank has a filler
    assert sum(totals)[:, 1].tolist() == [13, 2, 1]  # colour, text, unnamed


def test_few_questions_come_from_all_of_the_file(make_data):
    samples = make_data().samples
    assert [sample.id for sample in evenly(samples, 4)] == [samples[index].id for index in (0, 4, 8, 12)]
    assert evenly(samples, None) == evenly(samples, 99) == list(samples)
    assert len(HeldOutQuestions(make_data(), max_samples=5)) == 5


def test_modes_and_random_states_are_put_back(model_and_processor, make_data):
    model, _ = model_and_processor
    model.train()
    model.model.vision_tower.eval()
    modes = [module.training for module in model.modules()]
    HeldOutQuestions(make_data(), max_new_tokens=2).score(model, the_same)
    assert [module.training for module in model.modules()] == modes
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with unchanged_random_states(torch.device("cpu")):
        list(DataLoader([1, 2]))
        assert not torch.equal(torch.get_rng_state(), states[0])  # even a loader in order draws
        random.random(), np.random.rand()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


@pytest.mark.parametrize("fields", [{"language_model_training": "full"}, LORA])
def test_training_is_bit_for_bit_the_same(fields, make_recipe, data_file, tmp_path):
    """With dropout, checkpointed layers, and questions beside the held-out loss or without it."""

    def run(name, **more):
        result = train(
            make_recipe(2, **fields, max_steps=4, activation_checkpointing=True, output_dir=str(tmp_path / name), **more)
        )
        weights = load_file(Path(result["checkpoint"], "model.safetensors"))
        return result, weights, [(entry["loss"], entry["grad_norm"]) for entry in log_of(result) if "loss" in entry]

    plain, weights, losses = run("plain")
    questions = {"exact_match": True, "path": str(data_file), "max_new_tokens": 3, "max_samples": 8}
    held_out = {"eval_path": str(data_file)} if fields is LORA else {}
    asked, weights_asked, losses_asked = run("asked", evaluation=questions, eval_every=1, data=held_out)
    assert losses == losses_asked and len(losses) == 4
    assert all(torch.equal(tensor, weights_asked[name]) for name, tensor in weights.items())

    entries = [entry for entry in log_of(asked) if "eval_loss" in entry]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
    assert all({"eval_exact_match", "eval_exact_match_stderr", "eval_exact_match_colour"} <= entry.keys() for entry in entries)
    assert asked["exact_match"] == {name: entries[-1][name] for name in entries[-1] if name.startswith("eval_exact_match")}
    assert plain["exact_match"] == {} and asked["kept_step"] == 4
    assert "| exact match, held out | overall " in Path(asked["checkpoint"], "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_run_that_learns_gives_more_right_answers(make_recipe, data_file):
    result = train(
        make_recipe(
            2,
            language_model_training="full",
            max_steps=40,
            batch_size=16,
            micro_batch_size=16,
            evaluation={"exact_match": True, "path": str(data_file), "max_new_tokens": 16},
            eval_every=20,
        )
    )
    shares = [entry["eval_exact_match"] for entry in log_of(result) if "eval_loss" in entry]
    assert shares[-1] == result["exact_match"]["eval_exact_match"] > 0.2


@pytest.mark.parametrize("fields", [{"language_model_training": "full"}, LORA])
def test_the_best_step_is_kept(fields, make_recipe, data_file, monkeypatch, tmp_path):
    shares, kept = iter([0.1, 0.7, 0.3]), []

    def score(self, model, *rest, **options):
        kept.append({name: value.clone() for name, value in model.named_parameters() if "projector" in name})
        share = next(shares)
        return {"exact_match": share, "exact_match_stderr": 0.0}

    monkeypatch.setattr(HeldOutQuestions, "score", score)
    best = {"exact_match": True, "path": str(data_file), "keep_best": "exact_match"}
    result = train(make_recipe(2, **fields, evaluation=best, eval_every=1))
    assert (result["steps"], result["kept_step"]) == (3, 2)
    assert result["exact_match"] == {"eval_exact_match": 0.7, "eval_exact_match_stderr": 0.0}
    weights = load_file(Path(result["checkpoint"], "model.safetensors"))
    assert len(kept) == 3
    for name, value in kept[1].items():
        assert torch.equal(weights[name], value)
        assert not torch.equal(weights[name], kept[2][name])


def test_a_damaged_picture_is_skipped_or_named(model_and_processor, make_data, make_record, picture_folder, tmp_path):
    model, _ = model_and_processor
    Image.new("RGB", (8, 8)).save(picture_folder / "images" / "damaged.png")
    (picture_folder / "images" / "damaged.png").write_bytes(b"no picture")
    pictures = {"good": "images/red.png", "bad": "images/damaged.png"}
    entries = [make_record(name, picture, "<image>\nWhat?", "x") for name, picture in pictures.items()]
    problems = Problems("skip")
    totals = []
    questions = HeldOutQuestions(make_data(entries, problems=problems), max_new_tokens=2)
    questions.score(model, lambda counts: totals.append(counts.clone()) or counts)
    assert totals[0][:, 1].tolist() == [1] and problems.counts() == {"damaged_image": 1}
    with pytest.raises(SampleError, match="sample bad: cannot read the image"):
        HeldOutQuestions(make_data(entries), max_new_tokens=2).score(model, the_same)


def test_a_question_that_is_too_long_is_found_before_the_first_step(make_recipe, data_file):
    settings = {"exact_match": True, "path": str(data_file), "max_new_tokens": 1020}
    with pytest.raises(ValueError, match=r"held-out sample \S+: its question has \d+ tokens.*evaluation.max_new_tokens 1020"):
        train(make_recipe(1, evaluation=settings))


def test_nothing_to_answer_is_an_error(make_data):
    with pytest.raises(ValueError, match="no held-out questions"):
        HeldOutQuestions(make_data([]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"evaluation": {"exact_match": True}}, "there are no questions"),
        ({"evaluation": {"path": "x.json"}}, "evaluation.exact_match is false"),
        ({"evaluation": {"exact_match": True, "path": "x", "max_new_tokens": 0}}, "max_new_tokens must be at least 1"),
        ({"evaluation": {"exact_match": True, "path": "x", "keep_best": "exact_match"}}, "eval_every is not"),
        ({"evaluation": {"exact_match": True, "path": "x", "keep_best": "accuracy"}}, "keep_best must be loss"),
        ({"evaluation": {"exact_match": True, "path": "x"}, "distributed": "zero3"}, "zero3"),
        ({"evaluation": {"keep_best": "exact_match"}, "eval_every": 1, "data": {"eval_path": "x"}}, "exact_match is false"),
        ({"evaluation": {"keep_best": "loss"}, "eval_every": 1, "save_every": 1, "data": {"eval_path": "x"}}, "save_every"),
        ({"evaluation": {"keep_best": "loss"}, "eval_every": 1, "distributed": "fsdp2", "data": {"eval_path": "x"}}, "fsdp2"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(fields, message, make_recipe):
    with pytest.raises(ValueError, match=message):
        make_recipe(1, **fields)


def test_a_metric_that_the_questions_do_not_give_is_refused(make_recipe, data_file):
    settings = {"exact_match": True, "path": str(data_file), "keep_best": "exact_match_shape"}
    with pytest.raises(ValueError, match="the held-out questions give exact_match, exact_match_colour"):
        train(make_recipe(1, evaluation=settings, eval_every=1))
