"""Language models in 8 and 4 bits, with the real libraries where they are: `make test-quantized` brings them."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText

import model.quantization as quantization
from model import build_model, build_processor
from model.answering import Conversation
from model.cli.checkpoint import load_checkpoint
from model.cli.main import main
from model.instruction import SentenceEncoder
from model.quantization import KEPT, only_language_model, quantization_config
from model.training.lora import add_lora, load_adapters, save_adapters
from model.training.recipe import DataSource, LoraSettings, ModelSource, TrainRecipe
from model.training.run import train

LIBRARIES = {"int8": "torchao", "int4": "torchao", "nf4": "bitsandbytes"}

#: Largest difference of a logit from float32, as a share of the largest logit, on the tiny model with its random weights.
TOLERANCES = {"int8": 0.03, "nf4": 0.4}


def needing(*names: str) -> list:
    return [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                importlib.util.find_spec(LIBRARIES[name]) is None,
                reason=f"{LIBRARIES[name]} is not installed; make test-quantized brings it",
            ),
        )
        for name in names
    ]


every = pytest.mark.parametrize("name", needing("int8", "nf4"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, part_folders, encoder_folder):
    torch.manual_seed(0)
    fusion = {"type": "igva", "num_groups": 2, "text_dim": 16, "hidden_dim": 32, "num_blocks": 1}
    built = build_model(part_folders["clip"], part_folders["llama"], fusion=fusion)
    encoder = SentenceEncoder(encoder_folder)
    processor = build_processor(part_folders["clip"], part_folders["llama"], built.config, sentence_encoder=encoder)
    folder = tmp_path_factory.mktemp("quantized") / "stage1"
    built.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def linears(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


def is_plain(linear: nn.Module) -> bool:
    return type(linear.weight) is nn.Parameter and linear.weight.is_floating_point()


@torch.no_grad()
def logits_of(model, make_batch):
    batch = make_batch(model)
    batch.pop("labels")
    return model.eval()(**batch).logits.float()


@every
def test_the_language_model_alone_is_quantised(name, checkpoint, make_batch):
    loaded = AutoModelForImageTextToText.from_pretrained(checkpoint, quantization_config=quantization_config(name))
    inner = loaded.model
    assert not any(is_plain(linear) for linear in linears(inner.language_model))
    for part in (inner.vision_tower, inner.fusion, inner.multi_modal_projector, loaded.lm_head):
        assert all(is_plain(linear) for linear in linears(part))
    plain = AutoModelForImageTextToText.from_pretrained(checkpoint)
    for key, tensor in plain.state_dict().items():
        if not key.startswith("model.language_model.layers."):
            assert torch.equal(loaded.state_dict()[key], tensor), key
    expected, found = logits_of(plain, make_batch), logits_of(loaded, make_batch)
    error = (found - expected).abs().max() / expected.abs().max()
    assert 0 < error < TOLERANCES[name]


@every
def test_it_answers_on_the_command_line(name, checkpoint, tmp_path, capsys):
    Image.new("RGB", (40, 20), "red").save(tmp_path / "red.png")
    words = ["ask", str(checkpoint), str(tmp_path / "red.png"), "Which colour?", "--max_new_tokens=4", f"--quantization={name}"]
    assert main(words) == 0
    assert "layers" in capsys.readouterr().out


@pytest.mark.parametrize("name", needing("nf4"))
def test_a_config_of_the_users_own_leaves_the_vision_side_alone_too(name, checkpoint):
    from transformers import BitsAndBytesConfig

    loaded = AutoModelForImageTextToText.from_pretrained(checkpoint, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    assert all(is_plain(linear) for linear in linears(loaded.model.vision_tower))
    assert is_plain(loaded.lm_head)


@every
def test_adapters_on_it_are_saved_and_load_again(name, checkpoint, make_batch, tmp_path):
    options = {"quantization_config": quantization_config(name)}
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, **options)
    add_lora(model, LoraSettings(r=2, alpha=4, dropout=0.0))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".lora_" in key or "multi_modal_projector" in key:
                parameter.add_(0.1 * torch.randn_like(parameter))
    save_adapters(model, tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(checkpoint, **options)
    load_adapters(again, tmp_path)
    torch.testing.assert_close(logits_of(again, make_batch), logits_of(model, make_batch), atol=1e-5, rtol=0)


@every
def test_a_recipe_trains_on_it_and_merges_into_the_unquantised_weights(name, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "stage1")
    Image.new("RGB", (40, 20), "red").save(tmp_path / "red.png")
    turns = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": "red"}]
    records = [{"id": str(n), "image": "red.png", "conversations": turns} for n in range(4)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    recipe = TrainRecipe(
        name="quantised",
        output_dir=str(tmp_path / "stage2"),
        stage=2,
        language_model_training="lora",
        language_model_quantization=name,
        lora=LoraSettings(r=4, alpha=8, dropout=0.0),
        model=ModelSource(checkpoint=str(tmp_path / "stage1")),
        data=DataSource(str(tmp_path / "data.json")),
        batch_size=2,
        micro_batch_size=2,
        max_steps=8,
        learning_rate=1e-2,
        warmup=0,
        scheduler="constant",
        precision="fp32",
        log_every=1,
    )
    result = train(recipe)
    log = [json.loads(line) for line in (tmp_path / "stage2" / "training" / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    base, merged = (AutoModelForImageTextToText.from_pretrained(tmp_path / name) for name in ("stage1", "stage2"))
    assert merged.state_dict().keys() == base.state_dict().keys()  # plain: no library is needed to load it
    assert getattr(merged.config, "quantization_config", None) is None
    changed = {key for key, tensor in base.state_dict().items() if not torch.equal(merged.state_dict()[key], tensor)}
    assert {key.split(".")[1] for key in changed} == {"language_model", "multi_modal_projector", "fusion"}
    assert not [key for key in changed if "embed_tokens" in key or ("norm" in key and "language_model" in key)]
    # The adapters, on the quantised base that they were trained with.
    adapted = load_checkpoint(f"{result['checkpoint']}/adapters", quantization=name)
    conversation = Conversation(adapted.model, adapted.processor)
    conversation.show(Image.open(tmp_path / "red.png"))
    answer, _ = conversation.ask("Which colour?", max_new_tokens=4)
    assert isinstance(answer, str)
    card = (tmp_path / "stage2" / "adapters" / "README.md").read_text()
    assert f"held in {name} meanwhile" in card


def test_a_library_that_is_missing_is_one_line(checkpoint, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    Image.new("RGB", (40, 20), "red").save(tmp_path / "red.png")
    for name, library in LIBRARIES.items():
        words = ["ask", str(checkpoint), str(tmp_path / "red.png"), "Which colour?", f"--quantization={name}"]
        assert main(words) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{name} needs {library}, which is not installed: pip install 'igva-kernels[{library}]'" in line


@pytest.mark.parametrize("name", needing("int4"))
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_int4_without_a_gpu_is_one_line(name, checkpoint):
    with pytest.raises(ValueError, match="int4 of torchao has kernels for CUDA GPUs alone, and there is none; use nf4 or int8"):
        load_checkpoint(str(checkpoint), quantization=name)
    with pytest.raises(ValueError, match="int4 of torchao runs in bfloat16"):
        load_checkpoint(str(checkpoint), quantization=name, dtype="float32")


def test_an_unknown_name_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match="quantization must be one of int8, int4, nf4, got 'int2'"):
        quantization_config("int2")


def test_what_is_kept_is_added_to_what_a_config_keeps():
    class Config:
        llm_int8_skip_modules = ("mine",)

    given = Config()
    assert set(only_language_model(given).llm_int8_skip_modules) == {"mine", *KEPT}
    assert given.llm_int8_skip_modules == ("mine",)
    with pytest.raises(ValueError, match="cannot leave vision tower"):
        only_language_model({"load_in_4bit": True})


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"language_model_training": "full"}, "set language_model_training to lora"),
        (
            {"language_model_training": "lora", "model": ModelSource(vision_tower="a", language_model="b")},
            "set model.checkpoint",
        ),
        ({"language_model_training": "lora", "distributed": "zero3"}, "use distributed ddp without compile"),
        ({"language_model_training": "lora", "compile": True}, "use distributed ddp without compile"),
    ],
)
def test_a_recipe_says_what_does_not_go_with_it(fields, text):
    given = {"model": ModelSource(checkpoint="c"), "data": DataSource("d"), "language_model_quantization": "nf4", **fields}
    with pytest.raises(ValueError, match=f"language_model_quantization is nf4.*{text}"):
        TrainRecipe(name="a", output_dir="b", stage=2, **given)
