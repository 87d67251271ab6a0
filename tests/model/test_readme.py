"""Every Python block of the README runs as it stands, and every make target that it names exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_blocks_run(number):
    namespace: dict = {}
    exec(compile(BLOCKS[number], f"README.md, python block {number + 1}", "exec"), namespace)
    fused = namespace["fused"]
    assert fused.shape == (2, 576, 2048) and fused.isfinite().all()


def test_there_are_blocks_to_run():
    assert len(BLOCKS) >= 2


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = set(re.findall(r"(?:`|^    )make ([a-z-]+)", README, flags=re.MULTILINE))
    assert named and named <= targets
