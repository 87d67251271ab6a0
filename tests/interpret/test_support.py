"""What the kernels refuse, and that they say why."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from igva_kernels import fuse
from igva_kernels.plan import FusionPlan

PLAN = FusionPlan.llava(1, layer=1)


def empty(shape: tuple[int, ...], stride: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float16) -> Tensor:
    """A tensor of which nobody looks at the elements."""
    return torch.empty(256, dtype=dtype).as_strided(shape, stride or torch.empty(shape, device="meta").stride())


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (empty((1, 3, 12)), "D=12 is not a multiple of 8"),
        (empty((1, 3, 6), dtype=torch.float32), "D=6 is not a multiple of 4"),
        (torch.empty(1, 3, 8, dtype=torch.int8), "torch.int8"),
        (empty((1, 3, 8), (64, 16, 1)), "no contiguous rows"),
        (empty((1, 3, 8), (24, 0, 1)), "no contiguous rows"),
        (empty((1, 8, 8), (64, 1, 8)), "no contiguous rows"),
        (empty((2, 3, 8), (28, 8, 1)), "batch stride 28"),
        (torch.empty(25, dtype=torch.float16)[1:].view(1, 3, 8), "no multiple of 16 bytes"),
    ],
)
def test_reasons(kernels, state, reason) -> None:
    assert reason in kernels.check_supported([state], None, PLAN.program, 1)


def test_limits_of_the_launch(kernels, monkeypatch) -> None:
    from igva_kernels.impl.triton import support

    assert kernels.check_supported([empty((2, 3, 8))], None, PLAN.program, 1) is None
    monkeypatch.setattr(support, "MAX_BATCH", 1)
    assert "B=2" in kernels.check_supported([empty((2, 3, 8))], None, PLAN.program, 1)
    monkeypatch.setattr(support, "MAX_IMAGE_ELEMENTS", 24)
    assert "S*T*D = 24" in kernels.check_supported([empty((1, 3, 8))], None, PLAN.program, 1)


def test_without_a_gpu_or_the_interpreter(kernels, monkeypatch) -> None:
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert "cpu" in kernels.check_supported([empty((1, 3, 8))], None, PLAN.program, 1)


def test_a_named_implementation_does_not_give_way() -> None:
    states = [torch.randn(1, 3, 12, dtype=torch.float16) for _ in range(2)]
    with pytest.raises(ValueError, match=r"triton.*D=12 is not a multiple of 8"):
        fuse(states, PLAN, num_prefix_tokens=1, impl="triton")
    assert fuse(states, PLAN, num_prefix_tokens=1, impl="auto").shape == (1, 2, 12)
