"""What a call on the Triton path does beside its launches: it waits for nothing, copies nothing, and tries no settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from igva_kernels import FusionPlan

WAITS_OR_COPIES = ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "_to_copy", "lift_fresh", "unique", "to")
"""Operators that wait for a device, or that bring a tensor to it: reading a value, shapes that depend on values, other dtypes
and devices."""


@pytest.mark.parametrize(("needs_weights", "needs_states"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("form", ["image", "token", "sparse"])
def test_no_operator_waits_or_copies(kernels, make_states, needs_weights, needs_states, form) -> None:
    operators = []

    class Notes(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, arguments=(), options=None):
            operators.append(operator._schema.name.removeprefix("aten::"))
            return operator(*arguments, **(options or {}))

    plan = FusionPlan.igva(4, 2)
    states = [state for layer, state in enumerate(make_states(plan, patches=4)) if layer in plan.sources]
    weights = torch.rand((2, 2) if form == "image" else (2, 4, 2))
    indices = torch.zeros(2, 4, 2, dtype=torch.int64) if form == "sparse" else None
    keeps_means = needs_weights and indices is None
    with Notes():
        out, means = kernels.fuse_forward(states, weights, plan.program, 1, keeps_means, indices=indices)
        if needs_weights:
            kept = means if keeps_means else None
            kernels.fuse_backward(out, states, kept, weights, plan.program, 1, 5, True, needs_states, indices=indices)
    assert "new_empty" in operators  # it looks where the call allocates
    assert not set(operators) & set(WAITS_OR_COPIES), operators


def test_no_kernel_tries_settings(kernels) -> None:
    for source in Path(kernels.__file__).parent.glob("*.py"):
        text = source.read_text(encoding="utf-8")
        for word in ("autotune", "heuristics", "do_bench", "synchronize", ".item(", ".tolist("):
            assert word not in text, f"{source.name}: {word}"
