"""Checkpoints of other code bases: small ones under their official names, to ours and back."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration

from igva_kernels.modules import MMFuserFusion, WeightAllocator
from model.cli.main import main
from model.converters.llava_hf import from_llava, to_llava
from model.converters.official import from_official, to_official, write_official
from model.converters.tensors import read_tensors

D, H = 32, 64  # widths of the tiny tower and language model
GROUPS = [[1, 2], [3, 4]]
CONFIGS = {
    "llava": {"mm_vision_select_layer": -2},
    "igva": {
        "vit_base_layer": -2,
        "vit_aggregate_groups": json.dumps(GROUPS),
        "aggregate_by_average": False,
        "sentence_embed_dim": 16,
        "aggregator_hidden_dim": 32,
        "aggregator_num_transformers": 1,
        "aggregator_num_heads": 4,
    },
    "dense_connector": {"mm_dense_connector_type": "dci"},
    "mmfuser": {"mm_vision_select_layer": "list-4/-3/-2"},
}
SLOTS = {"llava": 1, "igva": 2, "dense_connector": 3, "mmfuser": 1}
OTHER_ORDER = {"igva": "fused_first", "dense_connector": "base_last"}


def official_projector(kind):
    """What the released code saves as mm_projector.bin, the aggregator beside it."""
    places = ("1", "3") if kind == "mmfuser" else ("0", "2")
    linears = dict(zip(places, (nn.Linear(SLOTS[kind] * D, H), nn.Linear(H, H)), strict=True))
    tensors = {f"model.mm_projector.{place}.{n}": p.detach() for place, m in linears.items() for n, p in m.named_parameters()}
    if kind == "igva":
        aggregator = WeightAllocator(num_groups=2, vision_dim=D, text_dim=16, hidden_dim=32, num_blocks=1, num_heads=4)
        tensors |= {f"model.vision_aggregator.{n}": p.detach() for n, p in aggregator.named_parameters()}
    if kind == "mmfuser":
        block = MMFuserFusion((-4, -3, -2), D, num_layers=4)
        with torch.no_grad():
            block.cross_scale.normal_()
            block.self_scale.normal_()
        tensors |= block.official_state_dict("model.mm_projector.0.")
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.fixture
def projector_file(request, tmp_path):
    """``(kind, file)``: mm_projector.bin with its config.json beside it."""
    kind = request.param
    folder = tmp_path / "official"
    folder.mkdir()
    torch.save(official_projector(kind), folder / "mm_projector.bin")
    (folder / "config.json").write_text(json.dumps({"mm_projector_type": "mlp2x_gelu", **CONFIGS[kind]}), encoding="utf-8")
    return kind, folder / "mm_projector.bin"


def by_hand(kind, tensors, tower, pixels, embeds):
    """The features that the released code gives, in its own order of slots."""
    states = tower(pixels, output_hidden_states=True).hidden_states
    patches = [state[:, 1:] for state in states]
    if kind == "igva":
        aggregator = WeightAllocator(num_groups=2, vision_dim=D, text_dim=16, hidden_dim=32, num_blocks=1, num_heads=4)
        aggregator.load_state_dict({n.removeprefix("model.vision_aggregator."): t for n, t in tensors.items() if "aggreg" in n})
        means = torch.stack(
            [torch.stack([states[layer] for layer in group]).mean(0) for group in GROUPS], dim=1
        )  # (B, K, T, D)
        weights = aggregator(means[:, :, 0], embeds)
        features = torch.cat([patches[-2], (weights[:, :, None, None] * means[:, :, 1:]).sum(1)], dim=-1)
    elif kind == "dense_connector":
        features = torch.cat([patches[-2], (patches[0] + patches[1]) / 2, (patches[2] + patches[3]) / 2], dim=-1)
    elif kind == "mmfuser":
        block = MMFuserFusion((-4, -3, -2), D, num_layers=4)
        block.load_official_state_dict({n: t for n, t in tensors.items() if ".mm_projector.0." in n}, "model.mm_projector.0.")
        features = block(states, num_prefix_tokens=1)
    else:
        features = patches[-2]
    first, second = ("1", "3") if kind == "mmfuser" else ("0", "2")
    weight = {
        key: tensors[f"model.mm_projector.{key}"] for key in (f"{p}.{n}" for p in (first, second) for n in ("weight", "bias"))
    }
    hidden = nn.functional.gelu(nn.functional.linear(features, weight[f"{first}.weight"], weight[f"{first}.bias"]))
    return nn.functional.linear(hidden, weight[f"{second}.weight"], weight[f"{second}.bias"])


@pytest.mark.parametrize("projector_file", CONFIGS, indirect=True)
def test_an_official_projector_gives_the_features_of_its_code_and_returns_unchanged(projector_file, part_folders, tmp_path):
    kind, file = projector_file
    parts = {"vision_tower": part_folders["clip"], "language_model": part_folders["llama"]}
    tensors = read_tensors(file)
    pixels, embeds = torch.randn(2, 3, 28, 28), torch.randn(2, 16)
    expected = by_hand(kind, tensors, AutoModel.from_pretrained(part_folders["clip"]), pixels, embeds)
    models = []
    for order in dict.fromkeys((None, OTHER_ORDER.get(kind))):
        conversion = from_official(kind, file, **parts, order=order)
        models.append(conversion.model)
        assert conversion.record["projector_columns"] == ("as they were" if order is None else "permuted")
        assert conversion.record["order"] == (order or ("base_first" if kind in OTHER_ORDER else None))
        with torch.no_grad():
            features = conversion.model.get_image_features(pixels, embeds).pooler_output
        torch.testing.assert_close(features, expected, rtol=2e-5, atol=2e-6)
        back, _ = to_official(kind, conversion.model, vocab_size=261)
        for name, tensor in tensors.items():
            assert torch.equal(back[name], tensor), name
        assert back["model.embed_tokens.weight"].shape == (261, H)
    # The whole checkpoint, as the official code saves it, and from there again.
    whole = tmp_path / "whole"
    write_official(kind, models[-1], whole, vocab_size=261)
    AutoTokenizer.from_pretrained(part_folders["llama"]).save_pretrained(whole)
    again = from_official(kind, whole, vision_tower=part_folders["clip"])
    assert again.record["language_model"] == "in the checkpoint"
    words = torch.randint(0, 256, (1, 8))
    reference = AutoModelForCausalLM.from_pretrained(part_folders["llama"])(words).logits
    torch.testing.assert_close(again.model(words).logits[..., :261], reference, rtol=2e-5, atol=2e-6)
    with torch.no_grad():
        features = again.model.get_image_features(pixels, embeds).pooler_output
    torch.testing.assert_close(features, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("layer", [-2, [-2, 1]])
def test_transformers_llava_and_ours_give_the_same_logits_both_ways(layer, vision_configs, text_config):
    config = LlavaConfig(
        vision_config=vision_configs["clip"].to_dict(),
        text_config=text_config.to_dict(),
        image_token_id=261,
        vision_feature_layer=layer,
        image_seq_length=4,
    )
    llava = LlavaForConditionalGeneration(config).eval()
    ids = torch.randint(0, 256, (2, 12))
    ids[:, 2:6] = 261
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 28, 28)}
    with torch.no_grad():
        expected = llava(**inputs).logits
        model = from_llava(llava)
        assert model.config.fusion["type"] == ("llava" if layer == -2 else "layers")
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-6, atol=1e-6)
        back = to_llava(model)
        assert back.config.vision_feature_layer == layer
        torch.testing.assert_close(back(**inputs).logits, expected, rtol=1e-6, atol=1e-6)
    assert set(back.state_dict()) == set(llava.state_dict())


def test_what_llava_does_not_have_is_refused(make_model, vision_configs, text_config):
    with pytest.raises(ValueError, match="knows no fusion of type 'igva'"):
        to_llava(make_model())
    with pytest.raises(ValueError, match="has no token_pooling"):
        to_llava(make_model(fusion={"type": "llava"}, token_pooling=2))
    full = LlavaConfig(
        vision_config=vision_configs["clip"].to_dict(), text_config=text_config.to_dict(), vision_feature_select_strategy="full"
    )
    with pytest.raises(ValueError, match="drops 0 tokens, but a 'clip_vision_model' tower has 1"):
        from_llava(LlavaForConditionalGeneration(full))


@pytest.mark.parametrize("projector_file", ["llava"], indirect=True)
def test_checkpoints_that_do_not_fit_are_named(projector_file, part_folders, make_model):
    _, file = projector_file
    tensors = read_tensors(file)
    parts = {"vision_tower": part_folders["clip"], "language_model": part_folders["llama"]}
    with pytest.raises(ValueError, match="holds no language model"):
        from_official("llava", file, vision_tower=part_folders["clip"])
    with pytest.raises(ValueError, match=r"order must be None: llava concatenates no channels"):
        from_official("llava", file, **parts, order="fused_first")
    with pytest.raises(ValueError, match="kind must be one of 'llava', 'igva'"):
        from_official("cambrian", file, **parts)
    torch.save({name: tensor for name, tensor in tensors.items() if "2.bias" not in name}, file)
    with pytest.raises(ValueError, match=r"1 tensors are missing \(multi_modal_projector.linear_2.bias\)"):
        from_official("llava", file, **parts)
    torch.save({**tensors, "model.mm_projector.4.weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"a llava projector does not have: \['model.mm_projector.4.weight'\]"):
        from_official("llava", file, **parts)
    with pytest.raises(ValueError, match="igva computes the fusion 'igva'"):
        to_official("igva", make_model(fusion={"type": "llava"}))


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("the file's code ran",))


def test_no_code_of_a_file_runs(tmp_path):
    file = tmp_path / "mm_projector.bin"
    torch.save({"model.mm_projector.0.weight": Trap()}, file)
    with pytest.raises(pickle.UnpicklingError):
        read_tensors(file)


@pytest.mark.parametrize("projector_file", ["igva"], indirect=True)
def test_the_command_converts_and_records(projector_file, part_folders, tmp_path, capsys):
    _, file = projector_file
    out = tmp_path / "ours"
    command = ["convert", str(file), str(out), "--from=igva", "--order=fused_first"]
    assert main([*command, f"--vision_tower={part_folders['clip']}", f"--language_model={part_folders['llama']}"]) == 0
    record = json.loads((out / "conversion.json").read_text(encoding="utf-8"))
    assert (record["source_order"], record["order"], record["projector_columns"]) == ("base_first", "fused_first", "permuted")
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["fusion"]["order"] == "fused_first"
    assert main(["convert", str(out), str(tmp_path / "back"), "--to=igva", "--vocab_size=261"]) == 0
    back, original = read_tensors(tmp_path / "back"), read_tensors(file)
    assert all(torch.equal(back[name], tensor) for name, tensor in original.items())
    assert main([*command]) == 1  # not empty
    assert "is not empty" in capsys.readouterr().err
