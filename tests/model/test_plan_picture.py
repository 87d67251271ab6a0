"""``igva plan --picture`` and the picture of a model's fusion."""

from __future__ import annotations

import re

import pytest

from model.plan_picture import save_fusion_picture

pytest.importorskip("matplotlib", reason="matplotlib is not installed: the pictures of plans are not drawn")


def words(path) -> set[str]:
    return set(re.findall(r">([^<>\n]+)</text>", path.read_text(encoding="utf-8")))


def test_the_stage_decides_between_mean_and_weights(make_config, tmp_path):
    config = make_config("clip")
    for stage in (1, 2):
        save_fusion_picture(config, tmp_path / f"{stage}.svg", stage=stage)
    assert {"igva, stage 1", "mean of 4 layers", "h3, copied"} <= words(tmp_path / "1.svg")
    assert {"igva, stage 2", "weighted sum of 2 means", "weights per image", "w₂/2"} <= words(tmp_path / "2.svg")


@pytest.mark.parametrize(
    ("fusion", "text"),
    [
        ({"type": "scalar_mix"}, "one set of weights for all"),
        ({"type": "mixture_of_layers", "text_dim": 16}, "weights per token"),
        ({"type": "mixture_of_layers", "text_dim": 16, "level": "layer"}, "weights per image"),
        ({"type": "llava"}, "h3, copied"),
    ],
)
def test_what_the_weights_are_for(make_config, fusion, text, tmp_path):
    save_fusion_picture(make_config("clip", fusion=fusion), tmp_path / "plan.svg")
    assert text in words(tmp_path / "plan.svg")


@pytest.mark.parametrize(
    "fusion",
    [{"type": "mmfuser", "layers": [1, 2, 3]}, {"type": "dense_connector", "variant": "sti", "layers": [1, 2], "strip": 2}],
)
def test_a_fusion_that_is_no_mix_has_no_picture(make_config, fusion, tmp_path):
    with pytest.raises(ValueError, match=r"reads h1, h2, h3 and is no mix of layers token by token"):
        save_fusion_picture(make_config("clip", fusion=fusion), tmp_path / "plan.svg")
    assert not list(tmp_path.iterdir())
