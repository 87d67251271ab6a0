"""The permutation that turns Mllama's interleaved columns into blocks and back."""

import pytest
import torch

from igva_kernels import FusionPlan, Layer, fuse
from igva_kernels.modules import columns_to_blocks, columns_to_interleaved


def _published(states, final, indices):
    """modeling_mllama.py: outputs of the blocks, stacked on the last axis, flattened, behind the final state."""
    of_blocks = states[1:]
    interleaved = torch.stack([of_blocks[i] for i in indices], dim=-1)
    return torch.cat([final, interleaved.reshape(*final.shape[:-1], -1)], dim=-1)


def test_the_plan_puts_the_final_state_first_and_counts_the_blocks_from_zero():
    plan = FusionPlan.mllama()
    assert plan.num_layers == 33  # the final state is entry 33, behind the 33 of the local encoder
    assert plan.slots == tuple(Layer(index) for index in (33, 4, 8, 16, 24, 31))


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_blocks_with_the_permuted_linear_equal_the_published_features_with_the_original(impl):
    # Small integers: every sum is exact, in whatever order it is taken.
    states = [torch.randint(-4, 5, (2, 6, 4)).double() for _ in range(33)]
    final = torch.randint(-4, 5, (2, 6, 4)).double()
    weight = torch.randint(-4, 5, (7, 24)).double()
    published = _published(states, final, (3, 7, 15, 23, 30))
    blocks = fuse((*states, final), FusionPlan.mllama(), num_prefix_tokens=0, impl=impl)
    assert torch.equal(blocks @ columns_to_blocks(weight).T, published @ weight.T)
    assert torch.equal(columns_to_interleaved(blocks), published)
    assert torch.equal(columns_to_blocks(published), blocks)


@pytest.mark.parametrize(("num_interleaved", "num_leading_blocks"), [(5, 1), (3, 0), (1, 2), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_both_directions_undo_each_other(num_interleaved, num_leading_blocks, dtype):
    columns = 4 * (num_interleaved + num_leading_blocks)
    weight = torch.arange(2 * columns).reshape(2, columns).to(dtype)
    there = columns_to_blocks(weight, num_interleaved, num_leading_blocks)
    assert there.is_contiguous() and there.dtype == dtype
    assert torch.equal(columns_to_interleaved(there, num_interleaved, num_leading_blocks), weight)
    back = columns_to_interleaved(weight, num_interleaved, num_leading_blocks)
    assert torch.equal(columns_to_blocks(back, num_interleaved, num_leading_blocks), weight)


def test_gradients_pass_both_ways():
    weight = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(3, 12, dtype=torch.float64)
    (grad,) = torch.autograd.grad(columns_to_blocks(weight, 2), weight, cotangent)
    assert torch.equal(grad, columns_to_interleaved(cotangent, 2))


@pytest.mark.parametrize("convert", [columns_to_blocks, columns_to_interleaved])
@pytest.mark.parametrize(
    ("columns", "arguments", "words"),
    [(23, (5, 1), ["23 columns", "1 + 5"]), (24, (0, 1), ["num_interleaved", "0 and 1"]), (24, (5, -1), ["5 and -1"])],
)
def test_errors_name_the_numbers(convert, columns, arguments, words):
    with pytest.raises(ValueError) as error:
        convert(torch.zeros(2, columns), *arguments)
    for word in words:
        assert word in str(error.value)
