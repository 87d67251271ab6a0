"""docs/patch.md and docs/official-igva-defects.md: the code runs, and every test that is named is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_block_of_the_page_runs(make_igva, capsys):
    page = (ROOT / "docs" / "patch.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    model = make_igva()
    exec(compile(block, "docs/patch.md", "exec"), {"model": model})
    assert "encode_images" in capsys.readouterr().out
    assert "encode_images" not in vars(model)


def test_every_test_that_a_defect_names_is_there():
    page = (ROOT / "docs" / "official-igva-defects.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \|.*\| (\S+) \|$", page, flags=re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 33))
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    missing = [name for _, name in rows if name != "–" and f"def {name}(" not in tests]
    assert not missing
