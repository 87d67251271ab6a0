"""ScalarMix, TGIF and RAEv2's sum: the official formulas written plainly, the official parameter names."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from igva_kernels import FusionPlan, Norm, OutputNorm, fuse
from igva_kernels.modules import (
    MultiLayerSum,
    ScalarMix,
    TGIFFusion,
    VipLlavaFusion,
    convert_allennlp_scalar_mix,
    output_norm_of,
)


@pytest.fixture
def states():
    return [torch.randn(2, 5, 8, dtype=torch.float64) for _ in range(7)]


def test_scalar_mix_starts_as_the_plain_mean(states):
    mix = ScalarMix(FusionPlan.scalar_mix(6)).double()
    torch.testing.assert_close(mix(states, num_prefix_tokens=1), torch.stack(states)[:, :, 1:].mean(0))


def test_allennlps_scalar_mix_with_its_state_dict_and_gradients(states):
    official = {f"scalar_parameters.{k}": torch.randn(1, dtype=torch.float64) for k in range(7)}
    official["gamma"] = torch.tensor([0.7], dtype=torch.float64)
    mix = ScalarMix(FusionPlan.scalar_mix(6)).double()
    mix.load_state_dict(convert_allennlp_scalar_mix(official))
    parameters = {name: value.clone().requires_grad_() for name, value in official.items()}
    normed = functional.softmax(torch.cat([parameters[f"scalar_parameters.{k}"] for k in range(7)]), dim=0).split(1)
    published = parameters["gamma"] * sum(w * t[:, 1:] for w, t in zip(normed, states, strict=True))
    out = mix(states, num_prefix_tokens=1)
    torch.testing.assert_close(out, published)
    cotangent = torch.randn_like(out)
    out.backward(cotangent)
    published.backward(cotangent)
    expected = convert_allennlp_scalar_mix({name: value.grad for name, value in parameters.items()})
    torch.testing.assert_close(mix.weights.grad, expected["weights"])
    torch.testing.assert_close(mix.scale.grad, expected["scale"])


@pytest.mark.parametrize("normalize", [False, True])
def test_s3prls_featurizer_loads_unchanged(normalize, states):
    weights = torch.randn(7, dtype=torch.float64)
    stacked = torch.stack(states, dim=0)
    if normalize:
        stacked = functional.layer_norm(stacked, (stacked.shape[-1],))
    published = (functional.softmax(weights, dim=-1).unsqueeze(-1) * stacked.view(7, -1)).sum(0).view(2, 5, 8)
    mix = ScalarMix(FusionPlan.scalar_mix(6, norm=Norm("layer") if normalize else None), scale=False).double()
    assert mix.load_state_dict({"weights": weights}) and mix.scale is None
    torch.testing.assert_close(mix(states, num_prefix_tokens=0), published)


@pytest.mark.parametrize("names", [["weights"], ["gamma"], ["scalar_parameters.0", "scalar_parameters.2", "gamma"], []])
def test_other_state_dicts_are_refused(names):
    with pytest.raises(ValueError, match=r"scalar_parameters\.0, scalar_parameters\.1"):
        convert_allennlp_scalar_mix({name: torch.zeros(1) for name in names})


class OfficialLayerSelector(nn.Module):
    """The formula of Linchenchen/TGIF, layer_selection.py, over stacked features (B, L, N, D)."""

    def __init__(self, num_layers, text_dim, vision_dim):
        super().__init__()
        self.layer_weights_projection = nn.Sequential(nn.Linear(text_dim, 512), nn.ReLU(), nn.Linear(512, num_layers))
        self.norm = nn.LayerNorm(vision_dim)

    def forward(self, features, text):
        weights = functional.softmax(self.layer_weights_projection(text), dim=-1)
        mixed = torch.einsum("bl,blnd->bnd", weights, features)
        return self.norm(features[:, -2] + mixed), weights


def test_tgif_with_the_official_state_dict_and_gradients(states):
    official = OfficialLayerSelector(6, 10, 8).double()
    nn.init.normal_(official.norm.weight)
    nn.init.normal_(official.norm.bias)
    fusion = TGIFFusion(FusionPlan.tgif(6), vision_dim=8, text_dim=10).double()
    fusion.load_state_dict(official.state_dict())
    text = torch.randn(2, 10, dtype=torch.float64)
    leaves = [state.requires_grad_() for state in states]
    published, weights = official(torch.stack([state[:, 1:] for state in leaves[1:]], dim=1), text)
    out = fusion(states, text, num_prefix_tokens=1)
    torch.testing.assert_close(out.fused, published, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.weights, weights, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(published)
    want = torch.autograd.grad(published, [*official.parameters(), *leaves[1:]], cotangent)
    got = torch.autograd.grad(out.fused, [*fusion.parameters(), *leaves[1:]], cotangent)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_tgif_for_a_7b_model_has_the_official_sizes():
    fusion = TGIFFusion(FusionPlan.tgif(24))
    shapes = {name: tuple(value.shape) for name, value in fusion.state_dict().items()}
    assert shapes == {
        "layer_weights_projection.0.weight": (512, 4096),
        "layer_weights_projection.0.bias": (512,),
        "layer_weights_projection.2.weight": (24, 512),
        "layer_weights_projection.2.bias": (24,),
        "norm.weight": (1024,),
        "norm.bias": (1024,),
    }


def test_multi_layer_sum_adds_the_mean_patch_of_the_last_layer():
    states = [torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True) for _ in range(25)]
    norm = nn.LayerNorm(8, elementwise_affine=False, dtype=torch.float64)
    outputs = [norm(states[block + 1])[:, 5:] for block in (11, 13, 15, 17, 19, 21, 23)]  # DINOv3: CLS and four registers
    published = torch.stack(outputs, dim=0).mean(dim=0) + outputs[-1].mean(dim=1, keepdim=True)
    plan = FusionPlan.mean_of_normalised_layers(24, layers=range(12, 25, 2))
    out = MultiLayerSum(plan)(states, num_prefix_tokens=5)
    torch.testing.assert_close(out, published, rtol=1e-12, atol=1e-12)
    cotangent, leaves = torch.randn_like(published), states[12::2]
    got, want = (torch.autograd.grad(result, leaves, cotangent) for result in (out, published))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_vip_llavas_norm_runs_over_all_slots(states):
    plan = FusionPlan.layers(6, (-2, -5, 3))
    fusion = VipLlavaFusion(plan, 8, eps=1e-3).double()
    nn.init.normal_(fusion.projector_layernorm.weight)
    features = torch.cat([states[i][:, 1:] for i in (5, 2, 3)], dim=-1)
    norm = fusion.projector_layernorm
    published = functional.layer_norm(features, (24,), norm.weight, norm.bias, 1e-3)
    torch.testing.assert_close(fusion(states, num_prefix_tokens=1), published)


def test_weights_of_a_module_in_bfloat16_are_computed_in_float32(states):
    narrow = [state.bfloat16() for state in states]
    mix = ScalarMix(FusionPlan.scalar_mix(6)).bfloat16()
    assert mix.mixing_weights().dtype == torch.float32
    assert mix(narrow, num_prefix_tokens=1).dtype == torch.bfloat16
    fusion = TGIFFusion(FusionPlan.tgif(6), vision_dim=8, text_dim=10).bfloat16()
    out = fusion(narrow, torch.randn(2, 10), num_prefix_tokens=1)
    assert out.weights.dtype == torch.float32 and out.fused.dtype == torch.bfloat16
    torch.testing.assert_close(out.weights.sum(-1), torch.ones(2))
    mixed = fuse([state.float() for state in narrow], fusion.plan, out.weights, num_prefix_tokens=1)
    expected = fusion.float().norm(mixed)  # the sum is not rounded before the norm
    torch.testing.assert_close(out.fused, expected.bfloat16(), rtol=2**-7, atol=0)


MODULES = {
    "scalar_mix": (lambda: ScalarMix(FusionPlan.scalar_mix(6)), False),
    "tgif": (lambda: TGIFFusion(FusionPlan.tgif(6), vision_dim=8, text_dim=10), True),
    "vip_llava": (lambda: VipLlavaFusion(FusionPlan.layers(6, (-2, 3)), 8), False),
    "multi_layer_sum": (lambda: MultiLayerSum(FusionPlan.mean_of_normalised_layers(6)), False),
}


@pytest.mark.parametrize("name", MODULES)
def test_compiled_in_one_graph_equals_eager(name, states):
    make, takes_text = MODULES[name]
    module = make().double()
    arguments = (torch.randn(2, 10, dtype=torch.float64),) if takes_text else ()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    eager, out = (run(states, *arguments, num_prefix_tokens=1) for run in (module, compiled))
    eager, out = (result if isinstance(result, torch.Tensor) else result.fused for result in (eager, out))
    torch.testing.assert_close(out, eager, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ScalarMix(FusionPlan.llava(6)), "no weighted groups.*scalar_mix"),
        (lambda: TGIFFusion(FusionPlan.llava(6)), "no weighted groups.*tgif"),
        (lambda: MultiLayerSum(FusionPlan.igva_average(6, 2)), "mean_of_normalised_layers"),
        (lambda: TGIFFusion(FusionPlan.tgif(6), 8, 10)([None] * 7, torch.zeros(2, 9), num_prefix_tokens=1), r"\(2, 9\).*10"),
    ],
)
def test_errors_say_what_helps(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# ---- norms behind a mix -------------------------------------------------------------------------------------------------


@pytest.fixture
def vip_llava():
    return VipLlavaFusion(FusionPlan.layers(6, (-2, -3, 1)), vision_dim=8).double()


def run_of(module, states):
    out = module(states, num_prefix_tokens=1)
    return out, torch.autograd.grad(out.square().sum(), list(module.parameters()))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # the tower is frozen: its maps have no gradient
@pytest.mark.parametrize("how", ["forward hook", "forward pre-hook", "backward hook", "another class"])
def test_a_norm_that_somebody_waits_for_is_called(how, vip_llava, states):
    """ZeRO-3 gathers parameters in such hooks, adapters wrap the module; the numbers are the same."""
    expected, expected_grads = run_of(vip_llava, states)
    norm, calls = vip_llava.projector_layernorm, []
    if how == "forward hook":
        norm.register_forward_hook(lambda *_: calls.append(how))
    elif how == "forward pre-hook":
        norm.register_forward_pre_hook(lambda *_: calls.append(how))
    elif how == "backward hook":
        norm.register_full_backward_hook(lambda *_: calls.append(how))
    else:

        class Counted(nn.LayerNorm):
            def forward(self, rows):
                calls.append(how)
                return super().forward(rows)

        norm.__class__ = Counted
    assert output_norm_of(norm) is None
    out, grads = run_of(vip_llava, states)
    assert calls
    torch.testing.assert_close(out, expected)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, wanted)


def test_the_norms_of_torch_are_fused():
    layer, rms = nn.LayerNorm(6, eps=1e-6, bias=False), nn.RMSNorm(6, eps=1e-4)
    assert output_norm_of(layer) == OutputNorm(layer.weight, None, 1e-6, "layer")
    assert output_norm_of(rms) == OutputNorm(rms.weight, None, 1e-4, "rms")
    assert output_norm_of(nn.LayerNorm(6, elementwise_affine=False)) == OutputNorm()
    for other in (nn.Identity(), nn.RMSNorm(6), nn.LayerNorm((2, 3))):
        assert output_norm_of(other) is None


def test_shards_are_not_taken():
    norm = nn.LayerNorm(6)
    norm.weight = nn.Parameter(norm.weight.detach()[:3])  # as FSDP leaves it outside of its forward
    assert output_norm_of(norm) is None


@pytest.mark.parametrize("strict", [False, True])
def test_exported_it_is_one_operator(strict, vip_llava, states):
    class Fusion(nn.Module):
        def __init__(self):
            super().__init__()
            self.fusion = vip_llava

        def forward(self, hidden_states):
            return self.fusion(hidden_states, num_prefix_tokens=1)

    exported = torch.export.export(Fusion(), (states,), strict=strict)
    targets = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert targets[0] is torch.ops.igva.fuse_normalised.default and torch.ops.aten.layer_norm.default not in targets
    assert torch.equal(exported.module()(states), vip_llava(states, num_prefix_tokens=1))


def test_state_dicts_have_the_published_names(vip_llava):
    assert list(vip_llava.state_dict()) == ["projector_layernorm.weight", "projector_layernorm.bias"]
    names = list(TGIFFusion(FusionPlan.tgif(6), vision_dim=8, text_dim=10).state_dict())
    assert names[-2:] == ["norm.weight", "norm.bias"] and len(names) == 6


def test_a_width_that_the_norm_does_not_have(vip_llava):
    with pytest.raises(ValueError, match=r"output_norm\.weight has the shape \(24,\), expected \(S\*D,\) = \(30,\)"):
        vip_llava([torch.randn(2, 5, 10, dtype=torch.float64)] * 7, num_prefix_tokens=1)
