"""Random cases against float64, drawn by hypothesis.

``pytest tests/fuzz`` runs the CPU implementations; with ``TRITON_INTERPRET=1`` in the environment, which holds for a whole
process, the kernels in Triton's interpreter instead. Without more it is a few hundred cases, the same at every run.
``FUZZ_EXAMPLES`` sets their number and ``FUZZ_SEED`` which they are; both are printed.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "24" if INTERPRET else "200"))
SEED = int(os.environ.get("FUZZ_SEED", "20261123"))


def _register_folder() -> None:
    """The modules of this folder as ``fuzz.NAME``: it is on no import path, and hypothesis needs its strategies at import."""
    spec = importlib.util.spec_from_loader("fuzz", loader=None, is_package=True)
    package = ModuleType("fuzz")
    package.__spec__, package.__path__ = spec, [str(Path(__file__).parent)]
    sys.modules["fuzz"] = package


_register_folder()


def pytest_report_header() -> str:
    kind = "the kernels in Triton's interpreter" if INTERPRET else "the CPU implementations"
    return f"fuzz: {kind}, FUZZ_EXAMPLES={EXAMPLES} FUZZ_SEED={SEED}"


@pytest.fixture
def for_random(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Run a function on ``share`` times :data:`EXAMPLES` random cases: ``for_random(strategy, function, share=1.0)``.

    Every test, and every set of its parameters, draws cases of its own. A failing one is made small before it is printed.
    """

    def run(strategy: SearchStrategy, function: Callable[..., None], share: float = 1.0) -> None:
        @settings(
            max_examples=max(1, round(share * EXAMPLES)),
            deadline=None,
            database=None,  # the seed alone says what is drawn
            print_blob=False,
            report_multiple_bugs=False,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=(HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much),
        )
        @given(case=strategy)
        def check(case) -> None:
            function(case)

        own = zlib.crc32(request.node.name.encode())
        try:
            seed(SEED + own)(check)()
        except BaseException as error:
            error.add_note(f"FUZZ_EXAMPLES={EXAMPLES} FUZZ_SEED={SEED} repeats this run")
            raise

    return run
