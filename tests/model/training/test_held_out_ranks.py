"""Two real processes answer held-out questions: DDP, ZeRO-2 and FSDP2 count alike, and no rank waits for another."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

PROGRAM = Path(__file__).with_name("sharded_program.py")
ROOT = Path(__file__).resolve().parents[3]
WITH_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
WAYS = ["ddp", "fsdp2", *(["zero2", "zero3"] if WITH_DEEPSPEED else [])]


@pytest.fixture(scope="module")
def logs(make_recipe_in, tmp_path_factory, records):
    """``logs[way]``: the evaluations of a run. One batch has no picture, on one rank alone."""
    folder = tmp_path_factory.mktemp("questions")
    # Three batches, the last of them without pictures: one rank has a filler, and no picture where the other has some.
    (folder / "questions.json").write_text(json.dumps([*records[:3], *records[-2:]]), encoding="utf-8")
    images = Path(make_recipe_in(folder)(2).data.path).parent
    entries = []
    for way in WAYS:
        recipe = make_recipe_in(folder)(
            2,
            output_dir=str(folder / way),
            distributed=way,
            batch_size=8,
            language_model_training="full",
            learning_rate=3e-3,
            max_steps=4,
        ).to_dict()
        recipe["data"] |= {"image_folder": str(images), "eval_path": str(folder / "questions.json")}
        recipe["evaluation"] |= {"exact_match": way != "zero3", "max_new_tokens": 6}
        recipe["eval_every"] = 2
        file = folder / f"{way}.yaml"
        file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        entries.append({"name": way, "recipe": str(file), "stop_at": None})
    (folder / "runs.json").write_text(json.dumps(entries))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # The guard ends a hang.
    command = [*launcher, str(PROGRAM), str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    seen = {way: torch.load(folder / f"{way}.pt", weights_only=False) for way in WAYS}
    return {way: [entry for entry in seen[way]["logs"] if "eval_loss" in entry] for way in WAYS}


@pytest.mark.slow
def test_all_ways_count_alike(logs):
    for way in WAYS:
        # After the last step of each the loss is computed already.
        assert [entry["step"] for entry in logs[way]] == [2, 4]
        for entry, of_ddp in zip(logs[way], logs["ddp"], strict=True):
            assert entry["eval_loss"] == pytest.approx(of_ddp["eval_loss"], rel=1e-3)
            if way != "zero3":
                for name in ("eval_exact_match", "eval_exact_match_colour", "eval_exact_match_text"):
                    assert entry[name] == pytest.approx(of_ddp[name], abs=1e-6)
