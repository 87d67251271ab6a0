"""Trackers of transformers beside the JSONL log, which has every entry whatever they do."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from model.training.run import train

SCALARS = {
    "loss",
    "tokens_per_second",
    "samples_per_second",
    "tflops_per_second",
    "peak_memory_gb",
    "padding_share",
    "data_wait_share",
}


def log_of(result):
    lines = Path(result["checkpoint"], "training", "log.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if "loss" in entry]


def test_tensorboard_stands_in_the_checkpoint_with_every_figure_of_the_log(make_recipe, monkeypatch):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    result = train(make_recipe(trackers=["tensorboard"]))
    entries = log_of(result)
    assert set(entries[0]) >= SCALARS
    reader = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(Path(result["checkpoint"], "training", "tensorboard")))
    events.Reload()
    for name in SCALARS:
        written = {scalar.step: scalar.value for scalar in events.Scalars(f"train/{name}")}
        assert written == pytest.approx({entry["step"]: entry[name] for entry in entries}, rel=1e-6), name


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_other_trackers_run_beside_the_log(tracker, make_recipe, tmp_path, monkeypatch):
    if importlib.util.find_spec(tracker) is None:
        pytest.skip(f"{tracker} is not installed (pip install {tracker})")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "TRACKIO_DIR": str(tmp_path / "trackio")}.items():
        monkeypatch.setenv(name, value)
    assert set(log_of(train(make_recipe(trackers=[tracker])))[0]) >= SCALARS
    assert [path for path in tmp_path.rglob("*") if path.suffix in (".wandb", ".db")]


def test_a_tracker_that_is_not_installed_is_named(make_recipe):
    missing = next((name for name in ("comet_ml", "clearml", "neptune") if importlib.util.find_spec(name) is None), None)
    if missing is None:
        pytest.skip("all trackers are installed")
    with pytest.raises((RuntimeError, ValueError), match=missing.split("_")[0]):
        train(make_recipe(trackers=[missing]))
