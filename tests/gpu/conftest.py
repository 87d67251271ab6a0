"""The kernels on a card, at full size. Without a card nothing here is collected, and one line says so."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from igva_kernels import FusionPlan, Layer, Mean
from igva_kernels.program import Norm

if not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


# The cases and checks of tests/fuzz as ``fuzz.NAME``: that folder is on no import path.
_fuzz = ModuleType("fuzz")
_fuzz.__spec__ = importlib.util.spec_from_loader("fuzz", loader=None, is_package=True)
_fuzz.__path__ = [str(Path(__file__).parents[1] / "fuzz")]
sys.modules.setdefault("fuzz", _fuzz)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not torch.cuda.is_available():
        terminalreporter.write_line("tests/gpu skipped: torch sees no CUDA or ROCm device")


@pytest.fixture(autouse=True)
def _gives_memory_back() -> Iterator[None]:
    """Other tests run on the same card at the same time, and what the caching allocator of this process keeps is not theirs."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Tower:
    """The hidden states of a real vision tower."""

    plan: FusionPlan
    num_prefix_tokens: int
    num_patches: int
    width: int


TOWERS = {
    "CLIP-L/14 336": Tower(FusionPlan.igva(24, 4), 1, 576, 1024),
    "SigLIP-so400m/14 384": Tower(FusionPlan.igva(27, 3), 0, 729, 1152),
    "DINOv2-L/14 with registers": Tower(FusionPlan.igva(24, 6, order="base_first"), 5, 1369, 1024),
}


@pytest.fixture
def clip() -> Tower:
    return TOWERS["CLIP-L/14 336"]


@pytest.fixture(params=TOWERS.values(), ids=TOWERS.keys())
def tower(request: pytest.FixtureRequest) -> Tower:
    return request.param


@pytest.fixture
def make_states() -> Callable[..., list[Tensor | None]]:
    """The L + 1 hidden states of a tower; those that the plan does not read are None. Prefix rows are NaN unless asked
    for."""

    def make(tower: Tower, batch: int, dtype: torch.dtype, finite_prefix: bool = False) -> list[Tensor | None]:
        states: list[Tensor | None] = []
        for layer in range(tower.plan.num_layers + 1):
            if layer not in tower.plan.sources:
                states.append(None)
                continue
            state = torch.randn(batch, tower.num_prefix_tokens + tower.num_patches, tower.width, device="cuda").to(dtype)
            if not finite_prefix:
                state[:, : tower.num_prefix_tokens] = float("nan")
            states.append(state)
        return states

    return make


@pytest.fixture
def make_weights() -> Callable[..., Tensor]:
    """Random weights (K,), (B, K) or (B, N, K) in float32."""

    def make(tower: Tower, batch: int, sharing: str) -> Tensor:
        shape = {"all": (), "image": (batch,), "token": (batch, tower.num_patches)}[sharing]
        return torch.randn(*shape, tower.plan.num_groups, device="cuda")

    return make


def _normalised(state: Tensor, norm: Norm | None) -> Tensor:
    if norm is None:
        return state
    normalise = functional.layer_norm if norm.kind == "layer" else functional.rms_norm
    return normalise(state, state.shape[-1:], eps=norm.eps)


def _formula(states: list[Tensor | None], plan: FusionPlan, weights: Tensor | None, prefix: int) -> Tensor:
    """The definition, straight from the plan, in the dtype of its arguments: what eager torch would run."""
    patches = [None if state is None else state[:, prefix:] for state in states]
    column, slots = 0, []
    for slot in plan.slots:
        if isinstance(slot, Layer):
            slots.append(patches[slot.index])
        elif isinstance(slot, Mean):
            slots.append(sum(_normalised(patches[layer], slot.norm) for layer in slot.layers) / len(slot.layers))
        else:
            total = 0.0
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
