"""The comparison of fusions: what it says, what it refuses, and one process for each."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from rich.console import Console

from model.cli.main import main as cli
from model.fusions import complete_options, make_fusion
from model.quickstart import compare
from model.quickstart.parts import Parts
from model.quickstart.run import Folders


def result(accuracy: float, error: float = 0.02) -> dict:
    score = {"count": 400, "accuracy": accuracy, "standard_error": error, "fusion_weights": None}
    return {
        "scores": {"object": score, "overall": score},
        "image_tokens": 16,
        "parameters": {"projector": {"trainable": 1_500_000, "frozen": 0}},
        "seconds": {"warm start": 85.0, "stage 2": 200.4, "evaluation": 50.0},
        "peak_memory_gb": 2.5,
    }


def test_the_table_shows_accuracy_with_its_error_time_and_memory():
    console = Console(width=80)
    results = {"llava": result(0.5), "dense_connector": result(0.5), "mmfuser": result(0.5), "igva": result(0.625)}
    with console.capture() as shown:
        console.print(compare.comparison_table(results))
    lines = shown.get().splitlines()
    rows = {cells[0].strip(): cells[-1].strip() for cells in (line.strip("│┃").split("│") for line in lines) if len(cells) == 5}
    assert rows["overall"] == "62.5 ± 2.0"
    expected = {
        "image tokens": "16",
        "trained, M": "1.5",
        "warm start, s": "85",
        "stage 2, s": "200",
        "peak memory, GB": "2.50",
    }
    assert expected.items() <= rows.items()


def test_no_ranking_within_the_error_bars():
    close = compare.verdict({"llava": result(0.50), "igva": result(0.55)})
    assert close == "no two fusions differ by more than two standard errors: this run ranks none of them"
    apart = compare.verdict({"llava": result(0.50), "mmfuser": result(0.55), "igva": result(0.60)})
    assert "igva over llava: 10.0 ± 2.8 points" in apart
    assert "mmfuser" not in apart


def test_fusions_are_checked_before_anything_runs(capsys):
    assert cli(["compare", "--fusions=igva,vista"]) == 1
    assert "no fusion 'vista' to compare; there are llava, dense_connector, mmfuser, igva" in capsys.readouterr().err
    assert cli(["compare", "--fusions=igva,igva"]) == 1
    assert "named twice" in capsys.readouterr().err


@pytest.mark.parametrize("name", compare.FUSIONS)
def test_every_fusion_fits_the_tower_of_the_quickstart(name):
    fusion = make_fusion(complete_options(compare.FUSIONS[name]), num_layers=12, vision_dim=384)
    assert fusion.width % 384 == 0
    fusion.make_module()


def test_each_fusion_runs_in_its_own_process_and_a_twin_after_its_model(tmp_path, monkeypatch):
    ran = []
    folders = Folders(tmp_path, smoke=True)

    def run(command, check):
        name = next(part.removeprefix("--fusions=") for part in command if part.startswith("--fusions="))
        ran.append(name)
        assert {"--one", "--smoke", f"--folder={tmp_path}"} <= set(command)
        compare.result_file(folders, name).write_text(json.dumps(result(0.5)), encoding="utf-8")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(compare.subprocess, "run", run)
    monkeypatch.setattr(compare, "prepare_parts", lambda *args, **kwargs: Parts("a", "b", "c"))
    monkeypatch.setattr(compare, "make_pictures", lambda *args, **kwargs: None)
    assert compare.main(["--smoke", "--fusions=mmfuser,llava", f"--folder={tmp_path}"]) == 0
    assert ran == ["llava", "mmfuser"]
    saved = json.loads((tmp_path / "comparison-smoke.json").read_text(encoding="utf-8"))
    assert list(saved["fusions"]) == ["mmfuser", "llava"] and saved["smoke"] is True
    assert (tmp_path / "comparison-smoke.png").read_bytes().startswith(b"\x89PNG")

    monkeypatch.setattr(compare.subprocess, "run", lambda command, check: SimpleNamespace(returncode=3))
    with pytest.raises(RuntimeError, match="run of igva ended with exit status 3"):
        compare.main(["--smoke", "--fusions=igva", f"--folder={tmp_path}"])
