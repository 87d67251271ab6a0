"""``igva explain``: the weights are those that the model runs with, and leaving a group out does what it says."""

from __future__ import annotations

import json
import math

import pytest
import torch
from PIL import Image

from model import explain
from model.answering import pixels_of
from model.cli import explain as command
from model.cli.main import main

QUESTIONS = ("Which colour?", "How many?", "Is it dark?")


@pytest.fixture
def pictures() -> list[Image.Image]:
    return [Image.new("RGB", (40, 20), colour) for colour in ("red", "blue")]


@pytest.fixture
def loaded(make_model, make_processor, tiny_encoder):
    model = make_model().eval()
    return model, make_processor(model.config, sentence_encoder=tiny_encoder)


def test_the_weights_are_those_of_the_forward(loaded, pictures):
    model, processor = loaded
    weights = explain.group_weights(model, processor, pictures, QUESTIONS)
    assert weights.shape == (2, 3, 2)
    for index, picture in enumerate(pictures):
        pixel_values = pixels_of(processor, picture)
        for position, question in enumerate(QUESTIONS):
            expected = model.get_image_features(pixel_values, processor.encode_instructions([question])).fusion_weights
            torch.testing.assert_close(weights[index, position], expected[0])
    assert weights.std(dim=1).max() > 1e-4  # another question moves them


def test_a_group_that_is_left_out_has_no_say(loaded, pictures, monkeypatch):
    model, processor = loaded
    allocator = model.model.fusion.allocator
    with explain._leave_out(allocator, 1):
        weights = explain.group_weights(model, processor, pictures, QUESTIONS)
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.0]).expand_as(weights))
    assert explain.group_weights(model, processor, pictures, QUESTIONS)[..., 1].min() > 0


def test_saliency_is_the_loss_in_log_probability(loaded, pictures):
    model, processor = loaded
    saliency = explain.group_saliency(model, processor, pictures[0], QUESTIONS[0], max_new_tokens=4)
    assert len(saliency.lost) == 2
    assert saliency.log_probability < 0
    # Greedily chosen, its tokens are each the likeliest; of 264 no likeliest one is rarer than 1 in 264.
    assert saliency.log_probability >= -4 * math.log(model.config.text_config.vocab_size)
    with explain._leave_out(model.model.fusion.allocator, 0):
        without = explain.group_saliency(model, processor, pictures[0], QUESTIONS[0], max_new_tokens=4)
    if without.answer == saliency.answer:
        assert without.log_probability == pytest.approx(saliency.without_group[0], abs=1e-5)
    assert any(abs(lost) > 1e-6 for lost in saliency.lost)


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        ([[0.97, 0.01, 0.02], [0.96, 0.02, 0.02]], "collapsed to group 1"),
        ([[0.33, 0.34, 0.33], [0.34, 0.33, 0.33]], "collapsed to uniform"),
        ([[0.5, 0.3, 0.2], [0.501, 0.3, 0.199]], "the instruction is not read"),
        ([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]], None),
        ([[0.5, 0.3, 0.2]], None),
        ([[0.33, 0.34, 0.33]], None),
    ],
)
def test_a_collapse_is_told(weights, text):
    told = explain.collapse(torch.tensor(weights))
    assert (told is None) if text is None else (text in told)


def test_entropy_is_a_share():
    weights = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]])
    torch.testing.assert_close(explain.entropy(weights), torch.tensor([1.0, 0.0, 0.5]))


def test_what_has_no_weights_is_refused(make_model, make_processor, pictures, tiny_encoder):
    fixed = make_model(fusion={"type": "llava"})
    with pytest.raises(ValueError, match="nothing to explain"):
        explain.group_weights(fixed, make_processor(fixed.config), pictures, QUESTIONS)
    model = make_model()
    with pytest.raises(ValueError, match="no sentence encoder"):
        explain.group_weights(model, make_processor(model.config), pictures, QUESTIONS)
    with pytest.raises(ValueError, match="0 pictures"):
        explain.group_weights(model, make_processor(model.config, sentence_encoder=tiny_encoder), [], QUESTIONS)


@pytest.fixture
def as_command(loaded, monkeypatch, tmp_path):
    """The command on the model in memory; gives the JSON that it writes."""
    from model.cli import checkpoint

    monkeypatch.setattr(checkpoint, "load_checkpoint", lambda name: checkpoint.Checkpoint(*loaded))

    def run(*argv: str) -> dict:
        assert main(["explain", "mine", *argv, f"--output={tmp_path / 'out' / 'explained'}"]) == 0
        assert (tmp_path / "out" / "explained.png").read_bytes().startswith(b"\x89PNG")
        return json.loads((tmp_path / "out" / "explained.json").read_text())

    return run


def test_questions_about_a_folder_show_mean_and_spread(as_command, loaded, pictures, tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    for index, picture in enumerate(pictures):
        picture.save(tmp_path / "pictures" / f"{index}.png")
    written = as_command(str(tmp_path / "pictures"), "--saliency", *QUESTIONS)
    weights = explain.group_weights(*loaded, pictures, QUESTIONS)
    for index, row in enumerate(written["rows"]):
        assert (row["name"], row["count"]) == (QUESTIONS[index], 2)
        assert row["mean"] == pytest.approx(weights[:, index].mean(0).tolist(), abs=1e-6)
        assert row["spread"] == pytest.approx(weights[:, index].std(0).tolist(), abs=1e-6)
    assert len(written["saliency"]) == 3
    shown = capsys.readouterr().out
    assert "layers 1-2" in shown and "±" in shown and "is left out" in shown


def test_a_data_file_shows_kinds(as_command, pictures, tmp_path):
    (tmp_path / "images").mkdir()
    for name, picture in zip(("red", "blue"), pictures, strict=True):
        picture.save(tmp_path / "images" / f"{name}.png")
    turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "it"}]
    records = [
        {"id": f"{kind}-{name}", "image": f"images/{name}.png", "level": kind, "conversations": turns}
        for kind in ("colour", "shape")
        for name in ("red", "blue")
    ]
    records.append({"id": "text", "conversations": [{"from": "human", "value": "Hm?"}, {"from": "gpt", "value": "hm"}]})
    (tmp_path / "data.json").write_text(json.dumps(records))
    written = as_command(str(tmp_path / "data.json"), f"--image_folder={tmp_path}")
    assert [(row["name"], row["count"]) for row in written["rows"]] == [("colour", 2), ("shape", 2), ("all", 4)]


@pytest.mark.parametrize(
    ("argv", "status", "text"),
    [
        (["mine", "picture.png"], 2, "no question given"),
        (["mine", "data.json", "Why?"], 2, "its own questions"),
        (["mine", "picture.png", "Why?", "--limit=0"], 2, "--limit must be at least 1"),
        (["mine", "picture.png", "Why?"], 1, "no picture, folder or data file at picture.png"),
    ],
)
def test_bad_use_is_told_before_anything_is_loaded(argv, status, text, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["explain", *argv]) == status
    assert text in capsys.readouterr().err


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no pictures"):
        command.picture_files(tmp_path)
