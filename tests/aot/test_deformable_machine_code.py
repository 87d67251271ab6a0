"""The machine code of multi-scale deformable attention, for the sizes of MMFuser: wide accesses to the value, no spills.

Counts are of instructions in the code. The loop over the points of a level is not unrolled, so a level has the four corners of
one point. Budgets are in ``budgets_deformable.json``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BUDGETS = Path(__file__).with_name("budgets_deformable.json")

BATCH, QUERIES, HEADS, CHANNELS, LEVELS, POINTS = 16, 576, 16, 64, 4, 4
SHAPES = ((24, 24),) * LEVELS
CORNERS = 4

CASES = {
    "forward": {},
    "dlocations and dweights": {"needs": (False, True, True)},
    "dvalue added": {"needs": (True, True, True), "deterministic": False},
    "dvalue gathered": {"needs": (True, False, False), "deterministic": True},
}

KERNELS = [
    ("forward", "attention_forward_kernel"),
    ("dlocations and dweights", "attention_backward_kernel"),
    ("dvalue added", "attention_backward_kernel"),
    ("dvalue gathered", "sort_keys_kernel"),
    ("dvalue gathered", "value_gradient_kernel"),
]

MATRIX = [
    *((*kernel, target, torch.bfloat16, CHANNELS) for kernel in KERNELS for target in ("sm_80", "sm_90", "sm_100", "gfx942")),
    *((*kernel, "sm_90", torch.float32, CHANNELS) for kernel in KERNELS if kernel[1] != "sort_keys_kernel"),
    *(
        (*kernel, "sm_90", torch.float16, 32) for kernel in KERNELS if kernel[1] != "sort_keys_kernel"
    ),  # Deformable DETR's heads
    ("forward", "attention_forward_kernel", "sm_90", torch.bfloat16, 72),  # SigLIP-so400m: no power of two
]


def tensors(dtype: torch.dtype, channels: int, batch: int = BATCH, queries: int = QUERIES, shapes=SHAPES) -> dict[str, Any]:
    """What the launchers take: address space only. The keys of the sort alone are ever read."""
    num_cells = sum(height * width for height, width in shapes)
    return {
        "value": torch.empty(batch, num_cells, HEADS, channels, dtype=dtype),
        "spatial_shapes": shapes,
        "locations": torch.empty(batch, queries, HEADS, len(shapes), POINTS, 2),
        "weights": torch.empty(batch, queries, HEADS, len(shapes), POINTS),
        "grad_out": torch.empty(batch, queries, HEADS * channels, dtype=dtype),
    }


@pytest.fixture(scope="module")
def record(machine_code) -> Callable[..., Any]:
    """A launch, recorded instead of executed."""
    from igva_kernels.impl.triton import deformable, deformable_backward, deformable_forward, deformable_value_gradient

    def record(case: str, kernel: str, target: str, inputs: dict[str, Any]) -> Any:
        modules = deformable_forward, deformable_backward, deformable_value_gradient
        warp = machine_code.TARGETS[target].warp_size
        with machine_code.recorded_launches(*modules, warp_size=warp) as launches:
            if case == "forward":
                deformable.attention_forward(*(inputs[name] for name in list(inputs)[:4]))
            else:
                options = {"deterministic": None, **CASES[case]}
                deformable.attention_backward(**inputs, **options)
        (launch,) = (launch for launch in launches if launch.kernel.__name__ == kernel)
        return launch

    return record


@pytest.fixture(autouse=True)
def _small_sorts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The host code between the kernels would sort millions of keys that nobody wrote."""
    monkeypatch.setattr(torch.Tensor, "sort", lambda self, **_: (self, torch.empty(self.shape, dtype=torch.int64)))
    monkeypatch.setattr(torch, "searchsorted", lambda _, bases, **__: bases)
    yield


@pytest.mark.parametrize(
    ("case", "kernel", "target", "dtype", "channels"), MATRIX, ids=lambda value: str(value).removeprefix("torch.")
)
def test_machine_code_stays_within_its_budget(machine_code, record, budgets, case, kernel, target, dtype, channels) -> None:
    code = machine_code.compile_launch(record(case, kernel, target, tensors(dtype, channels)), target)
    assert code.float64 == 0
    assert code.spills == 0 or channels == 72, "ptxas keeps five scalars of a padded row in local memory, outside of the loops"
    corners, places = LEVELS * CORNERS, LEVELS * 3  # x, y and weight of a point
    if kernel == "attention_forward_kernel":
        assert (code.wide_loads, code.narrow_loads, code.wide_stores, code.narrow_stores) == (corners, places, 1, 0)
    elif kernel == "attention_backward_kernel":
        assert (code.wide_loads, code.wide_stores, code.narrow_stores) == (corners + 1, 0, places)
        # The places are loaded once more for each way in which a row is held: three by Triton 3.6, seven by 3.9 where the
        # additions are single.
        assert code.narrow_loads <= (3 if budgets.pinned else 7) * places
    elif kernel == "value_gradient_kernel":
        assert code.wide_loads == 2  # rows of the gradient, for the samples above the cell and those below it
    budgets.check(f"{case}, {kernel} | {target} | {str(dtype).removeprefix('torch.')} | {channels}", code.as_dict())


@pytest.mark.parametrize(("target", "expected"), [("sm_80", 0), ("sm_90", 32), ("sm_100", 32)])
def test_additions_are_as_wide_as_the_target_can(machine_code, record, target, expected) -> None:
    """Two additions of four float32 a corner where the hardware has them; single ones before Hopper."""
    launch = record("dvalue added", "attention_backward_kernel", target, tensors(torch.bfloat16, CHANNELS))
    listing, _ = machine_code.disassemble(machine_code.compile_kernel(launch, target).asm["cubin"])
    assert len(re.findall(r"REDG?\.E\.ADD\.F32x4", listing)) == expected
    assert (len(re.findall(r"REDG?\.E\.ADD\.F32\.", listing)) > 0) == (expected == 0)


def test_the_gather_has_no_atomics(machine_code, record) -> None:
    for kernel in ("sort_keys_kernel", "value_gradient_kernel"):
        launch = record("dvalue gathered", kernel, "sm_90", tensors(torch.bfloat16, CHANNELS))
        listing, _ = machine_code.disassemble(machine_code.compile_kernel(launch, "sm_90").asm["cubin"])
        assert not re.search(r"\b(REDG?|ATOM[GS]?)\b", listing)  # REDUX is a sum within a warp


@pytest.mark.parametrize(("case", "kernel"), KERNELS)
def test_other_sizes_reuse_the_compiled_kernel(machine_code, record, case, kernel) -> None:
    """The images of a detector differ in size: a change of B, Q or the maps must not compile in mid-run."""
    sizes = [(1, 1, ((1, 1),) * 4), (2, 3, ((5, 7), (3, 4), (2, 2), (1, 1))), (16, 576, SHAPES), (3, 1024, ((32, 32),) * 4)]
    keys = {
        machine_code.compilation_key(record(case, kernel, "sm_90", tensors(torch.bfloat16, CHANNELS, *size)), "sm_90")
        for size in sizes
    }
    assert len(keys) == 1
