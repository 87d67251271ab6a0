"""The model card says what was done, names nothing of this machine, and its code loads the model."""

from __future__ import annotations

import re

import pytest
import yaml

from model.training.run import train


@pytest.fixture(scope="module")
def card(tmp_path_factory, new_model, data_file):
    from model.training.recipe import DataSource, LoraSettings, ModelSource, TrainRecipe

    root = tmp_path_factory.mktemp("a folder of this machine")
    recipe = TrainRecipe(
        name="with-adapters",
        output_dir=str(root / "out"),
        stage=2,
        model=ModelSource(**new_model),
        data=DataSource(str(data_file), eval_path=str(data_file)),
        language_model_training="lora",
        lora=LoraSettings(r=2, alpha=4),
        batch_size=4,
        micro_batch_size=4,
        max_steps=1,
        precision="fp32",
    )
    result = train(recipe)
    return root, result, (root / "out" / "README.md").read_text(encoding="utf-8")


def test_it_says_what_was_done(card):
    _, result, text = card
    for row in (
        "| fusion | type: igva, num_groups: 2",
        "| stage | 2; language model: lora |",
        "| data | data.json, held out: data.json |",
        "| steps, batch | 1, 4 |",
        f"| loss in training, held out | {result['train_loss']:.4f}, {result['eval_loss']:.4f} |",
        "| projector |",
        "`adapters/`",
    ):
        assert row in text


def test_it_names_nothing_of_this_machine(card, new_model):
    root, _, text = card
    assert str(root.parent) not in text
    assert str(new_model["vision_tower"]) not in text


def test_its_head_is_yaml_that_the_hub_reads(card):
    head = yaml.safe_load(re.match(r"---\n(.*?)---\n", card[2], flags=re.DOTALL)[1])
    assert (head["library_name"], head["pipeline_tag"]) == ("transformers", "image-text-to-text")
    assert "base_model" not in head  # all parts were folders


def test_its_code_loads_the_model(card):
    root, _, text = card
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict = {}
    exec(block.replace("THIS FOLDER", str(root / "out")), names)
    assert names["igva"].config.fusion["num_groups"] == 2
    assert names["processor"].sentence_encoder is not None
