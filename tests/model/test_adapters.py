"""A folder of adapters in use: its base is found, it answers, and `igva merge` makes a plain checkpoint of both."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from model import build_model, build_processor
from model.adapters import adapter_folder, base_of, load_adapted
from model.answering import Conversation
from model.cli.checkpoint import load_checkpoint
from model.cli.main import main
from model.instruction import SentenceEncoder
from model.training.lora import CONFIG_FILE, add_lora, save_adapters
from model.training.recipe import LoraSettings

QUESTION = "Which colour is it?"


@pytest.fixture(scope="module")
def made(tmp_path_factory, part_folders, encoder_folder):
    """``base``, a checkpoint of stage 1, and ``run/adapters`` beside it."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("adapters_of_this_machine")
    fusion = {"type": "igva", "num_groups": 2, "text_dim": 16, "hidden_dim": 32, "num_blocks": 1, "stage": 1}
    model = build_model(part_folders["clip"], part_folders["llama"], fusion=fusion)
    encoder = SentenceEncoder(encoder_folder)
    processor = build_processor(part_folders["clip"], part_folders["llama"], model.config, sentence_encoder=encoder)
    model.save_pretrained(root / "base")
    processor.save_pretrained(root / "base")
    add_lora(model, LoraSettings(r=2, alpha=4, dropout=0.0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name or "multi_modal_projector" in name or ".fusion." in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    processor.aspect_ratio = "crop"  # as this training had it, unlike that of the base
    save_adapters(model, root / "run" / "adapters", base="base")
    processor.save_pretrained(root / "run" / "adapters")
    return root


@pytest.fixture
def root(made, tmp_path):
    shutil.copytree(made, tmp_path / "here")
    return tmp_path / "here"


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))


def answer(checkpoint) -> tuple[str, list[float]]:
    conversation = Conversation(checkpoint.model, checkpoint.processor)
    conversation.show(picture())
    text, weights = conversation.ask(QUESTION, max_new_tokens=6)
    return text, weights


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    side, tokens = model.config.image_size, model.config.num_image_tokens
    ids = torch.randint(0, 256, (2, 12), generator=generator)
    ids[:, :tokens] = model.config.image_token_id
    pixels, embeds = torch.randn(2, 3, side, side, generator=generator), torch.randn(2, 16, generator=generator)
    return model(input_ids=ids, pixel_values=pixels.to(model.dtype), instruction_embeds=embeds).logits


def test_they_answer_with_the_processor_of_their_training(root, capsys):
    adapted = load_checkpoint(str(root / "run" / "adapters"))
    assert adapted.aspect_ratio == "crop" and adapted.model.fusion_stage == 2
    base = load_checkpoint(str(root / "base"))
    assert answer(adapted) != answer(base)
    picture().save(root / "picture.png")
    assert main(["ask", str(root / "run" / "adapters"), str(root / "picture.png"), QUESTION, "--max_new_tokens=6"]) == 0
    assert capsys.readouterr().out.startswith(answer(adapted)[0])


def test_they_are_evaluated(root, capsys):
    picture().save(root / "picture.png")
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": "red"}]
    (root / "data.json").write_text(json.dumps([{"id": "a", "image": "picture.png", "conversations": turns}]))
    output = root / "scores.json"
    words = ["evaluate", str(root / "run" / "adapters"), str(root / "data.json"), "--max_new_tokens=6", f"--output={output}"]
    assert main(words) == 0
    expected, weights = answer(load_checkpoint(str(root / "run" / "adapters")))
    (found,) = json.loads(output.read_text())["model"]["answers"]
    assert found["answer"] == expected and found["fusion_weights"] == pytest.approx(weights, abs=1e-5)


def test_merged_they_are_a_plain_checkpoint_with_the_same_answers(root, capsys):
    adapters, out = root / "run" / "adapters", root / "merged"
    assert main(["merge", str(adapters), str(out)]) == 0
    expected, _ = load_adapted(adapters)
    merged = AutoModelForImageTextToText.from_pretrained(out).eval()
    # W + B A against W x + B (A x), at logits of about 5.
    torch.testing.assert_close(logits_of(merged), logits_of(expected), atol=1e-4, rtol=0)
    assert merged.state_dict().keys() == AutoModelForImageTextToText.from_pretrained(root / "base").state_dict().keys()
    text, weights = answer(load_checkpoint(str(out)))
    expected_text, expected_weights = answer(load_checkpoint(str(adapters)))
    assert text == expected_text and weights == pytest.approx(expected_weights, abs=1e-5)
    assert AutoProcessor.from_pretrained(out).sentence_encoder is not None
    assert sorted(path.name for path in root.iterdir()) == ["base", "merged", "run"]  # nothing half-written beside it
    card = (out / "README.md").read_text()
    assert "adapters" in card and str(root.parent) not in card


def test_merged_in_16_bits_they_take_half_the_room(root):
    assert main(["merge", str(root / "run" / "adapters"), str(root / "merged"), "--dtype=bfloat16"]) == 0
    merged = AutoModelForImageTextToText.from_pretrained(root / "merged").eval()
    assert merged.dtype == torch.bfloat16
    adapted, _ = load_adapted(root / "run" / "adapters")
    expected = logits_of(adapted)
    # How far bfloat16 alone leads, in the same model: some random models are more sensitive than others.
    rounding = (logits_of(adapted.to(torch.bfloat16)).float() - expected).norm()
    assert (logits_of(merged).float() - expected).norm() <= 3 * rounding
    assert rounding < 0.2 * expected.norm()


def test_merging_refuses_what_is_there_and_leaves_nothing_half_written(root, capsys):
    adapters = root / "run" / "adapters"
    assert main(["merge", str(adapters), str(root / "base")]) == 1
    assert "is not empty; choose another folder" in capsys.readouterr().err
    shutil.rmtree(root / "base" / "sentence_encoder")
    (root / "base" / "model.safetensors").write_bytes(b"damaged")
    assert main(["merge", str(adapters), str(root / "merged")]) == 1
    assert "model.safetensors is damaged" in capsys.readouterr().err
    assert sorted(path.name for path in root.iterdir()) == ["base", "run"]
    assert main(["merge", str(root / "base"), str(root / "merged")]) == 1
    assert "is no folder of adapters" in capsys.readouterr().err


def test_a_base_is_found_beside_them_or_given(root, tmp_path):
    adapters = root / "run" / "adapters"
    assert adapter_folder(adapters) == adapters and adapter_folder(root / "base") is None and adapter_folder("nothing") is None
    assert Path(base_of(adapters)) == root / "base"
    assert base_of(adapters, "another") == "another"
    shutil.move(root / "base", tmp_path / "elsewhere")
    with pytest.raises(
        FileNotFoundError, match="belong to the checkpoint 'base', which is not beside them; give it with --base"
    ):
        base_of(adapters)
    assert load_checkpoint(str(adapters), base=str(tmp_path / "elsewhere")).model.fusion_stage == 2
    config = json.loads((adapters / CONFIG_FILE).read_text())
    for named, expected in (("owner/name", "owner/name"), (None, None)):
        (adapters / CONFIG_FILE).write_text(json.dumps({**config, "base_model_name_or_path": named}))
        if expected:
            assert base_of(adapters) == expected
        else:
            with pytest.raises(ValueError, match="name no checkpoint that they belong to"):
                base_of(adapters)


def test_a_base_with_another_vocabulary_is_refused(root):
    other = AutoModelForImageTextToText.from_pretrained(root / "base")
    other.config.image_token_id -= 1
    other.save_pretrained(root / "base")
    with pytest.raises(ValueError, match="trained with another vocabulary"):
        load_adapted(root / "run" / "adapters")


def test_adapters_of_the_hub_are_downloaded_whole(root, monkeypatch):
    """There is no hub here: its two calls are replaced by a folder."""
    adapters = root / "run" / "adapters"
    monkeypatch.setattr("model.adapters.find_adapter_config_file", lambda name: name if name == "me/adapters" else None)
    monkeypatch.setattr("model.adapters.snapshot_download", lambda name: str(adapters))
    assert adapter_folder("me/adapters") == adapters
    assert adapter_folder("me/model") is None


def test_a_base_for_what_needs_none_is_refused(root):
    with pytest.raises(ValueError, match="--base goes with a folder of adapters"):
        load_checkpoint(str(root / "base"), base=str(root / "base"))
