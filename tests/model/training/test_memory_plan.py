"""The planned memory of a step is what the step really takes, and the command says what fits."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPVisionConfig, LlamaConfig

from benchmarks.memory import peak_bytes
from model.cli import plan as command
from model.cli.main import main
from model.configuration import IgvaLlavaConfig
from model.modeling import IgvaLlavaForConditionalGeneration
from model.training.freeze import apply_stage
from model.training.layers import checkpoint_layers
from model.training.lora import add_lora
from model.training.memory_plan import LiveMemory, plan_memory
from model.training.recipe import LoraSettings, TrainRecipe

LENGTH, LABELS = 96, 20


@pytest.fixture(scope="module")
def config() -> IgvaLlavaConfig:
    """Large enough that tensors, and not the odds and ends, decide: 5 M parameters."""
    return IgvaLlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=128, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512, image_size=112, patch_size=14
        ).to_dict(),
        text_config=LlamaConfig(
            vocab_size=2048,
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=512,
        ).to_dict(),
        fusion={"type": "igva", "num_groups": 3, "text_dim": 32, "hidden_dim": 64, "num_blocks": 2},
        image_token_id=2047,
    )


def recipe(**fields) -> TrainRecipe:
    from model.training.recipe import DataSource, ModelSource

    source = ModelSource(vision_tower="tower", language_model="language")
    settings = {
        "stage": 2,
        "micro_batch_size": 4,
        "batch_size": 4,
        "precision": "fp32",
        "name": "x",
        "output_dir": "x",
        **fields,
    }
    return TrainRecipe(model=source, data=DataSource("data.json"), **settings)


def measured(config: IgvaLlavaConfig, recipe: TrainRecipe, batch: int) -> int:
    """Bytes that a real step has alive beside the weights: of the trained model's own forward and backward."""
    torch.manual_seed(0)
    model = IgvaLlavaForConditionalGeneration(config)
    if recipe.resolved_language_model_training == "lora":
        add_lora(model, recipe.lora)
    apply_stage(model, recipe.stage, recipe.resolved_language_model_training)
    if recipe.activation_checkpointing:
        checkpoint_layers(model.model.language_model)
    model.train()
    tokens = config.num_image_tokens
    input_ids = torch.randint(0, 2000, (batch, LENGTH))
    input_ids[:, 2 : 2 + tokens] = config.image_token_id
    labels = torch.full_like(input_ids, -100)
    labels[:, -LABELS:] = input_ids[:, -LABELS:]
    inputs = {"input_ids": input_ids, "labels": labels, "pixel_values": torch.randn(batch, 3, 112, 112)}

    def step() -> None:
        model.zero_grad()
        model(**inputs, instruction_embeds=torch.zeros(batch, 32)).loss.backward()

    step()
    model.zero_grad()
    return peak_bytes(step, torch.device("cpu"))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"activation_checkpointing": True},
        {"stage": 1},
        {"language_model_training": "lora", "lora": LoraSettings(r=8, alpha=16)},
        {"micro_batch_size": 16, "batch_size": 16},
    ],
    ids=["full", "checkpointed", "stage 1", "lora", "larger batch"],
)
def test_the_plan_is_within_15_percent_of_the_step(config, fields):
    settings = recipe(**fields)
    planned = plan_memory(settings, config, length=LENGTH, labels=LABELS, bf16=False).step
    found = measured(config, settings, settings.micro_batch_size)
    assert planned.gradients + planned.activations == pytest.approx(found, rel=0.15)


def test_weights_and_states_are_those_of_the_model(config):
    planned = plan_memory(recipe(), config, length=LENGTH, labels=LABELS, bf16=False)
    model = IgvaLlavaForConditionalGeneration(config)
    apply_stage(model, 2, "full")
    numel = sum(parameter.numel() for parameter in model.parameters())
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert sum(planned.step.weights.values()) == 4 * numel + buffers
    assert (planned.step.gradients, planned.step.optimizer) == (4 * learning, 8 * learning)
    assert planned.report.trainable == learning


def test_frozen_weights_in_bf16_take_half(config):
    whole = plan_memory(recipe(stage=1), config, length=LENGTH, bf16=False).step.weights["language model"]
    half = plan_memory(recipe(stage=1, precision="bf16"), config, length=LENGTH, bf16=True).step.weights["language model"]
    assert half == pytest.approx(whole / 2, rel=0.01)


def test_the_largest_batch_fits_and_one_more_does_not(config):
    planned = plan_memory(recipe(), config, length=LENGTH, labels=LABELS, bf16=False)
    gigabytes = (planned.step.fixed + planned.without_samples + 10.5 * planned.per_sample) / 1e9 / 0.92
    assert planned.largest_batch(gigabytes) == 10
    assert planned.largest_batch(planned.step.fixed / 1e9) == 0


def test_accumulation_keeps_the_gradients_of_the_passes_before(config):
    once = plan_memory(recipe(), config, length=LENGTH, labels=LABELS, bf16=False).step
    twice = plan_memory(recipe(batch_size=8), config, length=LENGTH, labels=LABELS, bf16=False).step
    assert twice.activations >= once.activations


@pytest.mark.parametrize("length", [10, 5000])
def test_a_length_that_cannot_be_is_refused(config, length):
    with pytest.raises(ValueError, match=f"length is {length}, expected more than the 64 tokens of an image"):
        plan_memory(recipe(), config, length=length)


def test_storages_count_once_and_until_they_are_freed():
    with FakeTensorMode(), LiveMemory() as memory:
        whole = torch.zeros(100)
        view = whole[:50]
        assert memory.live == 400
        other = whole + 1
        assert memory.live == memory.peak == 800
        del whole
        assert memory.live == 800  # the view holds it
        del view, other
        assert (memory.live, memory.peak) == (0, 800)


def test_the_command_shows_parts_and_cards(new_model, data_file, tmp_path, capsys):
    flags = [f"--model.{name}={new_model[name]}" for name in ("vision_tower", "language_model", "sentence_encoder")]
    picture = f"--picture={tmp_path / 'plan.png'}"
    status = main(["plan", "igva-tiny-stage1", *flags, f"--data.path={data_file}", "--card=RTX 4090", "--card=0.001", picture])
    assert status == 0 and (tmp_path / "plan.png").is_file()
    shown = capsys.readouterr().out
    for text in ("weights of the language model", "AdamW's states", "each further sample", "RTX 4090", "none fits"):
        assert text in shown


@pytest.mark.parametrize(("card", "text"), [("H900", "no card 'H900'; there are RTX 3090"), ("-1", "must be above 0 GB")])
def test_a_card_that_is_not_known_is_refused(card, text):
    with pytest.raises(ValueError, match=text):
        command._gigabytes(card, {"RTX 3090": 24})
