"""LLaVA JSON: what is read, and what is refused with the name of the sample."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from model.chat_templates import CHAT_TEMPLATES
from model.data.dataset import LlavaDataset
from model.data.images import make_square, open_image
from model.data.llava_json import read_llava_json, samples_from_records
from model.loss import IGNORE_INDEX

GOOD = {"image": "images/red.png", "turns": ("<image>\nWhich colour?", "red")}


def test_reads_one_image_several_images_several_turns_and_text_only(data_file, picture_folder):
    samples = {sample.id: sample for sample in read_llava_json(data_file)}
    assert len(samples) == 16
    assert samples["colour-0"].images == (picture_folder / "images" / "red.png",)
    assert samples["colour-0"].kind == "colour"
    assert [path.name for path in samples["two"].images] == ["red.png", "blue.png"]
    assert samples["turns"].human_turns == ["<image>\nWhich colour?", "Is it dark?"]
    assert samples["text-a"].images == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "images/none.png"}, "no image at"),
        ({"image": "../secret.png"}, "outside the image folder"),
        ({"image": "images/../../secret.png"}, "outside the image folder"),
        ({"image": "/etc/hostname"}, "outside the image folder"),
        ({"image": 7}, "must be a path or a list of paths"),
        ({"image": None}, "1 <image> in the human turns, but 0 images"),
        ({"image": ["images/red.png", "images/blue.png"]}, "1 <image> in the human turns, but 2 images"),
        ({"turns": ("What is it?", "red")}, "0 <image> in the human turns, but 1 images"),
        ({"turns": ("<image> What?", "red <image>")}, "which is an answer"),
        ({"turns": ("<image> What?",)}, "no human turn with an answer"),
        ({"turns": ()}, "at least one turn"),
        ({"conversations": [{"from": "system", "value": "<image>"}]}, "expected 'human' or 'gpt'"),
        ({"conversations": [{"from": "human", "value": 3}]}, "a text in"),
        ({"conversations": [{"from": "human", "value": "<image>"}, {"from": "human", "value": "?"}]}, "must alternate"),
        ({"conversations": "hello"}, "must be a list"),
    ],
)
def test_a_broken_record_is_refused_with_its_id(change, message, make_record, picture_folder):
    fields = {**GOOD, **change}
    record = make_record("sample-17", fields["image"], *fields["turns"])
    if "conversations" in change:
        record["conversations"] = change["conversations"]
    with pytest.raises((ValueError, FileNotFoundError), match="sample sample-17: ") as error:
        samples_from_records([record], picture_folder)
    assert message in str(error.value)


def test_a_dialogue_that_begins_with_an_answer_loses_it(make_record, picture_folder):
    record = make_record("tail", None, "", "left over", "And now?", "now this")
    record["conversations"] = record["conversations"][1:]
    (sample,) = samples_from_records([record], picture_folder)
    assert [turn.text for turn in sample.turns] == ["And now?", "now this"]


def test_a_link_that_the_user_put_into_the_image_folder_is_followed(make_record, picture_folder, tmp_path):
    (tmp_path / "linked").symlink_to(picture_folder / "images")
    (sample,) = samples_from_records([make_record("a", "linked/red.png", *GOOD["turns"])], tmp_path)
    assert open_image(sample.images[0]).getpixel((0, 0)) == (220, 40, 40)


@pytest.mark.parametrize(
    ("content", "message"), [("[{]", "not valid JSON"), ('{"a": 1}', "must hold a JSON list"), ("[]", "no records")]
)
def test_a_file_of_another_form_is_refused(content, message, tmp_path):
    (tmp_path / "data.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_llava_json(tmp_path / "data.json")


def test_image_folder_may_lie_elsewhere(records, picture_folder, tmp_path):
    (tmp_path / "data.json").write_text(json.dumps(records), encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"sample colour-0: no image at"):
        read_llava_json(tmp_path / "data.json")
    assert len(read_llava_json(tmp_path / "data.json", picture_folder)) == len(records)


def test_pad_centres_the_picture_on_the_mean_colour():
    picture = make_square(Image.new("RGB", (40, 20), (220, 40, 40)), "pad", (0.5, 0.25, 0.0))
    assert picture.size == (40, 40)
    column = [picture.getpixel((20, row)) for row in range(40)]
    assert column == [(127, 63, 0)] * 10 + [(220, 40, 40)] * 20 + [(127, 63, 0)] * 10


def test_crop_keeps_the_middle():
    wide = Image.new("RGB", (40, 20), (220, 40, 40))
    wide.paste((0, 0, 0), (10, 0, 30, 20))
    for picture in (wide, wide.transpose(Image.Transpose.ROTATE_90)):
        middle = make_square(picture, "crop", (0.5, 0.5, 0.5))
        assert middle.size == (20, 20)
        assert middle.getcolors() == [(400, (0, 0, 0))]


def test_stretch_stretches_the_picture():
    picture = make_square(Image.new("RGB", (20, 40), (220, 40, 40)), "stretch", (0.5, 0.5, 0.5))
    assert picture.size == (40, 40)
    assert picture.getcolors() == [(1600, (220, 40, 40))]


def test_a_file_that_is_no_picture_is_refused_by_name(tmp_path):
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    with pytest.raises(ValueError, match=r"cannot read the image .*text\.png"):
        open_image(tmp_path / "text.png")


# ---- as published ----------------------------------------------------------------------------------------------------------

#: One record of each form, as they stand in blip_laion_cc_sbu_558k.json and llava_v1_5_mix665k.json, texts shortened.
PUBLISHED = [
    {
        "id": "004539375",
        "image": "00453/004539375.jpg",
        "conversations": [
            {"from": "human", "value": "Render a clear and concise summary of the photo.\n<image>"},
            {"from": "gpt", "value": "select luxury furniture 3 - inch gel memory foam mattress topper"},
        ],
    },
    {
        "id": "000000033471",
        "image": "coco/train2017/000000033471.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat are the colors of the bus in the image?"},
            {"from": "gpt", "value": "The bus in the image is white and red."},
            {"from": "human", "value": "What feature can be seen on the back of the bus?"},
            {"from": "gpt", "value": "The back of the bus features an advertisement."},
        ],
    },
    {
        "id": "qV2Hq1t_0",
        "model": "",
        "conversations": [
            {"from": "gpt", "value": "...the rest of an answer that was split off."},
            {"from": "human", "value": "Go on."},
            {"from": "gpt", "value": "Of course."},
            {"from": "human", "value": "Thanks."},
        ],
    },
    {
        "id": 2408512,
        "image": "vg/VG_100K_2/2408512.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nPlease provide a short description for this region: [0.31, 0.5, 0.42, 0.7]."},
            {"from": "gpt", "value": "A man in a hat."},
        ],
    },
]


@pytest.fixture
def published(tmp_path):
    for record in PUBLISHED:
        if "image" in record:
            (tmp_path / record["image"]).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 30), (200, 40, 40)).save(tmp_path / record["image"])
    (tmp_path / "published.json").write_text(json.dumps(PUBLISHED), encoding="utf-8")
    return tmp_path


def test_published_records_are_read_as_llava_reads_them(published):
    caption, dialogue, text, region = read_llava_json(published / "published.json")
    # The image comes first, wherever the record has it.
    assert caption.human_turns == ["<image>\nRender a clear and concise summary of the photo."]
    assert dialogue.human_turns[0] == "<image>\nWhat are the colors of the bus in the image?" and len(dialogue.turns) == 4
    assert text.images == () and [turn.text for turn in text.turns] == ["Go on.", "Of course.", "Thanks."]
    assert region.id == "2408512" and region.images == (published / "vg/VG_100K_2/2408512.jpg",)


def test_a_jsonl_file_holds_the_same_records(published):
    lines = "\n".join(json.dumps(record) for record in PUBLISHED)
    (published / "published.jsonl").write_text(lines + "\n\n", encoding="utf-8")
    plain, by_line = (read_llava_json(published / f"published.{ending}") for ending in ("json", "jsonl"))
    assert [(s.id, s.images, s.turns) for s in plain] == [(s.id, s.images, s.turns) for s in by_line]
    assert [sample.record for sample in plain] == [0, 1, 2, 3] and [sample.record for sample in by_line] == [1, 2, 3, 4]


@pytest.mark.parametrize("template", ["plain", "vicuna_v1", "chatml"])
def test_published_records_become_tensors(template, published, model_and_processor):
    processor = model_and_processor[1]
    data = LlavaDataset(read_llava_json(published / "published.json"), processor, chat_template=CHAT_TEMPLATES[template])
    for index, sample in enumerate(data.samples):
        item = data[index]
        spoken = processor.tokenizer.decode(item["labels"][item["labels"] != IGNORE_INDEX])
        end = {"plain": "\n", "vicuna_v1": "</s>", "chatml": "<|im_end|>"}[template]
        assert spoken == "".join(turn.text + end for turn in sample.turns if turn.role == "assistant")
        assert ("pixel_values" in item) == bool(sample.images)


def test_several_images_stay_where_the_text_has_them(make_record, picture_folder):
    record = make_record("two", ["images/red.png", "images/blue.png"], "First <image> and then <image>: which?", "red")
    (sample,) = samples_from_records([record], picture_folder)
    assert sample.human_turns == ["First <image> and then <image>: which?"]
