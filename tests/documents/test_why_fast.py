"""docs/why-fast.md: its tables say what the budgets and the plan's bytes say."""

from __future__ import annotations

import json
import re

import pytest
from documents.pages import PAGE_BY_PATH, ROOT

from benchmarks.roofline import backward_traffic, forward_traffic
from igva_kernels import FusionPlan

TEXT = PAGE_BY_PATH[ROOT / "docs" / "why-fast.md"].text
IGVA = FusionPlan.igva(24).program


def table(first_cell: str) -> list[list[str]]:
    """The rows of the table whose head begins with this cell."""
    (body,) = re.findall(rf"^\| {re.escape(first_cell)} \|.*\n\|[-|]+\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines()]


def test_registers_and_accesses_are_those_of_the_budgets() -> None:
    budgets = json.loads((ROOT / "tests" / "aot" / "budgets.json").read_text(encoding="utf-8"))
    for kernel, loads, stores, hopper, mi300, spills in table("kernel"):
        on = {target: budgets[f"{kernel} | {target} | bfloat16 | 1024"] for target in ("sm_90", "gfx942")}
        assert {(code["wide_loads"], code["wide_stores"], code["spills"]) for code in on.values()} == {
            (int(loads), int(stores), int(spills))
        }
        assert (on["sm_90"]["registers"], on["gfx942"]["registers"]) == (int(hopper), int(mi300))


def test_the_bytes_are_those_of_the_plan() -> None:
    *steps, official, fused = [[int(re.sub(r"\D", "", cell)) for cell in row[1:]] for row in table("IGVA, forward")]
    assert all(read + written == maps for read, written, maps in (*steps, official, fused))
    assert [sum(column) for column in zip(*steps, strict=True)] == official
    forward = forward_traffic(IGVA, map_bytes=1)
    assert [forward.reads, forward.writes, forward.maps] == fused


@pytest.mark.parametrize(("tower", "maps"), [("frozen", 35), ("trained", 41)])
def test_the_maps_of_a_training_step(tower: str, maps: int) -> None:
    forward = forward_traffic(IGVA, map_bytes=1, save_means=True)
    backward = backward_traffic(IGVA, 1, weights=True, states=tower == "trained", saved_means=True)
    assert forward.maps + backward.maps == maps
    assert re.search(rf"^\| {tower} tower \|.*\| {maps} \|$", TEXT, re.MULTILINE)
