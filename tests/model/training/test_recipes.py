"""Every shipped recipe is read and runs; settings that contradict each other are refused by name."""

from __future__ import annotations

from typing import get_args

import pytest

from model import attention, instruction
from model.cli.train import SHIPPED_RECIPES, find_recipe, shipped_recipes
from model.data import batches
from model.fusions import FUSIONS
from model.training import recipe as recipe_module
from model.training.recipe import TrainRecipe, load_recipe, recipe_parser
from model.training.run import train


def test_the_recipes_are_there():
    assert {"igva-7b-stage1", "igva-7b-stage2", "igva-tiny-stage1", "igva-tiny-stage2"} <= set(shipped_recipes())


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_read(name):
    recipe = load_recipe(find_recipe(name))
    assert recipe.name == name
    assert recipe.accumulation_steps() * recipe.micro_batch_size == recipe.batch_size
    assert recipe.accumulation_steps(num_processes=1) >= 1


def test_the_7b_recipes_have_the_published_values():
    first, second = (load_recipe(find_recipe(f"igva-7b-stage{stage}")) for stage in (1, 2))
    assert (first.batch_size, first.learning_rate, first.warmup, first.epochs) == (256, 1e-3, 0.03, 1)
    assert (second.batch_size, second.learning_rate, second.warmup, second.epochs) == (128, 2e-5, 0.03, 1)
    assert first.data.chat_template == "plain"
    assert first.accumulation_steps(8) == 1 and second.accumulation_steps(8) == 2
    assert (first.resolved_language_model_training, second.resolved_language_model_training) == ("frozen", "full")
    assert (second.balance_loss_weight, second.legacy_double_softmax) == (0.02, True)
    assert second.model.checkpoint == first.output_dir


@pytest.mark.parametrize("system", ["llava", "dense-connector", "mmfuser"])
def test_the_7b_recipes_of_the_other_systems_have_the_published_values(system):
    first, second = (load_recipe(find_recipe(f"{system}-7b-stage{stage}")) for stage in (1, 2))
    assert first.model.fusion["type"] == system.replace("-", "_")
    assert (first.batch_size, first.learning_rate, first.warmup, first.epochs) == (256, 1e-3, 0.03, 1)
    assert (second.batch_size, second.learning_rate, second.warmup, second.epochs) == (128, 2e-5, 0.03, 1)
    assert (first.data.aspect_ratio, second.data.aspect_ratio) == ("crop", "pad")
    assert (first.resolved_language_model_training, second.resolved_language_model_training) == ("frozen", "full")
    assert (second.balance_loss_weight, second.model.checkpoint) == (0.0, first.output_dir)


def test_every_fusion_has_a_recipe():
    fusions = [load_recipe(find_recipe(name)).model.fusion for name in shipped_recipes() if name.endswith("stage1")]
    assert {fusion["type"] for fusion in fusions} == set(FUSIONS)


def test_the_tiny_recipes_run(new_model, data_file, tmp_path):
    flags = [f"--model.{name}={new_model[name]}" for name in ("vision_tower", "language_model", "sentence_encoder")]
    common = [f"--data.path={data_file}", "--smoke=true", "--precision=fp32"]
    first = train(load_recipe(find_recipe("igva-tiny-stage1"), [*flags, *common, f"--output_dir={tmp_path / 'one'}"]))
    flags = [f"--model.checkpoint={first['checkpoint']}", f"--output_dir={tmp_path / 'two'}"]
    second = train(load_recipe(find_recipe("igva-tiny-stage2"), [*flags, *common]))
    assert (first["steps"], second["steps"]) == (10, 10)


OTHER_FUSIONS = [name.removesuffix("-tiny-stage1") for name in shipped_recipes() if name.endswith("tiny-stage1")]
OTHER_FUSIONS.remove("igva")


@pytest.mark.parametrize("name", OTHER_FUSIONS)
def test_the_tiny_recipe_of_every_fusion_runs_in_both_stages(name, new_model, data_file, tmp_path):
    reads_text = name in ("mixture-of-layers", "tgif")
    parts = ("vision_tower", "language_model") + (("sentence_encoder",) if reads_text else ())
    flags = [f"--model.{part}={new_model[part]}" for part in parts]
    common = [f"--data.path={data_file}", "--max_steps=2", "--precision=fp32", "--batch_size=2", "--micro_batch_size=2"]
    recipe = load_recipe(find_recipe(f"{name}-tiny-stage1"), [*flags, *common, f"--output_dir={tmp_path / 'one'}"])
    first = train(recipe)
    flags = [f"--model.checkpoint={first['checkpoint']}", f"--output_dir={tmp_path / 'two'}"]
    second = train(load_recipe(find_recipe("igva-tiny-stage2"), [*flags, *common]))
    for result in (first, second):
        assert result["steps"] == 2
        # What such a fusion learns, it learns with the projector, in both stages.
        has_module = reads_text or name in ("mmfuser", "scalar-mix", "vip-llava")
        assert ("fusion" in result["parameters"]) == has_module
        assert not has_module or result["parameters"]["fusion"]["trainable"] > 0


def test_every_field_is_documented():
    parser = recipe_parser(with_help=True)
    undocumented = [action.dest for action in parser._actions if not action.help]
    fields = [action.dest for action in parser._actions if "." in action.dest or action.dest in TrainRecipe.__annotations__]
    assert not undocumented
    assert len(fields) > 45


def test_flags_override_the_file(tmp_path):
    recipe = load_recipe(
        find_recipe("igva-7b-stage1"), ["--learning_rate=5e-4", "--model.fusion.num_groups=6", "--data.num_workers=0"]
    )
    assert recipe.learning_rate == 5e-4
    assert recipe.model.fusion == {"type": "igva", "num_groups": 6, "base": -2, "order": "fused_first"}
    assert recipe.data.num_workers == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rat=1"], "learning_rat"),
        (["--learning_rate=fast"], "learning_rate"),
        (["--stage=3"], "stage"),
        (["--batch_size=0"], "batch_size must be above 0"),
        (["--warmup=-1"], "warmup must not be negative"),
        (["--language_model_training=full"], "only the projector"),
        (["--balance_loss_weight=0.1"], "balance_loss_weight is set in stage 1"),
        (["--eval_every=5"], "data.eval_path is not"),
        (["--model.checkpoint=somewhere"], "model.checkpoint already fixes model.vision_tower"),
        (["--model.vision_tower=null"], "model.vision_tower is not set"),
        (["--data.aspect_ratio=round"], "aspect_ratio"),
        (["--data.grouping=length"], "grouping"),
        (["--attention=flash"], "attention"),
        (["--frozen_weights=fp16"], "frozen_weights"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(flags, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        load_recipe(find_recipe("igva-7b-stage1"), flags)


def test_batches_that_do_not_divide_are_refused():
    recipe = load_recipe(find_recipe("igva-7b-stage1"))
    with pytest.raises(ValueError, match="multiple of 96"):
        recipe.accumulation_steps(num_processes=3)


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (recipe_module.InstructionPolicy, instruction.InstructionPolicy),
        (recipe_module.Attention, attention.Attention),
        (recipe_module.Grouping, batches.Grouping),
    ],
)
def test_the_recipe_s_choices_are_those_of_the_modules(mine, theirs):
    assert set(get_args(mine)) == set(get_args(theirs))


def test_a_recipe_that_is_not_there_names_those_that_are():
    with pytest.raises(FileNotFoundError, match="igva-7b-stage1"):
        find_recipe("igva-70b")
    with pytest.raises(FileNotFoundError, match="no recipe at"):
        load_recipe(SHIPPED_RECIPES / "none.yaml")
