"""The vision side as one file: every fusion, any batch, in a process that knows neither transformers nor this model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import igva_kernels.modules
from model import IgvaLlavaConfig, IgvaLlavaForConditionalGeneration
from model.cli.main import main
from model.export import RECORD, ExportReport, VisionSide, export_vision_side
from model.fusions import FUSIONS

ROOT = Path(igva_kernels.__file__).parents[1]
MOL = {"type": "mixture_of_layers", "text_dim": 16, "key_dim": 8}

FUSION_CASES = {
    "igva": {"type": "igva"},
    "igva stage 1": {"type": "igva", "stage": 1},
    "igva mean patch": {"type": "igva", "summary": "mean_patch"},
    "llava": {"type": "llava"},
    "layers": {"type": "layers", "layers": [-1, 0, 2]},
    "vip_llava": {"type": "vip_llava", "layers": [-2, 1, 4]},
    "dci": {"type": "dense_connector"},
    "sci": {"type": "dense_connector", "variant": "sci", "layers": [1]},
    "sti": {"type": "dense_connector", "variant": "sti", "layers": [1, 2], "strip": 2},
    "efficient": {"type": "dense_connector", "token_reduction": 2},
    "mmfuser": {"type": "mmfuser", "layers": [1, 2, -2], "num_heads": 4, "num_points": 2},
    "tgif": {"type": "tgif", "text_dim": 16, "router_dim": 8},
    "scalar_mix": {"type": "scalar_mix", "norm": "layer"},
    "mol layer": {**MOL, "level": "layer"},
    "mol patch": {**MOL, "level": "patch", "top_k": 3},
    "mol hybrid": {**MOL, "level": "hybrid"},
    "multi_layer_sum": {"type": "multi_layer_sum"},
}

OTHER_PROCESS = """
import sys
import torch
import igva_kernels.modules
found = torch.export.load(sys.argv[1]).module()(*torch.load(sys.argv[2]))
torch.save(found, sys.argv[3])
print(sorted({"transformers", "model"} & {name.partition(".")[0] for name in sys.modules}))
"""


def inputs_for(model, batch: int) -> tuple[torch.Tensor, ...]:
    pixels, embeds = torch.randn(batch, 3, 28, 28), torch.randn(batch, 16)
    return (pixels, embeds) if model.reads_instruction else (pixels,)


def in_another_process(file: Path, inputs, folder: Path) -> dict[str, torch.Tensor]:
    torch.save(inputs, folder / "inputs.pt")
    command = [sys.executable, "-c", OTHER_PROCESS, str(file), str(folder / "inputs.pt"), str(folder / "outputs.pt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    return torch.load(folder / "outputs.pt")


def test_there_is_a_case_for_every_type():
    assert {options["type"] for options in FUSION_CASES.values()} == set(FUSIONS)


def check_file(model, file: Path, report: ExportReport) -> None:
    """The file against eager, on batches that it was not recorded with."""
    assert report.error <= 64 * torch.finfo(torch.float32).eps * report.largest
    loaded = torch.export.load(file).module()
    for batch in (1, 3):
        inputs = inputs_for(model, batch)
        with torch.no_grad():
            found, expected = loaded(*inputs), model.get_image_features(*inputs)
        torch.testing.assert_close(found["image_tokens"], expected.pooler_output, atol=1e-5, rtol=1e-5)
        assert ("group_weights" in found) == (expected.fusion_weights is not None)
        if "group_weights" in found:
            torch.testing.assert_close(found["group_weights"], expected.fusion_weights, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("case", FUSION_CASES)
def test_every_fusion_gives_what_eager_gives(case, make_model, tmp_path):
    model = make_model(fusion=FUSION_CASES[case])
    report = export_vision_side(model, tmp_path / "vision.pt2")
    check_file(model, tmp_path / "vision.pt2", report)
    # STI is torch's own cut, mean and concatenation.
    assert any(name.startswith("igva.") for name in report.operators) == (case != "sti")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["igva", "mmfuser", "mol hybrid"])
def test_the_file_runs_where_only_igva_kernels_is_imported(case, make_model, tmp_path):
    model = make_model("dinov2", fusion=FUSION_CASES[case])
    export_vision_side(model, tmp_path / "vision.pt2")
    inputs = inputs_for(model, 3)
    found = in_another_process(tmp_path / "vision.pt2", inputs, tmp_path)
    with torch.no_grad():
        expected = model.get_image_features(*inputs)
    torch.testing.assert_close(found["image_tokens"], expected.pooler_output, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def exported(vision_configs, text_config, tmp_path_factory):
    """IGVA in stage 2, and its file."""
    torch.manual_seed(0)
    fusion = {"type": "igva", "num_groups": 2, "text_dim": 16, "hidden_dim": 32, "num_blocks": 1}
    configs = {"vision_config": vision_configs["clip"].to_dict(), "text_config": text_config.to_dict()}
    model = IgvaLlavaForConditionalGeneration(IgvaLlavaConfig(**configs, fusion=fusion, image_token_id=261)).eval()
    file = tmp_path_factory.mktemp("exported") / "vision.pt2"
    return model, file, export_vision_side(model, file)


def test_a_file_gives_what_eager_gives_for_batches_of_any_size(exported):
    model, file, report = exported
    check_file(model, file, report)
    assert set(report.operators) == {"igva.fuse", "igva.group_summaries", "igva.reduce_groups"}


def test_the_instruction_moves_the_tokens_and_the_language_model_stays_out(exported):
    model, file, _ = exported
    program = torch.export.load(file)
    assert not [name for name in program.state_dict if "language_model" in name or "lm_head" in name]
    pixels, embeds = inputs_for(model, 2)
    first, other = (program.module()(pixels, value)["image_tokens"] for value in (embeds, -embeds))
    assert (first - other).abs().max() > 1e-4


def test_the_file_says_what_it_takes_and_gives(exported):
    extra = {RECORD: ""}
    torch.export.load(exported[1], extra_files=extra)
    record = json.loads(extra[RECORD])
    assert record["inputs"] == {"pixel_values": "float32 (batch, 3, 28, 28)", "instruction_embeds": "float32 (batch, 16)"}
    assert record["outputs"] == {"image_tokens": "float32 (batch, 4, 64)", "group_weights": "float32 (batch, 2)"}


def test_the_model_itself_stays_as_it_was(make_model, make_batch):
    model = make_model()
    side = VisionSide(model)
    assert "language_model" not in dict(side.model.named_children())
    assert "language_model" in dict(model.model.named_children())
    assert make_batch(model) and model(**make_batch(model)).loss.isfinite()


@pytest.mark.slow
def test_in_bfloat16(make_model, tmp_path):
    report = export_vision_side(make_model().to(torch.bfloat16), tmp_path / "vision.pt2")
    assert report.record["inputs"]["pixel_values"] == "bfloat16 (batch, 3, 28, 28)"
    assert report.error <= 64 * torch.finfo(torch.bfloat16).eps * report.largest


def test_a_file_that_is_there_or_of_another_name_is_refused(make_model, tmp_path):
    (tmp_path / "there.pt2").write_text("mine")
    with pytest.raises(FileExistsError, match="is there already"):
        export_vision_side(make_model(), tmp_path / "there.pt2")
    with pytest.raises(ValueError, match=r"must end in \.pt2"):
        export_vision_side(make_model(), tmp_path / "vision.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there.pt2"]


@pytest.mark.slow
def test_a_file_that_gives_something_else_is_not_written(make_model, tmp_path, monkeypatch):
    save = torch.export.save

    def save_another(exported, *arguments, **options):
        with torch.no_grad():
            exported.state_dict["model.multi_modal_projector.linear_2.bias"].add_(1.0)
        save(exported, *arguments, **options)
        with torch.no_grad():
            exported.state_dict["model.multi_modal_projector.linear_2.bias"].sub_(1.0)

    monkeypatch.setattr(torch.export, "save", save_another)
    with pytest.raises(RuntimeError, match="differs from the model"):
        export_vision_side(make_model(), tmp_path / "vision.pt2")
    assert not list(tmp_path.iterdir())


def test_the_command(make_model, make_processor, tmp_path, capsys):
    model = make_model()
    model.save_pretrained(tmp_path / "checkpoint")
    make_processor(model.config).save_pretrained(tmp_path / "checkpoint")
    assert main(["export", str(tmp_path / "checkpoint"), str(tmp_path / "vision.pt2")]) == 0
    out = capsys.readouterr().out
    assert "input   pixel_values: float32 (batch, 3, 28, 28)" in out
    assert "largest difference from eager: " in out and "igva." in out
    extra = {RECORD: ""}
    torch.export.load(tmp_path / "vision.pt2", extra_files=extra)
    assert len(json.loads(extra[RECORD])["pictures"]["mean"]) == 3
    assert main(["export", str(tmp_path / "checkpoint"), str(tmp_path / "vision.pt2")]) == 1
    assert "is there already" in capsys.readouterr().err
