"""Checkpoints in shards, with every fusion, moved to another folder: the same logits, and no path of where they came from."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from model import build_model, build_processor
from model.answering import Conversation
from model.fusions import FUSIONS
from model.instruction import SentenceEncoder

MOL = {"type": "mixture_of_layers", "text_dim": 16, "key_dim": 8}
CASES = {
    "igva": {"type": "igva", "num_groups": 2, "text_dim": 16, "hidden_dim": 32, "num_blocks": 1},
    "llava": {"type": "llava"},
    "layers": {"type": "layers", "layers": [-1, 0, 2]},
    "vip_llava": {"type": "vip_llava", "layers": [-2, 1, 4]},
    "dci": {"type": "dense_connector"},
    "sti": {"type": "dense_connector", "variant": "sti", "layers": [1, 2], "strip": 2},
    "mmfuser": {"type": "mmfuser", "layers": [1, 2, -2], "num_heads": 4, "num_points": 2},
    "tgif": {"type": "tgif", "text_dim": 16, "router_dim": 8},
    "scalar_mix": {"type": "scalar_mix", "norm": "layer"},
    "mixture_of_layers": {**MOL, "level": "hybrid"},
    "multi_layer_sum": {"type": "multi_layer_sum"},
}


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def without_labels(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


def paths_in(folder: Path, fragment: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and fragment.encode() in path.read_bytes()]


def test_there_is_a_case_for_every_type():
    assert {options["type"] for options in CASES.values()} == set(FUSIONS)


@pytest.mark.parametrize("case", CASES)
def test_shards_moved_elsewhere_give_the_same_logits(case, part_folders, make_batch, no_network, tmp_path):
    torch.manual_seed(0)
    model = build_model(part_folders["dinov2"], part_folders["llama"], fusion=CASES[case])
    with torch.no_grad():
        for parameter in model.model.fusion.parameters() if model.model.fusion else ():
            parameter.add_(0.1 * torch.randn_like(parameter))
    inputs = without_labels(make_batch(model, length=24))
    with torch.no_grad():
        expected = model(**inputs).logits
    model.save_pretrained(tmp_path / "first", max_shard_size="50KB")
    shards = sorted(path.name for path in (tmp_path / "first").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "first" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(shards) > 3 and set(index.values()) == set(shards)
    assert "lm_head.weight" not in index  # tied: it is there once
    shutil.move(tmp_path / "first", tmp_path / "second")
    loaded, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "second", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, expected, atol=1e-5, rtol=0)
    for fragment in (str(tmp_path), str(part_folders["dinov2"]), str(part_folders["llama"])):
        assert not paths_in(tmp_path / "second", fragment)


def test_a_moved_checkpoint_answers_with_the_encoder_that_it_carries(part_folders, encoder_folder, no_network, tmp_path):
    from PIL import Image

    torch.manual_seed(0)
    model = build_model(part_folders["clip"], part_folders["llama"], fusion=CASES["igva"])
    encoder = SentenceEncoder(encoder_folder)
    processor = build_processor(part_folders["clip"], part_folders["llama"], model.config, sentence_encoder=encoder)
    model.save_pretrained(tmp_path / "first", max_shard_size="50KB")
    processor.save_pretrained(tmp_path / "first")

    def answer(model, processor):
        conversation = Conversation(model, processor)
        conversation.show(Image.new("RGB", (40, 20), "red"))
        return conversation.ask("Which colour is it?", max_new_tokens=5)

    expected, weights = answer(model, processor)
    shutil.move(tmp_path / "first", tmp_path / "second")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "second")
    again, same_weights = answer(loaded, AutoProcessor.from_pretrained(tmp_path / "second"))
    assert again == expected and same_weights == pytest.approx(weights, abs=1e-6)
    for fragment in (str(tmp_path), str(encoder_folder)):
        assert not paths_in(tmp_path / "second", fragment)
