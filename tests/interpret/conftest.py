"""The kernels in Triton's interpreter: their meaning, on a CPU.

Triton reads ``TRITON_INTERPRET`` when a kernel is decorated, so it is set here, before any test imports the kernels,
and the folder wants a process of its own (``pytest tests/interpret``). What the interpreter cannot show is in
``tests/aot`` (machine code) and ``tests/gpu`` (races, rounding to bfloat16: the interpreter truncates). Programs take
some milliseconds each, so the cases are small.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from igva_kernels.plan import FusionPlan, Layer, Mean, Weighted
from igva_kernels.program import Norm

os.environ["TRITON_INTERPRET"] = "1"

GUARD = 64
"""Elements of NaN before and behind each tensor; a multiple of 16 bytes, so that alignment stays what it is."""

PLANS = {
    "igva": FusionPlan.igva(4, 2),
    "igva_base_first": FusionPlan.igva(6, 3, order="base_first"),
    "igva_average": FusionPlan.igva_average(4, 2),
    "llava": FusionPlan.llava(3),
    "one_layer": FusionPlan.igva(1, 1, base=0),
    "one_group": FusionPlan.igva(3, 1),
    "overlapping": FusionPlan(5, (Weighted(((0, 1, 2), (2, 3, 4), (0, 4))), Mean((1, 2)), Layer(2), Layer(0))),
    "two_weighted": FusionPlan(4, (Weighted(((1,), (2, 3))), Layer(-1), Weighted(((1, 2), (3, 4))))),
    "repeated_group": FusionPlan(4, (Weighted(((1, 2), (3, 4))), Weighted(((1, 2), (3, 4))))),
    "plain_and_weighted": FusionPlan(4, (Mean((1, 2)), Weighted(((1, 2), (3,))))),
    "layers_and_one_as_it_is": FusionPlan(4, (Weighted(((1,), (2,), (3,), (4,)), plus=-2),)),
    "groups_that_end_out_of_order": FusionPlan(4, (Weighted(((2, 4), (1,), (0, 3)), plus=0), Layer(1))),
}
NORMALISED_PLANS = {
    "layer_norm": FusionPlan(3, (Mean((1, 2, 3), norm=Norm("layer")),)),
    "rms_norm": FusionPlan(2, (Mean((1, 2), norm=Norm("rms", 1e-6)), Layer(1))),
    "weighted": FusionPlan(4, (Weighted(((1, 2), (3,)), plus=-2, norm=Norm("layer", 1e-6)), Layer(0))),
    "with_and_without": FusionPlan(3, (Weighted(((1, 2),), norm=Norm("rms")), Weighted(((1, 2), (0, 3))))),
}
WEIGHTED_PLANS = {name: plan for name, plan in PLANS.items() if plan.num_groups}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name, plans in (("plan", PLANS), ("weighted_plan", WEIGHTED_PLANS), ("normalised_plan", NORMALISED_PLANS)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, plans.values(), ids=plans.keys())


@pytest.fixture(scope="session")
def kernels() -> ModuleType:
    """The implementation, once it is certain that its kernels are interpreted."""
    import igva_kernels.impl.triton as kernels
    from igva_kernels.impl.triton import mix_forward

    if type(mix_forward.mix_forward_kernel).__name__ != "InterpretedFunction":
        pytest.fail("the kernels were imported before TRITON_INTERPRET was set: run `pytest tests/interpret` by itself")
    return kernels


def guarded(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A NaN tensor with NaN before and behind it, and the buffer that holds all of it."""
    numel = torch.Size(shape).numel()
    buffer = torch.full((numel + 2 * GUARD,), float("nan"), dtype=dtype)
    return buffer[GUARD : GUARD + numel].view(shape), buffer


@pytest.fixture(autouse=True)
def _poison_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever the implementation allocates holds NaN until it is written, and nothing beyond its ends may be written.

    The implementation allocates with ``Tensor.new_empty`` only.
    """
    allocated: list[Tensor] = []
    real = torch.Tensor.new_empty

    def poisoned(self: Tensor, *size, dtype: torch.dtype | None = None, **kwargs) -> Tensor:
        dtype = dtype or self.dtype
        if type(self) is not Tensor or self.device.type != "cpu" or not dtype.is_floating_point or kwargs:
            return real(self, *size, dtype=dtype, **kwargs)
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        tensor, buffer = guarded(shape, dtype)
        allocated.append(buffer)
        return tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    yield
    for buffer in allocated:
        assert buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all(), "written outside of an output"


@pytest.fixture
def make_states() -> Callable[..., list[Tensor]]:
    """L + 1 random hidden states between NaNs. The prefix rows, which a mix of patches must not read, are NaN and
    inf."""

    def make(
        plan: FusionPlan,
        batch: int = 2,
        patches: int = 3,
        width: int = 40,
        prefix: int = 1,
        dtype: torch.dtype = torch.float32,
        finite_prefix: bool = False,
    ) -> list[Tensor]:
        states = []
        for layer in range(plan.num_layers + 1):
            state, _ = guarded((batch, prefix + patches, width), dtype)
            state.copy_(torch.randn(state.shape, dtype=torch.float64))
            if not finite_prefix:
                state[:, :prefix] = float("inf") if layer % 2 else float("nan")
            states.append(state)
        return states

    return make


@pytest.fixture
def make_weights() -> Callable[..., Tensor | None]:
    """Random weights (K,), (B, K) or (B, N, K), or None where the plan takes none."""

    def make(
        plan: FusionPlan, sharing: str, batch: int = 2, patches: int = 3, dtype: torch.dtype = torch.float32
    ) -> Tensor | None:
        shape = {"all": (), "image": (batch,), "token": (batch, patches)}[sharing]
        return torch.randn(*shape, plan.num_groups, dtype=dtype) if plan.num_groups else None

    return make


def _normalised(state: Tensor, norm: Norm | None) -> Tensor:
    if norm is None:
        return state
    normalise = functional.layer_norm if norm.kind == "layer" else functional.rms_norm
    return normalise(state, state.shape[-1:], eps=norm.eps)


def _formula(states: list[Tensor], plan: FusionPlan, weights: Tensor | None, prefix: int) -> Tensor:
    """The definition, straight from the plan: every slot for itself, in the dtype of its arguments."""
    patches = [state[:, prefix:] for state in states]
    column, slots = 0, []
    for slot in plan.slots:
        if isinstance(slot, Layer):
            slots.append(patches[slot.index])
        elif isinstance(slot, Mean):
            slots.append(sum(_normalised(patches[layer], slot.norm) for layer in slot.layers) / len(slot.layers))
        else:
            total = torch.zeros_like(patches[0])
            for group in slot.groups:
                weight = weights[..., column].reshape(*weights.shape[:-1], *(1,) * (4 - weights.ndim))
                total = total + weight * (sum(_normalised(patches[layer], slot.norm) for layer in group) / len(group))
                column += 1
            if slot.plus is not None:
                total = total + patches[slot.plus]
            slots.append(total)
    return torch.cat(slots, dim=-1)


@pytest.fixture
def formula() -> Callable[..., Tensor]:
    return _formula


@pytest.fixture
def formula_gradients() -> Callable[..., tuple[list[Tensor], Tensor | None]]:
    """dL/dh of each source of the plan, and dL/dw, by autograd through the formula, in ``dtype``."""

    def gradients(
        states: list[Tensor],
        plan: FusionPlan,
        weights: Tensor | None,
        prefix: int,
        grad_out: Tensor,
        dtype: torch.dtype,
    ) -> tuple[list[Tensor], Tensor | None]:
        states = [state.detach().to(dtype).requires_grad_() for state in states]
        leaves = [states[layer] for layer in plan.sources]
        if weights is not None:
            weights = weights.detach().to(dtype).requires_grad_()
            leaves.append(weights)
        grads = list(torch.autograd.grad(_formula(states, plan, weights, prefix), leaves, grad_out.to(dtype)))
        grad_weights = grads.pop() if weights is not None else None
        return grads, grad_weights

    return gradients
