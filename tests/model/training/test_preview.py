"""The preview shows what is learned, to the character, and stops at nothing."""

from __future__ import annotations

import json

import pytest
import yaml
from rich.console import Console

from model.chat_templates import CHAT_TEMPLATES
from model.cli.main import main
from model.data.dataset import LlavaDataset
from model.data.llava_json import read_llava_json
from model.data.preview import preview


@pytest.fixture
def make_preview(model_and_processor, data_file):
    def make(sample_id, template="vicuna_v1", **options):
        samples = read_llava_json(data_file)
        data = LlavaDataset(samples, model_and_processor[1], chat_template=CHAT_TEMPLATES[template], **options)
        return preview(data, [sample.id for sample in samples].index(sample_id))

    return make


@pytest.mark.parametrize(
    ("template", "learned"),
    [("vicuna_v1", ["green</s>", "no</s>"]), ("chatml", ["green<|im_end|>", "no<|im_end|>"]), ("plain", ["green\nno\n"])],
)
def test_segments_are_the_text_and_its_learned_parts(template, learned, make_preview, model_and_processor):
    shown = make_preview("turns", template)
    tokenizer = model_and_processor[1].tokenizer
    assert [segment.text for segment in shown.segments if segment.part == "learned"] == learned
    image = [segment for segment in shown.segments if segment.part == "image"]
    assert [segment.num_tokens for segment in image] == [4]
    whole = "".join(segment.text or "<image>" * segment.num_tokens for segment in shown.segments)
    assert shown.num_tokens == len(tokenizer(whole, add_special_tokens=False)["input_ids"])
    assert shown.pictures == ((40, 20, 1),)
    assert shown.instruction == ("Which colour?", "Is it dark?")


def test_a_cut_sample_says_how_much_is_missing(make_preview):
    whole = make_preview("text-a")
    cut = make_preview("text-a", max_length=whole.num_tokens - 3)
    assert whole.tokens_cut == 0
    assert cut.num_tokens == whole.num_tokens - 3 and cut.tokens_cut == 3 and cut.count("learned") == 2
    assert "3 more were cut off" in "".join(cut._facts())
    assert cut.pictures == cut.instruction == ()


def test_tiles_are_counted(make_preview):
    shown = make_preview("turns", aspect_ratio="anyres")
    assert shown.pictures == ((40, 20, 3),) and shown.count("image") == 12


@pytest.mark.parametrize("colours", [True, False])
def test_learned_text_is_green_or_between_marks(colours, make_preview):
    console = Console(width=200, force_terminal=colours, color_system="truecolor" if colours else None)
    with console.capture() as captured:
        console.print(make_preview("turns").render(marks=not colours), soft_wrap=True)
    out = captured.get()
    assert ("\x1b[1;32mgreen</s>\x1b[0m" in out) == colours
    assert ("ASSISTANT: ⟦green</s>⟧USER: Is it dark? ASSISTANT: ⟦no</s>⟧" in out) == (not colours)
    for part in (
        "sample turns",
        "<image> x 4",
        "picture of 40 x 20 pixels",
        "instruction: 'Which colour?' / 'Is it dark?'",
        " learned (",
    ):
        assert part in out


# ---- the command -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe_file(make_recipe, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(make_recipe(1).to_dict()), encoding="utf-8")
    return str(file)


def test_the_command_shows_samples_of_a_recipe(recipe_file, capsys):
    assert main(["preview", recipe_file, "--limit=2"]) == 0
    out = capsys.readouterr().out
    assert out.count("sample colour-") == 2 and "⟦red<|im_end|>⟧" in out
    assert main(["preview", recipe_file, "--id=two", "--id=turns", "--data.chat_template=plain", "--color=always"]) == 0
    out = capsys.readouterr().out
    assert "sample two" in out and "sample turns" in out and "\x1b[1;32m" in out and "⟦" not in out
    assert main(["preview", recipe_file, "--random=3", "--seed=1"]) == 0
    assert capsys.readouterr().out.count("tokens: ") == 3


def test_the_command_takes_a_data_file_and_a_checkpoint(recipe_file, stage1, data_file, capsys):
    assert (
        main(["preview", str(data_file), "--recipe=igva-7b-stage2", f"--model.checkpoint={stage1}", "--data.image_folder=null"])
        == 0
    )
    assert capsys.readouterr().out.count("tokens: ") == 3


def test_the_command_shows_what_is_wrong_and_fails(recipe_file, picture_folder, make_record, capsys):
    (picture_folder / "images" / "damaged.png").write_bytes(b"broken")
    turns = ("<image>\nWhich?", "red")
    records = [
        make_record("damaged", "images/damaged.png", *turns),
        make_record("good", "images/red.png", *turns),
        make_record("gone", "images/none.png", *turns),
    ]
    file = picture_folder / "preview.json"
    file.write_text(json.dumps(records), encoding="utf-8")
    assert main(["preview", recipe_file, f"--data.path={file}"]) == 1
    out = capsys.readouterr().out
    assert "sample damaged: cannot read the image" in out and "sample good" in out and "1 samples left out" in out


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--id=none"], 1, "no sample 'none' among the 16"),
        (["--limit=0"], 2, "--limit must be at least 1"),
        (["--recipe=igva-7b-stage1"], 2, "give one recipe"),
        (["--data.pth=a"], 1, "data.pth"),
        (["--data.path=none.json"], 1, "no data file at none.json"),
    ],
)
def test_wrong_flags_are_named(flags, status, message, recipe_file, capsys):
    assert main(["preview", recipe_file, *flags]) == status
    assert message in capsys.readouterr().err


def test_a_data_file_needs_a_recipe(data_file, capsys):
    assert main(["preview", str(data_file)]) == 2
    assert "needs --recipe" in capsys.readouterr().err
