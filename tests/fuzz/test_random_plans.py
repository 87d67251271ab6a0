"""``fuse``, ``group_summaries`` and the two-step form on random plans, shapes, dtypes, layouts and gradient flags."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from fuzz.cases import DTYPES, ROW_LAYOUTS, STATE_LAYOUTS, Case, Limits, cases
from fuzz.check import check_determinism, check_fuse, check_summaries, check_two_steps

from igva_kernels.dispatch import implementation

MAX_PROGRAMS = 8
"""Of a launch in the interpreter."""

if os.environ.get("TRITON_INTERPRET") == "1":
    # At some 15 ms a program a case takes a fraction of a second.
    IMPLEMENTATIONS = {
        "triton": Limits(
            access_bytes=16,
            layouts=STATE_LAYOUTS,
            max_batch=2,
            max_layers=5,
            max_image_bytes=4096,
            max_rows=MAX_PROGRAMS,
            truncates=True,
        )
    }
else:
    IMPLEMENTATIONS = {
        "reference": Limits(),
        "torch": Limits(),
        "native": Limits(dtypes=DTYPES[:3], layouts=ROW_LAYOUTS),
        "auto": Limits(),
    }


@pytest.fixture(params=IMPLEMENTATIONS)
def impl(request: pytest.FixtureRequest) -> str:
    if request.param == "native" and (reason := implementation("native").why_unavailable()):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def limits(impl: str) -> Limits:
    return IMPLEMENTATIONS[impl]


@pytest.fixture
def for_some(impl: str, for_random: Callable[..., None]) -> Callable[..., None]:
    """``for_random``, with a tenth of the cases for the definition, and for what only chooses among the others."""
    factor = 0.1 if impl in ("reference", "auto") else 1.0
    return lambda strategy, function, share: for_random(strategy, function, factor * share)


@pytest.mark.parametrize("half", (1, 2))  # for two processes
def test_fuse(impl, limits, half, for_some) -> None:
    for_some(cases(limits), lambda case: check_fuse(case, impl, limits), share=0.5)


def test_two_steps(impl, limits, for_some) -> None:
    def usable(case: Case) -> bool:  # it takes summaries as well, of what there is
        return impl != "triton" or _programs_of_summaries(case, "cls" if case.prefix else "mean_patch") <= MAX_PROGRAMS

    for_some(cases(limits).filter(usable), lambda case: check_two_steps(case, impl, limits), share=0.2)


@pytest.mark.parametrize("summary", ("cls", "mean_patch"))
def test_summaries(impl, limits, summary, for_some) -> None:
    def usable(case: Case) -> bool:
        programs = _programs_of_summaries(case, summary) if impl == "triton" else 0
        return case.plan.num_groups > 0 and (summary == "mean_patch" or case.prefix > 0) and programs <= MAX_PROGRAMS

    for_some(cases(limits).filter(usable), lambda case: check_summaries(case, impl, limits, summary), share=0.1)


def _programs_of_summaries(case: Case, summary: str) -> int:
    """A CLS row is cut into pieces of one access of each thread of a warp; patches are summed for each group apart."""
    from igva_kernels.impl.triton.launch import WARP
    from igva_kernels.impl.triton.patch_means import ACCESSES_PER_ROW

    columns, groups = (WARP, 1) if summary == "cls" else (ACCESSES_PER_ROW, case.plan.num_groups)
    return -(-case.width * case.dtype.itemsize // (16 * columns)) * groups * case.batch


def test_the_same_bits_on_every_run(impl, limits, for_some) -> None:
    for_some(cases(limits), lambda case: check_determinism(case, impl), share=0.02)
