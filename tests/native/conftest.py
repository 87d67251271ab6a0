"""The compiled kernels, built into a cache of the test run's own; plans and inputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from igva_kernels import FusionPlan, Layer, Mean, Weighted
from igva_kernels.impl import native
from igva_kernels.impl.native import build

PLANS = {
    "igva": FusionPlan.igva(24, 4),
    "igva_base_first": FusionPlan.igva(8, 2, order="base_first"),
    "igva_average": FusionPlan.igva_average(8, 4),
    "llava": FusionPlan.llava(8),
    "one_layer": FusionPlan.igva(1, 1, base=0),
    "large_group": FusionPlan.igva(40, 2),
    "overlapping": FusionPlan(5, (Weighted(((0, 1, 2), (2, 3, 4), (0, 4))), Mean((1, 2)), Layer(2), Layer(0), Layer(2))),
    "two_weighted": FusionPlan(4, (Weighted(((1,), (2, 3))), Layer(-1), Weighted(((1, 2), (3, 4))))),
    "repeated_group": FusionPlan(4, (Weighted(((1, 2), (3, 4), (1, 2))), Weighted(((1, 2), (3, 4))))),
    "same_group_plain_and_weighted": FusionPlan(4, (Mean((1, 2)), Weighted(((1, 2), (3,))))),
    "plus": FusionPlan(4, (Weighted(((0, 1), (2,)), plus=2), Layer(4))),
}


@pytest.fixture(params=PLANS, ids=str)
def plan(request: pytest.FixtureRequest) -> FusionPlan:
    return PLANS[request.param]


def forget() -> None:
    """Let the next use decide afresh whether and how to build."""
    build.library.cache_clear()
    build.why_unavailable.cache_clear()


@pytest.fixture(scope="session")
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(cache_home: str) -> Iterator[None]:
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = cache_home
    forget()
    yield
    if before is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = before
    forget()


@pytest.fixture
def _built() -> None:
    """Skips where no compiler can build the kernels."""
    reason = build.why_unavailable()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def portable(monkeypatch: pytest.MonkeyPatch, _built: None) -> Iterator[None]:
    """The kernels built for every processor of this kind: on x86-64 without AVX and without conversions in hardware."""
    monkeypatch.setattr(build, "NATIVE_FLAGS", (("-O1", "-Wno-psabi"),))  # -O1: built faster
    forget()
    yield
    forget()


@pytest.fixture(params=["this processor", "any processor"])
def either_build(request: pytest.FixtureRequest, _built: None) -> None:
    if request.param == "any processor":
        request.getfixturevalue("portable")


@pytest.fixture
def many_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Sets the number of threads, and lets small inputs be spread over all of them."""
    before = torch.get_num_threads()
    monkeypatch.setattr(native, "BYTES_PER_THREAD", 1)
    monkeypatch.setattr(native, "CHUNK_ELEMENTS", 256)
    yield torch.set_num_threads
    torch.set_num_threads(before)


class Case(NamedTuple):
    """Inputs of one mix: the states that the plan reads, weights or None, and a cotangent."""

    plan: FusionPlan
    states: list[Tensor]
    weights: Tensor | None
    cotangent: Tensor
    num_prefix_tokens: int

    def to(self, dtype: torch.dtype, *, weights: torch.dtype | None = None) -> Case:
        return self._replace(
            states=[state.to(dtype) for state in self.states],
            weights=None if self.weights is None else self.weights.to(weights or dtype),
            cotangent=self.cotangent.to(dtype),
        )


@pytest.fixture
def make_case() -> Callable[..., Case]:
    """Random inputs whose values a dtype holds exactly."""

    def make(
        plan: FusionPlan,
        dtype: torch.dtype = torch.float32,
        *,
        batch: int = 3,
        tokens: int = 7,
        width: int = 40,
        prefix: int = 1,
        shape: str = "per_image",
    ) -> Case:
        patches = tokens - prefix
        states = [torch.randn(batch, tokens, width).to(dtype) for _ in plan.sources]
        weights = None
        if plan.num_groups:
            leading = {"shared": (), "per_image": (batch,), "per_token": (batch, patches)}[shape]
            weights = torch.randn(*leading, plan.num_groups)
        return Case(plan, states, weights, torch.randn(batch, patches, plan.num_slots * width).to(dtype), prefix)

    return make


@pytest.fixture
def in_dtype() -> Callable[[Case], Tensor]:
    """The mix step by step in the dtype of the states, as eager torch rounds it: the yardstick for accuracy."""

    def mix(case: Case) -> Tensor:
        program, patches = case.plan.program, [state[:, case.num_prefix_tokens :] for state in case.states]
        means = [torch.stack([patches[source] for source in group]).mean(0) for group in program.groups]
        slots = []
        for slot in program.slots:
            if hasattr(slot, "source"):
                slots.append(patches[slot.source])
                continue
            total = torch.zeros_like(patches[0])
            for term in slot.terms:
                mean = means[term.group]
                if term.column >= 0:
                    weight = case.weights[..., term.column].to(mean.dtype)
                    mean = mean * weight.reshape(*weight.shape, *(1,) * (3 - weight.ndim))
                total = total + mean
            slots.append(total)
        return torch.cat(slots, -1)

    return mix
