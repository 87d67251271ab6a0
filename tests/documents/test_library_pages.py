"""The pages about ``igva_kernels`` alone: their Python runs where neither transformers nor the model package is to be had."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from documents.pages import PAGES, ROOT, Page
from documents.running import run_page, stated_shapes

RUNNING = [page for page in PAGES if page.of("python") and not page.uses_the_model]


def official_igva() -> torch.nn.Module:
    """A stand-in with the signatures of the released IGVA code, in stage 2."""
    code = runpy.run_path(str(ROOT / "tests" / "patch" / "conftest.py"))
    return code["OfficialIgva"]("[[1,2],[3,4],[5,6],[7,8]]", -2, average=False)


PROVIDED = {"official_igva": official_igva}


@pytest.mark.parametrize("page", RUNNING, ids=lambda page: page.name)
def test_python_runs(page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("transformers", "model", "accelerate", "peft", "jsonargparse"):
        monkeypatch.setitem(sys.modules, name, None)
    names = run_page(page, tmp_path, lambda provided: PROVIDED[provided]())
    results = [names[name] for name in ("out", "fused") if name in names]
    assert all(result.isfinite().all() for result in results)
    if page.name == "README.md":
        assert names["fused"].shape == (2, 576, 2 * 1024)


def test_the_pages_that_need_torch_alone() -> None:
    names = {page.name for page in RUNNING}
    assert {"README.md", "docs/plans.md", "docs/deformable-attention.md", "docs/patch.md"} <= names
    assert sum(stated_shapes(page) for page in RUNNING) >= 20
