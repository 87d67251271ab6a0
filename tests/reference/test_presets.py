"""Every preset against its published formula, written here plainly and without the plan."""

import pytest
import torch
from torch.nn import functional

from igva_kernels import FusionPlan, Layer, Mean, Norm, SparseWeights, Weighted, fuse

IMPLEMENTATIONS = ["reference", "torch", "auto"]


@pytest.fixture
def tower():
    """The hidden states of a tower: L + 1 maps (B, T, D) of two images."""

    def make(num_layers, tokens=5, width=4, dtype=torch.float64):
        return [torch.randn(2, tokens, width, dtype=torch.float64).to(dtype) for _ in range(num_layers + 1)]

    return make


# ---- layers beside each other: copies, equal to the last bit -------------------------------------------------------------


COPIES = {
    # name: plan, published list of entries of the tower's hidden_states, prefix tokens
    "llava": (FusionPlan.llava(24), [-2], 1),
    "layers_int": (FusionPlan.layers(24, -2), [-2], 1),
    "layers_list": (FusionPlan.layers(24, [-2, 3, 3, 0]), [-2, 3, 3, 0], 1),
    "vip_llava": (FusionPlan.vip_llava(24), [-2, -5, -8, -11, 6], 1),
    "granite_vision": (FusionPlan.granite_vision(27), [-24, -20, -12, -1], 0),
    "sci": (FusionPlan.dense_connector_sci(24), [23, 7, 15], 1),
    "sci_of_the_paper": (FusionPlan.dense_connector_sci(24, order="base_last"), [7, 15, 23], 1),
    "sci_four_layers": (FusionPlan.dense_connector_sci(24, layers=(7, 15, 19)), [23, 7, 15, 19], 1),
    "sci_siglip": (FusionPlan.dense_connector_sci(26, base=-1), [26, 7, 15], 0),
    "layer_select_fuse_18": (FusionPlan.layer_select_fuse(24, "18"), [18, 23], 1),
    "layer_select_fuse_3_18": (FusionPlan.layer_select_fuse(24, "3-18"), [3, 18, 23], 1),
    "layer_select_fuse_3_18_23": (FusionPlan.layer_select_fuse(24, "3-18-23"), [3, 18, 23], 1),
    "layer_select_fuse_siglip": (FusionPlan.layer_select_fuse(27, "3-18-23"), [3, 20, 25], 0),
}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", COPIES)
def test_lists_of_layers_are_the_published_concatenation_bit_for_bit(name, impl, tower):
    plan, entries, prefix = COPIES[name]
    states = tower(plan.num_layers, dtype=torch.bfloat16)
    published = torch.cat([states[entry][:, prefix:] for entry in entries], dim=-1)
    assert torch.equal(fuse(states, plan, num_prefix_tokens=prefix, impl=impl), published)


@pytest.mark.parametrize(("num_blocks", "vit_layers", "prefix"), [(23, (-2, -9), 1), (27, (-3, -9), 0), (25, (24, 18), 0)])
def test_molmo_counts_the_outputs_of_the_blocks(num_blocks, vit_layers, prefix, tower):
    states = tower(num_blocks)
    of_blocks = states[1:]  # olmo/image_vit.py appends the output of each block, not the embedding
    published = torch.cat([of_blocks[layer] for layer in vit_layers], dim=-1)[:, prefix:]
    plan = FusionPlan.molmo(num_blocks, vit_layers=vit_layers)
    assert torch.equal(fuse(states, plan, num_prefix_tokens=prefix), published)


def test_molmos_layers_of_clip_and_of_siglip():
    assert FusionPlan.molmo(23).slots == (Layer(22), Layer(15))
    assert FusionPlan.molmo(27, vit_layers=(-3, -9)).slots == (Layer(25), Layer(19))
    assert FusionPlan.molmo(25, vit_layers=(24, 18)).slots == (Layer(25), Layer(19))


def test_granites_layers_of_siglip():
    assert FusionPlan.granite_vision(27).slots == (Layer(4), Layer(8), Layer(16), Layer(27))


# ---- means ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("num_layers", "options", "halves", "base", "prefix"),
    [
        (24, {}, [range(0, 12), range(12, 24)], 23, 1),
        (26, {"base": -1}, [range(0, 13), range(13, 26)], 26, 0),
        (24, {"num_groups": 3}, [range(0, 8), range(8, 16), range(16, 24)], 23, 1),
    ],
    ids=["clip", "siglip_without_its_last_block", "three_groups"],
)
def test_dense_channel_integration(num_layers, options, halves, base, prefix, impl, tower):
    states = tower(num_layers)
    means = [torch.sum(torch.stack([states[i][:, prefix:] for i in half]), dim=0) / len(half) for half in halves]
    code = torch.cat([states[base][:, prefix:], *means], dim=-1)
    paper = torch.cat([*means, states[base][:, prefix:]], dim=-1)
    plan = FusionPlan.dense_connector_dci(num_layers, **options)
    torch.testing.assert_close(fuse(states, plan, num_prefix_tokens=prefix, impl=impl), code, rtol=1e-13, atol=1e-13)
    plan = FusionPlan.dense_connector_dci(num_layers, order="base_last", **options)
    torch.testing.assert_close(fuse(states, plan, num_prefix_tokens=prefix, impl=impl), paper, rtol=1e-13, atol=1e-13)


def test_dense_channel_integration_takes_groups_by_name():
    plan = FusionPlan.dense_connector_dci(27, groups=[range(0, 13), range(13, 27)])
    assert plan.slots == (Layer(26), Mean(tuple(range(13))), Mean(tuple(range(13, 27))))


@pytest.mark.parametrize(
    ("num_layers", "strategy", "selected", "prefix"),
    [
        (24, "former", [*range(1, 13), 23], 1),
        (24, "latter", [*range(13, 25), 23], 1),
        (24, "all", [*range(1, 25), 23], 1),
        (27, "latter", [*range(15, 27), 25], 0),
    ],
)
def test_layer_select_fuse_divides_by_twelve_and_puts_the_base_last(num_layers, strategy, selected, prefix, tower):
    states = tower(num_layers)
    features = [states[layer][:, prefix:] for layer in selected]
    means = [torch.sum(torch.stack(features[i : i + 12]), dim=0) / 12 for i in range(0, len(features) - 1, 12)]
    published = torch.cat([*means, features[-1]], dim=-1)
    plan = FusionPlan.layer_select_fuse(num_layers, strategy)
    torch.testing.assert_close(fuse(states, plan, num_prefix_tokens=prefix), published, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("layers", [None, (12, 14, 16, 18, 20, 22, 24), range(2, 25)], ids=["all", "k7", "k23"])
def test_mean_of_normalised_layers(layers, impl, tower):
    states = tower(24, tokens=9)
    norm = torch.nn.LayerNorm(4, elementwise_affine=False, dtype=torch.float64)  # RAEv2 strips the parameters
    chosen = range(1, 25) if layers is None else layers
    published = torch.stack([norm(states[i])[:, 5:] for i in chosen], dim=0).mean(dim=0)
    plan = FusionPlan.mean_of_normalised_layers(24, layers=layers)
    torch.testing.assert_close(fuse(states, plan, num_prefix_tokens=5, impl=impl), published, rtol=1e-12, atol=1e-12)
    rms = torch.stack([h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt() for h in (states[i][:, 5:] for i in chosen)])
    plan = FusionPlan.mean_of_normalised_layers(24, layers=layers, norm=Norm("rms", eps=1e-6))
    torch.testing.assert_close(fuse(states, plan, num_prefix_tokens=5, impl=impl), rms.mean(0), rtol=1e-12, atol=1e-12)


def test_a_scale_and_shift_that_all_layers_share_may_be_applied_to_the_mean(tower):
    states = tower(8)
    scale, shift = torch.randn(2, 4, dtype=torch.float64).unbind(0)
    published = torch.stack([functional.layer_norm(h, (4,), scale, shift, 1e-6) for h in states[1:]]).mean(0)
    plan = FusionPlan.mean_of_normalised_layers(8, norm=Norm("layer", eps=1e-6))
    torch.testing.assert_close(fuse(states, plan, num_prefix_tokens=0) * scale + shift, published)


# ---- weighted sums: weights shared, per image, per token; every gradient -------------------------------------------------


def _igva(states, w):
    groups = [torch.stack(states[1 + 6 * k : 7 + 6 * k]).mean(0) for k in range(4)]
    return torch.cat([sum(w[..., k, None] * groups[k] for k in range(4)), states[23]], dim=-1)


def _scalar_mix(states, w):
    return sum(w[..., k, None] * state for k, state in enumerate(states))


def _s3prl_normalised(states, w):
    return _scalar_mix([functional.layer_norm(state, (state.shape[-1],)) for state in states], w)


def _tgif(states, w):
    return states[-2] + sum(w[..., k, None] * state for k, state in enumerate(states[1:]))


def _mixture_of_layers(states, w):
    return sum(w[..., k, None] * state for k, state in enumerate(states[1:]))


WEIGHTED = {
    "igva": (FusionPlan.igva(24), _igva),
    "scalar_mix": (FusionPlan.scalar_mix(24), _scalar_mix),
    "scalar_mix_normalised": (FusionPlan.scalar_mix(24, norm=Norm("layer")), _s3prl_normalised),
    "tgif": (FusionPlan.tgif(24), _tgif),
    "mixture_of_layers": (FusionPlan.mixture_of_layers(24), _mixture_of_layers),
}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", ["shared", "per_image", "per_token"])
@pytest.mark.parametrize("name", WEIGHTED)
def test_weighted_presets_and_all_their_gradients(name, shape, impl, tower):
    plan, formula = WEIGHTED[name]
    states = [state.requires_grad_() for state in tower(24)]
    leading = {"shared": (), "per_image": (2,), "per_token": (2, 4)}[shape]
    weights = torch.randn(*leading, plan.num_groups, dtype=torch.float64, requires_grad=True)
    expanded = weights[:, None] if shape == "per_image" else weights
    out = fuse(states, plan, weights, num_prefix_tokens=1, impl=impl)
    published = formula([state[:, 1:] for state in states], expanded)
    torch.testing.assert_close(out, published, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(published)
    leaves = [weights, *states]
    actual = torch.autograd.grad(out, leaves, cotangent, allow_unused=True)
    expected = torch.autograd.grad(published, leaves, cotangent, allow_unused=True)
    for got, want in zip(actual, expected, strict=True):
        assert (got is None) == (want is None)  # h_0, where the method does not read it
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_mixture_of_layers_takes_top_k_and_the_reserve_layer_as_sparse_weights(impl, tower):
    plan = FusionPlan.mixture_of_layers(24)
    states = [state.requires_grad_() for state in tower(24)]
    values, columns = torch.randn(2, 4, 24, dtype=torch.float64).softmax(-1).topk(3)
    values = (values / values.sum(-1, keepdim=True)).detach().requires_grad_()
    gate = torch.rand(2, 4, 1, dtype=torch.float64, requires_grad=True)
    reserve = torch.full((2, 4, 1), 22)  # h_23; a token whose top-k names it too gets both shares
    weights = SparseWeights(torch.cat([(1 - gate) * values, gate], -1), torch.cat([columns, reserve], -1))
    out = fuse(states, plan, weights, num_prefix_tokens=1, impl=impl)
    patches = torch.stack([state[:, 1:] for state in states[1:]], dim=2)  # (B, N, L, D)
    chosen = patches.gather(2, columns[..., None].expand(-1, -1, -1, 4))
    published = (1 - gate) * (values[..., None] * chosen).sum(2) + gate * states[23][:, 1:]
    torch.testing.assert_close(out, published, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(published)
    leaves = [values, gate, *states[1:]]
    actual = torch.autograd.grad(out, leaves, cotangent)
    expected = torch.autograd.grad(published, leaves, cotangent)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_columns_follow_the_order_in_which_the_layers_are_named():
    assert FusionPlan.scalar_mix(4).slots == (Weighted(((0,), (1,), (2,), (3,), (4,))),)
    assert FusionPlan.scalar_mix(4, layers=(3, -1, 0)).groups == ((3,), (4,), (0,))
    assert FusionPlan.mixture_of_layers(4, layers=(2, 4)).groups == ((2,), (4,))
    assert FusionPlan.tgif(3, base=1).slots == (Weighted(((1,), (2,), (3,)), plus=1),)


# ---- errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FusionPlan.layers(24, [-2, 30]), ["slot 1", "layer 30", "24 layers"]),
        (lambda: FusionPlan.layers(24, []), ["slots is empty"]),
        (lambda: FusionPlan.vip_llava(5), ["slot 2", "layer -8", "5 layers"]),
        (lambda: FusionPlan.dense_connector_sci(24, order="fused_first"), ["order", "base_last", "'fused_first'"]),
        (lambda: FusionPlan.dense_connector_dci(27), ["num_groups=2", "27 layers", "groups="]),
        (lambda: FusionPlan.layer_select_fuse(24, "18-23"), ["strategy", "'18-23'", "'3-18'"]),
        (lambda: FusionPlan.layer_select_fuse(27, "former"), ["'former'", "27 layers", "[24]"]),
        (lambda: FusionPlan.layer_select_fuse(12, "latter"), ["12 layers", "[24, 27]", "FusionPlan("]),
        (lambda: FusionPlan.mllama(8), ["block 15", "8 blocks", "from 0 to 7"]),
        (lambda: FusionPlan.mllama(32, intermediate_layers=(-1,)), ["block -1"]),
        (lambda: FusionPlan.scalar_mix(4, layers=()), ["at least one group"]),
    ],
)
def test_errors_say_what_was_got_and_what_helps(make, words):
    with pytest.raises(ValueError) as error:
        make()
    for word in words:
        assert word in str(error.value)
