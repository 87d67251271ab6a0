"""The compiled forward against float64, against plain torch bit for bit, and at the edges of shapes and values."""

import pytest
import torch

from igva_kernels import FusionPlan, Mean
from igva_kernels.impl import cpu, native, reference

pytestmark = pytest.mark.usefixtures("_built")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = ["shared", "per_image", "per_token"]


def forward(module, case, **options):
    return module.fuse_forward(case.states, case.weights, case.plan.program, case.num_prefix_tokens, True, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_mix_and_means_are_as_exact_as_torch(plan, dtype, shape, make_case, in_dtype, assert_as_exact_as):
    case = make_case(plan, dtype, shape=shape)
    out, means = forward(native, case)
    if case.weights is None:
        exact, exact_means = reference.fuse_forward(case.to(torch.float64).states, None, plan.program, 1, False)[0], None
    else:
        exact, exact_means = forward(reference, case.to(torch.float64))
    assert out.dtype == means.dtype == dtype
    assert out.is_contiguous()
    # One rounding at the store.
    assert_as_exact_as(out, in_dtype(case), exact, slack=0.5)
    if exact_means is not None:
        patches = [state[:, 1:] for state in case.states]
        groups = plan.program.groups[: len(means)]
        own = torch.stack([torch.stack([patches[source] for source in group]).mean(0) for group in groups])
        assert_as_exact_as(means, own, exact_means, slack=0.5, what="means")


@pytest.mark.usefixtures("either_build")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bits_are_those_of_plain_torch_on_every_processor(plan, dtype, shape, make_case):
    case = make_case(plan, dtype, width=43, shape=shape)
    for actual, expected in zip(forward(native, case), forward(cpu, case), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("width", [1, 3, 15, 16, 17, 31, 33, 100, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_width(width, dtype, make_case):
    case = make_case(FusionPlan.igva(12, 4), dtype, tokens=4, width=width)
    assert torch.equal(forward(native, case)[0], forward(cpu, case)[0])


@pytest.mark.parametrize(("batch", "tokens", "prefix"), [(0, 5, 1), (1, 2, 1), (1, 1, 0), (2, 130, 5), (5, 3, 2)])
def test_any_number_of_images_and_tokens(batch, tokens, prefix, make_case):
    case = make_case(FusionPlan.igva(4, 2), batch=batch, tokens=tokens, prefix=prefix)
    out, means = forward(native, case)
    assert out.shape == (batch, tokens - prefix, 80)
    assert means.shape == (2, batch, tokens - prefix, 40)
    assert torch.equal(out, forward(cpu, case)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_states(plan, dtype, make_case):
    case = make_case(plan, dtype)
    expected = forward(native, case)
    views = []
    for number, state in enumerate(case.states):
        if number % 4 == 0:  # a larger tensor's middle: larger strides of images and rows
            larger = torch.full((state.shape[0], state.shape[1] + 2, state.shape[2] + 3), float("nan"), dtype=dtype)
            view = larger[:, 1:-1, 2:-1]
        elif number % 4 == 1:  # images inside of tokens
            view = torch.empty(state.shape[1], state.shape[0], state.shape[2], dtype=dtype).transpose(0, 1)
        elif number % 4 == 2:  # every second image
            view = torch.full((2 * state.shape[0], *state.shape[1:]), float("nan"), dtype=dtype)[::2]
        else:
            view = torch.empty_like(state)
        views.append(view.copy_(state))
    assert all(torch.equal(a, b) for a, b in zip(forward(native, case._replace(states=views)), expected, strict=True))


def test_states_that_share_memory_across_images(make_case):
    case = make_case(FusionPlan.igva(4, 2))
    case = case._replace(states=[state[:1].expand_as(state) for state in case.states])
    assert torch.equal(forward(native, case)[0], forward(cpu, case)[0])


@pytest.mark.parametrize("threads", [2, 3])
def test_the_same_bits_on_any_number_of_threads(threads, plan, make_case, many_threads):
    case = make_case(plan, torch.bfloat16, tokens=60)
    many_threads(1)
    alone = forward(native, case)
    many_threads(threads)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(forward(native, case), alone, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_element_of_the_outputs_is_written(plan, dtype, make_case, monkeypatch):
    case = make_case(plan, dtype, tokens=9, width=37)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        out, means = forward(native, case)
        reduced = native.reduce_forward(case.states, plan.program, 1)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(tensor.isfinite().all() for tensor in (out, means, reduced))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_stay_where_they_are(value, make_case):
    case = make_case(FusionPlan.igva(4, 2), tokens=8)
    expected, _ = forward(native, case)
    for state in case.states:
        state[:, 0] = value  # the prefix is not read
    case.states[1][1, 3, 7] = value
    out, _ = forward(native, case)
    assert not out[1, 2, 7].isfinite()
    out[1, 2, 7] = expected[1, 2, 7]
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reduction_in_the_states_dtype_and_wide(plan, dtype, make_case):
    case = make_case(plan, dtype)
    for out_dtype in (None, torch.float32):
        actual = native.reduce_forward(case.states, plan.program, 1, dtype=out_dtype)
        expected = cpu.reduce_forward(case.states, plan.program, 1, dtype=out_dtype)
        assert actual.dtype == (out_dtype or dtype)
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixing_wide_means_beside_narrow_copies(plan, dtype, make_case):
    case = make_case(plan, dtype)
    program = plan.program
    means = native.reduce_forward(case.states, program, 1, dtype=torch.float32)
    copies = [case.states[source][:, 1:] for source in program.copied_sources]
    out, _ = native.fuse_forward([*means, *copies], case.weights, plan.mix_program, 0, False, dtype=dtype)
    assert out.dtype == dtype
    assert torch.equal(out, forward(native, case)[0])


# ---- conversions --------------------------------------------------------------------------------------------------------

ONE_LAYER = FusionPlan(1, (Mean((1,)),)).program


@pytest.mark.usefixtures("either_build")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_16_bit_values_are_widened_exactly_and_come_back(dtype):
    values = torch.arange(1 << 16).to(torch.uint16).view(dtype).reshape(1, 64, 1024)
    wide = native.reduce_forward([values], ONE_LAYER, 0, dtype=torch.float32)[0]
    assert torch.equal(wide.view(torch.int32)[~values.isnan()], values.float().view(torch.int32)[~values.isnan()])
    assert torch.equal(wide.isnan(), values.isnan())
    back, _ = native.fuse_forward([values], None, ONE_LAYER, 0, False)
    assert torch.equal(back.view(torch.int16)[~values.isnan()], values.view(torch.int16)[~values.isnan()])
    assert torch.equal(back.isnan(), values.isnan())


@pytest.mark.usefixtures("either_build")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_nearest_ties_to_even(dtype):
    """All exponents and signs with all patterns of the bits that decide, against torch's own conversion."""
    dropped = 16 if dtype == torch.bfloat16 else 13
    tails = [0, 1, (1 << dropped - 1) - 1, 1 << dropped - 1, (1 << dropped - 1) + 1, (1 << dropped) - 1]
    upper = torch.arange(1 << 16, dtype=torch.int64) << 16
    extra = torch.randint(0, 1 << 16 - dropped, (1 << 16,)) << dropped if dropped < 16 else torch.zeros(1 << 16).long()
    bits = torch.stack([(upper | extra | tail) for tail in tails])
    values = (bits - ((bits >> 31) << 32)).to(torch.int32).view(torch.float32).reshape(1, -1, 1024)
    actual, _ = native.fuse_forward([values], None, ONE_LAYER, 0, False, dtype=dtype)
    expected = values.to(dtype)
    assert torch.equal(actual.isnan(), values.isnan())
    number = ~values.isnan()
    assert torch.equal(actual.view(torch.int16)[number], expected.view(torch.int16)[number])
    quiet = 0x0040 if dtype == torch.bfloat16 else 0x0200
    assert (actual.view(torch.int16)[~number] & quiet != 0).all()


def test_copies_keep_every_bit():
    plan = FusionPlan.llava(1, layer=1)
    for dtype in (torch.bfloat16, torch.float16):
        values = torch.arange(1 << 16).to(torch.uint16).view(dtype).reshape(1, 64, 1024)
        out, _ = native.fuse_forward([values], None, plan.program, 0, False)
        assert torch.equal(out.view(torch.int16), values.view(torch.int16))
