"""Towers under FSDP2: two processes on a CPU give what one process without sharding gives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

RANKS = Path(__file__).with_name("sharded_ranks.py")
ROOT = RANKS.parents[2]


@pytest.mark.slow
def test_two_ranks_equal_one_process_without_sharding():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(RANKS)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }  # a script's own folder is on its path, not ours
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)  # a hang guard
    assert done.returncode == 0, done.stdout + done.stderr
    towers = ("clip_vision_model", "clip_with_projection", "dinov2")
    lines = [(f"streams {tower} tower", f"streams {tower} module", f"trains {tower}") for tower in towers]
    assert done.stdout.split("\n")[:-1] == [line for three in lines for line in three]
