"""What learns in which stage, and the report of it."""

from __future__ import annotations

import pytest

from model.training.freeze import apply_stage
from model.training.lora import add_lora
from model.training.recipe import LoraSettings


def trainable_parts(model):
    parts = {"vision_tower": "model.vision_tower.", "allocator": "model.fusion.", "projector": "model.multi_modal_projector."}
    parts |= {"language_model": "model.language_model.", "lm_head": "lm_head."}
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {part for part, prefix in parts.items() if any(name.startswith(prefix) for name in names)}


@pytest.mark.parametrize(
    ("stage", "language_model", "expected"),
    [
        (1, "frozen", {"projector"}),
        (2, "frozen", {"projector", "allocator"}),
        (2, "lora", {"projector", "allocator", "language_model"}),
        (2, "full", {"projector", "allocator", "language_model"}),
    ],
)
def test_each_stage_trains_its_parts_and_no_other(stage, language_model, expected, make_model):
    model = make_model()
    if language_model == "lora":
        add_lora(model, LoraSettings(r=2))
    apply_stage(model, stage, language_model)
    assert trainable_parts(model) == expected
    assert model.fusion_stage == stage


def test_the_stages_may_follow_in_any_order(make_model):
    model = make_model()
    apply_stage(model, 2, "full")
    apply_stage(model, 1)
    assert trainable_parts(model) == {"projector"}


def test_the_report_counts_every_parameter_once(make_model):
    model = make_model()
    report = apply_stage(model, 2, "full")
    assert report.trainable + report.frozen == sum(parameter.numel() for parameter in model.parameters())
    assert report.trainable == sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    tower = sum(parameter.numel() for parameter in model.model.vision_tower.parameters())
    assert (report["vision_tower"].trainable, report["vision_tower"].frozen) == (0, tower)
    # The head is the word embeddings, which the language model's row has counted.
    assert report["lm_head"].trainable == 0


def test_with_adapters_only_they_learn_in_the_language_model(make_model):
    model = make_model()
    add_lora(model, LoraSettings(r=2))
    report = apply_stage(model, 2, "lora")
    adapters = sum(parameter.numel() for name, parameter in model.named_parameters() if ".lora_" in name)
    assert report["language_model"].trainable == adapters > 0


def test_the_table_shows_parts_and_totals(make_model):
    report = apply_stage(make_model(), 1)
    table = report.table()
    assert table.row_count == len(report.rows) + 1
    columns = [list(column.cells) for column in table.columns]
    assert columns[0][-1] == "total"
    assert columns[1][-1] == f"{report.trainable:,}"


def test_a_fusion_without_stages_has_no_allocator_to_train(make_model):
    model = make_model(fusion={"type": "llava"})
    apply_stage(model, 2, "full")
    assert trainable_parts(model) == {"projector", "language_model"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3,), "stage must be 1 or 2"),
        ((2, "half"), "language_model_training must be one of"),
        ((1, "full"), "stage 1 trains the projector only"),
        ((2, "lora"), "has no adapters"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message, make_model):
    with pytest.raises(ValueError, match=message):
        apply_stage(make_model(), *arguments)


# What DistributedDataParallel without a search for idle parameters needs, and ZeRO and FSDP2 are glad of.
LEARNING_FUSIONS = [
    {},
    {"type": "dense_connector"},
    {"type": "mmfuser", "layers": [1, 2, -2], "num_heads": 4, "num_points": 2},
    {"type": "tgif", "text_dim": 16, "router_dim": 8},
    {"type": "scalar_mix", "norm": "layer"},
    {"type": "mixture_of_layers", "text_dim": 16, "key_dim": 8, "level": "hybrid"},
]


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("fusion", LEARNING_FUSIONS, ids=lambda fusion: fusion.get("type", "igva"))
def test_every_parameter_that_learns_takes_part_in_each_step(fusion, stage, make_model, make_batch):
    model = make_model(fusion=fusion).train()
    apply_stage(model, stage, "frozen" if stage == 1 else "full")
    for images_per_row in ((1, 1), (0, 0)):
        model.zero_grad()
        model(**make_batch(model, images_per_row)).loss.backward()
        idle = [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]
        assert not idle


def test_without_instructions_the_allocator_is_frozen_and_all_others_take_part(make_model, make_batch):
    model = make_model().train()
    report = apply_stage(model, 2, "full", instructions=False)
    assert report["allocator"].trainable == 0 < report["allocator"].frozen
    batch = make_batch(model)
    del batch["instruction_embeds"]
    model(**batch).loss.backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())
