"""What cannot be used: refused or left out as the recipe says, counted, and never a reason to change the other samples."""

from __future__ import annotations

import json
import os
import random

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from model.data.images import image_size, make_square, open_image
from model.data.llava_json import read_llava_json
from model.data.problems import MissingImageError, Problem, Problems, SampleError, check_on_error
from model.loss import IGNORE_INDEX
from model.training.data import load_data
from model.training.recipe import OnError as RecipeOnError
from model.training.recipe import ProblemKind as RecipeProblemKind
from model.training.run import load_parts, train

GOOD = ("<image>\nWhich colour?", "red")


def error(kind="missing_image", text="sample 7: no image"):
    return (MissingImageError if kind == "missing_image" else SampleError)(kind, text)


@pytest.fixture
def broken_records(make_record, picture_folder):
    """One good sample and one of each kind of problem that the records themselves show."""
    return {
        "": make_record("good", "images/red.png", *GOOD),
        "broken_record": make_record("no-turns", "images/red.png"),
        "placeholders": make_record("no-image", None, *GOOD),
        "outside_path": make_record("outside", "../secret.png", *GOOD),
        "missing_image": make_record("missing", "images/none.png", *GOOD),
    }


# ---- the policy ------------------------------------------------------------------------------------------------------------


def test_a_kind_is_raised_unless_it_is_to_be_skipped():
    problems = Problems({"missing_image": "skip"})
    problems.meet(error(), file="a.json", record=3)
    with pytest.raises(SampleError, match="damaged"):
        problems.meet(error("damaged_image", "damaged"), file="a.json", record=4)
    assert problems.counts() == {"missing_image": 1}
    assert problems.all() == [Problem("missing_image", "a.json", 3, "sample 7: no image")]


@pytest.mark.parametrize(
    ("on_error", "message"),
    [("ignore", "must be one of 'raise', 'skip'"), ({"typo": "skip"}, "names 'typo'"), ({"missing_image": 1}, "got 1")],
)
def test_an_unknown_kind_or_action_is_refused(on_error, message):
    with pytest.raises(ValueError, match=message):
        check_on_error(on_error)


def test_a_problem_counts_once_however_often_and_by_whichever_process_it_is_met(tmp_path):
    path = tmp_path / "problems.jsonl"
    first, second = Problems("skip", path), Problems("skip", path)
    for problems in (first, second, first):
        problems.meet(error(), file="a.json", record=3)
    child = os.fork()
    if child == 0:
        Problems("skip", path).meet(error("damaged_image", "sample 8: damaged"), file="a.json", record=8)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with path.open("a") as stream:
        stream.write('{"kind": "missing_im')  # a process that was killed
    assert first.counts() == second.counts() == {"damaged_image": 1, "missing_image": 1}


def test_the_table_names_the_first_of_each_kind():
    from rich.console import Console

    problems = Problems("skip")
    for record in (9, 2):
        problems.meet(error(text=f"sample [{record}]: no image"), file="a.json", record=record)
    console = Console(width=100)
    with console.capture() as captured:
        console.print(problems.table())
    text = captured.get()
    assert "2 samples left out" in text and "sample [2]: no image" in text and "sample [9]" not in text


def test_the_recipe_names_the_same_kinds_and_actions():
    from model.data.problems import OnError, ProblemKind

    assert RecipeProblemKind == ProblemKind and RecipeOnError == OnError


# ---- records ---------------------------------------------------------------------------------------------------------------


def test_every_kind_is_left_out_and_counted(broken_records, picture_folder, tmp_path):
    file = tmp_path / "data.jsonl"
    lines = [json.dumps(record) for record in broken_records.values()]
    file.write_text("\n".join([*lines[:2], '{"id": 3, "image', "", *lines[2:], "[" * 100_000]) + "\n", encoding="utf-8")
    problems = Problems("skip")
    (sample,) = read_llava_json(file, picture_folder, problems)
    assert (sample.id, sample.file, sample.record) == ("good", "data.jsonl", 1)
    assert problems.counts() == {**{kind: 1 for kind in broken_records if kind}, "broken_line": 2}
    assert [problem.record for problem in problems.all()] == [3, 8, 2, 7, 6, 5]
    assert "line 3 of" in problems.all()[0].message


@pytest.mark.parametrize("kind", ["broken_record", "placeholders", "outside_path", "missing_image"])
def test_every_kind_can_be_raised_alone(kind, broken_records, picture_folder):
    file = picture_folder / "broken.json"
    file.write_text(json.dumps([*broken_records.values()]), encoding="utf-8")
    with pytest.raises(SampleError, match=f"sample {broken_records[kind]['id']}: ") as raised:
        read_llava_json(file, None, Problems({name: "skip" for name in broken_records if name not in ("", kind)}))
    assert raised.value.kind == kind


def test_many_errors_are_summed_up_by_kind(broken_records, make_record, picture_folder):
    file = picture_folder / "many.json"
    records = [make_record(f"missing-{number}", "images/none.png", *GOOD) for number in range(1200)]
    file.write_text(json.dumps([*records, *broken_records.values()]), encoding="utf-8")
    with pytest.raises(FileNotFoundError) as raised:
        read_llava_json(file)
    message = str(raised.value)
    assert "1,201 x missing_image, first: sample missing-0: no image at" in message
    assert "1 x placeholders, first: sample no-image" in message and "data.on_error=skip" in message


def test_a_file_without_a_usable_record_is_refused(broken_records, picture_folder):
    file = picture_folder / "none.json"
    file.write_text(json.dumps([broken_records["missing_image"]]), encoding="utf-8")
    with pytest.raises(ValueError, match="no record that can be used: all 1 were skipped"):
        read_llava_json(file, None, Problems("skip"))


@pytest.mark.parametrize(
    "field", [{"from": ["human"], "value": "a"}, {"from": "human", "value": "\ud800"}, {"value": "a"}, "a"]
)
def test_strange_turns_are_broken_records(field, picture_folder):
    file = picture_folder / "strange.json"
    file.write_text(json.dumps([{"id": 5, "conversations": [field, {"from": "gpt", "value": "b"}]}]), encoding="utf-8")
    with pytest.raises(SampleError, match="sample 5: ") as raised:
        read_llava_json(file)
    assert raised.value.kind == "broken_record"


# ---- pictures --------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_whatever_is_wrong_with_a_file_has_one_name(form, tmp_path):
    noise = Image.effect_noise((24, 16), 90).convert("RGB")
    noise.save(tmp_path / "good", form)
    good = (tmp_path / "good").read_bytes()
    draw = random.Random(0)
    refused = 0
    for number in range(120):
        content = bytearray(good[: draw.randrange(len(good))] if number % 3 == 0 else good)
        for _ in range(draw.randrange(1, 9)):
            if content:
                content[draw.randrange(len(content))] = draw.randrange(256)
        file = tmp_path / "damaged"
        file.write_bytes(content)
        try:
            assert open_image(file, max_pixels=10**6).mode == "RGB"
        except SampleError as damage:
            assert damage.kind in ("damaged_image", "oversized_image") and "damaged" in str(damage)
            refused += 1
    assert refused > 20


def test_a_decompression_bomb_is_refused_by_its_header(tmp_path):
    bomb = tmp_path / "bomb.png"
    Image.new("1", (20_000, 20_000)).save(bomb)  # 49 KB, 1.2 GB in RGB; more than Pillow itself opens
    assert bomb.stat().st_size < 100_000
    for read in (open_image, image_size):
        with pytest.raises(SampleError, match=r"bomb\.png") as raised:
            read(bomb)
        assert raised.value.kind == "oversized_image"
    small = tmp_path / "small.png"
    Image.new("RGB", (20, 10)).save(small)
    assert open_image(small, 200).size == image_size(small, 200) == (20, 10)
    with pytest.raises(SampleError, match="20 x 10 pixels, more than max_image_pixels 199"):
        open_image(small, 199)


@pytest.mark.parametrize("aspect_ratio", ["pad", "stretch"])
def test_a_thin_strip_does_not_become_a_huge_square(aspect_ratio):
    square = make_square(Image.new("RGB", (60_000, 4), (200, 0, 0)), aspect_ratio, (0.5, 0.5, 0.5))
    assert square.width == square.height < 10_000
    assert square.getpixel((100, square.height // 2)) == (200, 0, 0)


# ---- runs ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged_file(records, picture_folder, make_record):
    """The data file with a damaged, an oversized and an endless sample behind those that are good, and a missing image."""
    (picture_folder / "images" / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    Image.new("1", (3000, 3000)).save(picture_folder / "images" / "large.png")
    more = [
        make_record("damaged", "images/damaged.png", *GOOD),
        make_record("large", "images/large.png", *GOOD),
        make_record("endless", None, "a" * 3000, "b"),
        make_record("missing", "images/none.png", *GOOD),
    ]
    file = picture_folder / "damaged.json"
    file.write_text(json.dumps([*records, *more]), encoding="utf-8")
    return file


def test_a_sample_that_is_skipped_teaches_nothing(damaged_file, make_recipe, new_model, tmp_path):
    recipe = make_recipe(1, data={"path": str(damaged_file), "on_error": "skip", "max_image_pixels": 1_000_000})
    data, _ = load_data(recipe, load_parts(recipe.model)[1], tmp_path / "unused")
    assert [sample.id for sample in data.samples[-3:]] == ["damaged", "large", "endless"]
    for index in range(len(data) - 3, len(data)):
        item = data[index]
        assert set(item) == {"input_ids", "labels"} and (item["labels"] == IGNORE_INDEX).all()
    assert data.problems.counts() == {"damaged_image": 1, "missing_image": 1, "not_learnable": 1, "oversized_image": 1}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_counts_and_reports_what_it_left_out(workers, damaged_file, make_recipe, tmp_path, capfd):
    data = {"path": str(damaged_file), "on_error": "skip", "max_image_pixels": 1_000_000, "num_workers": workers}
    result = train(make_recipe(1, data=data, max_steps=None, epochs=2, batch_size=10))
    counts = {"damaged_image": 1, "missing_image": 1, "not_learnable": 1, "oversized_image": 1}
    assert result["samples_left_out"] == counts
    folder = tmp_path / "stage1" / "training"
    listed = [json.loads(line) for line in (folder / "problems.jsonl").read_text().splitlines()]
    assert {entry["message"].split()[1] for entry in listed} == {"damaged:", "large:", "endless:", "missing:"}
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    (entry,) = [entry for entry in log if "samples_left_out" in entry]
    assert entry["samples_left_out"] == 4 and entry["left_out_damaged_image"] == 1
    assert "4 samples left out" in capfd.readouterr().err
    assert json.loads((folder / "result.json").read_text())["samples_left_out"] == counts


def test_without_problems_nothing_is_said_of_them(make_recipe, tmp_path, capfd):
    assert train(make_recipe(1))["samples_left_out"] == {}
    assert not (tmp_path / "stage1" / "training" / "problems.jsonl").exists()
    assert "left out" not in capfd.readouterr().err


def test_a_damaged_image_ends_a_run_that_is_not_to_skip_it(damaged_file, make_recipe, tmp_path):
    data = {"path": str(damaged_file), "on_error": {"missing_image": "skip", "not_learnable": "skip"}, "grouping": "random"}
    with pytest.raises(ValueError, match=r"sample damaged: cannot read the image .*damaged\.png"):
        train(make_recipe(1, data=data, max_steps=None, epochs=1))
    assert not (tmp_path / "stage1").exists()


def test_a_step_with_a_skipped_sample_is_the_step_without_it(records, make_record, picture_folder, make_recipe):
    (picture_folder / "images" / "damaged.png").write_bytes(b"broken")
    states = []
    for name, more in (("with", [make_record("damaged", "images/damaged.png", *GOOD)]), ("without", [])):
        file = picture_folder / f"{name}.json"
        file.write_text(json.dumps([*records[:3], *more]), encoding="utf-8")
        data = {"path": str(file), "on_error": "skip", "grouping": "random"}
        recipe = make_recipe(1, data=data, max_steps=1, batch_size=4, micro_batch_size=4, name=name)
        recipe.output_dir += name
        states.append(AutoModelForImageTextToText.from_pretrained(train(recipe)["checkpoint"]).state_dict())
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], atol=1e-6, rtol=0, msg=name)
