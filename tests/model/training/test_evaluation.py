"""Exact match, its baselines, and batched answers that equal single ones."""

from __future__ import annotations

import math

import pytest
import torch

from model import evaluation
from model.answering import answer_end_tokens, render_prompt
from model.data.llava_json import samples_from_records
from model.evaluation import (
    evaluate,
    most_frequent_answers,
    normalized,
    other_pictures,
)


@pytest.fixture
def samples(records, picture_folder):
    return samples_from_records(records, picture_folder)


def answers_by_id(result):
    return {answer.id: answer.answer for answer in result.answers}


def test_a_batch_gives_the_answers_of_single_runs(model_and_processor, samples):
    model, processor = model_and_processor
    batched = evaluate(model, processor, samples, batch_size=5, max_new_tokens=6)
    single = evaluate(model, processor, samples, batch_size=1, max_new_tokens=6)
    assert answers_by_id(batched) == answers_by_id(single)
    assert len(set(answers_by_id(single).values())) > 4
    for one, other in zip(batched.answers, single.answers, strict=True):
        assert one.fusion_weights == (None if other.fusion_weights is None else pytest.approx(other.fusion_weights, abs=1e-5))


def test_answers_come_from_the_picture_and_the_instruction_of_the_sample(model_and_processor, samples):
    model, processor = model_and_processor
    seen = []
    features = model.get_image_features

    def record(pixel_values, instruction_embeds):
        seen.append((pixel_values, instruction_embeds))
        return features(pixel_values, instruction_embeds)

    model.get_image_features = record
    two = next(sample for sample in samples if sample.id == "two")
    turns = next(sample for sample in samples if sample.id == "turns")
    evaluate(model, processor, [two], max_new_tokens=1)
    evaluate(model, processor, [turns], max_new_tokens=1)
    assert len(seen[0][0]) == 2
    assert torch.equal(seen[0][1], processor.encode_instructions(["Which colours?"] * 2))
    expected = processor.encode_instructions(["Which colour?", "Is it dark?"]).mean(0, keepdim=True)
    torch.testing.assert_close(seen[1][1], expected)


def test_scores_are_counted_by_kind_with_their_standard_error(model_and_processor, samples, monkeypatch):
    model, processor = model_and_processor
    answers = iter(["Red.", "GREEN", "nothing"])

    def fake(model, processor, prompts, pixel_values, instruction_embeds, **options):
        return [next(answers) for _ in prompts], torch.tensor([[0.25, 0.75]] * len(pixel_values))

    monkeypatch.setattr(evaluation, "generate_answers", fake)
    result = evaluate(model, processor, samples[:3], batch_size=1)
    score = result.scores["colour"]
    assert (score.count, score.accuracy) == (3, pytest.approx(2 / 3))
    assert score.standard_error == pytest.approx(math.sqrt(2 / 9 / 3))
    assert score.fusion_weights == (0.25, 0.75)
    assert result.overall == score
    assert result.to_dict()["scores"]["overall"]["count"] == 3
    assert [next(iter(column.cells)) for column in result.table().columns] == ["colour", "3", "66.7 ± 27.2 %", "0.25 0.75"]


def test_another_picture_means_another_picture(model_and_processor, samples):
    model, processor = model_and_processor
    with_own = [sample for sample in samples if sample.id != "two"]
    chosen = other_pictures(with_own)
    for index, other in enumerate(chosen):
        if with_own[index].images:
            assert with_own[index].images != with_own[other].images
            assert with_own[index].kind == with_own[other].kind
        else:
            assert other == index
    own = evaluate(model, processor, with_own, max_new_tokens=6)
    blind = evaluate(model, processor, with_own, max_new_tokens=6, picture_of=chosen)
    for one, other in zip(own.answers, blind.answers, strict=True):
        assert (one.fusion_weights != other.fusion_weights) == (one.kind == "colour"), one.id
        assert one.reference == other.reference


def test_there_must_be_another_picture(samples):
    with pytest.raises(ValueError, match="show the same picture"):
        other_pictures([samples[0], samples[4]])  # both red


def test_a_picture_too_many_is_refused(model_and_processor, samples):
    with pytest.raises(ValueError, match="sample two, which has 2 images, the 1 of"):
        evaluate(*model_and_processor, samples[11:13], picture_of=[1, 0] if len(samples[11].images) == 2 else [0, 0])


def test_the_commonest_answer_of_each_kind_is_the_other_baseline(make_record, picture_folder):
    def data(*answers, kind):
        return [make_record(str(n), None, "What?", answer, level=kind) for n, answer in enumerate(answers)]

    train = samples_from_records(
        data("red", "Red", "blue", "blue.", "RED", kind="colour") + data("two", kind="count"), picture_folder
    )
    test = samples_from_records(
        data("red", "blue", kind="colour") + data("two", kind="count") + data("red", kind="new"), picture_folder
    )
    result = most_frequent_answers(train, test)
    assert {kind: score.accuracy for kind, score in result.scores.items()} == {
        "colour": 0.5,
        "count": 1.0,
        "new": 1.0,
        "overall": 0.75,
    }


@pytest.mark.parametrize(("one", "other"), [(" Red.\n", "red"), ("A  cat", "a cat"), ("STOP.", "stop")])
def test_equal_answers_may_differ_in_case_space_and_full_stop(one, other):
    assert normalized(one) == normalized(other)
    assert normalized("not " + one) != normalized(other)


def test_generation_stops_where_the_template_ends_an_answer(model_and_processor):
    model, processor = model_and_processor
    tokenizer = processor.tokenizer
    stop = answer_end_tokens(model, processor)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in stop  # of the ChatML template
    assert tokenizer.eos_token_id in stop
    assert all(token in tokenizer.all_special_ids for token in stop)


def test_prompts_of_inference_are_those_of_training(model_and_processor, samples):
    processor = model_and_processor[1]
    turns = next(sample for sample in samples if sample.id == "turns").turns
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    whole = processor.tokenizer.decode(processor.tokenize_conversation(messages)["input_ids"])
    placeholders = processor.image_token * processor.num_image_tokens()
    assert whole.startswith(render_prompt(processor, turns[:3]).replace(processor.image_token, placeholders))


def test_nothing_to_evaluate_is_an_error(model_and_processor):
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate(*model_and_processor, [])
