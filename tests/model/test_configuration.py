"""The configuration: defaults are filled in, contradictions are refused where they are written down."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import transformers
from transformers import AutoConfig, CLIPConfig, CLIPVisionConfig, Dinov2WithRegistersConfig, SiglipVisionConfig, ViTMAEConfig

from igva_kernels import FusionPlan
from model import IgvaLlavaConfig, _hf_compat
from model._hf_compat import check_version, load_image_processor, pil_image_processor
from model.configuration import num_prefix_tokens_of

ROOT = Path(__file__).resolve().parents[2]
OLDEST, SETUP = ROOT / "constraints-oldest.txt", ROOT / "setup.py"

SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}


def test_saved_config_equals_the_loaded_one(make_config, tmp_path):
    fusion = {"groups": ((1, 2), (3, 4)), "order": "base_first"}
    config = make_config("dinov2", fusion, token_pooling=2, balance_loss_weight=0.02)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is IgvaLlavaConfig
    assert loaded.fusion == config.fusion
    assert loaded.fusion_plan() == config.fusion_plan()
    assert (loaded.token_pooling, loaded.balance_loss_weight, loaded.num_prefix_tokens) == (2, 0.02, 1)
    assert loaded.vision_config.to_dict() == config.vision_config.to_dict()
    assert loaded.text_config.to_dict() == config.text_config.to_dict()


def test_missing_fusion_keys_take_the_published_sizes():
    fusion = IgvaLlavaConfig(fusion={"num_groups": 3}).fusion
    assert fusion["num_groups"] == 3
    assert (fusion["base"], fusion["order"], fusion["stage"]) == (-2, "fused_first", 2)
    assert (fusion["text_dim"], fusion["hidden_dim"], fusion["num_blocks"], fusion["num_heads"]) == (768, 1024, 4, 4)


@pytest.mark.parametrize(
    ("fusion", "text"),
    [
        ({"type": "dense"}, "fusion type 'dense' is unknown"),
        ({"groups_": 4}, r"unknown keys \['groups_'\]"),
        ({"stage": 3}, "stage must be 1"),
        ({"num_groups": 3}, "does not cut 4 layers"),
        ({"type": "llava", "layer": 9}, "layer 9 does not exist"),
        ({"order": "middle"}, "order must be"),
        ({"summary": "max"}, "summary must be"),
    ],
)
def test_a_wrong_fusion_is_named(make_config, fusion, text):
    with pytest.raises(ValueError, match=text):
        make_config(fusion=fusion)


def test_fusion_must_be_a_dict(vision_configs):
    with pytest.raises(TypeError, match="fusion must be a dict"):
        IgvaLlavaConfig(vision_config=vision_configs["clip"], fusion="igva")


def test_prefix_tokens_come_from_the_model_type():
    assert num_prefix_tokens_of(CLIPVisionConfig(**SMALL)) == 1
    assert num_prefix_tokens_of(Dinov2WithRegistersConfig(**SMALL, num_register_tokens=4)) == 5
    assert num_prefix_tokens_of(SiglipVisionConfig(**SMALL)) == 0
    with pytest.raises(ValueError, match=r"'vit_mae'.*pass num_prefix_tokens="):
        num_prefix_tokens_of(ViTMAEConfig(**SMALL))


def test_unknown_towers_work_with_the_number_given(make_config):
    config = make_config(vision_config=ViTMAEConfig(**SMALL), num_prefix_tokens=1)
    assert config.num_prefix_tokens == 1


def test_cls_summaries_need_a_cls_token(make_config):
    tower = SiglipVisionConfig(**SMALL)
    with pytest.raises(ValueError, match="mean_patch"):
        make_config(vision_config=tower)
    assert make_config(vision_config=tower, fusion={"summary": "mean_patch"}).num_prefix_tokens == 0


def test_the_vision_half_of_a_full_clip_config_is_taken(vision_configs):
    full = CLIPConfig(vision_config=vision_configs["clip"].to_dict())
    assert IgvaLlavaConfig(vision_config=full).vision_config.model_type == "clip_vision_model"
    assert IgvaLlavaConfig(vision_config=full.to_dict()).vision_config.num_hidden_layers == 4


@pytest.mark.parametrize(("image_size", "token_pooling", "tokens"), [(28, None, 4), (28, 2, 1), (42, 3, 1), (42, None, 9)])
def test_number_of_image_tokens(make_config, image_size, token_pooling, tokens):
    assert make_config(image_size=image_size, token_pooling=token_pooling).num_image_tokens == tokens


def test_pooling_that_does_not_divide_the_grid_is_refused(make_config):
    with pytest.raises(ValueError, match=r"token_pooling=2 does not divide the 3 x 3 patches.*multiple of 28"):
        make_config(image_size=42, token_pooling=2)


def test_stage_one_is_the_plain_average_for_equal_groups_only(make_config):
    config = make_config(fusion={"stage": 1})
    assert config.fusion_plan() == FusionPlan.igva_average(4, 2)
    assert config.fusion_plan(stage=2) == FusionPlan.igva(4, 2)
    uneven = make_config(fusion={"stage": 1, "groups": [[1], [2, 3, 4]]})
    assert uneven.fusion_plan() == FusionPlan.igva(4, groups=[[1], [2, 3, 4]])
    assert uneven.fusion["num_groups"] == 2


def test_tied_embeddings_are_taken_from_the_language_model(make_config):
    assert make_config().tie_word_embeddings


@pytest.mark.parametrize("version", ["5.9.2", "4.57.0", "6.0.0.dev0"])
def test_a_transformers_outside_the_range_is_refused(version):
    with pytest.raises(ImportError, match=rf"needs transformers>=5\.10,<6, found {version}"):
        check_version(version)


def test_the_range_is_asked_on_import(monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "4.57.0")
    spec = importlib.util.spec_from_file_location("a_copy", _hf_compat.__file__)
    with pytest.raises(ImportError, match=r"found 4\.57\.0; install a version of that range"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_the_lowest_versions_that_are_tested_are_the_lowest_that_setup_admits():
    """`make test-transformers-oldest` installs those of constraints-oldest.txt."""
    pinned = dict(line.split("==") for line in OLDEST.read_text().splitlines() if line and not line.startswith("#"))
    admitted = dict(re.findall(r'"([a-z-]+)>=([\d.]+)', SETUP.read_text()))
    for name in ("transformers", "accelerate", "peft", "sentence-transformers"):
        lowest = admitted[name].split(".")
        assert pinned[name].split(".")[: len(lowest)] == lowest, name


@pytest.mark.parametrize("version", ["5.10.0", "5.23.0"])
def test_a_transformers_inside_the_range_is_taken(version):
    check_version(version)


@pytest.mark.parametrize("name", ["CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil"])
def test_every_name_of_an_image_processor_gives_the_pil_one(name):
    values = {"image_processor_type": name, "size": {"shortest_edge": 30}}
    processor = load_image_processor(values)
    assert type(processor) is pil_image_processor("CLIPImageProcessor")
    assert processor.size["shortest_edge"] == 30


def test_unknown_image_processors_are_named():
    with pytest.raises(ValueError, match="no image processor 'NoSuchProcessor'"):
        pil_image_processor("NoSuchProcessor")
    with pytest.raises(ValueError, match="names no image_processor_type"):
        load_image_processor({})
