"""What an import costs: neither triton nor transformers, and nothing of the model package."""

import subprocess
import sys
from pathlib import Path

import pytest

import igva_kernels

PACKAGE_FOLDER = Path(igva_kernels.__file__).parents[1]  # the tree, or where the wheel is installed


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=PACKAGE_FOLDER, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("module", ["igva_kernels", "igva_kernels.modules"])
def test_import_needs_torch_alone(module):
    done = run(
        f"import sys, {module}; "
        "print(sorted({'triton', 'transformers', 'model', 'flash_attn', 'deepspeed'} & {m.split('.')[0] for m in sys.modules}))"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_fuse_runs_where_triton_cannot_be_imported():
    done = run(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, igva_kernels as k\n"
        "plan = k.FusionPlan.igva(4, 2)\n"
        "out = k.fuse([torch.ones(1, 3, 8)] * 5, plan, torch.full((2,), 0.5), num_prefix_tokens=1)\n"
        "assert torch.equal(out, torch.ones(1, 2, 16)), out\n"
    )
    assert done.returncode == 0, done.stderr
