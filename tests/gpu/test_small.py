"""Every kernel of the mix at a size of a few programs: quick enough to run under compute-sanitizer.

    make test-gpu-sanitizer

runs these and the ``small`` tests of the allocator and of deformable attention under memcheck and racecheck. Without the
caching allocator each input is an allocation of its own, so that memcheck sees an access past its end; outputs lie between
guards. The checks are those of ``tests/fuzz``: float64, poisoned memory, inputs that stay as they are.
"""

from __future__ import annotations

import pytest
import torch
from fuzz.cases import Case, Limits, NormBehind
from fuzz.check import check_fuse, check_summaries, check_two_steps

from igva_kernels import FusionPlan, Layer, Mean, Norm, Weighted

pytestmark = pytest.mark.gpu

LIMITS = Limits()
LONGER = "last rows of a longer sequence"


def case(
    plan: FusionPlan,
    sharing: str | None,
    dtype: torch.dtype,
    width: int,
    *,
    states_need: bool = True,
    norm: NormBehind | None = None,
) -> Case:
    """Two images of five patches: the last tile of each is not full."""
    sources = len(plan.sources)
    return Case(
        plan=plan,
        batch=2,
        prefix=1,
        patches=5,
        width=width,
        dtype=dtype,
        sharing=sharing,
        num_columns=2 if sharing == "sparse" else 0,
        weights_dtype=torch.float32,
        layouts=tuple((LONGER, "contiguous")[source % 2] for source in range(sources)),
        unread="None",
        grad_layout="rows of a longer sequence",
        norm=norm,
        weights_need=sharing is not None,
        states_need=(states_need,) * sources,
        seed=0,
    )


IGVA = FusionPlan.igva(6, 2)
OVERLAPPING = FusionPlan(5, (Weighted(((0, 1, 2), (2, 3, 4)), plus=5), Mean((1, 2)), Layer(2), Layer(0)))
NORMALISED = FusionPlan(4, (Weighted(((1, 2), (3,)), norm=Norm("layer")), Mean((1, 4), Norm("rms"))))
LAYER_BEHIND = NormBehind("layer", 1e-5, weight=True, bias=True, wide=False, needs=True)
RMS_BEHIND = NormBehind("rms", 1e-5, weight=True, bias=False, wide=True, needs=False)
BF16, F32 = torch.bfloat16, torch.float32

CASES = {
    "frozen, shared weights": case(IGVA, "all", BF16, 1152, states_need=False),
    "frozen, weights per image, odd width": case(IGVA, "image", BF16, 1000, states_need=False),
    "trainable, weights per image": case(IGVA, "image", F32, 1028),
    "trainable, weights per token": case(IGVA, "token", BF16, 1152),
    "sparse, frozen": case(FusionPlan.mixture_of_layers(4), "sparse", BF16, 1000, states_need=False),
    "sparse, trainable": case(FusionPlan.mixture_of_layers(4), "sparse", F32, 516),
    "overlapping groups and a layer beside the sum": case(OVERLAPPING, "image", BF16, 264),
    "norms, trainable": case(NORMALISED, "image", BF16, 1000),
    "norms, weights per token": case(NORMALISED, "token", F32, 1028),
    "no weights": case(FusionPlan.dense_connector_dci(4), None, BF16, 1152),
    "norm behind, trainable": case(IGVA, "image", BF16, 1000, norm=LAYER_BEHIND),
    "norm behind, frozen": case(IGVA, "token", BF16, 1152, states_need=False, norm=RMS_BEHIND),
    "norm behind, sparse": case(FusionPlan.mixture_of_layers(4), "sparse", F32, 516, norm=LAYER_BEHIND),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_small_fuse(case: Case) -> None:
    check_fuse(case, "triton", LIMITS, "cuda")


@pytest.mark.parametrize("name", ("trainable, weights per image", "overlapping groups and a layer beside the sum"))
def test_small_two_steps(name: str) -> None:
    check_two_steps(CASES[name], "triton", LIMITS, "cuda")


@pytest.mark.parametrize("summary", ("cls", "mean_patch"))
def test_small_summaries(summary: str) -> None:
    check_summaries(CASES["trainable, weights per token"], "triton", LIMITS, summary, "cuda")
