"""``kill -9`` at any moment leaves the last good checkpoint whole, and the run ends in the bits of one that nobody killed.

KILLS=100 sets the number of kills (make kill-test).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

PROGRAM = Path(__file__).with_name("kill_program.py")
ROOT = Path(__file__).resolve().parents[3]
KILLS = int(os.environ.get("KILLS", "20"))


@pytest.mark.slow
def test_killed_runs_lose_nothing(make_recipe, stage1_checkpoint, tmp_path):
    recipe = make_recipe(
        2,
        language_model_training="full",
        output_dir=str(tmp_path / "out"),
        max_steps=4,
        save_every=1,
        overwrite=True,
        data={"instruction_cache": str(tmp_path / "instructions.safetensors")},
    )
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()), encoding="utf-8")
    shutil.copytree(stage1_checkpoint, tmp_path / "out")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROGRAM), str(tmp_path), str(KILLS), "20250115"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60 * KILLS, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert done.stdout.splitlines()[-1].startswith(f"{KILLS} kills, ")
