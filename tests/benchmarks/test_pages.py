"""The pages that show measured figures: written from the result files, and up to date."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from benchmarks.pages import PAGES, fill, main
from benchmarks.record import read_json
from benchmarks.targets import TARGETS, measured_cases, outcomes, slower_than

ROOT = Path(__file__).parents[2]
EMPTY = "before\n<!-- measured: {} -->\nstale\n<!-- end of measured -->\nafter\n"


def fuse_case(
    variant: str, seconds: float, *, mode: str = "forward", batch: int = 16, dtype: str = "bfloat16", **metrics
) -> dict:
    name = f"fuse CLIP-L/14-336 B={batch} {dtype} stage 2 {mode}"
    parameters = {"tower": "CLIP-L/14-336", "batch": batch, "dtype": dtype, "stage": 2, "mode": mode, "variant": variant}
    found = {"median_s": seconds, "low_s": seconds, "high_s": seconds, **metrics}
    return {"name": f"{name}: {variant}", "parameters": parameters, "status": "ok", "metrics": found}


@pytest.fixture
def cpu_kernels() -> dict:
    return read_json(ROOT / "benchmarks" / "results" / "cpu-kernels.json")


@pytest.fixture
def card(cpu_kernels: dict) -> dict:
    """A result file as a card would leave it, with figures that are made up."""
    document = copy.deepcopy(cpu_kernels)
    document["machine"]["device"] = "NVIDIA H200"
    document["cases"] = [
        fuse_case("igva_kernels", 1e-4, share_of_copy=0.96, times_faster_than_official_eager=4.5, peak_maps=2.0),
        fuse_case("official eager", 4.5e-4, peak_maps=24.0),
        fuse_case("torch.compile", 2e-4, peak_maps=30.0),
        fuse_case("torch.compile max-autotune", 9e-5, peak_maps=30.0),
        fuse_case("igva_kernels", 2e-4, mode="frozen backward", share_of_copy=0.91, peak_maps=0.0),
        fuse_case("igva_kernels", 3e-4, mode="frozen", share_of_copy=0.85, times_faster_than_official_eager=3.5, peak_maps=6.0),
    ]
    return document


def test_pages_show_what_the_results_hold() -> None:
    assert main(["--check"]) == 0, "run python -m benchmarks.pages"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_page_has_a_block(page: Path) -> None:
    assert "<!-- measured: " in page.read_text()


def test_a_stale_page_is_found_and_then_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(EMPTY.format("figures-cpu"))
    assert main(["--check", str(page)]) == 1
    assert "does not show" in capsys.readouterr().err and "stale" in page.read_text()
    assert main([str(page)]) == 0 and main(["--check", str(page)]) == 0
    text = page.read_text()
    assert "stale" not in text and text.startswith("before\n") and text.endswith("<!-- end of measured -->\nafter\n")


def test_an_unknown_block_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(EMPTY.format("figures-abacus"))
    assert main([str(page)]) == 2
    assert "figures-abacus" in capsys.readouterr().err and "stale" in page.read_text()


def test_results_that_cannot_be_read_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.json").write_text("{")
    page = tmp_path / "page.md"
    page.write_text(EMPTY.format("performance"))
    assert main(["--results", str(tmp_path), str(page)]) == 2
    assert capsys.readouterr().err and "stale" in page.read_text()


def test_the_headline(cpu_kernels: dict, card: dict) -> None:
    text = fill(EMPTY.format("headline"), [cpu_kernels])
    assert "* **On a GPU: nothing has been measured yet.**" in text and "* **On a CPU** (" in text
    text = fill(EMPTY.format("headline"), [card])
    assert "igva_kernels 0.1 ms, official eager 0.45 ms, torch.compile of it 0.2 ms; maps alive" in text
    assert "inputs 2, 24, 30." in text


def test_without_a_card_the_page_says_so(cpu_kernels: dict) -> None:
    text = fill(EMPTY.format("performance"), [cpu_kernels])
    assert "On a GPU: nothing has been measured yet" in text and "**On a CPU**" in text


def test_figures_of_a_card(card: dict) -> None:
    text = fill(EMPTY.format("performance"), [card])
    assert "**On a GPU** (NVIDIA H200" in text and "On a CPU: nothing has been measured yet" in text
    assert "| 16 | forward | bfloat16 | **0.1** | 0.45 | 0.2 | 0.09 | 4.5 | 96% | 2.0 | 24.0 | 30.0 |" in text
    assert "torch.compile max-autotune 0.09 ms, igva_kernels 0.1 ms" in text  # where a peer wins, the page says it


def test_verdicts(card: dict) -> None:
    found = {outcome.target.figure: outcome for outcome in outcomes([card], "cuda")}
    assert found["forward, share of a copy beside it"].verdict == "yes"
    assert found["forward, share of a copy beside it"].measured == "B=16 bf16 96 %"
    assert found["both passes, share of a copy"].measured == "B=16 bf16 frozen 85 %"
    assert found["backward alone, share of a copy"].measured == "B=16 bf16 frozen backward 91 %"
    assert found["backward alone, share of a copy"].verdict == "yes"
    assert found["against the best of `torch.compile`"].verdict == "no"  # the faster of its two modes counts
    assert found["allocator, replay of a CUDA graph"].verdict == "not measured"
    assert len(found) == len(TARGETS["cuda"]) == len(outcomes([], "cuda"))


def test_the_best_of_torch_compile_is_each_against_ours_of_the_same_part(card: dict) -> None:
    peers, autotune = copy.deepcopy(card), copy.deepcopy(card)
    card["cases"] = card["cases"][:2]
    peers["part"], autotune["part"] = "peers", "autotune"
    peers["cases"] = [fuse_case("igva_kernels", 1.2e-4), fuse_case("torch.compile of a plain sum", 1.5e-4)]
    autotune["cases"] = [fuse_case("igva_kernels", 1e-4), fuse_case("torch.compile max-autotune", 1.6e-4)]
    found = {outcome.target.figure: outcome for outcome in outcomes([card, peers, autotune], "cuda")}
    assert found["against the best of `torch.compile`"].values == {"B=16 bf16": pytest.approx(1.5 / 1.2)}
    assert found["forward, share of a copy beside it"].values == {"B=16 bf16": 0.96}  # of the part kernels
    text = fill(EMPTY.format("performance"), [autotune, card, peers])
    assert "| 16 | forward | bfloat16 | **0.1** | 0.45 | 0.15 | 0.16 | 4.5 |" in text and "of a plain sum" in text


def test_tiny_runs_are_no_figures(card: dict) -> None:
    card["arguments"]["tiny"] = True
    assert all(not outcome.values for outcome in outcomes([card], "cuda"))


def test_a_card_says_nothing_of_the_cpu(card: dict) -> None:
    assert all(not outcome.values for outcome in outcomes([card], "cpu"))


def test_nobody_is_slower_than_itself(card: dict) -> None:
    cases = [case for case in measured_cases(card) if case["parameters"]["variant"] != "torch.compile max-autotune"]
    assert slower_than(cases) == []


def test_vision_side_takes_the_faster_of_two(card: dict) -> None:
    card["part"] = "vision"
    seconds = {"igva_kernels": 1.2, "streaming, by group": 1.02, "LLaVA-1.5": 1.0, "official eager": 2.0}
    card["cases"] = [
        {
            "name": f"vision CLIP-L/14-336 B=16: {variant}",
            "parameters": {"tower": "CLIP-L/14-336", "batch": 16, "dtype": "bfloat16", "llm_dim": 4096, "variant": variant},
            "status": "ok",
            "metrics": {"median_s": time},
        }
        for variant, time in seconds.items()
    ]
    found = {outcome.target.figure: outcome for outcome in outcomes([json.loads(json.dumps(card))], "cuda")}
    assert found["vision side over LLaVA-1.5's"].measured == "B=16 2.0 %"
    assert found["vision side over LLaVA-1.5's"].verdict == "yes"
