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


def test_import_adds_nothing_to_what_torch_imports():
    """How long it takes is printed by ``python -m benchmarks --part host``; what it costs is what it imports."""
    done = run(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import igva_kernels\n"
        "print(*sorted(set(sys.modules) - before))\n"
        "print(torch.ops.igva.fuse.default, torch.ops.igva.deformable_attention.default)\n"
    )
    assert done.returncode == 0, done.stderr
    modules, operators = (line.split() for line in done.stdout.splitlines())
    assert {name.partition(".")[0] for name in modules} == {"igva_kernels"}
    on_first_use = {"modules", "towers", "patching", "impl.cpu", "impl.native", "impl.triton", "impl.deformable_cpu"}
    assert not on_first_use & {name.removeprefix("igva_kernels.") for name in modules}
    assert operators == ["igva.fuse.default", "igva.deformable_attention.default"]  # a loaded export looks for them by name


def test_fuse_runs_where_triton_cannot_be_imported():
    done = run(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, igva_kernels as k\n"
        "plan = k.FusionPlan.igva(4, 2)\n"
        "out = k.fuse([torch.ones(1, 3, 8)] * 5, plan, torch.full((2,), 0.5), num_prefix_tokens=1)\n"
        "assert torch.equal(out, torch.ones(1, 2, 16)), out\n"
    )
    assert done.returncode == 0, done.stderr
