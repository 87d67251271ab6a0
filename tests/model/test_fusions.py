"""Every fusion type that a model can be configured with: what it makes, what learns, and that it survives saving."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, CLIPVisionConfig, SiglipVisionConfig

from igva_kernels import functional
from model import IgvaLlavaConfig
from model.fusions import FUSIONS, complete_options, takes_text

WIDTH = 32  # of the tiny tower
IGVA = {"type": "igva", "num_groups": 2, "text_dim": 16, "hidden_dim": 32, "num_blocks": 1}
MOL = {"type": "mixture_of_layers", "text_dim": 16, "key_dim": 8}

#: Options for a tower of 4 layers and 2 x 2 patches, channels of a fused token, and tokens of an image.
CASES = {
    "igva": (IGVA, 2 * WIDTH, 4),
    "llava": ({"type": "llava"}, WIDTH, 4),
    "layers": ({"type": "layers", "layers": [-1, 0, 2]}, 3 * WIDTH, 4),
    "vip_llava": ({"type": "vip_llava", "layers": [-2, 1, 4]}, 3 * WIDTH, 4),
    "dci": ({"type": "dense_connector"}, 3 * WIDTH, 4),
    "dci_last": ({"type": "dense_connector", "order": "base_last", "num_groups": 4}, 5 * WIDTH, 4),
    "sci": ({"type": "dense_connector", "variant": "sci", "layers": [1]}, 2 * WIDTH, 4),
    "sti": ({"type": "dense_connector", "variant": "sti", "layers": [1, 2], "strip": 2}, WIDTH, 8),
    "efficient": ({"type": "dense_connector", "token_reduction": 2}, 3 * WIDTH, 1),
    "mmfuser": ({"type": "mmfuser", "layers": [1, 2, -2], "num_heads": 4, "num_points": 2}, WIDTH, 4),
    "tgif": ({"type": "tgif", "text_dim": 16, "router_dim": 8}, WIDTH, 4),
    "scalar_mix": ({"type": "scalar_mix", "norm": "layer"}, WIDTH, 4),
    "mol_layer": ({**MOL, "level": "layer"}, WIDTH, 4),
    "mol_patch": ({**MOL, "level": "patch", "top_k": 3}, WIDTH, 4),
    "mol_hybrid": ({**MOL, "level": "hybrid"}, WIDTH, 4),
    "multi_layer_sum": ({"type": "multi_layer_sum"}, WIDTH, 4),
}


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return CASES[request.param]


def without_labels(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


def randomize(model):
    """Move parameters away from initial values such as zero scales, which would hide what they multiply."""
    with torch.no_grad():
        for parameter in (model.model.fusion or torch.nn.Identity()).parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_there_is_a_case_for_every_type():
    assert {options["type"] for options, _, _ in CASES.values()} == set(FUSIONS)


def test_width_tokens_loss_and_gradients(case, make_model, make_batch):
    fusion, width, tokens = case
    model = randomize(make_model(fusion=fusion)).train()
    assert model.model.multi_modal_projector.linear_1.in_features == width
    assert model.config.num_image_tokens == tokens
    batch = make_batch(model, length=24)
    output = model(**batch)
    assert output.image_hidden_states.shape == (2, tokens, 64)
    output.loss.backward()
    trained = [
        *model.model.multi_modal_projector.named_parameters(),
        *(model.model.fusion or torch.nn.Module()).named_parameters(),
    ]
    for name, parameter in trained:
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if "query.weight" not in name and "bias" not in name:
            assert parameter.grad.any(), name


def test_saved_and_loaded_it_gives_the_same_logits_and_generates(case, make_model, make_batch, tmp_path):
    fusion, _, _ = case
    model = randomize(make_model(fusion=fusion))
    inputs = without_labels(make_batch(model, length=24))
    expected = model(**inputs)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).fusion == model.config.fusion
    loaded, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(loaded(**inputs).logits, expected.logits)
    new = loaded.generate(**inputs, max_new_tokens=1, do_sample=False, eos_token_id=None, pad_token_id=256)
    assert torch.equal(new[:, -1], expected.logits[:, -1].argmax(-1))


def test_layer_by_layer_it_gives_the_bits_of_the_tuple(case, make_model, make_batch):
    fusion, _, _ = case
    features = []
    for streaming in (True, False):
        model = randomize(make_model(fusion={**fusion, "streaming": streaming})).requires_grad_(False)
        inputs = make_batch(model, length=24)
        torch.manual_seed(1)
        features.append(model.get_image_features(inputs["pixel_values"], inputs["instruction_embeds"]))
        torch.manual_seed(0)
    assert torch.equal(features[0].pooler_output, features[1].pooler_output)


@pytest.mark.parametrize("streaming", [True, False])
def test_the_norm_before_the_projector_is_part_of_the_pass(case, streaming, make_model, make_batch, monkeypatch):
    """As the norm on its own, with gradients; a hook on it, or pooling in between, and it runs on its own."""
    fusion, _, _ = case
    model = randomize(make_model(fusion={**fusion, "streaming": streaming}, projector_input_norm=True))
    model.model.vision_tower.requires_grad_(False)
    norm = model.model.multi_modal_projector.input_norm
    with torch.no_grad():
        norm.weight.add_(0.1 * torch.randn_like(norm.weight))
        norm.bias.add_(0.1 * torch.randn_like(norm.bias))
    parameters = [norm.weight, norm.bias, *(model.model.fusion or torch.nn.Identity()).parameters()]
    inputs, calls = make_batch(model, length=24), []
    monkeypatch.setattr(functional, "_fuse_normalised", counted(functional._fuse_normalised, calls))

    def run():
        calls.clear()
        features = model.get_image_features(inputs["pixel_values"], inputs["instruction_embeds"]).pooler_output
        return features.detach(), torch.autograd.grad(features.square().mean(), parameters, allow_unused=True)

    own_norm = fusion["type"] in ("tgif", "vip_llava")
    apart = fusion["type"] in ("mmfuser", "multi_layer_sum") or fusion.get("variant") == "sti"
    features, grads = run()
    assert bool(calls) == (own_norm or not apart)
    with norm.register_forward_hook(lambda *_: calls.append("hook")):
        expected, expected_grads = run()
        assert "hook" in calls
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-3, atol=1e-5)


def test_pooling_comes_before_the_norm(make_model, make_batch, monkeypatch):
    model = make_model(fusion={"type": "llava"}, projector_input_norm=True, token_pooling=2)
    inputs, calls = make_batch(model, length=24), []
    monkeypatch.setattr(functional, "_fuse_normalised", counted(functional._fuse_normalised, calls))
    assert model.get_image_features(inputs["pixel_values"]).pooler_output.shape[1] == 1
    assert not calls


def counted(function, calls):
    def call(*arguments):
        calls.append("fused")
        return function(*arguments)

    return call


def test_only_what_reads_the_instruction_depends_on_it(case, make_model, make_batch):
    fusion, _, _ = case
    model = randomize(make_model(fusion=fusion))
    batch = make_batch(model, length=24)
    first, second = (
        model.get_image_features(batch["pixel_values"], embeds).pooler_output
        for embeds in (batch["instruction_embeds"], 3 * batch["instruction_embeds"].flip(0))
    )
    assert torch.equal(first, second) == (not model.reads_instruction)
    assert takes_text(fusion) == model.reads_instruction


def test_without_an_instruction_every_layer_weighs_the_same(make_model, make_batch):
    for name in ("tgif", "mol_hybrid"):
        model = make_model(fusion=CASES[name][0])
        batch = make_batch(model)
        output = model.get_image_features(batch["pixel_values"])
        assert output.fusion_weights.eq(1 / 4).all()
        states = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states
        mean = torch.stack(states[1:]).mean(0)[:, 1:]
        fused = model.model.fusion.norm(mean + states[-2][:, 1:]) if name == "tgif" else mean
        torch.testing.assert_close(output.pooler_output, model.model.multi_modal_projector(fused), rtol=2e-5, atol=2e-6)


def test_images_may_share_a_sentence(make_model, make_batch):
    owners = torch.tensor([1, 0])
    for name in ("igva", "tgif", "mol_patch"):
        model = randomize(make_model(fusion=CASES[name][0]))
        batch = make_batch(model)
        pixels, embeds = batch["pixel_values"], batch["instruction_embeds"]
        shared = model.get_image_features(pixels, embeds, owners)
        assert torch.equal(shared.pooler_output, model.get_image_features(pixels, embeds[owners]).pooler_output)


def test_only_igva_has_stages(case, make_model):
    fusion, _, _ = case
    model = make_model(fusion=fusion)
    if fusion["type"] == "igva":
        model.set_fusion_stage(1)
        assert not model.reads_instruction
    else:
        with pytest.raises(ValueError, match="has no stages; only 'igva' has"):
            model.set_fusion_stage(1)


def test_a_training_batch_without_images_touches_all_that_learns(case, make_model, make_batch):
    fusion, _, _ = case
    model = make_model(fusion=fusion).train()
    model.model.vision_tower.requires_grad_(False)
    model(**make_batch(model, images_per_row=(0, 0))).loss.backward()
    for name, parameter in model.named_parameters():
        if "vision_tower" not in name:
            assert parameter.grad is not None, name


def test_the_processor_makes_as_many_placeholders(case, make_config, make_processor, tmp_path):
    fusion, _, tokens = case
    processor = make_processor(make_config(fusion=fusion))
    processor.save_pretrained(tmp_path)
    for each in (processor, AutoProcessor.from_pretrained(tmp_path)):
        assert each.num_image_tokens() == tokens


def test_the_published_towers_give_the_published_numbers_of_tokens():
    def tokens(fusion, **tower):
        return IgvaLlavaConfig(
            vision_config=tower or None, fusion=fusion, image_size=tower.get("image_size", 336)
        ).num_image_tokens

    clip = CLIPVisionConfig(
        num_hidden_layers=24, hidden_size=1024, num_attention_heads=16, image_size=336, patch_size=14
    ).to_dict()
    siglip = SiglipVisionConfig(
        num_hidden_layers=26, hidden_size=1152, num_attention_heads=16, image_size=384, patch_size=14
    ).to_dict()
    assert tokens({"type": "dense_connector", "variant": "sti"}, **clip) == 720
    assert tokens({"type": "dense_connector", "variant": "sti", "base": -1}, **siglip) == 911
    assert tokens({"type": "dense_connector", "token_reduction": 2}, **clip) == 144
    assert tokens({"type": "mmfuser"}, **clip) == 576


def test_new_parts_in_a_plain_checkpoint_begin_as_their_modules_begin(make_model, make_config, tmp_path):
    make_model(fusion={"type": "llava"}).save_pretrained(tmp_path)
    for name in ("mmfuser", "scalar_mix", "mol_hybrid"):
        config = make_config(fusion=CASES[name][0])
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=True)
        fusion = loaded.model.fusion
        assert all(parameter.isfinite().all() for parameter in fusion.parameters())
        if name == "mmfuser":
            assert fusion.cross_scale.eq(0).all() and fusion.self_scale.eq(0).all()
            assert fusion.cross_attn.sampling_offsets.weight.eq(0).all()
            assert fusion.cross_attn.sampling_offsets.bias.abs().max() == 2  # the ring of the second of two points
        elif name == "scalar_mix":
            assert fusion.weights.eq(0).all() and fusion.scale.eq(1).all()
        else:
            assert fusion.blend.weight.eq(0).all() and fusion.key_weight.std() > 0.01


@pytest.mark.parametrize(
    ("fusion", "text"),
    [
        ({"type": "dense"}, r"'dense' is unknown, expected one of \['dense_connector', 'igva', 'layers', 'llava'"),
        ({"type": "dense_connector", "variant": "xci"}, "variant must be one of 'sti', 'sci', 'dci'"),
        ({"type": "dense_connector", "layers": [1]}, r"unknown keys \['layers'\]; type 'dense_connector' knows .*'num_groups'"),
        (
            {"type": "dense_connector", "variant": "sti", "order": "base_last"},
            r"unknown keys \['order'\]; .*variant 'sti', knows",
        ),
        ({"type": "dense_connector", "token_reduction": 0}, "token_reduction must be None or an int"),
        ({"type": "layers"}, "needs layers"),
        ({"type": "mmfuser", "points": 4}, r"unknown keys \['points'\]"),
        ({"type": "scalar_mix", "norm": "batch"}, "norm must be one of None, 'layer', 'rms'"),
        ({"type": "mixture_of_layers", "level": "token"}, "level must be one of"),
        ({"type": "llava", "stage": 1}, r"unknown keys \['stage'\]"),
    ],
)
def test_wrong_options_are_named(fusion, text):
    with pytest.raises(ValueError, match=text):
        complete_options(fusion)


def test_layers_that_the_tower_lacks_are_refused_by_the_config(make_config):
    with pytest.raises(ValueError, match="layer 7 does not exist"):
        make_config(fusion={"type": "dense_connector", "variant": "sti"})
    with pytest.raises(ValueError, match="layer -22 does not exist"):
        make_config(fusion={"type": "mmfuser"})


def test_pooling_squares_of_tokens_that_are_no_map_is_refused(make_config):
    with pytest.raises(ValueError, match="tokens of DenseConnector STI are none"):
        make_config(fusion=CASES["sti"][0], token_pooling=2)
    with pytest.raises(ValueError, match=r"token_reduction=2 does not divide the 1 x 1 patches"):
        make_config(fusion=CASES["efficient"][0], token_pooling=2)


def test_the_page_names_every_type_and_option():
    page = (Path(__file__).parents[2] / "docs" / "fusions.md").read_text(encoding="utf-8")
    for options, _, _ in CASES.values():
        name = options["type"]
        rows = [line for line in page.splitlines() if line.startswith(f"| `{name}`") and options.get("variant", "") in line]
        named = " ".join(rows).replace(":", " ").replace(",", " ").replace("`", " ").split()
        assert rows and set(FUSIONS[name].defaults(options)) <= set(named), name
