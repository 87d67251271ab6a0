"""DenseConnector STI and the efficient variant's token reduction, against torch's pooling and interpolation written plainly."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from igva_kernels.modules import SparseTokenIntegration, reduce_tokens


def published(states, base, layers, prefix):
    """dense_connector_sti, with its permutes."""
    pool = nn.AvgPool1d(kernel_size=8, stride=8)
    pooled = [pool(states[layer][:, prefix:].permute(0, 2, 1)).permute(0, 2, 1) for layer in layers]
    return torch.cat([states[base][:, prefix:], *pooled], dim=-2)


def make_states(tokens, width=6, layers=24, dtype=torch.float64):
    return [torch.randn(2, tokens, width, dtype=torch.float64).to(dtype) for _ in range(layers + 1)]


@pytest.mark.parametrize(("tokens", "layers", "base", "prefix", "out"), [(577, 24, -2, 1, 720), (729, 26, -1, 0, 911)])
def test_sti_is_the_published_one_for_both_towers(tokens, layers, base, prefix, out):
    states = make_states(tokens, layers=layers)
    module = SparseTokenIntegration(layers, base=base)
    result = module(states, num_prefix_tokens=prefix)
    assert result.shape == (2, out, 6) and module.num_tokens(tokens - prefix) == out
    assert result.is_contiguous()
    torch.testing.assert_close(result, published(states, base, (7, 15), prefix), rtol=1e-14, atol=1e-14)


def test_sti_gives_the_published_gradients():
    ours = [state.requires_grad_() for state in make_states(1 + 21)]
    theirs = [state.detach().clone().requires_grad_() for state in ours]
    result = SparseTokenIntegration()(ours, num_prefix_tokens=1)
    expected = published(theirs, -2, (7, 15), 1)
    torch.testing.assert_close(result, expected)
    cotangent = torch.randn_like(result)
    result.backward(cotangent)
    expected.backward(cotangent)
    for layer, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert (mine.grad is None) == (layer not in (7, 15, 23))
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad)


def test_a_graph_and_a_finished_output_give_the_same_bits():
    states = make_states(1 + 40, dtype=torch.float32)
    without = SparseTokenIntegration()(states, num_prefix_tokens=1)
    states[7].requires_grad_()
    assert torch.equal(SparseTokenIntegration()(states, num_prefix_tokens=1), without)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sti_in_low_precision_is_as_exact_as_the_published_one(dtype, assert_as_exact_as):
    states = make_states(1 + 64, width=16, dtype=dtype)
    exact = published([state.double() for state in states], -2, (7, 15), 1)
    assert_as_exact_as(
        SparseTokenIntegration()(states, num_prefix_tokens=1), published(states, -2, (7, 15), 1), exact, slack=0.5
    )


def test_layers_that_sti_does_not_read_may_be_none():
    states = make_states(1 + 16)
    kept = [state if layer in (2, 23) else None for layer, state in enumerate(states)]
    module = SparseTokenIntegration(layers=(2,), strip=4)
    torch.testing.assert_close(module(kept, num_prefix_tokens=1)[:, 16:], states[2][:, 1:].unflatten(1, (4, 4)).mean(2))


@pytest.mark.parametrize(
    ("options", "text"), [({"layers": ()}, "layers is empty"), ({"strip": 0}, "strip must be"), ({"base": 25}, "layer 25")]
)
def test_wrong_options_of_sti_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        SparseTokenIntegration(**options)


def test_too_few_patches_for_a_strip_are_refused():
    with pytest.raises(ValueError, match="no strip of 8 tokens"):
        SparseTokenIntegration()(make_states(1 + 7), num_prefix_tokens=1)


@pytest.mark.parametrize(("grid", "size"), [((24, 24), (12, 12)), ((5, 7), (3, 4)), ((4, 6), (4, 6)), ((3, 3), (5, 5))])
def test_reduced_tokens_are_torchs_bilinear_ones(grid, size):
    tokens = torch.randn(2, grid[0] * grid[1], 5, dtype=torch.float64, requires_grad=True)
    image = tokens.detach().transpose(1, 2).reshape(2, 5, *grid).requires_grad_()
    expected = functional.interpolate(image, size=size, mode="bilinear", align_corners=False)
    result = reduce_tokens(tokens, grid, size)
    torch.testing.assert_close(result, expected.flatten(2).transpose(1, 2), rtol=1e-13, atol=1e-14)
    cotangent = torch.randn_like(result)
    result.backward(cotangent)
    expected.backward(cotangent.transpose(1, 2).reshape(2, 5, *size))
    torch.testing.assert_close(tokens.grad, image.grad.flatten(2).transpose(1, 2), rtol=1e-13, atol=1e-14)


def test_half_the_size_is_the_mean_of_four_tokens():
    tokens = torch.randn(1, 16, 3, dtype=torch.float64)
    expected = functional.avg_pool2d(tokens.transpose(1, 2).reshape(1, 3, 4, 4), 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(reduce_tokens(tokens, (4, 4), (2, 2)), expected)


def test_a_grid_that_is_none_of_the_tokens_is_refused():
    with pytest.raises(ValueError, match="N = 4 x 4"):
        reduce_tokens(torch.zeros(1, 15, 3), (4, 4), (2, 2))
    with pytest.raises(ValueError, match="size must be"):
        reduce_tokens(torch.zeros(1, 16, 3), (4, 4), (0, 2))
